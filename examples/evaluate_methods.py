"""Compare methods, one of them your own, on two small tasks: tables here, and a report with pictures in a folder.

    pip install "mend_hf[eval]"
    python examples/evaluate_methods.py [--output-dir outputs/report] [--from-hub] [--tiny]

`mend evaluate` and `mend report` do the same from the command line, and go on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model_options import add_model_options, load_model
from rich.console import Console
from tiny import DATA

from mend_hf import MendModel
from mend_hf.data.metaicl import load_tasks
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.export import write_report
from mend_hf.evaluation.methods import in_context, pick_methods
from mend_hf.evaluation.readers import Demonstrations, Reader
from mend_hf.evaluation.report import print_tables

METHODS = ["zero-shot", "in-context", "training-free anchors", "MEND"]


def last_four_in_context(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """A method of one's own: the text of the last four demonstrations alone."""
    return in_context(model, demonstrations[-4:])


def main() -> None:
    """Print every result as it comes, then the tables, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-demonstrations", type=int, default=16)
    parser.add_argument("--max-queries", type=int, default=10, help="of each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 21], help="one set of demonstrations each")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/report"), help="for the report")
    add_model_options(parser)
    args = parser.parse_args()
    model = load_model(args)
    console = Console()

    results = []
    for result in evaluate_methods(
        model,
        load_tasks(DATA, split="train"),  # demonstrations
        load_tasks(DATA, split="test"),  # queries
        pick_methods(METHODS) | {"last 4": last_four_in_context},
        num_demonstrations=args.num_demonstrations,
        seeds=args.seeds,
        max_queries=args.max_queries,
    ):
        results.append(result)
        console.print(f"{result.task}, seed {result.seed}, {result.method}: {100 * result.score:.1f}")
    print_tables(results, console)
    write_report({"examples": results}, args.output_dir, against="in-context")
    console.print(f"Pictures and tables: open {args.output_dir / 'index.html'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
