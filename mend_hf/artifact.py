"""Distilled demonstrations as a thing: tensors and where they came from, saved and loaded without the distiller."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor

from mend_hf import __version__
from mend_hf.cards import CARD_NAME, CardFacts
from mend_hf.demonstrations import name_demonstration, parse_demonstrations
from mend_hf.errors import CheckpointError, DataError
from mend_hf.files import write_folder
from mend_hf.library import RECORD_NAME, WEIGHTS_NAME, check_name, write_library_card
from mend_hf.pooling import pool_anchors
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, Prefix, join_tasks, stack_rows
from mend_hf.provenance import ChunkRecord, Provenance, provenance_from_record
from mend_hf.saved_pair import Headers, TensorHeader, check_version, read_pair, write_pair
from mend_hf.upload import PushOptions, push_saved

FORMAT_VERSION = 2


class DistilledDemonstrations:
    """The demonstrations of one or more tasks as a prefix, in place of their text.

    Behaves as a sequence of tasks: `len`, iteration and indexing; `select` picks one task for every row of a batch.

    Chunks are kept as they were distilled, and joined and pooled when first read, so that `join` and `drop` change
    nothing about the others.

    Args:
        chunks: Keys and values, or vectors, one row for every chunk that the provenance lists.
        provenance: Where they came from.
    """

    def __init__(self, chunks: Prefix, provenance: Provenance) -> None:
        self.chunks = chunks
        self.provenance = provenance

    @cached_property
    def prefix(self) -> Prefix:
        """Keys and values, or vectors, one row a task, as a base model reads them."""
        joined = join_tasks(self.chunks, self._task_rows)
        if isinstance(joined, KeyValuePrefix) and self.provenance.max_slots is not None:
            return pool_anchors(joined, self.provenance.max_slots, self.provenance.anchor_pooling)
        return joined

    @property
    def _task_rows(self) -> list[int]:
        return [row for row, task in enumerate(self.provenance.chunks) for _ in task]

    def __len__(self) -> int:
        return len(self.provenance.chunks)

    def __getitem__(self, row: int) -> DistilledDemonstrations:
        return self.select([row])

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
        return "kv" if isinstance(self.chunks, KeyValuePrefix) else "embeds"

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
        """Return the given tasks, in this order; a task may occur more than once.

        Args:
            rows: From 0, or, counted from the end, from -1.

        Raises:
            IndexError: There is no such task.
        """
        for row in rows:
            if not -len(self) <= row < len(self):
                raise IndexError(f"Expected a task from 0 to {len(self) - 1}, got {row}.")
        first = [sum(len(task) for task in self.provenance.chunks[:row]) for row in range(len(self))]
        return self._pick([[*range(first[row], first[row] + len(self.provenance.chunks[row]))] for row in rows])

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> DistilledDemonstrations:
        """Return these demonstrations on a device, in another floating-point type if one is named."""
        chunks = self.chunks.to(torch.device(device), dtype or _dtype_of(self.chunks))
        return DistilledDemonstrations(chunks, self.provenance)

    def join(self, other: DistilledDemonstrations) -> DistilledDemonstrations:
        """Return these demonstrations with others behind them, task by task; nothing is distilled again.

        Equal to distilling all of them at once under `overflow="concat"` with a chunk border between the two.

        Args:
            other: Demonstrations of the same tasks, distilled by the same distiller in the same prompt format.

        Raises:
            DataError: They do not fit together, or have been distilled with `overflow="recurrent"`.
        """
        if "recurrent" in (self.provenance.overflow, other.provenance.overflow):
            raise DataError(
                'Expected demonstrations that were distilled apart, got some with overflow="recurrent", where every '
                'chunk has read those before it: distil all of them anew, or with overflow="concat".'
            )
        facts, others = self._facts_to_join(), other._facts_to_join()
        different = [
            f"- {name}: {facts[name]!r} and {others[name]!r}" for name in facts if facts[name] != others[name]
        ]
        if different:
            raise DataError(
                "Expected demonstrations that fit together, got\n" + "\n".join(different) + "\nDistil both with the "
                "same distiller, base model, settings and number of tasks."
            )
        count, order = [len(self.chunks), 0], []
        records = [*zip(self.provenance.chunks, other.provenance.chunks, strict=True)]
        for own, added in records:
            order += [count[1] + place for place in range(len(own))]
            order += [count[0] + place for place in range(len(added))]
            count = [count[0] + len(added), count[1] + len(own)]
        device, dtype = self.chunks.mask.device, _dtype_of(self.chunks)
        chunks = stack_rows([self.chunks, other.chunks.to(device, dtype)]).select(order)
        provenance = dataclasses.replace(self.provenance, chunks=[[*own, *added] for own, added in records])
        return DistilledDemonstrations(chunks, provenance)

    def drop(self, demonstrations: Any) -> DistilledDemonstrations:
        """Return what stays without some demonstrations; nothing is distilled again.

        What stays is the very same as before: `a.join(b).drop(b)` is `a`, bit for bit. Chunks are dropped whole, from
        the last on where a demonstration occurs more than once.

        Args:
            demonstrations: Raw ones as for `distill`, or distilled ones; one task for all tasks or one each.

        Raises:
            DataError: A task does not hold them, shares their chunks with others, or would lose all it has.
        """
        tasks = _names_to_drop(demonstrations)
        if len(tasks) not in (1, len(self)):
            raise DataError(
                f"Expected demonstrations of 1 task or of {len(self)}, got {len(tasks)}: give one list a task."
            )
        kept, start = [], 0
        for row, task in enumerate(self.provenance.chunks):
            places = _places_to_keep(task, tasks[row % len(tasks)], row)
            kept.append([start + place for place in places])
            start += len(task)
        return self._pick(kept)

    def _pick(self, chunks_of_task: Sequence[Sequence[int]]) -> DistilledDemonstrations:
        """Return tasks that are made of the chunks of these numbers."""
        records = [chunk for task in self.provenance.chunks for chunk in task]
        provenance = dataclasses.replace(
            self.provenance, chunks=[[records[i] for i in task] for task in chunks_of_task]
        )
        return DistilledDemonstrations(self.chunks.select([i for task in chunks_of_task for i in task]), provenance)

    def _facts_to_join(self) -> dict[str, Any]:
        names = ("base_model_fingerprint", "distiller_hash", "prompt_format", "max_slots", "anchor_pooling")
        facts = {name: getattr(self.provenance, name) for name in names}
        return {"prefix_form": self.prefix_form, "tasks": len(self), "dtype": _dtype_of(self.chunks)} | facts

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the tensors (safetensors) and their provenance (JSON) into a folder.

        Args:
            save_directory: Made if need be; either both files are written or none.
        """
        record = {
            "format_version": FORMAT_VERSION,
            "mend_version": __version__,
            "prefix_form": self.prefix_form,
            "provenance": dataclasses.asdict(self.provenance),
        }
        with write_folder(save_directory) as folder:
            write_pair(folder, RECORD_NAME, record, WEIGHTS_NAME, self._tensors())

    def push_to_hub(
        self, repo_id: str, *, name: str | None = None, facts: CardFacts | None = None, **options: Any
    ) -> CommitInfo:
        """Upload these demonstrations to the Hub in one commit, alone or as one of many in a repository.

        What people wrote on the page outside the block of mend_hf, and the metadata that is there, stay.

        Args:
            repo_id: `name` or `owner/name`; the repository is made if need be.
            name: Of these demonstrations among others in the repository; what has the name there is replaced. None:
                they are all that is in it.
            facts: What the card should say beside.
            **options: As for `MendModel.push_to_hub`.

        Raises:
            DataError: `name` cannot be one.
            HubError: The Hub refuses, or cannot be reached.
        """
        subfolder = None if name is None else check_name(name)
        write = partial(write_library_card, self.provenance, self.prefix_form, facts)
        return push_saved(repo_id, self.save_pretrained, write, PushOptions(**options), subfolder, CARD_NAME)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, name: str | None = None, **hub: Any
    ) -> DistilledDemonstrations:
        """Load distilled demonstrations from a folder or a Hub repository; no distiller is needed.

        Args:
            name_or_path: A local folder, or a Hub id.
            name: One of many in that place, each in a subfolder of its own as in a `DemonstrationStore`.
            **hub: `revision`, `token`, `cache_dir`, `subfolder` ... as in transformers.

        Raises:
            CheckpointError: Files are missing, damaged, or of a newer format.
        """
        if name is not None:
            hub["subfolder"] = "/".join(part for part in (hub.get("subfolder"), check_name(name)) if part)
        record, tensors = read_pair(name_or_path, RECORD_NAME, WEIGHTS_NAME, _check_record, **hub)
        try:
            provenance = provenance_from_record(record["provenance"], record["format_version"])
            chunks = _prefix_from_tensors(tensors, record["prefix_form"])
            num_chunks = sum(len(task) for task in provenance.chunks)
            places = _describe_misplaced(chunks)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"Expected the entries that save_pretrained writes in {name_or_path}, got a problem with {error}: "
                "the files are damaged or do not belong together, save them again."
            ) from error
        if len(chunks) != num_chunks or not all(provenance.chunks) or places:
            raise CheckpointError(
                f"Expected tensors for the {num_chunks} chunks that {RECORD_NAME} lists, got "
                f"{places or f'{len(chunks)} rows'}: the files in {name_or_path} do not belong together, save them "
                "again."
            )
        return cls(chunks, provenance)

    def _tensors(self) -> dict[str, Tensor]:
        if isinstance(self.chunks, EmbeddingPrefix):
            return {"vectors": self.chunks.vectors, "mask": self.chunks.mask}
        layers = {f"keys.{i}": key for i, key in enumerate(self.chunks.keys)}
        layers |= {f"values.{i}": value for i, value in enumerate(self.chunks.values)}
        places = {"mask": self.chunks.mask, "next_positions": self.chunks.next_positions}
        return layers | places | {"anchor_labels": self.chunks.labels}


