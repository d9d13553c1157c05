"""Whether calibration by other inputs helps where every query has options of its own, and by how many inputs.

    python examples/benchmarks/own_options.py --tasks TASKS --task piqa --task math_qa

Batch calibration takes off what an option gets behind other inputs of the task. A label is an answer to all of them;
an option of one query is an answer to none. Here the options of a query are read behind 1, 2, 4 and 8 of the
demonstrations' inputs, by the distiller and by training-free anchors; without calibration is column 0.

The last line is `RESULT mend_0=... mend_1=...`: accuracies in points of 100, means over tasks and seeds.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console

from mend_hf import Demonstration, MendConfig, MendModel, get_mend_model
from mend_hf.data.metaicl import Example, load_tasks, sample_demonstrations
from mend_hf.evaluation.methods import METHODS
from mend_hf.evaluation.readers import Reader
from mend_hf.evaluation.report import to_table

sys.path.append(str(Path(__file__).parents[1]))
from tiny import load_tiny
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
NUM_INPUTS = (0, 1, 2, 4, 8)
READ_BY = {"MEND": "mend", "training-free anchors": "anchors"}


def main() -> None:
    """Score all tasks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distiller", default=str(EXAMPLES / "distillers" / "smollm2-135m-general-kv"))
    parser.add_argument("--tasks", default=str(EXAMPLES / "data"), help="tasks in MetaICL's format")
    parser.add_argument("--task", action="append", help="one of them; repeat it, or leave it out for all")
    parser.add_argument("--seeds", default="13,21")
    parser.add_argument("--num-demonstrations", type=int, default=16)
    parser.add_argument("--num-queries", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a small random model, in seconds")
    args = parser.parse_args()
    model = load_model(args)
    train, test = (load_tasks(args.tasks, split=split, tasks=args.task) for split in ("train", "test"))
    rows = [["method", "task", *map(str, NUM_INPUTS)]]
    means = {}
    for method, short in READ_BY.items():
        columns = []
        for task, examples in test.items():
            queries = random.Random(task).sample(examples, len(examples))[
                : args.num_queries
            ]  # as `mend evaluate` does
            runs = []
            for seed in map(int, args.seeds.split(",")):
                drawn = sample_demonstrations(train[task], args.num_demonstrations, seed)
                shots = [Demonstration(example.input, example.output) for example in drawn]
                runs.append(measure(METHODS[method](model, shots), shots, queries))
            columns.append([statistics.fmean(values) for values in zip(*runs, strict=True)])
            rows.append([method, task, *(f"{value:.1f}" for value in columns[-1])])
        means[short] = [statistics.fmean(values) for values in zip(*columns, strict=True)]
        rows.append([method, "all", *(f"{value:.1f}" for value in means[short])])
    Console().print(to_table(rows, title="Accuracy by the number of inputs that options are calibrated by"))
    result = [
        f"{short}_{count}={value:.1f}"
        for short in means
        for count, value in zip(NUM_INPUTS, means[short], strict=True)
    ]
    print("RESULT", *result)


def load_model(args: argparse.Namespace) -> MendModel:
    """Return the distiller on its base model."""
    if args.tiny:
        base, tokenizer = load_tiny()
        return get_mend_model(base, MendConfig(num_virtual_tokens=2), tokenizer).eval()
    base, tokenizer = load_smollm2()
    return MendModel.from_pretrained(base.to(getattr(torch, args.dtype)), args.distiller, tokenizer).eval()


def measure(reader: Reader, shots: list[Demonstration], queries: list[Example]) -> list[float]:
    """Return the accuracy (0 to 100) of options calibrated by each number of the demonstrations' inputs."""
    inputs = [shot.input for shot in shots[: max(NUM_INPUTS)]]
    right = [0] * len(NUM_INPUTS)
    for query in queries:
        own, *elsewhere = reader.score_options(
            [query.input, *inputs], [query.options] * (1 + len(inputs)), batch_size=8
        )
        for place, count in enumerate(NUM_INPUTS):
            priors = [log_of_mean(scores[:count]) for scores in zip(*elsewhere, strict=True)]
            calibrated = [score - prior for score, prior in zip(own, priors, strict=True)]
            right[place] += query.options[calibrated.index(max(calibrated))] == query.output
    return [100 * count / len(queries) for count in right]


def log_of_mean(scores: tuple[float, ...]) -> float:
    """Return the log of the mean likelihood; 0, which takes nothing off, of none."""
    return math.log(statistics.fmean(map(math.exp, scores))) if scores else 0.0


if __name__ == "__main__":
    main()
