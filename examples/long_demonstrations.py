"""Distil more demonstrations than the distiller's window holds: cut, in chunks, and in chunks with pooled slots.

python examples/long_demonstrations.py [--num-demonstrations 200] [--max-slots 200] [--from-hub] [--tiny]
"""

from __future__ import annotations

import argparse
import warnings
from itertools import cycle, islice
from typing import Any

from model_options import add_model_options, load_base, wrap
from rich.console import Console
from rich.table import Table
from tiny import DATA

from mend_hf.data.metaicl import load_tasks
from mend_hf.scoring import score_options


def main() -> None:
    """Print what each way keeps of the demonstrations, and how many queries it answers right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-demonstrations", type=int, default=200, help="those of the file, over and over")
    parser.add_argument("--num-queries", type=int, default=20, help="of the task's test side")
    parser.add_argument("--max-slots", type=int, default=200, help="of the pooled prefix")
    add_model_options(parser)
    args = parser.parse_args()
    ways: dict[str, dict[str, Any]] = {
        "cut": {"overflow": "truncate"},
        "in chunks": {"overflow": "concat"},
        "in chunks, pooled": {"overflow": "concat", "max_slots": args.max_slots},
    }
    at_hand = load_tasks(DATA, split="train")["support_tickets"]
    pairs = [(example.input, example.output) for example in islice(cycle(at_hand), args.num_demonstrations)]
    tests = load_tasks(DATA, split="test")["support_tickets"][: args.num_queries]
    queries, options = [test.input for test in tests], [test.options for test in tests]
    title = f"{len(pairs)} demonstrations, {min(len(at_hand), len(pairs))} of them different"
    table = Table("", "read", "tokens lost", "chunks", "slots", "MB", "right", title=title)
    base, tokenizer = load_base(args)
    for name, settings in ways.items():
        model = wrap(base, tokenizer, args, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is cut; the table says it
            distilled = model.distill(pairs, batch_size=2)  # two chunks at once: the memory does not grow with them
        origin = distilled.provenance
        [num_read], [num_lost], [chunks] = origin.num_demonstrations, origin.num_lost_tokens, origin.chunks
        scores = score_options(model, queries, options, distilled.prefix)
        chosen = [test.options[row.index(max(row))] for test, row in zip(tests, scores, strict=True)]
        right = sum(answer == test.output for answer, test in zip(chosen, tests, strict=True))
        cells = (num_read, num_lost, len(chunks), distilled.num_slots, f"{distilled.num_bytes / 1e6:.1f}")
        table.add_row(name, *map(str, cells), f"{right}/{len(tests)}")
        base = model.unload()
    Console().print(table)


if __name__ == "__main__":
    main()
