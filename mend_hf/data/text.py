"""Plain text for stage 1: documents, and rows that cut one into "demonstrations" and what follows them."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mend_hf.data.rows import SUFFIXES, get_text, load_hub_splits, number_rows, read_rows
from mend_hf.errors import ConfigError, DataError

_SPLITS = ("train", "validation", "dev", "test", "heldout")


def load_texts(name_or_path: str | Path, *, split: str = "train", text_column: str = "text", **hub: Any) -> list[str]:
    """Return documents.

    Args:
        name_or_path: A .jsonl, .jsonl.zst, .parquet or .txt file (the last is one document); a folder of them; or a
            data set on the Hub.
        split: In a folder: the files `SPLIT.*`, `SPLIT-NN.*` or `*.SPLIT.*`, where all others belong to "train". On
            the Hub: the split's name. A single file is read whole.
        text_column: The field that holds a row's text.
        **hub: Arguments of `datasets.load_dataset`.

    Raises:
        DataError: Nothing is there, or a row holds no text; the message names its place.
        MissingExtraError: The package that reads the source is not installed.
    """
    path = Path(name_or_path)
    if path.is_file():
        texts = [*_read_file(path, text_column)]
    elif files := _find_files(path):
        splits = {_name_split(file) for file in files}
        _check_split(split, splits, path)
        texts = [text for file in files if _name_split(file) == split for text in _read_file(file, text_column)]
    else:
        hub_splits = load_hub_splits(name_or_path, **hub)
        _check_split(split, hub_splits, name_or_path)
        placed = number_rows(hub_splits[split], f"{name_or_path} ({split})")
        texts = [get_text(row, text_column, place) for place, row in placed]
    if not texts:
        raise DataError(f"Expected at least one document in {name_or_path}, got none: name another source.")
    return texts


class TextDataset(Dataset[dict[str, Any]]):
    """Rows of plain text: the first part of a document as the only demonstration, the rest as the target.

    Row i depends on the seed, on i and on the texts only. The demonstration and the target, put together, are the
    document as it is written, or a window of it if it is longer than `max_tokens`; `query` is empty.

    Args:
        texts: Documents; each is as likely as every other.
        tokenizer: Counts the tokens, and says where in the text each of them ends.
        max_tokens: Longest window, in tokens.
        demonstration_fraction: Share of the window's tokens that go into the demonstration.
        min_tokens: Documents with fewer tokens are left out with a warning.
        num_rows: Length of the data set.
        seed: Fixes the rows.

    Raises:
        ConfigError: A number is impossible, or the tokenizer does not know where tokens end.
        DataError: No document is long enough.
    """

    def __init__(
        self,
        texts: Iterable[str],
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = 1024,
        demonstration_fraction: float = 0.8,
        min_tokens: int = 64,
        num_rows: int,
        seed: int,
    ) -> None:
        if not 2 <= min_tokens <= max_tokens or not 0 < demonstration_fraction < 1 or num_rows < 1:
            raise ConfigError(
                "Expected 2 <= min_tokens <= max_tokens, 0 < demonstration_fraction < 1 and 1 <= num_rows, got "
                f"min_tokens={min_tokens}, max_tokens={max_tokens}, demonstration_fraction={demonstration_fraction}, "
                f"num_rows={num_rows}: change what lies outside."
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                "Expected a fast tokenizer, which knows where in the text tokens end, got "
                f"{type(tokenizer).__name__}: load it with AutoTokenizer, or convert it to a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.demonstration_fraction = demonstration_fraction
        self.min_tokens = min_tokens
        self.num_rows = num_rows
        self.seed = seed
        texts = list(texts)
        self.texts = [text for text in texts if self._is_long_enough(text)]
        num_short = len(texts) - len(self.texts)
        if not self.texts:
            raise DataError(
                f"Expected a document of at least {min_tokens} tokens, got {num_short} shorter ones: "
                "lower min_tokens or give longer documents."
            )
        if num_short:
            warnings.warn(
                f"{num_short} of {len(texts)} documents have fewer than {min_tokens} tokens and are left out.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index`.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"Expected a row from 0 to {self.num_rows - 1}, got {index}.")
        # A string as the seed is hashed alike in every process and Python version; hash() is not.
        rng = random.Random(f"{self.seed}:{index}")
        text = rng.choice(self.texts)
        # A token is taken to begin where the one before ends: its own offsets may leave out the blank in front of it.
        borders = [0, *self._token_ends(text)]
        borders[-1] = len(text)
        num_tokens = min(len(borders) - 1, self.max_tokens)
        start = rng.randrange(len(borders) - num_tokens)
        middle = start + min(max(round(num_tokens * self.demonstration_fraction), 1), num_tokens - 1)
        return {
            "demonstrations": [text[borders[start] : borders[middle]]],
            "query": "",
            "target": text[borders[middle] : borders[start + num_tokens]],
        }

    def _token_ends(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]

    def _is_long_enough(self, text: str) -> bool:
        # The head of a long document settles it nearly always, and spares tokenising the whole collection up front.
        head = text[: 16 * self.min_tokens]
        return len(self._token_ends(head)) >= self.min_tokens or (
            len(text) > len(head) and len(self._token_ends(text)) >= self.min_tokens
        )


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
