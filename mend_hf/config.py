"""The settings of a distiller: one frozen dataclass, checked when it is made, saved as `mend_config.json`."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mend_hf import __version__
from mend_hf.architectures import TaskType
from mend_hf.errors import ConfigError
from mend_hf.files import fetch_json, write_folder, write_json
from mend_hf.saved_pair import HASH_NAME, VERSION_NAME, check_version

CONFIG_NAME = "mend_config.json"
FORMAT_VERSION = 1
PLAIN_FIELDS = ("input_prefix", "output_prefix", "answer_prefix", "demonstration_separator")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class MendConfig:
    """Everything that decides how demonstrations become a prefix, beside the weights.

    Every field has a default; `field.metadata["help"]` says what it does. Facts that the base model's own
    configuration holds (widths, layers, heads) are not repeated here.

    Raises:
        ConfigError: One or more values are impossible; the message lists all of them.
    """

    base_model_name_or_path: str | None = _setting(None, "The frozen base model: a Hub id or a folder.")
    base_model_revision: str | None = _setting(None, "Branch, tag or commit of the base model on the Hub.")
    base_model_fingerprint: dict[str, Any] | None = _setting(
        None, "Widths, layer counts and vocabulary hash of the base model; filled in by `get_mend_model`."
    )
    task_type: TaskType | None = _setting(
        None, "PEFT's name for the kind of base model; filled in by `get_mend_model`."
    )
    distiller_name_or_path: str | None = _setting(
        None, "A model of its own that reads the demonstrations; None: the base model itself with a LoRA adapter."
    )
    distiller_revision: str | None = _setting(None, "Branch, tag or commit of a separate distiller on the Hub.")
    lora_r: int = _setting(16, "Rank of the LoRA adapter; 0: no adapter (a separate distiller is then fully trained).")
    lora_alpha: int = _setting(32, "LoRA scaling: the update is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _setting(0.0, "Dropout on the LoRA input while the distiller trains.")
    lora_target_modules: str | tuple[str, ...] = _setting(
        "all-linear", 'Modules that get LoRA matrices: "all-linear", or names as in peft\'s `LoraConfig`.'
    )
    num_virtual_tokens: int = _setting(100, "V, the number of learned placeholder positions.")
    prefix_form: Literal["kv", "embeds"] | None = _setting(
        None, "Keys and values, or input embeddings; None: kv for a shared distiller of a decoder-only model."
    )
    anchor_tokens: Literal["answers", "none"] = _setting(
        "answers", "Whose keys and values a kv prefix keeps beside sink and placeholders: the answers' own tokens'."
    )
    max_anchor_tokens_per_demonstration: int = _setting(8, "Cap on the anchors of one demonstration.")
    overflow: Literal["truncate", "concat", "recurrent"] = _setting(
        "truncate",
        "Demonstrations beyond the window: drop the last ones, distil chunks apart, or let a chunk see the previous.",
    )
    max_demonstrations_per_chunk: int | None = _setting(
        None,
        "Demonstrations in one chunk; a chunk can be dropped later, a part of it cannot. None: as many as the window "
        "holds.",
    )
    max_slots: int | None = _setting(
        None, "Slots of a kv prefix: more anchors than that are pooled. None: all anchors are kept."
    )
    anchor_pooling: Literal["label", "similarity"] = _setting(
        "label",
        "Which anchors are pooled: those of the same token of the same answer, or those whose values are alike.",
    )
    max_demonstration_tokens: int = _setting(256, "A longer demonstration loses the end of its input.")
    max_distiller_tokens: int = _setting(900, "Demonstration tokens that the distiller reads at once.")
    prompt_format: Literal["plain", "chat"] = _setting(
        "plain",
        "How demonstrations and queries are written: between the four texts below, or as turns of the tokenizer's "
        "chat template, which says what stands there.",
    )
    input_prefix: str = _setting("Input: ", "Text before every input.")
    output_prefix: str = _setting("\nOutput:", "Text between an input and its output.")
    answer_prefix: str = _setting(" ", "Text in front of every output, tokenised together with it.")
    demonstration_separator: str = _setting("\n\n", "Text after every demonstration.")
    placeholder_initialization: Literal["prompt", "vocabulary"] | None = _setting(
        None,
        "Placeholder embeddings at birth: the tokens of the empty prompt format, over and over, which disturb least, "
        "or random rows of the vocabulary; None: the prompt where a tokenizer is known.",
    )
    projection: Literal["linear", "tanh"] = _setting(
        "linear",
        "From the distiller's last hidden state to what is added to the base model's vectors, or keys and values "
        "(embeds form; a separate distiller also in the kv form).",
    )
    projection_rank: int = _setting(
        64, "Rank of the projection from a separate distiller to keys and values (kv form); 0: full, and many weights."
    )
    training_stages: list[dict[str, Any]] | None = _setting(
        None, "Numbers of the trainings so far, first to last; `MendTrainer` writes them down."
    )
    mend_version: str | None = _setting(None, "The version of mend_hf that saved this file.")

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, list):
            object.__setattr__(self, "lora_target_modules", tuple(self.lora_target_modules))
        problems = [*_type_problems(self), *_value_problems(self)]
        if problems:
            raise ConfigError("MendConfig got impossible values:\n" + "\n".join(f"- {line}" for line in problems))

    @property
    def is_shared(self) -> bool:
        """Whether the base model itself, with its adapter on, reads the demonstrations."""
        return self.distiller_name_or_path is None

    def without_chunks(self, **changes: Any) -> MendConfig:
        """Return this config for reading one text as a whole, with neither chunks nor pooling, and other changes."""
        whole: dict[str, Any] = {"overflow": "truncate", "max_demonstrations_per_chunk": None, "max_slots": None}
        return dataclasses.replace(self, **whole | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = dataclasses.asdict(self)
        if isinstance(self.lora_target_modules, tuple):
            values["lora_target_modules"] = list(self.lora_target_modules)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MendConfig:
        """Build a config from JSON values; keys that this version does not know are dropped with a warning."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {HASH_NAME, VERSION_NAME})
        if unknown:
            warnings.warn(
                f"MendConfig does not know {', '.join(unknown)} and ignores it: a newer mend_hf may have written it "
                f"(mend_version {values.get('mend_version')}). Upgrade mend_hf, or check the spelling.",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `mend_config.json` into a folder, which is made if need be."""
        with write_folder(save_directory) as folder:
            write_json(folder / CONFIG_NAME, self.to_record())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> MendConfig:
        """Read `mend_config.json` from a folder or a Hub repository.

        Args:
            name_or_path: A local folder, or a Hub id.
            **hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only` ... as in transformers.

        Raises:
            CheckpointError: There is no readable `mend_config.json`, or a newer mend_hf wrote it.
            ConfigError: The file holds impossible values.
        """
        return cls.from_record(fetch_json(name_or_path, CONFIG_NAME, **hub))

    def to_record(self) -> dict[str, Any]:
        """Return what `mend_config.json` holds."""
        return self.to_dict() | {"mend_version": __version__, VERSION_NAME: FORMAT_VERSION}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> MendConfig:
        """Build a config from what `mend_config.json` holds; errors as in `from_pretrained`."""
        check_version(record, FORMAT_VERSION, CONFIG_NAME, oldest=1)
        return cls.from_dict(record)


def _type_problems(config: MendConfig) -> list[str]:
    """Compare every value with its annotation: a config may come from a JSON file that somebody edited."""
    hints = typing.get_type_hints(MendConfig)
    problems = []
    for setting in dataclasses.fields(config):
        value, hint = getattr(config, setting.name), hints[setting.name]
        options = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
        allowed = options or (hint,)
        if not any(_matches(value, option) for option in allowed):
            expected = " or ".join(_describe(option) for option in allowed)
            problems.append(f"{setting.name}: expected {expected}, got {value!r}")
    return problems


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is list:
        return isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _value_problems(config: MendConfig) -> list[str]:
    minimum = {
        "lora_r": 0,
        "lora_alpha": 1,
        "num_virtual_tokens": 0,
        "projection_rank": 0,
        "max_anchor_tokens_per_demonstration": 1,
        "max_demonstrations_per_chunk": 1,
        "max_slots": 1,
        "max_demonstration_tokens": 8,
        "max_distiller_tokens": 8,
    }
    problems = [
        f"{name}: expected at least {least}, got {value}"
        for name, least in minimum.items()
        if isinstance(value := getattr(config, name), int) and value < least
    ]
    if isinstance(config.lora_dropout, int | float) and not 0.0 <= config.lora_dropout < 1.0:
        problems.append(f"lora_dropout: expected a share from 0 up to 1, got {config.lora_dropout}")
    if config.prompt_format == "chat":
        problems += [
            f'{setting.name}: with prompt_format="chat" the chat template says what stands there; leave it out'
            for setting in dataclasses.fields(config)
            if setting.name in PLAIN_FIELDS and getattr(config, setting.name) != setting.default
        ]
    if config.num_virtual_tokens == 0 and config.prefix_form == "embeds":
        problems.append(
            "num_virtual_tokens: the embeds form consists of virtual tokens alone and needs at least 1, got 0"
        )
    if config.max_demonstrations_per_chunk is not None and config.overflow == "truncate":
        problems.append(
            'max_demonstrations_per_chunk: overflow="truncate" has one chunk only; use "concat" or "recurrent"'
        )
    if config.max_slots is not None and config.prefix_form == "embeds":
        problems.append('max_slots: vectors are never pooled; use prefix_form="kv", or lower num_virtual_tokens')
    if isinstance(config.max_slots, int) and 0 < config.max_slots < 1 + config.num_virtual_tokens:
        problems.append(
            f"max_slots: expected room for the sink and {config.num_virtual_tokens} placeholders, got "
            f"{config.max_slots}; raise it, or lower num_virtual_tokens"
        )
    if config.distiller_name_or_path is not None:
        if config.prefix_form == "kv" and config.num_virtual_tokens == 0:
            problems.append(
                "num_virtual_tokens: a separate distiller writes virtual tokens alone and needs at least 1, got 0"
            )
        if config.prefix_form == "kv" and config.max_slots is not None:
            problems.append(
                "max_slots: a separate distiller has no anchors that could be pooled; leave it out, and lower "
                "num_virtual_tokens"
            )
        if config.overflow == "recurrent":
            problems.append(
                'overflow: "recurrent" feeds vectors back into the base model and needs the shared distiller; '
                'use "concat"'
            )
    return problems
