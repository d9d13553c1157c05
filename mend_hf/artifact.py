"""Distilled demonstrations as a thing: tensors and where they came from, saved and loaded without the distiller."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import PushToHubMixin

from mend_hf import __version__
from mend_hf.config import MendConfig
from mend_hf.demonstrations import EncodedTask
from mend_hf.errors import CheckpointError, DataError
from mend_hf.files import fetch_file, read_json, read_tensors, write_folder, write_json
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, Prefix

WEIGHTS_NAME = "distilled_demonstrations.safetensors"
RECORD_NAME = "distilled_demonstrations.json"
FORMAT_VERSION = 1
PROMPT_FIELDS = ("input_prefix", "output_prefix", "answer_prefix", "demonstration_separator")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where distilled demonstrations came from. The lists have one entry a task.

    Attributes:
        base_model_name_or_path: The base model that they are for.
        base_model_fingerprint: What tells that base model from others.
        distiller_name_or_path: Where the distiller was loaded from; None: it was never saved.
        distiller_hash: Hash of the distiller's trained tensors; None: nothing was distilled, the text was only read.
        prompt_format: The config's prefixes and separators, by field name.
        num_demonstrations: How many demonstrations were read, at least in part.
        demonstrations_hash: Hash of all texts that were given, in order.
        num_tokens: Tokens that were read.
        num_lost_tokens: Tokens that the budgets cut away.
    """

    base_model_name_or_path: str | None
    base_model_fingerprint: dict[str, Any]
    distiller_name_or_path: str | None
    distiller_hash: str | None
    prompt_format: dict[str, str]
    num_demonstrations: list[int] = field(default_factory=list)
    demonstrations_hash: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_lost_tokens: list[int] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> Provenance:
        """Return the provenance of the given tasks."""
        lists: dict[str, Any] = {
            name: [value[row] for row in rows]
            for name, value in dataclasses.asdict(self).items()
            if isinstance(value, list)
        }
        return dataclasses.replace(self, **lists)


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
        num_demonstrations=[task.num_demonstrations for task in encoded],
        demonstrations_hash=[task.text_hash for task in encoded],
        num_tokens=[task.num_tokens for task in encoded],
        num_lost_tokens=[task.num_lost_tokens for task in encoded],
    )


class DistilledDemonstrations(PushToHubMixin):
    """The demonstrations of one or more tasks as a prefix, in place of their text.

    Behaves as a sequence of tasks: `len`, iteration and indexing; `select` picks one task for every row of a batch.

    Args:
        prefix: Keys and values, or vectors, one row a task.
        provenance: Where they came from.
    """

    def __init__(self, prefix: Prefix, provenance: Provenance) -> None:
        self.prefix = prefix
        self.provenance = provenance

    def __len__(self) -> int:
        return len(self.prefix)

    def __getitem__(self, row: int) -> DistilledDemonstrations:
        if not -len(self) <= row < len(self):
            raise IndexError(f"Expected a task from 0 to {len(self) - 1}, got {row}.")
        return self.select([row % len(self)])

    def __iter__(self) -> Iterator[DistilledDemonstrations]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"DistilledDemonstrations(form={self.prefix_form!r}, tasks={len(self)}, slots={self.num_slots}, "
            f"bytes={self.num_bytes:,}, demonstrations={self.provenance.num_demonstrations})"
        )

    @property
    def prefix_form(self) -> str:
        """Return "kv" or "embeds"."""
        return "kv" if isinstance(self.prefix, KeyValuePrefix) else "embeds"

    @property
    def num_slots(self) -> int:
        """How many positions every query attends to in place of the demonstrations' text."""
        return self.prefix.num_slots

    @property
    def num_bytes(self) -> int:
        """Size of the vectors, or of the keys and values, in bytes."""
        return self.prefix.num_bytes

    @property
    def vectors(self) -> Tensor:
        """The vectors (tasks, V, E) of the embeds form.

        Raises:
            DataError: These are keys and values.
        """
        if isinstance(self.prefix, KeyValuePrefix):
            raise DataError(
                'Expected the "embeds" form, got keys and values, which have no vectors: read .prefix.keys and '
                '.prefix.values, or distil with prefix_form="embeds".'
            )
        return self.prefix.vectors

    def select(self, rows: Sequence[int]) -> DistilledDemonstrations:
        """Return the given tasks, in this order; a task may occur more than once."""
        return DistilledDemonstrations(self.prefix.select(rows), self.provenance.select(rows))

    def save_pretrained(self, save_directory: str | Path, **push_to_hub: Any) -> None:
        """Write the tensors (safetensors) and their provenance (JSON) into a folder.

        Args:
            save_directory: Made if need be; either both files are written or none.
            **push_to_hub: Accepted for `push_to_hub`, which saves through this method.
        """
        record = {
            "format_version": FORMAT_VERSION,
            "mend_version": __version__,
            "prefix_form": self.prefix_form,
            "provenance": dataclasses.asdict(self.provenance),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        with write_folder(save_directory) as folder:
            save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            write_json(folder / RECORD_NAME, record)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> DistilledDemonstrations:
        """Load distilled demonstrations from a folder or a Hub repository; no distiller is needed.

        Args:
            name_or_path: A local folder, or a Hub id.
            **hub: `revision`, `token`, `cache_dir`, `subfolder` ... as in transformers.

        Raises:
            CheckpointError: Files are missing, damaged, or of a newer format.
        """
        record = read_json(fetch_file(name_or_path, RECORD_NAME, **hub))
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"Expected format_version {FORMAT_VERSION} in {RECORD_NAME}, got {version!r}: upgrade mend_hf."
            )
        tensors = read_tensors(fetch_file(name_or_path, WEIGHTS_NAME, **hub))
        try:
            provenance = _provenance_from_record(record["provenance"])
            prefix = _prefix_from_tensors(tensors, record["prefix_form"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"Expected the entries that save_pretrained writes in {name_or_path}, got a problem with {error}: "
                "the files are damaged or do not belong together, save them again."
            ) from error
        return cls(prefix, provenance)

    def _tensors(self) -> dict[str, Tensor]:
        if isinstance(self.prefix, EmbeddingPrefix):
            return {"vectors": self.prefix.vectors, "mask": self.prefix.mask}
        layers = {f"keys.{i}": key for i, key in enumerate(self.prefix.keys)}
        layers |= {f"values.{i}": value for i, value in enumerate(self.prefix.values)}
        return layers | {"mask": self.prefix.mask, "next_positions": self.prefix.next_positions}


def _prefix_from_tensors(tensors: dict[str, Tensor], prefix_form: str) -> Prefix:
    mask = tensors["mask"].to(torch.bool)
    if prefix_form == "embeds":
        return EmbeddingPrefix(tensors["vectors"], mask)
    num_layers = sum(name.startswith("keys.") for name in tensors)
    return KeyValuePrefix(
        tuple(tensors[f"keys.{i}"] for i in range(num_layers)),
        tuple(tensors[f"values.{i}"] for i in range(num_layers)),
        mask,
        tensors["next_positions"],
    )


def _provenance_from_record(values: dict[str, Any]) -> Provenance:
    known = {field.name for field in dataclasses.fields(Provenance)}
    unknown = sorted(set(values) - known)
    if unknown:
        warnings.warn(
            f"{RECORD_NAME} has entries that this version does not know: {', '.join(unknown)}.", stacklevel=3
        )
    return Provenance(**{key: value for key, value in values.items() if key in known})
