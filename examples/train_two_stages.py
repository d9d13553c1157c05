"""Train a distiller in two stages: on plain text, then on many tasks.

    python examples/train_two_stages.py --text TEXTS --tasks TASKS --partition FILE [--tiny]

TEXTS and TASKS are files, folders or Hub ids: by default the paper's, on the Hub, and as many rows as ask for a GPU.
`mend pretrain` and `mend finetune` do the same from the command line, and can go on after a stop.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tiny import DATA, load_tiny
from weights import load_smollm2

from mend_hf import MendConfig, MendModel, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import load_tasks
from mend_hf.data.partition import hold_out_tasks, load_partition
from mend_hf.data.text import TextDataset, load_texts


def train(model: MendModel, stage: str, rows: Any, eval_rows: Any, args: argparse.Namespace) -> None:
    """Train one stage, print the held-out losses before and after it, and save the distiller."""
    steps = max(len(rows) // args.batch_size, 1)
    training_args = MendTrainingArguments.from_recipe(
        stage,
        output_dir=f"{args.output_dir}/{stage}",
        max_steps=steps,
        warmup_steps=steps // 20,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        logging_steps=max(steps // 100, 1),
        save_steps=max(steps // 10, 1),
        save_total_limit=2,
        report_to="none",
    )
    trainer = MendTrainer(model=model, args=training_args, train_dataset=rows, eval_dataset=eval_rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"{stage}: held-out loss {before:.4g} before, {trainer.evaluate()['eval_loss']:.4g} after")
    model.save_pretrained(training_args.output_dir)


def main() -> None:
    """Run both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="bigheiniuJ/MyC4Validation", help="plain text for stage 1")
    parser.add_argument("--tasks", default="bigheiniuJ/EvalMetaICLAll", help="tasks in MetaICL's format for stage 2")
    parser.add_argument("--partition", help='JSON {"train": [...], "test": [...]}: train on the first list only')
    parser.add_argument("--num-rows", type=int, default=30_000, help="rows of each stage")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one step")
    parser.add_argument("--output-dir", default="outputs/two_stages", help="the distillers land in its subfolders")
    parser.add_argument("--from-hub", action="store_true", help="load SmolLM2 by its Hub name, not from the package")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on examples/data: seconds, no network")
    args = parser.parse_args()
    if args.tiny:
        args.text, args.tasks, args.num_rows, args.batch_size = str(DATA / "text.jsonl"), str(DATA), 8, 2
    torch.manual_seed(13)
    base, tokenizer = load_tiny() if args.tiny else load_smollm2(args.from_hub)
    model = get_mend_model(base, MendConfig(num_virtual_tokens=4 if args.tiny else 100), tokenizer)
    texts = load_texts(args.text)
    tasks = load_tasks(args.tasks, tasks=load_partition(args.partition).train if args.partition else None)
    num_texts, num_tasks = max(len(texts) // 50, 1), max(len(tasks) // 20, 1)  # held out: never trained on
    eval_tasks = {name: tasks.pop(name) for name in hold_out_tasks(tasks, num_tasks, seed=13)}
    num_eval_rows = min(args.num_rows, 64)
    text_rows = TextDataset(texts[num_texts:], tokenizer=tokenizer, num_rows=args.num_rows, seed=13)
    eval_text_rows = TextDataset(texts[:num_texts], tokenizer=tokenizer, num_rows=num_eval_rows, seed=13)
    task_rows = FewShotDataset(tasks, queries_per_demonstrations=4, num_rows=args.num_rows, seed=13)
    eval_task_rows = FewShotDataset(eval_tasks, queries_per_demonstrations=4, num_rows=num_eval_rows, seed=13)
    train(model, "pretrain", text_rows, eval_text_rows, args)
    train(model, "finetune", task_rows, eval_task_rows, args)


if __name__ == "__main__":
    main()
