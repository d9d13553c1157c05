"""A JSON record and the tensors that belong to it: written together, read together, and never a mixture of two saves.

The record holds a hash of the tensors' file. What a file claims is checked before its tensors are read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mend_hf.errors import CheckpointError
from mend_hf.files import fetch_file, fetch_json, parse_json, write_json

HASH_NAME, VERSION_NAME = "weights_sha256", "format_version"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_FLOATING_POINT = {"F64", "F32", "F16", "BF16"}
_SECONDS_OF_A_SAVE = 0.05


class TensorHeader(NamedTuple):
    """What a safetensors file says of one tensor.

    Attributes:
        dtype: In the format's own words: F32, BF16, I64, BOOL ...
        shape: Its lengths.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        """Whether it is of one of the types that models compute in."""
        return self.dtype in _FLOATING_POINT


Headers = Mapping[str, TensorHeader]
Check = Callable[[dict[str, Any], Headers], None]


def write_pair(
    folder: Path, record_name: str, record: dict[str, Any], weights_name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Write a record and its tensors into a folder of `write_folder`."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    (folder / weights_name).write_bytes(data)
    write_json(folder / record_name, record | {HASH_NAME: hashlib.sha256(data).hexdigest()})


def read_pair(
    name_or_path: str | Path, record_name: str, weights_name: str, check: Check, **hub: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a record and its tensors from a folder or a Hub repository.

    Where another process saves there at that moment, both are read again until they belong together.

    Args:
        name_or_path: A local folder, or a Hub id.
        record_name: Of the JSON file.
        weights_name: Of the safetensors file.
        check: Gets the record, and what the file says of its tensors; raises what refuses them. Only then are the
            tensors read.
        **hub: As in `fetch_file`.

    Raises:
        CheckpointError: A file is missing or damaged, holds numbers that are not finite, or does not belong to the
            other one.
    """
    before: tuple[dict[str, Any], str] | None = None
    while True:
        record = fetch_json(name_or_path, record_name, **hub)
        path = fetch_file(name_or_path, weights_name, **hub)
        try:
            with path.open("rb") as file:
                start, headers = _read_headers(file, path)
                check(record, headers)
                data = start + file.read()
        except FileNotFoundError:  # moved to its place between two looks
            continue
        digest = hashlib.sha256(data).hexdigest()
        if record.get(HASH_NAME, digest) == digest:
            return record, _parse(data, path)
        if before == (record, digest):
            raise CheckpointError(
                f"Expected the tensors that {record_name} was saved with, got others in {path} by its SHA-256: the "
                "file is damaged, or from another save. Save or fetch the whole folder again; if you changed the "
                f"tensors on purpose, take {HASH_NAME} out of {record_name}."
            )
        before = record, digest
        time.sleep(_SECONDS_OF_A_SAVE)


def check_version(record: Mapping[str, Any], newest: int, record_name: str, oldest: int | None = None) -> None:
    """Refuse a record of a format that this version does not read.

    Args:
        record: What the file holds.
        newest: The format that is written today.
        record_name: Of the file.
        oldest: The format of records that do not name theirs; None: every record does.

    Raises:
        CheckpointError: It is newer, or not a number.
    """
    version = record.get(VERSION_NAME, oldest)
    if type(version) is not int or not 1 <= version <= newest:
        raise CheckpointError(
            f"Expected {VERSION_NAME} from 1 to {newest} in {record_name}, got {version!r}: upgrade mend_hf."
        )


def _read_headers(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, TensorHeader]]:
    """Return the bytes in front of the tensors, and what they say."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    try:
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError("no header of a length that can be")
        text = file.read(length)
        entries = parse_json(text)
        return start + text, {
            str(name): TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, error) from error


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise CheckpointError(
            f"Expected finite numbers in {path}, got others in {', '.join(broken[:4])}: the training behind it went "
            "astray, or the file is damaged. Take an earlier checkpoint, or fetch it again."
        )
    return tensors


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected a whole safetensors file at {path}, got {error}: the file is damaged, fetch it again."
    )
