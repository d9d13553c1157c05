"""Where distilled demonstrations came from, and what every chunk of them holds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mend_hf.config import PLAIN_FIELDS, MendConfig
from mend_hf.demonstrations import EncodedTask
from mend_hf.fingerprint import hash_json

PROMPT_FIELDS = ("prompt_format", *PLAIN_FIELDS)


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """What one chunk holds: the smallest part that can be dropped.

    Attributes:
        demonstrations: What tells its demonstrations from others, as in `EncodedChunk`.
        num_tokens: Tokens that were read.
        num_lost_tokens: Tokens that the budgets cut away; a task's last chunk also counts what found no place.
    """

    demonstrations: list[str]
    num_tokens: int
    num_lost_tokens: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where distilled demonstrations came from. The lists have one entry a task.

    Attributes:
        base_model_name_or_path: The base model that they are for.
        base_model_fingerprint: What tells that base model from others.
        distiller_name_or_path: Where the distiller was loaded from; None: it was never saved.
        distiller_hash: Hash of the distiller's trained tensors; None: nothing was distilled, the text was only read.
        prompt_format: The config's prompt format, prefixes and separators, by field name.
        overflow: What was done with demonstrations beyond the window.
        max_slots: Slots that a query meets at most; anchors beyond that are pooled. None: all.
        anchor_pooling: How.
        chunks: The chunks of every task, in the order of their slots.
    """

    base_model_name_or_path: str | None
    base_model_fingerprint: dict[str, Any]
    distiller_name_or_path: str | None
    distiller_hash: str | None
    prompt_format: dict[str, str]
    overflow: str = "truncate"
    max_slots: int | None = None
    anchor_pooling: Literal["label", "similarity"] = "label"
    chunks: list[list[ChunkRecord]] = field(default_factory=list)

    @property
    def num_demonstrations(self) -> list[int]:
        """How many demonstrations were read, at least in part."""
        return [sum("-" not in name for chunk in task for name in chunk.demonstrations) for task in self.chunks]

    @property
    def demonstrations_hash(self) -> list[str]:
        """Hash of the demonstrations that were read, in order."""
        return [hash_json([name for chunk in task for name in chunk.demonstrations]) for task in self.chunks]

    @property
    def num_tokens(self) -> list[int]:
        """Tokens that were read."""
        return [sum(chunk.num_tokens for chunk in task) for task in self.chunks]

    @property
    def num_lost_tokens(self) -> list[int]:
        """Tokens that the budgets cut away."""
        return [sum(chunk.num_lost_tokens for chunk in task) for task in self.chunks]

    def summarize(self) -> dict[str, Any]:
        """Return every fact by name, without the list of chunks."""
        facts = dataclasses.asdict(dataclasses.replace(self, chunks=[]))
        del facts["chunks"]
        counted = ("num_demonstrations", "demonstrations_hash", "num_tokens", "num_lost_tokens")
        return facts | {name: getattr(self, name) for name in counted}


def describe_origin(
    config: MendConfig,
    encoded: Sequence[EncodedTask],
    distiller_name_or_path: str | None,
    distiller_hash: str | None,
) -> Provenance:
    """Return the provenance of tasks that a model with this config has read."""
    return Provenance(
        base_model_name_or_path=config.base_model_name_or_path,
        base_model_fingerprint=config.base_model_fingerprint or {},
        distiller_name_or_path=distiller_name_or_path,
        distiller_hash=distiller_hash,
        prompt_format={name: getattr(config, name) for name in PROMPT_FIELDS},
        overflow=config.overflow,
        max_slots=config.max_slots,
        anchor_pooling=config.anchor_pooling,
        chunks=[_describe_chunks(task, config.overflow) for task in encoded],
    )


def _describe_chunks(task: EncodedTask, overflow: str) -> list[ChunkRecord]:
    groups = [task.chunks] if overflow == "recurrent" else [[chunk] for chunk in task.chunks]
    return [
        ChunkRecord(
            demonstrations=[name for chunk in group for name in chunk.demonstrations],
            num_tokens=sum(len(chunk.input_ids) for chunk in group),
            num_lost_tokens=task.num_lost_tokens if group is groups[-1] else 0,
        )
        for group in groups
    ]


def provenance_from_record(values: dict[str, Any], format_version: int) -> Provenance:
    """Return the provenance that a file states; entries that this version does not know are dropped with a warning.

    Raises:
        ValueError: The entries are not those that `save_pretrained` writes; or KeyError, TypeError, AttributeError.
    """
    if format_version == 1:
        values = _upgrade_record(values)
    known = {field.name for field in dataclasses.fields(Provenance)}
    unknown = sorted(set(values) - known)
    if unknown:
        warnings.warn(
            f"The provenance has entries that this version does not know: {', '.join(unknown)}.", stacklevel=3
        )
    chunks = [[ChunkRecord(**chunk) for chunk in task] for task in values["chunks"]]
    values = values | {"prompt_format": {"prompt_format": "plain"} | values["prompt_format"]}  # older files lack it
    provenance = Provenance(**{key: value for key, value in values.items() if key in known} | {"chunks": chunks})
    _check_types(provenance)
    return provenance


def _check_types(provenance: Provenance) -> None:
    """Refuse entries of other types; a file may have been edited or damaged."""
    mappings = (provenance.base_model_fingerprint, provenance.prompt_format)
    texts = (provenance.base_model_name_or_path, provenance.distiller_name_or_path, provenance.distiller_hash)
    records = [chunk for task in provenance.chunks for chunk in task]
    fits = all(isinstance(value, dict) for value in mappings)
    fits &= all(isinstance(value, str | None) for value in (*texts, *provenance.prompt_format.values()))
    fits &= isinstance(provenance.max_slots, int | None) and provenance.anchor_pooling in ("label", "similarity")
    fits &= isinstance(provenance.overflow, str)
    fits &= all(type(number) is int for chunk in records for number in (chunk.num_tokens, chunk.num_lost_tokens))
    fits &= all(isinstance(name, str) for chunk in records for name in chunk.demonstrations)
    fits &= all(isinstance(chunk.demonstrations, list) for chunk in records)
    if not fits:
        raise ValueError("an entry of another type")


def _upgrade_record(values: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of format 1, in which a task had one chunk and its demonstrations no names."""
    lists = ("num_demonstrations", "demonstrations_hash", "num_tokens", "num_lost_tokens")
    chunks = [
        [
            {
                "demonstrations": [f"{text_hash}/{place}" for place in range(count)],
                "num_tokens": num_tokens,
                "num_lost_tokens": num_lost_tokens,
            }
        ]
        for count, text_hash, num_tokens, num_lost_tokens in zip(*(values[name] for name in lists), strict=True)
    ]
    return {name: value for name, value in values.items() if name not in lists} | {"chunks": chunks}
