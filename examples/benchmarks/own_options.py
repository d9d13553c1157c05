"""Whether calibration by other inputs helps where every query has options of its own, and by how many inputs.

    python examples/benchmarks/own_options.py --tasks TASKS --task piqa --task math_qa

Batch calibration takes off what an option gets behind other inputs of the task. A label is an answer to all of them;
an option of one query is an answer to none. Here the options of a query are read behind 1, 2, 4 and 8 of the
demonstrations' inputs, by the distiller and by training-free anchors; without calibration is column 0.

The last line is `RESULT mend_0=... mend_1=...`: accuracies in points of 100, means over tasks and seeds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console

from mend_hf import Demonstration, MendConfig, MendModel, get_mend_model
from mend_hf.data.metaicl import Example, load_tasks, sample_demonstrations
from mend_hf.evaluation.calibration import CalibratedReader
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
    # As many of them, and the same ones, as `mend evaluate` asks.
    queries = {task: random.Random(task).sample(rows, len(rows))[: args.num_queries] for task, rows in test.items()}
    table = [["method", "task", *map(str, NUM_INPUTS)]]
    means = {}
    for method, short in READ_BY.items():
        columns = []
        for task, asked in queries.items():
            runs = []
            for seed in map(int, args.seeds.split(",")):
                examples = sample_demonstrations(train[task], args.num_demonstrations, seed)
                shots = [Demonstration(example.input, example.output) for example in examples]
                runs.append(measure(METHODS[method](model, shots), shots, asked))
            columns.append([statistics.fmean(values) for values in zip(*runs, strict=True)])
            table.append([method, task, *(f"{value:.1f}" for value in columns[-1])])
        means[short] = [statistics.fmean(values) for values in zip(*columns, strict=True)]
        table.append([method, "all", *(f"{value:.1f}" for value in means[short])])
    Console().print(to_table(table, title="Accuracy by the number of inputs that options are calibrated by"))
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
    accuracies = []
    for count in NUM_INPUTS:
        inputs = [shot.input for shot in shots[:count]]
        calibrated = CalibratedReader(reader.model, reader.prefix, inputs) if inputs else reader
        scores = calibrated.score_options(
            [query.input for query in queries], [query.options for query in queries], batch_size=8
        )
        chosen = [query.options[row.index(max(row))] for query, row in zip(queries, scores, strict=True)]
        right = [answer == query.output for answer, query in zip(chosen, queries, strict=True)]
        accuracies.append(100 * statistics.fmean(right))
    return accuracies


if __name__ == "__main__":
    main()