def join_demonstrations(parts: Sequence[DistilledDemonstrations]) -> DistilledDemonstrations:
    """Return several distilled demonstrations as one, in order; as `DistilledDemonstrations.join` in a row.

    Raises:
        DataError: There are none, or they do not fit together.
    """
    if not parts:
        raise DataError("Expected distilled demonstrations to join, got an empty list: give one or more.")
    return reduce(DistilledDemonstrations.join, parts)


def _dtype_of(prefix: Prefix) -> torch.dtype:
    return prefix.vectors.dtype if isinstance(prefix, EmbeddingPrefix) else prefix.keys[0].dtype


def _names_to_drop(demonstrations: Any) -> list[list[str]]:
    if isinstance(demonstrations, DistilledDemonstrations):
        tasks = demonstrations.provenance.chunks
        return [[name for chunk in task for name in chunk.demonstrations] for task in tasks]
    return [[name_demonstration(item) for item in task] for task in parse_demonstrations(demonstrations)[0]]


def _places_to_keep(chunks: list[ChunkRecord], names: list[str], row: int) -> list[int]:
    """Return which chunks of a task stay when the demonstrations of these names leave it."""
    present = Counter(name for chunk in chunks for name in chunk.demonstrations)
    leaving = Counter(names)
    for name in present:  # further pieces of a plain text leave with the first
        first = name.partition("-")[0]
        leaving[name] = max(leaving[name], min(leaving[first], present[name]))
    missing = sum((leaving - present).values())
    if missing:
        raise DataError(
            f"Expected demonstrations that task {row} holds, got {missing} that it does not: compare input and output "
            "with what was distilled; files of older versions do not know their demonstrations, distil those again."
        )
    kept = []
    for place in reversed(range(len(chunks))):
        held = Counter(chunks[place].demonstrations)
        if held and held <= leaving:
            leaving -= held
        else:
            kept.append(place)
    if num_left := leaving.total():
        raise DataError(
            f"Expected demonstrations that fill whole chunks of task {row}, got {num_left} that share a chunk with "
            'others: drop those too, or distil with overflow="concat" and max_demonstrations_per_chunk=1.'
        )
    if not kept:
        raise DataError(f"Expected some demonstrations of task {row} to stay, got all of them: answer without any.")
    return kept[::-1]


