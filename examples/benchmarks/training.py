"""What a training step costs: ours against the reference formulation written plainly, for the same rows.

    python examples/benchmarks/training.py
    python examples/benchmarks/training.py --tasks TASKS --num-demonstrations 4-16

The reference formulation takes one query a distilling, pads a whole batch to its longest row, lets teacher and student
say logits for every token that they read, demonstrations and vectors included, and takes the divergence from
log-probabilities that are all held at once. All else is alike: the rows of a step, the weights, the losses. Seconds
are medians of rounds in turns; memory is the peak of a process of its own, less what it had before the step.

The last line is `RESULT training_speedup_1=... training_speedup_4=... training_memory_ratio=... loss_difference=...`:
rows a second, ours over the reference's, at one and at four queries a distilling; peak memory, ours over the
reference's; and the difference of losses or of gradients, whichever is larger, as a share of their size, in float64.
On a GPU both sides are timed in bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mend_hf import MendCollator, MendConfig, MendModel, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import load_tasks
from mend_hf.data.partition import load_partition

sys.path.append(str(Path(__file__).parents[1]))
from tiny import load_tiny
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
NUM_SHARED_QUERIES = 4


def main() -> None:
    """Measure in this process, and memory in one of its own for each side."""
    args = parse_arguments()
    if args.side:
        print(json.dumps(measure_memory(args)))
        return
    memory = {side: run_alone(side) for side in ("ours", "reference")}  # first, while this process is small
    model, rows = build(args, 1)
    shared_rows = build_rows(args, NUM_SHARED_QUERIES)
    float32_difference = compare(model, rows, args)
    loss_difference = compare(model.double(), rows[:2], args)
    model.float()
    ours, reference = time_in_turns(
        [lambda: our_step(model, rows, args), lambda: reference_step(model, rows, args)], args.num_rounds
    )
    # Four queries of one distilling are four rows of the reference's.
    ours_shared, reference_shared = time_in_turns(
        [
            lambda: our_step(model, shared_rows, args),
            lambda: reference_step(model, single_queries(shared_rows)[: args.num_rows], args),
        ],
        args.num_rounds,
    )
    num_queries = len(single_queries(shared_rows))
    speedup_1 = reference / ours
    speedup_4 = (reference_shared / args.num_rows) / (ours_shared / num_queries)
    memory_ratio = memory["ours"] / memory["reference"]
    utilisation = measure_utilisation(model, rows, args, ours)
    Console().print(
        f"Losses and gradients differ by {float32_difference:.1e} in float32, which is rounding, and by "
        f"{loss_difference:.1e} in float64. Our step reaches {100 * utilisation:.0f} % of the peak of matrix products."
    )
    show(args, rows, model, (ours, reference), (ours_shared / num_queries, reference_shared / args.num_rows), memory)
    print(
        f"RESULT training_speedup_1={speedup_1:.2f} training_speedup_4={speedup_4:.2f} "
        f"training_memory_ratio={memory_ratio:.2f} loss_difference={loss_difference:.1e}"
    )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=str(EXAMPLES / "data"), help="tasks in MetaICL's format")
    parser.add_argument("--partition", help="only the training tasks of this partition")
    parser.add_argument("--num-demonstrations", default="4-16", help="of a row: 16, or a range 4-16")
    parser.add_argument("--num-rows", type=int, default=8, help="rows of one step")
    parser.add_argument("--form", choices=("embeds", "kv"), default="embeds", help="of the prefix")
    parser.add_argument("--num-virtual-tokens", type=int, default=100)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--max-tokens-per-pass", type=int, help="default: that of the device")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small random model, to try this script in seconds")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.in_bfloat16 = args.device == "cuda"
    return args


def build(args: argparse.Namespace, num_queries: int) -> tuple[MendModel, list[dict[str, Any]]]:
    """Return a new distiller on the base model, moved a little away from its birth, and the rows of a step."""
    base, tokenizer = load_tiny() if args.tiny else load_smollm2()
    torch.manual_seed(args.seed)
    config = MendConfig(num_virtual_tokens=args.num_virtual_tokens, prefix_form=args.form)
    model = get_mend_model(base.to(args.device), config, tokenizer)
    for _, parameter in model.distiller.trained_tensors():  # so that no gradient is zero
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model, build_rows(args, num_queries)


def build_rows(args: argparse.Namespace, num_queries: int) -> list[dict[str, Any]]:
    """Return the rows of one step, each with so many queries."""
    wanted = list(load_partition(args.partition).train) if args.partition else None
    low, _, high = args.num_demonstrations.partition("-")
    rows = FewShotDataset(
        load_tasks(args.tasks, split="train", tasks=wanted),
        num_demonstrations=(int(low), int(high or low)),
        queries_per_demonstrations=num_queries,
        num_rows=args.num_rows,
        seed=args.seed,
    )
    return [rows[index] for index in range(args.num_rows)]


def single_queries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for every query."""
    return [
        {"demonstrations": row["demonstrations"], "query": query, "target": target}
        for row in rows
        for query, target in zip(row["query"], row["target"], strict=True)
    ]


