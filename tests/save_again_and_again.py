"""Saves distilled demonstrations into a folder over and over: `save_again_and_again.py FOLDER KILLS`.

Every one of KILLS children saves, one number in all its places after the other, until it is killed at some moment;
after each, the parent loads what is there and prints the numbers of its record and of its tensors.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mend_hf import DistilledDemonstrations
from mend_hf.prefix import EmbeddingPrefix
from mend_hf.provenance import ChunkRecord, Provenance


def make(number: int) -> DistilledDemonstrations:
    """Return demonstrations that say the number in their vectors and in their record."""
    chunk = ChunkRecord(demonstrations=[str(number)], num_tokens=number, num_lost_tokens=0)
    provenance = Provenance(
        base_model_name_or_path=None, base_model_fingerprint={}, distiller_name_or_path=None, distiller_hash=None,
        prompt_format={}, chunks=[[chunk]],
    )  # fmt: skip
    vectors = torch.full((1, 3, 4), float(number))
    return DistilledDemonstrations(EmbeddingPrefix(vectors, torch.ones(1, 3, dtype=torch.bool)), provenance)


def main(folder: Path, num_kills: int) -> None:
    """Kill, look, and again."""
    rng = random.Random(0)
    make(0).save_pretrained(folder)
    for kill in range(num_kills):
        child = os.fork()
        if not child:
            for number in range(1_000_000):
                make(1000 * kill + number % 1000).save_pretrained(folder)
        if kill % 10 == 0:  # on a busy machine children may not come to save before they are killed: let some
            wait_for_a_save(folder, latest_time=time.monotonic() + 30)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = DistilledDemonstrations.from_pretrained(folder)
        numbers = (found.provenance.num_tokens[0], int(found.vectors[0, 0, 0]), int(found.vectors[0, 2, 3]))
        sys.stdout.write(f"{' '.join(map(str, numbers))}\n")


def wait_for_a_save(folder: Path, latest_time: float) -> None:
    """Return when the folder holds another number than now."""
    before = DistilledDemonstrations.from_pretrained(folder).provenance.num_tokens
    while time.monotonic() < latest_time:
        if DistilledDemonstrations.from_pretrained(folder).provenance.num_tokens != before:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
