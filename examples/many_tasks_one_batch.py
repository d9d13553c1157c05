"""Ask three tasks in one batch: every row of it is answered from the demonstrations of its own task.

python examples/many_tasks_one_batch.py [--from-hub] [--tiny]
"""

from __future__ import annotations

import argparse

from model_options import add_model_options, load_model
from rich.console import Console
from rich.table import Table
from tiny import DATA

from mend_hf.data.metaicl import load_tasks
from mend_hf.data.rows import read_rows
from mend_hf.scoring import score_options


def main() -> None:
    """Print what the tasks cost, and a table of the batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-queries", type=int, default=2, help="queries of a task in a file")
    add_model_options(parser)
    args = parser.parse_args()
    model = load_model(args)

    train, test = (load_tasks(DATA, split=split) for split in ("train", "test"))
    shots = {name: [(example.input, example.output) for example in train[name][:16]] for name in train}
    queries = {name: [example.input for example in test[name][: args.num_queries]] for name in test}
    mails = [(row["input"], row["output"]) for _, row in read_rows(DATA / "my_demonstrations.jsonl")]
    shots["mails"], queries["mails"] = mails, ["Last chance: 50 percent off all shoes!", "Can you call me back today?"]

    names = list(shots)
    tasks = model.distill([shots[name] for name in names])  # one pass reads all three, a row each
    for name, task in zip(names, tasks, strict=True):
        [num_tokens] = task.provenance.num_tokens
        print(f"{name}: {len(shots[name])} demonstrations, {num_tokens} tokens -> {task.num_slots} slots")

    batch = [(name, query) for name in names for query in queries[name]]
    rows = tasks.select([names.index(name) for name, _ in batch])  # for every query the prefix of its task
    options = [sorted({label for _, label in shots[name]}) for name, _ in batch]
    scores = score_options(model, [query for _, query in batch], options, rows.prefix, batch_size=len(batch))
    # Without options: model.answer([query for _, query in batch], rows)

    table = Table("task", "query", "answer", title=f"{len(batch)} queries of {len(names)} tasks, one batch")
    for (name, query), labels, row in zip(batch, options, scores, strict=True):
        table.add_row(name, query, labels[row.index(max(row))])
    Console().print(table)


if __name__ == "__main__":
    main()