def our_step(model: MendModel, rows: list[dict[str, Any]], args: argparse.Namespace) -> Tensor:
    """Run forward and backward as `MendTrainer` does; return the loss."""
    trainer = make_trainer(model, rows, args)
    model.zero_grad()
    batches, num_items = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, model.device)
    return trainer.training_step(model, batches[0], num_items)


def make_trainer(model: MendModel, rows: list[dict[str, Any]], args: argparse.Namespace) -> MendTrainer:
    """Return a trainer of stage 2: the targets' NLL, and the divergence from the teacher."""
    settings = MendTrainingArguments.from_recipe(
        "finetune",
        output_dir=str(Path(tempfile.gettempdir()) / "mend_hf-benchmark"),
        max_steps=1,
        max_tokens_per_pass=args.max_tokens_per_pass,
        report_to="none",
        use_cpu=model.device.type == "cpu",
        bf16=args.in_bfloat16,
    )
    return MendTrainer(model=model, args=settings, train_dataset=rows)


def reference_step(model: MendModel, rows: list[dict[str, Any]], args: argparse.Namespace) -> Tensor:
    """Run forward and backward in the reference formulation; return the loss."""
    model.train()
    model.zero_grad()
    batch = MendCollator(model.tokenizer, model.mend_config)(rows)
    batch = {name: column.to(model.device) for name, column in batch.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.in_bfloat16):
        loss = reference_loss(model, batch)
    loss.backward()
    return loss.detach()


