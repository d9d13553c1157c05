"""Choosing among options, against the plain way: the whole text is read again for every option, one at a time.

    python examples/benchmarks/evaluation.py

Both choose among six options for the same queries behind the same 16 demonstrations, in context, with SmolLM2. The
reference is what the formula says: one forward pass for every option of every query, batch 1, full-length logits. Ours
reads the demonstrations once, every query once, and the options of several queries together.

The last line is `RESULT evaluation_speedup=... prediction_mismatches=...`: options a second, ours against the
reference's (median of the rounds' ratios), and how many queries they answer differently.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from mend_hf import Demonstration, MendConfig, MendModel, get_mend_model
from mend_hf.data.metaicl import load_tasks, sample_demonstrations
from mend_hf.evaluation.methods import in_context
from mend_hf.evaluation.report import to_table

sys.path.append(str(Path(__file__).parents[1]))
from tiny import load_tiny
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
TASK = "support_tickets"
MORE_OPTIONS = ("general question", "request for a refund")  # beside the task's own four

Scores = list[list[float]]


def main() -> None:
    """Choose both ways in every round, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-demonstrations", type=int, default=16)
    parser.add_argument("--num-queries", type=int, default=16)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a small random model, in seconds")
    args = parser.parse_args()
    base, tokenizer = load_tiny() if args.tiny else load_smollm2()
    model = get_mend_model(base, MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer).eval()
    train, test = (load_tasks(EXAMPLES / "data", split=split)[TASK] for split in ("train", "test"))
    shots = sample_demonstrations(train, args.num_demonstrations, 13)
    demonstrations = [Demonstration(shot.input, shot.output) for shot in shots]
    queries = [example.input for example in test[: args.num_queries]]
    options = [*test[0].options, *MORE_OPTIONS]

    def score_ours() -> Scores:
        reader = in_context(model, demonstrations)
        return reader.score_options(queries, [options] * len(queries), batch_size=args.batch_size)

    def score_reference() -> Scores:
        return score_plainly(model, demonstrations, queries, options)

    ours, reference = [], []
    for _ in range(args.num_rounds):
        scores, seconds = measure(score_ours)
        expected, reference_seconds = measure(score_reference)
        ours.append(seconds)
        reference.append(reference_seconds)
    pairs = [*zip(scores, expected, strict=True)]
    mismatches = sum(row.index(max(row)) != other.index(max(other)) for row, other in pairs)
    difference = max(abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True))
    num_options = len(queries) * len(options)
    rows = [["", "options a second", "seconds"]]
    for name, times in (("reference", reference), ("ours", ours)):
        seconds = statistics.median(times)
        rows.append([name, f"{num_options / seconds:.1f}", f"{seconds:.2f}"])
    title = f"{len(queries)} queries, {len(options)} options, {args.num_demonstrations} demonstrations"
    Console().print(to_table(rows, title=title))
    print(f"Largest difference of a score: {difference:.1e} nats a token")
    speedup = statistics.median(theirs / own for theirs, own in zip(reference, ours, strict=True))
    print(f"RESULT evaluation_speedup={speedup:.2f} prediction_mismatches={mismatches}")


def measure(score: Callable[[], Scores]) -> tuple[Scores, float]:
    """Return scores and the seconds that they took."""
    start = time.perf_counter()
    scores = score()
    return scores, time.perf_counter() - start


@torch.no_grad()
def score_plainly(
    model: MendModel, demonstrations: list[Demonstration], queries: list[str], options: list[str]
) -> Scores:
    """Return the mean log-likelihood of every option's tokens, each read behind the whole text."""
    [chunk] = model.prompt.encode_demonstrations(demonstrations).chunks
    scores = []
    for query in queries:
        scores.append([])
        for option in options:
            before = chunk.input_ids + model.prompt.encode_query(query)
            answer = model.prompt.encode_answer(option)
            logits = model.base_model(torch.tensor([before + answer])).logits[0]
            predicted = logits[len(before) - 1 : -1].log_softmax(-1)  # [option tokens, vocabulary]
            scores[-1].append(predicted[range(len(answer)), answer].mean().item())
    return scores


if __name__ == "__main__":
    main()
