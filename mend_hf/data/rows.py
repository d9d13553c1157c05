"""Rows of .jsonl, .jsonl.zst and .parquet files or of a Hub data set, each with the place it stands at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mend_hf.errors import DataError, import_extra

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")

Row = Mapping[str, Any]

_READ_BYTES = 1 << 20


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place as `FILE:LINE` (Parquet: `FILE:ROW`), counted from 1.

    Args:
        path: A .jsonl, .jsonl.zst or .parquet file. Empty lines are passed over.

    Raises:
        DataError: The file is missing, damaged or of another kind, or a line is no JSON object.
        MissingExtraError: The package that reads such a file is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"Expected a file at {path}, got {'a folder' if path.is_dir() else 'none'}: check the path.")
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.name.endswith(".jsonl.zst"):
        yield from _parse_lines(_decompress_lines(path), path)
    elif path.name.endswith(".jsonl"):
        with path.open("rb") as lines:
            yield from _parse_lines(lines, path)
    else:
        raise DataError(f"Expected a file that ends in {', '.join(SUFFIXES)}, got {path}: convert or rename it.")


def load_hub_splits(name: str | Path, **hub: Any) -> Mapping[str, Iterable[Row]]:
    """Return the splits of a data set on the Hub, or of a local folder that `datasets` can read.

    Args:
        name: Its Hub id or folder.
        **hub: `revision`, `token`, `cache_dir`, `name` (the configuration) ... of `datasets.load_dataset`.

    Raises:
        DataError: There is no such data set, or it cannot be fetched or read.
        MissingExtraError: `datasets` is not installed.
    """
    if str(name).endswith(SUFFIXES):
        raise DataError(f"Expected a file at {name}, got none: check the path.")
    datasets = import_extra("datasets", "data")
    try:
        return datasets.load_dataset(str(name), **hub)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = "a folder here" if Path(name).is_dir() else "neither a file nor a folder here"
        raise DataError(
            f"Expected a file, a folder or a Hub data set, got {str(name)!r}, which is {what} and which `datasets` "
            f"cannot load ({error}): check the path or the Hub id, and the network."
        ) from error


def number_rows(rows: Iterable[Row], name: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield rows with their places as `NAME:ROW`, counted from 1."""
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


def get_text(row: Row, column: str, place: str) -> str:
    """Return a column's text.

    Raises:
        DataError: The row lacks the column, or holds something else there.
    """
    if column not in row:
        raise DataError(
            f"{place}: expected a field {column!r}, got only {', '.join(map(repr, row))}: add or rename it."
        )
    if not isinstance(row[column], str):
        raise DataError(f"{place}: expected {column!r} to be a string, got {row[column]!r}: convert it to text.")
    return row[column]


def is_list_of_text(value: object) -> bool:
    """Return whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _parse_lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line.rstrip())
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise DataError(
                f"{place}: expected a JSON object, got text that is no JSON ({reason}): mend or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}: mend or remove the line.")
        yield place, row


def _decompress_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a Zstandard file, of which only a part is held at a time."""
    rest = b""
    for part in _decompress(path):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest


def _decompress(path: Path) -> Iterator[bytes]:
    zstandard = import_extra("zstandard", "data")
    # A frame at a time: only then does the decompressor say that one was cut off.
    frame, is_whole = None, False
    with path.open("rb") as file:
        while packed := file.read(_READ_BYTES):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise DataError(f"Expected a Zstandard file at {path}, got {error}: fetch it again.") from error
                packed, is_whole = frame.unused_data, frame.eof
                frame = None if is_whole else frame
    if not is_whole:
        raise DataError(f"Expected a whole Zstandard file at {path}, got a truncated one: fetch it again.")


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    parquet = import_extra("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            yield from number_rows((row for batch in file.iter_batches() for row in batch.to_pylist()), path)
    except (OSError, ValueError) as error:
        raise DataError(f"Expected a whole Parquet file at {path}, got {error}: fetch it again.") from error
