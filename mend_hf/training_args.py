"""Training arguments: those of transformers, and how the losses are weighed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import TrainingArguments

from mend_hf.errors import ConfigError
from mend_hf.losses import Divergence

if TYPE_CHECKING:
    from typing_extensions import Self

# Numbers of a training that have proved themselves, by name; everything else is as in `MendTrainingArguments`.
RECIPES: dict[str, dict[str, Any]] = {
    "pretrain": {"nll_loss_weight": 0.0, "kd_loss_weight": 1.0, "learning_rate": 5e-4},
    "finetune": {"nll_loss_weight": 1.0, "kd_loss_weight": 1.0, "learning_rate": 5e-4},
    # MEND, Li et al., ICLR 2024, arXiv 2403.06914: a distiller of its own, trained as a whole (lora_r=0).
    "paper-pretrain": {
        "nll_loss_weight": 0.0, "kd_loss_weight": 1.0, "learning_rate": 5e-5, "max_steps": 30_000,
        "lr_scheduler_type": "linear", "warmup_steps": 0,
    },
    "paper-finetune": {
        "nll_loss_weight": 1.0, "kd_loss_weight": 1.0, "learning_rate": 1e-5, "max_steps": 30_000,
        "lr_scheduler_type": "linear", "warmup_steps": 0,
    },
    # HyperTuning, Phang et al., ICML 2023, arXiv 2211.12485: the targets alone, no teacher.
    "hypertuning": {"nll_loss_weight": 1.0, "kd_loss_weight": 0.0, "learning_rate": 5e-4},
    # MetaICL, Min et al., NAACL 2022, arXiv 2110.15943: the base model itself, on the demonstrations' text.
    "metaicl": {"nll_loss_weight": 1.0, "kd_loss_weight": 0.0, "learning_rate": 1e-5},
}  # fmt: skip

# Recipes that tune the base model itself, on the demonstrations' full text, and make no distiller.
RECIPES_WITHOUT_DISTILLER = frozenset({"metaicl"})


@dataclass
class MendTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the losses and their weights.

    Raises:
        ConfigError: A weight or the temperature is impossible, or two settings exclude each other.
    """

    nll_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the targets' negative log-likelihood, in nats a token."}
    )
    kd_loss_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the divergence from the teacher over all query and target tokens, in nats a token."
        },
    )
    option_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy of choosing the target among a row's options, in nats a query, as "
            "`losses.option_loss`; 0: the wrong options are not read."
        },
    )
    calibrate_options: bool = field(
        default=False,
        metadata={
            "help": "Take off, before options are compared in that loss, what each gets on average over a row's "
            "queries (batch calibration): only what tells queries apart is trained then."
        },
    )
    kd_divergence: Divergence = field(
        default="forward_kl",
        metadata={"help": "KL(teacher || student), KL(student || teacher), or Jensen-Shannon, see `losses.kd_loss`."},
    )
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Softens both distributions in the divergence; it is scaled by the square."}
    )
    kd_top_k: int = field(
        default=0,
        metadata={"help": "Keep the teacher's k likeliest tokens, and all others as one; 0: the whole vocabulary."},
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the teacher's top k tokens of every row, for rows that come again."},
    )
    hidden_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance from the teacher's hidden states, as `losses.hidden_loss`."},
    )
    hidden_loss_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Outputs of these layers: 1 is the first's, -1 the last's. None: of all layers."},
    )
    max_tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "A batch with more demonstration and query tokens is read in several passes, rows of like length "
            "together, which saves padding and memory and changes no gradient. None: 1024 on a CPU, 16384 elsewhere; "
            "0: always in one."
        },
    )
    probe_steps: int = field(
        default=100,
        metadata={"help": "Steps between two looks at the probe rows, where there are some, see `probe.Probe`."},
    )
    nonfinite_loss: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "help": "A loss that is no finite number stops the training and its batch is written into the output "
            "folder; or the batch is skipped and counted in the log."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the rows' own columns."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns that hold labels, for evaluation."}
    )

    @classmethod
    def from_recipe(cls, name: str, **settings: Any) -> Self:
        """Return the arguments of a named recipe.

        Args:
            name: One of `RECIPES`.
            **settings: `output_dir`, and whatever should differ from the recipe.

        Raises:
            ConfigError: There is no such recipe.
        """
        if name not in RECIPES:
            raise ConfigError(f"Expected a recipe among {', '.join(RECIPES)}, got {name!r}.")
        return cls(**(RECIPES[name] | settings))

    @property
    def tokens_per_pass(self) -> int:
        """The most tokens of a pass on the device at hand; 0: no limit."""
        if self.max_tokens_per_pass is not None:
            return self.max_tokens_per_pass
        return 1024 if self.device.type == "cpu" else 16384

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares the student with the base model that reads the demonstrations' text."""
        return self.kd_loss_weight > 0 or self.hidden_loss_weight > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("nll_loss_weight", "kd_loss_weight", "option_loss_weight", "hidden_loss_weight")
        problems = [
            f"{name}: expected 0 or more, got {getattr(self, name)}"
            for name in (*weights, "kd_top_k")
            if getattr(self, name) < 0
        ]
        if not any(getattr(self, name) for name in weights):
            problems.append(f"{', '.join(weights)}: expected at least one above 0, got 0 for all")
        if self.calibrate_options and not self.option_loss_weight:
            problems.append(
                "calibrate_options: expected option_loss_weight above 0 beside it, because it changes that loss "
                f"alone, got {self.option_loss_weight}"
            )
        if self.kd_divergence not in get_args(Divergence):
            problems.append(f"kd_divergence: expected {' or '.join(get_args(Divergence))}, got {self.kd_divergence!r}")
        if self.nonfinite_loss not in ("stop", "skip"):
            problems.append(f"nonfinite_loss: expected 'stop' or 'skip', got {self.nonfinite_loss!r}")
        if self.kd_temperature <= 0:
            problems.append(f"kd_temperature: expected a number above 0, got {self.kd_temperature}")
        if self.max_tokens_per_pass is not None and self.max_tokens_per_pass < 0:
            problems.append(f"max_tokens_per_pass: expected 0 or more, or None, got {self.max_tokens_per_pass}")
        if self.probe_steps < 1:
            problems.append(f"probe_steps: expected 1 or more, got {self.probe_steps}")
        if self.hidden_loss_layers == []:
            problems.append("hidden_loss_layers: expected at least one layer, or None for all, got none")
        if self.teacher_cache_dir is not None and (not self.kd_top_k or self.hidden_loss_weight):
            problems.append(
                "teacher_cache_dir: expected kd_top_k above 0 and hidden_loss_weight=0, because only top tokens are "
                f"small enough to keep, got kd_top_k={self.kd_top_k}, hidden_loss_weight={self.hidden_loss_weight}"
            )
        if self.accelerator_config.dispatch_batches:
            problems.append(
                "accelerator_config: expected dispatch_batches=False, because batches of several processes are not "
                "one batch that could be cut apart, got True"
            )
        self.accelerator_config.dispatch_batches = False  # None would mean True where rows come as a stream
        if self.remove_unused_columns:
            problems.append(
                "remove_unused_columns: expected False, the collator reads the rows' own columns; got True"
            )
        if problems:
            raise ConfigError("MendTrainingArguments got impossible values:\n" + "\n".join(f"- {p}" for p in problems))
