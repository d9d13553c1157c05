"""The option `--compare` of `mend evaluate`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mend_hf.cli.options import load_base_model, wrap_for_answering
from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError, ConfigError
from mend_hf.files import fetch_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mend_hf.evaluation.readers import Method


def parse_comparisons(words: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Return folders or Hub ids by the names of their methods.

    Args:
        words: Each NAME=FOLDER_OR_HUB_ID.
        taken: Names of other methods.

    Raises:
        ConfigError: One is of another form, or its name is not its own.
    """
    places: dict[str, str] = {}
    for word in words:
        name, _, place = word.partition("=")
        if not name or not place:
            raise ConfigError(f"Expected --compare NAME=FOLDER_OR_HUB_ID, got {word!r}.")
        if name in places or name in taken:
            raise ConfigError(f"Expected a name of its own for what is compared, got {name!r} again: choose another.")
        places[name] = place
    return places


def load_comparisons(
    places: Mapping[str, str],
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: MendConfig,
) -> dict[str, Method]:
    """Return methods by name: MEND with another distiller, or in-context learning with another language model.

    Args:
        places: Folders or Hub ids; what holds a distiller's config is a distiller for this base model.
        base_model: Not wrapped yet; distillers share its weights.
        tokenizer: The base model's.
        config: Its prompt format and budgets are those of other language models.

    Raises:
        CheckpointError: A distiller is damaged, or was trained for another base model.
        ConfigError: There is neither a distiller nor a language model.
    """
    from mend_hf.evaluation.comparison import distil_with, read_with, share_weights

    methods: dict[str, Method] = {}
    for name, place in places.items():
        if _holds_distiller(place):
            methods[name] = distil_with(wrap_for_answering(share_weights(base_model), tokenizer, place))
        else:
            other = load_base_model(place, str(base_model.device), base_model.dtype)
            methods[name] = read_with(wrap_for_answering(*other, None, config))
    return methods


def _holds_distiller(place: str) -> bool:
    if Path(place).is_dir():
        return Path(place, CONFIG_NAME).is_file()
    try:
        fetch_file(place, CONFIG_NAME)
    except CheckpointError:
        return False
    return True
