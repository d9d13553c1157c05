"""Train on files of your own: JSON lines with an input and an output, every file a task.

    python examples/own_data.py [FILE ...] [--max-steps 20] [--from-hub] [--tiny]

It goes on from the distiller of this folder. Training that pays needs many tasks; see docs/how-to/train.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model_options import add_model_options, load_model
from tiny import DATA

from mend_hf import MendTrainer, MendTrainingArguments
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import Example
from mend_hf.data.rows import get_text, read_rows

FILES = [DATA / "support_tickets.train.jsonl", DATA / "restaurant_notes.train.jsonl"]
NUM_HELD_OUT = 8  # examples of every task that are never trained on


def read_task(path: Path) -> list[Example]:
    """Return a file's examples; the answers that occur in it are the options to choose from."""
    pairs = [(get_text(row, "input", place), get_text(row, "output", place)) for place, row in read_rows(path)]
    options = tuple(sorted({output for _, output in pairs}))
    return [Example(path.stem, *pair, options) for pair in pairs]


def main() -> None:
    """Print a row, train some steps, and print the held-out loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES, metavar="FILE", help=".jsonl, .zst or .parquet")
    parser.add_argument("--num-demonstrations", type=int, default=4, help="in a row")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--output-dir", default="outputs/own_data", help="for the distiller")
    add_model_options(parser)
    args = parser.parse_args()

    tasks = {path.stem: read_task(path) for path in args.files}
    settings = {"num_demonstrations": args.num_demonstrations, "balance_queries": True, "seed": 13}
    train = {name: examples[:-NUM_HELD_OUT] for name, examples in tasks.items()}
    held_out = {name: examples[-NUM_HELD_OUT:] for name, examples in tasks.items()}
    rows = FewShotDataset(train, num_rows=2 * args.max_steps, **settings)
    print(f"{len(tasks)} tasks, {sum(map(len, train.values()))} examples to train on; one of {len(rows)} rows:")
    print("\n".join(f"  {shot['input']} -> {shot['output']}" for shot in rows[0]["demonstrations"]))
    print(f"  {rows[0]['query']} -> ?    {rows[0]['target']}")

    torch.manual_seed(13)
    model = load_model(args)
    training_args = MendTrainingArguments.from_recipe(
        "finetune",
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        learning_rate=1e-4,
        per_device_train_batch_size=2,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    eval_rows = FewShotDataset(held_out, num_rows=16, **settings)
    trainer = MendTrainer(model=model, args=training_args, train_dataset=rows, eval_dataset=eval_rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {before:.4g} before, {trainer.evaluate()['eval_loss']:.4g} after {args.max_steps} steps")
    model.save_pretrained(args.output_dir)
    print(f"To load the distiller: MendModel.from_pretrained(base, {args.output_dir!r})")


if __name__ == "__main__":
    main()
