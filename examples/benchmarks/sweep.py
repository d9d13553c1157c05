"""How to choose virtual tokens, LoRA rank, learning rate and the teacher's weight: a small study of each.

    python examples/benchmarks/sweep.py --tasks TASKS --partition FILE --output-dir outputs/sweep

A study varies one setting of a common training and leaves the others alone. All trainings read the same rows. They are
judged on training tasks that are held out, never on test tasks: by the targets' negative log-likelihood and the
divergence from the teacher, in nats a token, and by the score of choosing among a query's options. A training whose
result is in the output folder is not repeated, so a sweep that was stopped goes on.

The last line is `RESULT num_trainings=... zero_shot_score=... in_context_score=... best_score=...`, in points of 100.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mend_hf import MendCollator, MendConfig, MendModel, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import Example, load_tasks
from mend_hf.data.partition import hold_out_tasks, load_partition
from mend_hf.evaluation.evaluator import evaluate_methods
from mend_hf.evaluation.methods import pick_methods
from mend_hf.evaluation.report import summarise, to_markdown, to_table
from mend_hf.files import write_json

sys.path.append(str(Path(__file__).parents[1]))
from tiny import load_tiny
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
COMMON: dict[str, Any] = {"num_virtual_tokens": 16, "lora_r": 16, "learning_rate": 5e-4, "kd_loss_weight": 1.0}
STUDIES: dict[str, list[Any]] = {
    "learning_rate": [1e-4, 5e-4, 2e-3],
    "kd_loss_weight": [0.0, 1.0, 4.0],
    "lora_r": [4, 16, 64],
    "num_virtual_tokens": [0, 4, 16, 64],
}
BASELINES = ("zero-shot", "in-context", "training-free anchors")
COLUMNS = ("NLL", "KL", "score")

Tasks = Mapping[str, list[Example]]


def main() -> None:
    """Run what is missing, and print the tables."""
    args = parse_arguments()
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    partition = load_partition(args.partition) if args.partition else None
    tasks = load_tasks(args.tasks, split="train", tasks=partition.train if partition else None)
    queries = load_tasks(args.tasks, split="test", tasks=tasks)
    tasks = {name: rows for name, rows in tasks.items() if is_classification(rows) and is_short(rows, args.max_words)}
    test_names = partition.test if partition else ()
    held_out = hold_out_tasks(tasks, args.num_eval_tasks, seed=args.seed, test_tasks=test_names)
    sides = (
        {name: rows for name, rows in tasks.items() if name not in held_out},
        {name: tasks[name] for name in held_out},
        {name: queries[name] for name in held_out},
    )
    settings = [COMMON]
    settings += [COMMON | {name: value} for name, values in STUDIES.items() for value in values]
    settings = [each for number, each in enumerate(settings) if each not in settings[:number]]
    if args.tiny:
        settings = settings[:2]
    baselines = read_or_run(output_dir / "baselines.json", partial(measure_baselines, args, sides))
    results = []
    for setting in settings:
        name = "_".join(f"{name}={value}" for name, value in setting.items())
        results.append(read_or_run(output_dir / f"{name}.json", partial(train_and_measure, args, setting, sides)))
    show(settings, results, baselines, output_dir)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=str(EXAMPLES / "data"), help="tasks in MetaICL's format")
    parser.add_argument("--partition", help="its training tasks alone are used, to train and to judge")
    parser.add_argument("--num-eval-tasks", type=int, default=8, help="training tasks to judge by")
    parser.add_argument("--max-words", type=int, default=30, help="leave out tasks with longer inputs on average")
    parser.add_argument("--num-demonstrations", type=int, default=8)
    parser.add_argument("--num-rows", type=int, default=200, help="rows of one training")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-queries", type=int, default=24, help="of a held-out task, for the score")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--tiny", action="store_true", help="a small random model and two trainings, in seconds")
    parser.add_argument("--output-dir", default="outputs/sweep")
    return parser.parse_args()


def is_classification(rows: list[Example]) -> bool:
    """Return whether all examples of a task have the same options."""
    return bool(rows[0].options) and all(row.options == rows[0].options for row in rows)


def is_short(rows: list[Example], max_words: int) -> bool:
    """Return whether a task's inputs are short enough for a study of minutes."""
    return sum(len(row.input.split()) for row in rows) <= max_words * len(rows)


