"""Distilled demonstrations of many tasks, for a process that serves them all from one model."""

from __future__ import annotations

import difflib
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.cards import CardFacts
from mend_hf.errors import ConfigError, DataError
from mend_hf.files import check_output_folder, find_file
from mend_hf.library import RECORD_NAME, WEIGHTS_NAME, check_name, write_library_card
from mend_hf.upload import PushOptions, push_files


class DemonstrationStore(Mapping[str, DistilledDemonstrations]):
    """A folder of distilled demonstrations by name, of which those asked for last are held in memory.

    Several threads may use one store, and several processes one folder: what another one replaced is read anew. What
    leaves the memory to make room stays whole for those who still answer from it.

    Files are read and not mapped into memory: a mapped file that somebody cuts off ends the process.

    Args:
        folder: One subfolder a name, as `DistilledDemonstrations.save_pretrained` writes it; made with the first one.
        max_bytes: Bytes of keys, values and vectors to hold in memory. The one asked for last is held in any case.
        device: Where they are held.
        dtype: In which floating-point type; None: as saved.

    Raises:
        ConfigError: `max_bytes` is below 0.
        CheckpointError: The folder cannot be written into.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = 2**30,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_bytes < 0:
            raise ConfigError(f"Expected max_bytes of 0 or more, got {max_bytes}: raise it.")
        self.folder = check_output_folder(folder)
        self.max_bytes = max_bytes
        self._device = torch.device(device)
        self._dtype = dtype
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the one asked for last at the end
        self._num_bytes = 0
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and vectors that the store holds in memory."""
        return self._num_bytes

    def add(self, name: str, demonstrations: DistilledDemonstrations, *, overwrite: bool = False) -> None:
        """Save demonstrations under a name.

        Args:
            name: Letters, digits, `_`, `-` and `.`, the first no `-` or `.`; at most 128.
            demonstrations: Of one task or more.
            overwrite: Replace what has the name already.

        Raises:
            DataError: The name cannot be one, or is taken.
        """
        path = self.folder / check_name(name)
        if not overwrite and find_file(path, RECORD_NAME):
            raise DataError(f"Expected a name that is free, got {name!r}: choose another one, or give overwrite=True.")
        demonstrations.save_pretrained(path)

    def push_to_hub(self, repo_id: str, *, facts: CardFacts | None = None, **options: Any) -> CommitInfo:
        """Upload all demonstrations to the Hub in one commit, each under its name.

        What else is in the repository stays. `DistilledDemonstrations.from_pretrained(repo_id, name=...)` loads one.

        Args:
            repo_id: `name` or `owner/name`; the repository is made if need be.
            facts: What the card should say beside.
            **options: As for `MendModel.push_to_hub`.

        Raises:
            DataError: There are none.
            HubError: The Hub refuses, or cannot be reached.
        """
        names = list(self)
        if not names:
            raise DataError(f"Expected demonstrations in {self.folder}, got none: add some first.")
        first = self[names[0]]
        found = {
            f"{name}/{file}": find_file(self.folder / name, file)
            for name in names
            for file in (RECORD_NAME, WEIGHTS_NAME)
        }
        files = {path: file for path, file in found.items() if file}
        write = partial(write_library_card, first.provenance, first.prefix_form, facts)
        return push_files(repo_id, files, write, PushOptions(**options))

    def remove(self, name: str) -> None:
        """Delete the demonstrations of a name.

        Raises:
            KeyError: There are none.
        """
        if name not in self:
            raise _UnknownNameError(name, self)
        shutil.rmtree(self.folder / name)
        with self._lock:
            self._let_go(name)

    def __getitem__(self, name: str) -> DistilledDemonstrations:
        """Return the demonstrations of a name, from memory where they are there.

        Raises:
            KeyError: There are none.
            CheckpointError: Their files are damaged.
        """
        record = find_file(self.folder / name, RECORD_NAME) if name in self else None
        if record is None:
            with self._lock:
                self._let_go(name)
            raise _UnknownNameError(name, self)
        state = record.stat()
        version = (state.st_ino, state.st_mtime_ns)
        with self._lock:
            held = self._held.get(name)
            if held and held.version == version:
                self._held.move_to_end(name)
                return held.demonstrations
        loaded = DistilledDemonstrations.from_pretrained(self.folder, name=name).to(
            self._device, self._dtype
        )  # nobody waits meanwhile
        size = _count_bytes(loaded)
        with self._lock:
            self._let_go(name)
            self._held[name] = _Held(version, size, loaded)
            self._num_bytes += size
            while self._num_bytes > self.max_bytes and len(self._held) > 1:
                self._let_go(next(iter(self._held)))
        return loaded

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and find_file(self.folder / check_name(name), RECORD_NAME) is not None
        except DataError:
            return False

    def __iter__(self) -> Iterator[str]:
        if not self.folder.is_dir():
            return iter(())
        return (path.name for path in sorted(self.folder.iterdir()) if path.name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _let_go(self, name: str) -> None:
        held = self._held.pop(name, None)
        self._num_bytes -= held.num_bytes if held else 0


class _UnknownNameError(DataError, KeyError):
    """The message, which looks through all names, is made where it is read: `DemonstrationStore.get` needs none."""

    def __init__(self, name: str, store: DemonstrationStore) -> None:
        super().__init__(name)
        self._store = store

    def __str__(self) -> str:
        name, known = self.args[0], list(self._store)
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        return (
            f"Expected one of the {len(known)} names of demonstrations in {self._store.folder}, got {name!r}{hint}: "
            "correct it, or add demonstrations of that name."
        )


class _Held(NamedTuple):
    version: tuple[int, int]  # its record's inode and time of change: every save writes a new file
    num_bytes: int
    demonstrations: DistilledDemonstrations


def _count_bytes(demonstrations: DistilledDemonstrations) -> int:
    """Return the bytes of a prefix, and of the chunks that it was joined from."""
    chunks, prefix = demonstrations.chunks, demonstrations.prefix
    return prefix.num_bytes + (0 if prefix is chunks else chunks.num_bytes)
