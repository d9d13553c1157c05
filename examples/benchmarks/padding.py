"""How much of a training's batches is padding, with rows in random order and with rows of like length together.

`python examples/benchmarks/padding.py --tasks FOLDER --partition FILE --text FOLDER` counts the tokens of SmolLM2's
tokenizer in the collator's own masks; no model runs. Without options it reads the small examples in examples/data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from mend_hf import MendCollator, MendConfig
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.length_groups import LengthSampler, measure_rows
from mend_hf.data.metaicl import load_tasks
from mend_hf.data.partition import load_partition
from mend_hf.data.text import TextDataset, load_texts
from mend_hf.passes import split_batch

sys.path.insert(0, str(Path(__file__).parents[1]))
from weights import FILE, find_weights

DATA = Path(__file__).parents[1] / "data"
MASKS = ("demo_attention_mask", "attention_mask", "teacher_attention_mask")


def count_padding(
    collate: MendCollator, rows: Any, order: Sequence[int], batch_size: int, max_tokens: int
) -> list[float]:
    """Return the share of padding in the masks together: of whole batches, and of the passes that they are read in."""
    tokens = whole = passes = 0
    for start in range(0, len(order), batch_size):
        batch = collate([rows[index] for index in order[start : start + batch_size]])
        tokens += sum(int(batch[name].sum()) for name in MASKS)
        whole += sum(batch[name].numel() for name in MASKS)
        parts = split_batch(batch, max_tokens, labels_apart=False)
        passes += sum(part[name].numel() for part in parts for name in MASKS)
    return [1 - tokens / whole, 1 - tokens / passes]


def make_rows(options: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[str, Dataset[Any]]]:
    """Yield the rows of both stages."""
    shape = {"num_rows": options.num_rows, "seed": 13}
    texts = load_texts(options.text)[: options.num_rows]
    yield "pretrain", TextDataset(texts, tokenizer=tokenizer, **shape)
    wanted = load_partition(options.partition).train if options.partition else None
    tasks = load_tasks(options.tasks, tasks=wanted)
    for k in ((16, 16), (4, 16)):
        rows = FewShotDataset(tasks, num_demonstrations=k, queries_per_demonstrations=options.num_queries, **shape)
        yield f"finetune, {k[0]} to {k[1]} demonstrations", rows


def main() -> None:
    """Print one line for every kind of rows and order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=str(DATA))
    parser.add_argument("--partition")
    parser.add_argument("--text", default=str(DATA / "text.jsonl"))
    parser.add_argument("--num-rows", type=int, default=1600)
    parser.add_argument("--num-queries", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens-per-pass", type=int, default=4096)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(find_weights().parent, gguf_file=FILE)
    collate = MendCollator(tokenizer, MendConfig())
    for name, rows in make_rows(options, tokenizer):
        start = time.perf_counter()
        lengths = measure_rows(rows, "length")
        seconds = time.perf_counter() - start
        shuffled = torch.randperm(options.num_rows, generator=torch.Generator().manual_seed(13)).tolist()
        for kind, order in (("random", shuffled), ("by length", [*LengthSampler(lengths, options.batch_size, 13)])):
            whole, passes = count_padding(collate, rows, order, options.batch_size, options.max_tokens_per_pass)
            print(f"{name}, {kind}: {whole:.1%} of batches, {passes:.1%} of their passes")
        print(f"{name}: {options.num_rows} lengths measured in {seconds:.1f} s")


if __name__ == "__main__":
    main()
