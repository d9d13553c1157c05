"""Folders of saved things: fetched from a path or the Hub, read with clear errors, written whole or not at all."""

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

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from mend_hf.errors import CheckpointError

_TEMPORARY_PREFIX = ".saving-"
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
    try:
        return Path(cached_file(str(name_or_path), filename, **hub))
    except OSError as error:
        raise CheckpointError(
            f"Expected a folder or a Hub repository with {filename}, got {str(name_or_path)!r}: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: The file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"Expected JSON in {path}, got {error}: the file is damaged, fetch it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"Expected a JSON object in {path}, got {type(values).__name__}: fetch the file again.")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, one key a line, sorted."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: The file is no safetensors file, or is cut off.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Expected a whole safetensors file at {path}, got {error}: the file is damaged, fetch it again."
        ) from error


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

    An error inside the block leaves `save_directory` as it was. Other files there are kept.

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
        written = sorted(temporary.iterdir())
        flush_to_disk(*written)
        for path in written:
            os.replace(path, folder / path.name)
        flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written, once it is too old to be another process's work at hand."""
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