def _check_record(record: dict[str, Any], headers: Headers) -> None:
    """Refuse a format that is not read here, and tensors that are no prefix."""
    check_version(record, FORMAT_VERSION, RECORD_NAME)
    form = record.get("prefix_form")
    mask = headers["mask"].shape if "mask" in headers else ()
    num_rows, num_slots = mask if len(mask) == 2 else (0, 0)
    expected: dict[str, tuple[int, ...]] = {"mask": (num_rows, num_slots)}
    states: list[str] = ["vectors"]
    if form == "kv":
        num_layers = sum(name.startswith("keys.") for name in headers)
        states = [f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(num_layers)]
        expected["next_positions"] = (num_rows,)
        expected |= {"anchor_labels": (num_rows, num_slots)} if "anchor_labels" in headers else {}
    shapes = {name: header.shape for name, header in headers.items() if name not in states}
    problems = [
        f"{name} of shape {shapes.get(name)}"
        for name in {*shapes, *expected}
        if shapes.get(name) != expected.get(name)
    ]
    for name in states:
        header = headers.get(name, TensorHeader("", ()))
        fits = header.shape[:1] == (num_rows,) and header.shape[-2:-1] == (num_slots,)
        if not (header.is_floating_point and len(header.shape) == (4 if form == "kv" else 3) and fits):
            problems.append(f"{name} of type {header.dtype or None} and shape {header.shape}")
    if form not in ("kv", "embeds") or not num_rows or not states or problems:
        found = ", ".join(sorted(problems)[:4]) or f"{num_rows} rows"
        raise CheckpointError(
            f"Expected the tensors of a prefix of the form {form!r} in {WEIGHTS_NAME}, got {found}: the file is "
            "damaged or belongs to another one, save or fetch the whole folder again."
        )


def _describe_misplaced(chunks: Prefix) -> str:
    """Say what of a prefix's mask and positions cannot be, or nothing."""
    if bool((chunks.mask[:, 1:] < chunks.mask[:, :-1]).any()):
        return "unused slots between those that count"
    if isinstance(chunks, KeyValuePrefix) and bool((chunks.next_positions < 0).any()):
        return "positions below 0"
    return ""


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
        tensors.get("anchor_labels"),
    )
