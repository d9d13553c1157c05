"""How a training step's cost grows with the number of demonstrations: within the distiller's window, and in chunks.

    python examples/benchmarks/linear_cost.py --output outputs/linear_cost.png

Every step is one row with one query, in the kv form. Demonstrations are repeated where there are too few: the cost
knows nothing of them but their tokens.

The last line is `RESULT cost_per_token_ratio=... r_squared=...`: milliseconds a token at the most demonstrations over
those at the fewest, and how much of the cost a straight line over the tokens explains.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mend_hf import MendConfig, MendModel, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.metaicl import load_tasks

sys.path.append(str(Path(__file__).parents[1]))
from tiny import load_tiny
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]


def main() -> None:
    """Measure, print a table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-demonstrations", default="4,8,16,32,48,64,96,128")
    parser.add_argument("--max-distiller-tokens", type=int, default=512, help="the window; beyond it are chunks")
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/linear_cost.png"))
    parser.add_argument("--tiny", action="store_true", help="a small random model, to try this script in seconds")
    args = parser.parse_args()
    base, tokenizer = load_tiny() if args.tiny else load_smollm2()
    torch.manual_seed(13)
    config = MendConfig(
        prefix_form="kv",
        num_virtual_tokens=16,
        overflow="concat",
        max_distiller_tokens=args.max_distiller_tokens,
    )
    model = get_mend_model(base, config, tokenizer)
    counts = [int(count) for count in args.num_demonstrations.split(",")]
    steps = [prepare_step(model, count) for count in counts]
    seconds: list[list[float]] = [[] for _ in counts]
    for _ in range(args.num_rounds + 1):
        for index, (trainer, batch, _) in enumerate(steps):
            seconds[index].append(time_step(trainer, batch))
    tokens = np.array([num_tokens for _, _, num_tokens in steps])
    milliseconds = np.array([1000 * median(each[1:]) for each in seconds])
    slope, start = np.polyfit(tokens, milliseconds, 1)
    residual = milliseconds - (slope * tokens + start)
    r_squared = 1 - residual.var() / milliseconds.var()
    show(counts, tokens, milliseconds)
    draw(tokens, milliseconds, (slope, start), args)
    per_token = milliseconds / tokens
    print(f"RESULT cost_per_token_ratio={per_token[-1] / per_token[0]:.2f} r_squared={r_squared:.3f}")


def prepare_step(model: MendModel, count: int) -> tuple[MendTrainer, Any, int]:
    """Return a trainer, the batch of one row, and how many demonstration tokens it has."""
    [examples] = load_tasks(EXAMPLES / "data", split="train", tasks=["support_tickets"]).values()
    shots = itertools.islice(itertools.cycle(examples[1:]), count)
    row = {
        "demonstrations": [{"input": shot.input, "output": shot.output} for shot in shots],
        "query": examples[0].input,
        "target": examples[0].output,
    }
    settings = MendTrainingArguments.from_recipe(
        "finetune",
        output_dir=tempfile.gettempdir(),
        max_steps=1,
        report_to="none",
        use_cpu=model.device.type == "cpu",
    )
    trainer = MendTrainer(model=model, args=settings, train_dataset=[row])
    batch = trainer.data_collator([row])
    return trainer, batch, int(batch["demo_attention_mask"].sum())


def time_step(trainer: MendTrainer, batch: Any) -> float:
    """Return the seconds of forward and backward."""
    trainer.model.zero_grad()
    batches, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.model.device)
    start = time.perf_counter()
    trainer.training_step(trainer.model, batches[0], num_items).item()
    return time.perf_counter() - start


def show(counts: list[int], tokens: np.ndarray, milliseconds: np.ndarray) -> None:
    """Print what was measured."""
    table = Table(title="A training step of one row")
    for column in ("demonstrations", "tokens", "ms", "ms a token"):
        table.add_column(column, justify="right")
    for count, num_tokens, cost in zip(counts, tokens, milliseconds, strict=True):
        table.add_row(str(count), str(num_tokens), f"{cost:.0f}", f"{cost / num_tokens:.2f}")
    Console().print(table)


def draw(tokens: np.ndarray, milliseconds: np.ndarray, line: tuple[float, float], args: argparse.Namespace) -> None:
    """Draw cost over tokens, with the straight line through it and the window's end."""
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(6, 3.7), layout="constrained")
    slope, start = line
    ends = np.array([0, tokens.max()])
    axes.plot(ends, (slope * ends + start) / 1000, color="#b0b0b0", label="straight line")
    axes.plot(tokens, milliseconds / 1000, "o", color="#1f5fa8", label="a step of one row")
    axes.axvline(args.max_distiller_tokens, color="#c0572b", linestyle="--", linewidth=1)
    axes.annotate(
        "in chunks from here",
        (args.max_distiller_tokens, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        color="#c0572b",
    )
    axes.set(xlabel="demonstration tokens", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150)


if __name__ == "__main__":
    main()
