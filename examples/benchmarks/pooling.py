"""What pooled anchors cost: the scores of 64 demonstrations with all their anchors, and with a quarter of them.

    python examples/benchmarks/pooling.py --tasks TASKS --task ag_news --task poem_sentiment

The last line is `RESULT unpooled_score=... label_score=... similarity_score=...`, in points of 100.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from mend_hf import MendConfig, MendModel
from mend_hf.data.metaicl import load_tasks
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.methods import mend
from mend_hf.evaluation.readers import Demonstrations, Reader
from mend_hf.evaluation.report import method_rows, summarise, task_rows, to_table
from mend_hf.pooling import pool_anchors

sys.path.append(str(Path(__file__).parents[1]))
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
UNPOOLED, BY_LABEL, BY_SIMILARITY = "all anchors", "by label", "by similarity"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=str(EXAMPLES / "data"), help="tasks in MetaICL's format")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--num-demonstrations", type=int, default=64)
    parser.add_argument("--demonstrations-per-chunk", type=int, default=16)
    parser.add_argument(
        "--kept-share", type=float, default=0.25, help="of the anchors, as slots of the pooled methods"
    )
    parser.add_argument("--seeds", default="13,21,42")
    parser.add_argument("--max-queries", type=int, default=40)
    args = parser.parse_args()
    base, tokenizer = load_smollm2()
    distiller = EXAMPLES / "distillers" / "smollm2-135m-kv"
    config = dataclasses.replace(
        MendConfig.from_pretrained(distiller),
        max_demonstrations_per_chunk=args.demonstrations_per_chunk,
        overflow="concat",
    )
    model = MendModel.from_pretrained(base, distiller, tokenizer, config=config)

    def pool(model: MendModel, demonstrations: Demonstrations, by: Literal["label", "similarity"]) -> Reader:
        prefix = mend(model, demonstrations).prefix
        num_anchors = int((prefix.labels != 0).sum())
        # Never fewer slots than the answers have tokens, which is the least that pooling by label can do with.
        num_kept = max(round(args.kept_share * num_anchors), len(prefix.labels.unique()) - 1)
        return Reader(model, pool_anchors(prefix, prefix.num_slots - num_anchors + num_kept, by))

    methods = {
        f"{args.demonstrations_per_chunk} demonstrations": lambda model, shots: mend(
            model, shots[: args.demonstrations_per_chunk]
        ),
        UNPOOLED: mend,
        BY_LABEL: partial(pool, by="label"),
        BY_SIMILARITY: partial(pool, by="similarity"),
    }
    results = list(
        evaluate_methods(
            model,
            load_tasks(args.tasks, split="train", tasks=args.task),
            load_tasks(args.tasks, split="test", tasks=args.task),
            methods,
            num_demonstrations=args.num_demonstrations,
            seeds=[int(seed) for seed in args.seeds.split(",")],
            max_queries=args.max_queries,
        )
    )
    summaries = summarise(results)
    console = Console()
    console.print(to_table(method_rows(summaries), title=f"{args.num_demonstrations} demonstrations, macro-F1"))
    console.print(to_table(task_rows(results)))
    scores = {summary.method: 100 * summary.score for summary in summaries}
    print(
        f"RESULT unpooled_score={scores[UNPOOLED]:.1f} label_score={scores[BY_LABEL]:.1f} "
        f"similarity_score={scores[BY_SIMILARITY]:.1f}"
    )


if __name__ == "__main__":
    main()