def read_or_run(path: Path, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what an earlier sweep has measured, or measure it and keep it."""
    if not path.exists():
        write_json(path, run())
    return json.loads(path.read_text())


def build_model(args: argparse.Namespace, setting: Mapping[str, Any]) -> MendModel:
    """Return a new distiller on the base model."""
    base, tokenizer = load_tiny() if args.tiny else load_smollm2()
    torch.manual_seed(args.seed)
    config = MendConfig(prefix_form="kv", num_virtual_tokens=setting["num_virtual_tokens"], lora_r=setting["lora_r"])
    return get_mend_model(base, config, tokenizer)


def measure_scores(
    model: MendModel, methods: tuple[str, ...], args: argparse.Namespace, sides: tuple[Tasks, Tasks, Tasks]
) -> dict[str, float]:
    """Return every method's score on the held-out tasks, in points of 100."""
    results = evaluate_methods(
        model.eval(),
        sides[1],
        sides[2],
        pick_methods(methods),
        num_demonstrations=args.num_demonstrations,
        seeds=[args.seed],
        max_queries=args.max_queries,
    )
    return {summary.method: 100 * summary.score for summary in summarise(list(results))}


def measure_baselines(args: argparse.Namespace, sides: tuple[Tasks, Tasks, Tasks]) -> dict[str, float]:
    """Return the scores of the base model without a distiller."""
    return measure_scores(build_model(args, COMMON), BASELINES, args, sides)


def train_and_measure(
    args: argparse.Namespace, setting: Mapping[str, Any], sides: tuple[Tasks, Tasks, Tasks]
) -> dict[str, float]:
    """Train a distiller with one setting, and judge it on the held-out tasks."""
    model = build_model(args, setting)
    shape: dict[str, Any] = {"num_demonstrations": args.num_demonstrations, "queries_per_demonstrations": 4}
    num_steps = max(args.num_rows // args.batch_size, 1)
    training_args = MendTrainingArguments.from_recipe(
        "finetune",
        output_dir=args.output_dir,
        max_steps=num_steps,
        warmup_steps=num_steps // 20,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        save_strategy="no",
        logging_steps=num_steps,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=args.seed,
        learning_rate=setting["learning_rate"],
        kd_loss_weight=setting["kd_loss_weight"],
    )
    trainer = MendTrainer(
        model=model,
        args=training_args,
        train_dataset=FewShotDataset(sides[0], num_rows=args.num_rows, seed=args.seed, **shape),
        data_collator=MendCollator(model.tokenizer, model.mend_config),
    )
    trainer.train()
    # Also a training without the teacher is measured against it.
    judge = MendTrainer(
        model=model,
        args=dataclasses.replace(training_args, kd_loss_weight=1.0),
        eval_dataset=FewShotDataset(sides[1], num_rows=4 * len(sides[1]), seed=args.seed + 1, **shape),
        data_collator=MendCollator(model.tokenizer, model.mend_config),
    )
    measured = judge.evaluate()
    [score] = measure_scores(model, ("MEND",), args, sides).values()
    return {"NLL": measured["eval_nll_loss"], "KL": measured["eval_kd_loss"], "score": score}


def show(
    settings: list[dict[str, Any]], results: list[dict[str, float]], baselines: Mapping[str, float], output_dir: Path
) -> None:
    """Print a table for every study, and write them as Markdown."""
    console = Console()
    scores = ", ".join(f"{name} {score:.1f}" for name, score in baselines.items())
    markdown = [f"Without training: {scores}."]
    console.print(markdown[0])
    for name in STUDIES:
        rows = [[name, *COLUMNS]]
        for setting, result in zip(settings, results, strict=True):
            if all(setting[other] == value for other, value in COMMON.items() if other != name):
                rows.append(
                    [f"{setting[name]:g}", f"{result['NLL']:.3f}", f"{result['KL']:.3f}", f"{result['score']:.1f}"]
                )
        rows[1:] = sorted(rows[1:], key=lambda row: float(row[0]))
        console.print(to_table(rows))
        markdown.append(to_markdown(rows))
    (output_dir / "sweep.md").write_text("\n\n".join(markdown) + "\n")
    print(
        f"RESULT num_trainings={len(results)} zero_shot_score={baselines['zero-shot']:.1f} "
        f"in_context_score={baselines['in-context']:.1f} best_score={max(result['score'] for result in results):.1f}"
    )


if __name__ == "__main__":
    main()
