"""Training arguments: those of transformers, and how the two losses are weighed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from mend_hf.errors import ConfigError

STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {"nll_loss_weight": 0.0, "kd_loss_weight": 1.0, "learning_rate": 5e-4},
    "finetune": {"nll_loss_weight": 1.0, "kd_loss_weight": 1.0, "learning_rate": 5e-4},
}


@dataclass
class MendTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the weights of the distillation losses.

    `STAGE_DEFAULTS` holds the numbers in which the two stages differ.

    Raises:
        ConfigError: A weight or the temperature is impossible.
    """

    nll_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the targets' negative log-likelihood, in nats a token."}
    )
    kd_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of KL(teacher || student) over all query and target tokens, in nats a token."},
    )
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Softens both distributions in the divergence; it is scaled by the square."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the rows' own columns."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns that hold labels, for evaluation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected 0 or more, got {getattr(self, name)}"
            for name in ("nll_loss_weight", "kd_loss_weight")
            if getattr(self, name) < 0
        ]
        if self.nll_loss_weight == self.kd_loss_weight == 0:
            problems.append("nll_loss_weight and kd_loss_weight: expected at least one above 0, got 0 for both")
        if self.kd_temperature <= 0:
            problems.append(f"kd_temperature: expected a number above 0, got {self.kd_temperature}")
        if self.remove_unused_columns:
            problems.append(
                "remove_unused_columns: expected False, the collator reads the rows' own columns; got True"
            )
        if problems:
            raise ConfigError("MendTrainingArguments got impossible values:\n" + "\n".join(f"- {p}" for p in problems))
