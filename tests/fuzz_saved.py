"""Feeds damaged files to the loaders, guided by coverage: every input loads or is refused with one of our errors.

    python tests/fuzz_saved.py [-runs=10000] [other options of libFuzzer]

Needs atheris, which has wheels for Linux only. The first byte of an input says which of the two files it is.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mend_hf", "safetensors"]):
    import torch

    from mend_hf.artifact import DistilledDemonstrations
    from mend_hf.errors import MendError
    from mend_hf.files import find_file, read_json, write_json
    from mend_hf.library import RECORD_NAME, WEIGHTS_NAME
    from mend_hf.prefix import KeyValuePrefix
    from mend_hf.provenance import ChunkRecord, Provenance
    from mend_hf.saved_pair import HASH_NAME

NAMES = (WEIGHTS_NAME, RECORD_NAME)


def save_whole(folder: Path) -> list[bytes]:
    """Save a prefix of one slot, and return its files as inputs; without the hash, which would hide the tensors."""
    keys, values = (torch.ones(1, 1, 1, 2),), (torch.ones(1, 1, 1, 2),)
    prefix = KeyValuePrefix(keys, values, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.long))
    chunk = ChunkRecord(demonstrations=["a"], num_tokens=1, num_lost_tokens=0)
    origin = Provenance(
        base_model_name_or_path=None, base_model_fingerprint={}, distiller_name_or_path=None, distiller_hash=None,
        prompt_format={}, chunks=[[chunk]],
    )  # fmt: skip
    DistilledDemonstrations(prefix, origin).save_pretrained(folder)
    record = read_json(folder / RECORD_NAME)
    del record[HASH_NAME]
    write_json(folder / RECORD_NAME, record)
    return [bytes([place]) + (folder / name).read_bytes() for place, name in enumerate(NAMES)]


def main() -> None:
    """Fuzz until the runs are over; a crash ends the process with the input that caused it."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        folder, seeds = Path(root, "saved"), Path(root, "seeds")
        whole = save_whole(folder)
        seeds.mkdir()
        for place, data in enumerate(whole):
            (seeds / str(place)).write_bytes(data)

        def load(data: bytes) -> None:
            changed = data[0] % 2 if data else 0
            for place, name in enumerate(NAMES):
                (folder / name).write_bytes(data[1:] if place == changed else whole[place][1:])
            try:
                DistilledDemonstrations.from_pretrained(folder)
            except MendError:
                return
            if find_file(folder, WEIGHTS_NAME) is None:
                raise RuntimeError("loaded from elsewhere")

        atheris.Setup([*sys.argv, str(seeds)], load)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
