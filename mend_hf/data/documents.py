"""Documents of plain text, read one at a time from files, folders or a Hub data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mend_hf.data.rows import SUFFIXES, Row, get_text, load_hub_splits, number_rows, read_rows
from mend_hf.errors import DataError

_SPLITS = ("train", "validation", "dev", "test", "heldout")


class TextStream(Iterable[str]):
    """Documents that are read anew whenever they are iterated over, and never all held in memory.

    Args:
        source: A .jsonl, .jsonl.zst, .parquet or .txt file (the last is one document); a folder of them; a data set
            on the Hub; or rows of your own that can be iterated over more than once, as a `datasets.IterableDataset`.
        split: In a folder: the files `SPLIT.*`, `SPLIT-NN.*` or `*.SPLIT.*`, where all others belong to "train". On
            the Hub: the split's name. A single file, and rows of your own, are read whole.
        text_column: The field that holds a row's text.
        **hub: Arguments of `datasets.load_dataset`; with `streaming=True` nothing is fetched before it is read.

    Raises:
        DataError: Nothing is there, or the rows can be read only once; while reading: a row holds no text. The message
            names the place.
        MissingExtraError: The package that reads the source is not installed.
    """

    def __init__(
        self, source: str | Path | Iterable[Row], *, split: str = "train", text_column: str = "text", **hub: Any
    ) -> None:
        self.text_column = text_column
        self._files: list[Path] = []
        self._rows: Iterable[Row] = ()
        self._name = str(source) if isinstance(source, str | Path) else f"rows of a {type(source).__name__}"
        if not isinstance(source, str | Path):
            if isinstance(source, Iterator):
                raise DataError(
                    f"Expected rows that can be read more than once, got a {type(source).__name__}, which is spent "
                    "after one reading: give a list, a data set, or a class whose __iter__ begins anew."
                )
            self._rows = source
        elif Path(source).is_file():
            self._files = [Path(source)]
        elif files := _find_files(Path(source)):
            _check_split(split, {_name_split(file) for file in files}, source)
            self._files = [file for file in files if _name_split(file) == split]
        else:
            splits = load_hub_splits(source, **hub)
            _check_split(split, splits, source)
            self._rows, self._name = splits[split], f"{source} ({split})"

    def __iter__(self) -> Iterator[str]:
        """Yield the documents."""
        for file in self._files:
            yield from _read_file(file, self.text_column)
        for place, row in number_rows(_iterate(self._rows), self._name):
            yield get_text(row, self.text_column, place)


def _iterate(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield all rows, also in a worker of a DataLoader, where an iterable data set's own loop gives only a share."""
    if not hasattr(rows, "iter"):
        yield from rows
        return
    for batch in rows.iter(batch_size=100):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _find_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.endswith((*SUFFIXES, ".txt")))


def _name_split(path: Path) -> str:
    words = (re.sub(r"-\d.*", "", part) for part in path.name.split("."))
    return next((word for word in words if word in _SPLITS), "train")


def _check_split(split: str, splits: Iterable[str], source: str | Path) -> None:
    if split not in splits:
        raise DataError(f"Expected a split {split!r} in {source}, got {', '.join(sorted(splits))}: name one of these.")


def _read_file(path: Path, text_column: str) -> Iterator[str]:
    if path.suffix == ".txt":
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"Expected UTF-8 text in {path}, got {error}: convert the file.") from error
    else:
        for place, row in read_rows(path):
            yield get_text(row, text_column, place)