def reference_loss(model: MendModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return NLL + KL, one query a row. Everything that a model reads, it also says logits for."""
    base = model.base_model
    embed = base.get_input_embeddings()
    query_ids, query_mask = batch["input_ids"], batch["attention_mask"]
    num_query_tokens = query_ids.shape[1]

    text_ids = torch.cat([batch["teacher_input_ids"], query_ids], dim=1)
    text_mask = torch.cat([batch["teacher_attention_mask"], query_mask], dim=1)
    with torch.no_grad():
        teacher_logits = base(input_ids=text_ids, **mask_and_positions(text_mask), use_cache=False).logits

    if model.mend_config.prefix_form == "embeds":
        vectors = write_vectors(model, batch["demo_input_ids"], batch["demo_attention_mask"])
        student_mask = torch.cat([query_mask.new_ones(vectors.shape[:2]), query_mask], dim=1)
        student_logits = base(
            inputs_embeds=torch.cat([vectors, embed(query_ids)], dim=1),
            **mask_and_positions(student_mask),
            use_cache=False,
        ).logits
    else:  # keys and values cannot be written more plainly; the student reads no vectors
        columns = {name: column for name, column in batch.items() if "teacher" not in name and name != "labels"}
        student_logits = model(**columns).logits

    labels = batch["labels"][:, 1:]
    mask = (query_mask[:, 1:] * query_mask[:, :-1]).bool()
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits[:, -num_query_tokens:-1].to(precision).log_softmax(-1)
    teacher = teacher_logits[:, -num_query_tokens:-1].to(precision).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1)[mask].mean()
    return F.nll_loss(student.flatten(0, 1), labels.flatten(), ignore_index=-100) + kl


def write_vectors(model: MendModel, demo_ids: Tensor, demo_mask: Tensor) -> Tensor:
    """Return the vectors (rows, V, width) of demonstrations that the base model reads with its adapter on."""
    distiller = model.distiller
    placeholders = distiller.placeholders.expand(len(demo_ids), -1, -1)
    embeddings = torch.cat([model.base_model.get_input_embeddings()(demo_ids), placeholders], dim=1)
    mask = torch.cat([demo_mask, demo_mask.new_ones(placeholders.shape[:2])], dim=1)
    with distiller.adapter_on():
        states = model.base_model.model(inputs_embeds=embeddings, **mask_and_positions(mask), use_cache=False)
    hidden = states.last_hidden_state[:, -placeholders.shape[1] :]
    return distiller.base_vectors + distiller.projection(distiller.norm(hidden))


def mask_and_positions(mask: Tensor) -> dict[str, Tensor]:
    """Return a mask and the positions that count its tokens alone."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def compare(model: MendModel, rows: list[dict[str, Any]], args: argparse.Namespace) -> float:
    """Return how far losses and gradients are apart, as a share of their size: the larger of both."""
    losses, gradients = [], []
    for step in (our_step, reference_step):
        losses.append(step(model, rows, argparse.Namespace(**vars(args) | {"in_bfloat16": False})))
        trained = [parameter for _, parameter in model.distiller.trained_tensors()]
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return max(float(abs(losses[0] - losses[1]) / losses[1]), float(apart))


def time_in_turns(steps: list[Callable[[], Any]], num_rounds: int) -> list[float]:
    """Return the median seconds of every step, run in turns after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(num_rounds + 1):
        for index, step in enumerate(steps):
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            seconds[index].append(time.perf_counter() - start)
    return [median(each[1:]) for each in seconds]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_utilisation(
    model: MendModel, rows: list[dict[str, Any]], args: argparse.Namespace, seconds: float
) -> float:
    """Return our step's floating-point operations a second, as a share of those of one large matrix product."""
    with FlopCounterMode(display=False) as counter:
        our_step(model, rows, args)
    dtype, size = (torch.bfloat16, 8192) if model.device.type == "cuda" else (torch.float32, 2048)
    factors = torch.randn(2, size, size, dtype=dtype, device=model.device)
    [product_seconds] = time_in_turns([lambda: factors[0] @ factors[1]], 5)
    return counter.get_total_flops() / seconds / (2 * size**3 / product_seconds)


def run_alone(side: str) -> int:
    """Return the peak memory of one side's step, in bytes, of a process of its own."""
    command = [sys.executable, *sys.argv, "--side", side]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(finished.stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace) -> int:
    """Return the bytes that a step needs at its peak beyond what the process had before it."""
    model, rows = build(args, 1)
    step = our_step if args.side == "ours" else reference_step
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, rows, args)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_kilobytes(status, "VmRSS")
    step(model, rows, args)
    return 1024 * (read_kilobytes(status, "VmHWM") - before)


def read_kilobytes(status: Path, name: str) -> int:
    """Return a field of a process's status file."""
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def show(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    model: MendModel,
    single: tuple[float, float],
    shared: tuple[float, float],
    memory: Mapping[str, int],
) -> None:
    """Print what was measured."""
    lengths = MendCollator(model.tokenizer, model.mend_config)(rows)["teacher_attention_mask"].sum(1)
    share = float(lengths.sum() / (lengths.max() * len(lengths)))
    table = Table(title=f"A step of {len(rows)} rows, {args.form}, {args.num_virtual_tokens} virtual tokens")
    for column in ("", "ours", "reference", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    ours, reference = (len(rows) / seconds for seconds in single)
    table.add_row("rows a second, one query", f"{ours:.2f}", f"{reference:.2f}", f"{ours / reference:.2f}")
    ours, reference = (1 / seconds for seconds in shared)
    name = f"queries a second, {NUM_SHARED_QUERIES} of a distilling"
    table.add_row(name, f"{ours:.2f}", f"{reference:.2f}", f"{ours / reference:.2f}")
    ours, reference = (memory[side] / 1e6 for side in ("ours", "reference"))
    table.add_row("peak memory, MB", f"{ours:.0f}", f"{reference:.0f}", f"{ours / reference:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"Demonstrations of {int(lengths.min())} to {int(lengths.max())} tokens; {100 * (1 - share):.0f} % of the "
        "reference's are padding."
    )


if __name__ == "__main__":
    main()
