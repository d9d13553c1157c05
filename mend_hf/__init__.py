"""Few-shot prompting without paying for the shots: demonstrations distilled into a prefix for a frozen model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mend_hf.artifact import DistilledDemonstrations, join_demonstrations
    from mend_hf.auto import AutoMendModel, get_mend_model
    from mend_hf.auto_classes import register_auto_classes
    from mend_hf.cards import CardFacts
    from mend_hf.config import MendConfig
    from mend_hf.curves import plot_training
    from mend_hf.data.collator import MendCollator
    from mend_hf.demonstrations import Demonstration
    from mend_hf.model import MendModel
    from mend_hf.pipeline import FewShotClassificationPipeline, FewShotTextGenerationPipeline, register_pipelines
    from mend_hf.store import DemonstrationStore
    from mend_hf.trainer import MendTrainer
    from mend_hf.training_args import MendTrainingArguments

_MODULE_OF = {
    "AutoMendModel": "auto",
    "CardFacts": "cards",
    "Demonstration": "demonstrations",
    "DemonstrationStore": "store",
    "DistilledDemonstrations": "artifact",
    "FewShotClassificationPipeline": "pipeline",
    "FewShotTextGenerationPipeline": "pipeline",
    "MendCollator": "data.collator",
    "MendConfig": "config",
    "MendModel": "model",
    "MendTrainer": "trainer",
    "MendTrainingArguments": "training_args",
    "get_mend_model": "auto",
    "register_auto_classes": "auto_classes",
    "register_pipelines": "pipeline",
    "join_demonstrations": "artifact",
    "plot_training": "curves",
}

__all__ = [
    "AutoMendModel",
    "CardFacts",
    "Demonstration",
    "DemonstrationStore",
    "DistilledDemonstrations",
    "FewShotClassificationPipeline",
    "FewShotTextGenerationPipeline",
    "MendCollator",
    "MendConfig",
    "MendModel",
    "MendTrainer",
    "MendTrainingArguments",
    "__version__",
    "get_mend_model",
    "join_demonstrations",
    "plot_training",
    "register_auto_classes",
    "register_pipelines",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import mend_hf` costs next to nothing."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
