"""Ways to a MendModel: around a base model at hand, or together with the base model that a distiller names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mend_hf.architectures import AUTO_CLASS_NAMES, TaskType
from mend_hf.config import MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.model import MendModel

AUTO_CLASSES: dict[TaskType, Any] = {
    task_type: getattr(transformers, name) for task_type, name in AUTO_CLASS_NAMES.items()
}
_CONFIG_ARGUMENTS = {
    "cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "proxies", "revision",
    "subfolder", "token", "trust_remote_code",
}  # fmt: skip


def get_mend_model(
    base_model: PreTrainedModel, config: MendConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> MendModel:
    """Wrap a base model with a new, untrained distiller.

    Args:
        base_model: Frozen from here on; a shared distiller puts its LoRA matrices into it, switched off.
        config: Fields that can be read off the base model are filled in.
        tokenizer: The base model's; None: looked up under the base model's name when text comes in.

    Raises:
        UnsupportedModelError: The base model cannot read a prefix.
        CheckpointError: `config` was made for another base model.
    """
    return MendModel(base_model, config, tokenizer)


def load_language_model(name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Return a decoder-only or an encoder-decoder language model, as its config says.

    Args:
        name_or_path: A folder or a Hub id.
        **kwargs: Passed to `from_pretrained`.
    """
    hub = {name: value for name, value in kwargs.items() if name in _CONFIG_ARGUMENTS}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **hub)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(name_or_path, **kwargs)


class AutoMendModel:
    """Loads a distiller together with the base model that its config names."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *,
        hub: dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **base_model_kwargs: Any,
    ) -> MendModel:
        """Return a saved distiller on its base model.

        Args:
            name_or_path: A folder that `save_pretrained` wrote, or a Hub id.
            hub: `revision`, `token`, `subfolder` ... for the distiller.
            tokenizer: The base model's; None: looked up under the base model's name.
            **base_model_kwargs: Passed to the auto class of the config's task type: `dtype`, `device_map`, ...

        Raises:
            CheckpointError: The distiller is missing, damaged, or does not name its base model.
        """
        config = MendConfig.from_pretrained(name_or_path, **(hub or {}))
        if config.base_model_name_or_path is None:
            raise CheckpointError(
                f"Expected {name_or_path} to name its base model, got none: load the base model yourself and use "
                "MendModel.from_pretrained(base_model, ...)."
            )
        base_model_kwargs.setdefault("revision", config.base_model_revision or "main")
        load = AUTO_CLASSES[config.task_type].from_pretrained if config.task_type else load_language_model
        base_model = load(config.base_model_name_or_path, **base_model_kwargs)
        return MendModel.from_pretrained(base_model, name_or_path, tokenizer, config=config, **(hub or {}))
