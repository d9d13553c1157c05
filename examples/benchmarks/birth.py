"""What an untrained prefix costs: KL to the full text and NLL of the targets, beside zero-shot.

    python examples/benchmarks/birth.py --tasks examples/data

The last line is `RESULT zero_shot_kl=... worst_kl=...`: of all untrained forms the worst, which must not be more than
0.1 nats a token above zero-shot. The two rows with random tokens show what the default start is worth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mend_hf import MendCollator, MendConfig, MendModel, get_mend_model
from mend_hf.architectures import CACHE_NAME
from mend_hf.caches import continue_inputs
from mend_hf.data.few_shot import FewShotDataset
from mend_hf.data.metaicl import load_tasks
from mend_hf.losses import kd_loss, nll_loss
from mend_hf.prefix import KeyValuePrefix

sys.path.append(str(Path(__file__).parents[1]))
from weights import load_smollm2

FORMS: dict[str, dict] = {
    "kv, anchors only (no training needed)": {"num_virtual_tokens": 0},
    "kv, 16 placeholders": {"num_virtual_tokens": 16, "anchor_tokens": "none"},
    "kv, 100 placeholders": {"num_virtual_tokens": 100, "anchor_tokens": "none"},
    "kv, anchors and 16 placeholders": {"num_virtual_tokens": 16},
    "kv, anchors and 100 placeholders": {"num_virtual_tokens": 100},
    "embeds, 16 vectors": {"num_virtual_tokens": 16, "prefix_form": "embeds"},
    "embeds, 100 vectors": {"num_virtual_tokens": 100, "prefix_form": "embeds"},
}
RANDOM = {"placeholder_initialization": "vocabulary"}
COMPARED: dict[str, dict] = {
    "kv, 100 placeholders, random tokens": FORMS["kv, 100 placeholders"] | RANDOM,
    "embeds, 100 vectors, random tokens": FORMS["embeds, 100 vectors"] | RANDOM,
}


@torch.no_grad()
def measure(model: MendModel, batches: Iterable[dict[str, torch.Tensor]], *, zero_shot: bool = False) -> list[float]:
    """Return the slots, the KL to the teacher and the targets' NLL, both in nats a token, as means over batches."""
    results = []
    for columns in batches:
        batch = dict(columns)
        labels = batch.pop("labels")[:, 1:]
        text = model.read_tokens(batch.pop("teacher_input_ids"), batch.pop("teacher_attention_mask"))
        mask = batch["attention_mask"].bool()
        teacher = _logits(model, text.select(batch["query_task_rows"]), batch)
        outputs = model.base_model(**_query(batch)) if zero_shot else model(**batch)
        slots = 0 if zero_shot else outputs[CACHE_NAME].get_seq_length() - mask.shape[1]
        student = outputs.logits[:, :-1]
        kl = kd_loss(student, teacher, mask[:, 1:] & mask[:, :-1])
        results.append([slots, kl.item(), nll_loss(student, labels).item()])
    return torch.tensor(results).mean(0).tolist()


def _query(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _logits(model: MendModel, prefix: KeyValuePrefix, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = continue_inputs(prefix, batch["attention_mask"], model.base_model)
    return model.base_model(input_ids=batch["input_ids"], **inputs).logits[:, :-1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=str(Path(__file__).parents[1] / "data"), help="tasks in MetaICL's format")
    parser.add_argument("--num-rows", type=int, default=6, help="rows of 6 demonstrations and 4 queries")
    args = parser.parse_args()
    torch.manual_seed(0)
    base, tokenizer = load_smollm2()
    rows = FewShotDataset(
        load_tasks(args.tasks), num_demonstrations=6, queries_per_demonstrations=4, num_rows=args.num_rows, seed=0
    )
    table = Table("prefix", "slots", "KL to the full text", "target NLL", title="Untrained, nats a token")
    kls = {}
    for name, settings in {"zero-shot": {"num_virtual_tokens": 0}, **FORMS, **COMPARED}.items():
        model = get_mend_model(base, MendConfig(**settings), tokenizer)
        collator = MendCollator(tokenizer, model.mend_config)
        slots, kl, nll = measure(model, (collator([row]) for row in rows), zero_shot=name == "zero-shot")
        table.add_row(name, f"{slots:.0f}", f"{kl:.2f}", f"{nll:.2f}")
        kls[name] = kl
        model.unload()
    Console().print(table)
    print(f"RESULT zero_shot_kl={kls['zero-shot']:.3f} worst_kl={max(kls[name] for name in FORMS):.3f}")


if __name__ == "__main__":
    main()
