"""transformers' own auto classes, and all that is built on them, for distillers: on request, since it changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mend_hf.architectures import DISTILLER_TYPE, DistillerConfig, TaskType
from mend_hf.auto import AUTO_CLASSES, AutoMendModel
from mend_hf.config import MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.model import MendModel

_HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
# What the auto classes add for purposes of their own.
_OTHERS_ARGUMENTS = ("config", "adapter_kwargs", "code_revision", "_commit_hash", "_from_auto")


class _Loader:
    """What an auto class finds for a `DistillerConfig`, with one task type a subclass."""

    config_class = DistillerConfig
    task_type: ClassVar[TaskType]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *args: Any, **kwargs: Any) -> MendModel:
        """Return a MendModel: the distiller on the base model that it names.

        Args:
            name_or_path: A folder or a Hub id.
            *args: Accepted as the auto classes give them.
            **kwargs: `revision`, `subfolder`, `token` ... are the distiller's, all others the base model's.

        Raises:
            CheckpointError: The distiller is missing, damaged, for another task type, or names no base model.
        """
        hub, rest = _split(kwargs)
        own = MendConfig.from_pretrained(name_or_path, **hub).task_type
        if own not in (cls.task_type, None):
            raise CheckpointError(
                f"Expected a distiller for {AUTO_CLASSES[cls.task_type].__name__}, got one for "
                f"{AUTO_CLASSES[own].__name__} in {name_or_path}: load it with that class."
            )
        return AutoMendModel.from_pretrained(name_or_path, hub=hub, **rest)


class DistillerTokenizer(PreTrainedTokenizerFast):
    """What `AutoTokenizer` finds for a `DistillerConfig`."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the base model that a distiller names."""
        hub, rest = _split(kwargs)
        config = MendConfig.from_pretrained(name_or_path, **hub)
        if config.base_model_name_or_path is None:
            raise CheckpointError(
                f"Expected {name_or_path} to name its base model, got none: load the tokenizer of the base model."
            )
        return AutoTokenizer.from_pretrained(
            config.base_model_name_or_path, *args, revision=config.base_model_revision or "main", **rest
        )


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that are the distiller's, and those of its base model; a token is for both."""
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    rest = {name: value for name, value in kwargs.items() if name not in (*_HUB_ARGUMENTS, *_OTHERS_ARGUMENTS)}
    return hub, rest | ({"token": hub["token"]} if "token" in hub else {})


def register_auto_classes() -> None:
    """Let transformers' auto classes and pipelines load distillers by name from here on, each on its base model.

    `AutoModelForCausalLM.from_pretrained("user/mend-x")` then returns a MendModel, `AutoTokenizer` the base model's
    tokenizer, and `pipeline("text-generation", model="user/mend-x")` works. May be called more than once.
    """
    AutoConfig.register(DISTILLER_TYPE, DistillerConfig, exist_ok=True)
    for task_type, auto_class in AUTO_CLASSES.items():
        # Pipelines compare the name of a model's class with the names in these tables.
        loader = type(MendModel.__name__, (_Loader,), {"task_type": task_type})
        auto_class.register(DistillerConfig, loader, exist_ok=True)
    AutoTokenizer.register(DistillerConfig, tokenizer_class=DistillerTokenizer, exist_ok=True)
