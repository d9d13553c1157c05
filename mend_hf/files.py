"""Folders of saved things: fetched from a path or the Hub, read with clear errors, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from mend_hf.errors import CheckpointError


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
        CheckpointError: The path, or one above it, is a file.
    """
    folder = Path(folder)
    for path in (folder, *folder.parents):
        if path.is_dir():
            return folder
        if path.exists():
            raise CheckpointError(f"Expected a folder to save into, got the file {path}: give another path.")
    return folder


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
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()
