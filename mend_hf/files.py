"""Folders of saved things: fetched from a path or the Hub, read with clear errors, written whole or not at all.

What is saved into a folder is first collected in a hidden one inside it. Given its final name, `.saved`, that folder
counts from then on: its files are moved to their places, and where a killed process did not come to that, readers take
them from where they are, and the next save moves them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mend_hf.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY_PREFIX = ".saving-"
_SAVED_NAME = ".saved"
_LEFTOVER_SECONDS = 24 * 3600.0


def fetch_file(name_or_path: str | Path, filename: str, **hub: Any) -> Path:
    """Return the local path of a file in a folder or a Hub repository, downloaded if need be.

    Args:
        name_or_path: A local folder, or a Hub id.
        filename: Name inside it.
        **hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only` ... as in transformers.

    Raises:
        CheckpointError: There is no such folder, repository or file.
    """
    local = find_file(Path(name_or_path, check_subfolder(hub.get("subfolder"), name_or_path)), filename)
    if local is not None:
        return local
    try:
        return Path(cached_file(str(name_or_path), filename, **hub))
    except (OSError, ValueError) as error:  # huggingface_hub's own for a name that cannot be
        reason = f"there is no such folder here, and of the Hub: {error}"
        if Path(name_or_path).is_dir():
            reason = "this folder has no such file: check the path"
        raise CheckpointError(
            f"Expected a folder or a Hub repository with {filename}, got {str(name_or_path)!r}: {reason}"
        ) from error


def check_subfolder(subfolder: str | None, name_or_path: str | Path) -> str:
    """Return a subfolder, "" for none.

    Raises:
        CheckpointError: It leads out of its place.
    """
    subfolder = str(subfolder or "")
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(f"Expected a subfolder inside {name_or_path}, got {subfolder!r}: leave the '..' out.")
    return subfolder


def find_file(folder: Path, filename: str) -> Path | None:
    """Return where a file of a local folder is; None: nowhere."""
    return next((path for path in (folder / _SAVED_NAME / filename, folder / filename) if path.is_file()), None)


def fetch_json(name_or_path: str | Path, filename: str, **hub: Any) -> dict[str, Any]:
    """Return the JSON object in a file of a folder or a Hub repository; arguments as in `fetch_file`.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    while True:
        path = fetch_file(name_or_path, filename, **hub)
        try:
            return read_json(path)
        except FileNotFoundError:  # moved to its place between two looks
            if not path.parent.name == _SAVED_NAME:
                raise


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: The file holds something else.
    """
    try:
        values = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Expected JSON in {path}, got {error}: the file is damaged, fetch it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"Expected a JSON object in {path}, got {type(values).__name__}: fetch the file again.")
    return values


def parse_json(text: bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: It is none, or an object has a key twice, of which readers could take either.
    """
    return json.loads(text, object_pairs_hook=_make_object)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key twice among {', '.join(sorted(name for name, _ in pairs)[:8])}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, one key a line, sorted."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output_folder(folder: str | Path) -> Path:
    """Return the path of a folder that can be written into, before any heavy work.

    Raises:
        CheckpointError: The path, or one above it, is a file or must not be written into.
    """
    folder = Path(folder)
    for path in (folder, *folder.absolute().parents):
        if path.is_dir():
            if not os.access(path, os.W_OK | os.X_OK):
                raise CheckpointError(
                    f"Expected a folder to save into, got {folder}, and {path} does not let you write: change its "
                    "permissions or give another path."
                )
            return folder
        if path.exists():
            raise CheckpointError(f"Expected a folder to save into, got the file {path}: give another path.")
    return folder


def flush_to_disk(*paths: Path) -> None:
    """Wait until files and folders are where a power cut does not reach them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def write_folder(save_directory: str | Path) -> Iterator[Path]:
    """Collect files in a temporary folder and move them into `save_directory` once all are written.

    An error inside the block leaves `save_directory` as it was, and a process that is killed leaves either the old
    files or the new ones. Other files there are kept. Of two processes that save at once, one waits for the other.

    Yields:
        The temporary folder.
    """
    folder = check_output_folder(save_directory)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=folder))
    try:
        yield temporary
        flush_to_disk(*temporary.iterdir(), temporary)
        with _lock(folder):
            _move_saved(folder)
            os.replace(temporary, folder / _SAVED_NAME)
            flush_to_disk(folder)
            _move_saved(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time move files into a folder, where the system can lock one."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl and descriptor is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _move_saved(folder: Path) -> None:
    """Move files that count already to their places."""
    saved = folder / _SAVED_NAME
    if saved.is_dir():
        for path in sorted(saved.iterdir()):
            os.replace(path, folder / path.name)
        flush_to_disk(folder)
        saved.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written, once it is too old to be another process's work at hand."""
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
