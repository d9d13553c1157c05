"""Plain text for stage 1: rows that cut a document into "demonstrations" and what follows them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mend_hf.data.documents import TextStream
from mend_hf.errors import ConfigError, DataError


def load_texts(name_or_path: str | Path, *, split: str = "train", text_column: str = "text", **hub: Any) -> list[str]:
    """Return all documents of a file, a folder or a Hub data set; see `TextStream`.

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
    texts = [*TextStream(name_or_path, split=split, text_column=text_column, **hub)]
    if not texts:
        raise DataError(f"Expected at least one document in {name_or_path}, got none: name another source.")
    return texts


class WindowCutter:
    """Cuts a row out of a document: a window's first part as the only demonstration, the rest as the target.

    Args:
        tokenizer: Counts the tokens, and says where in the text each of them ends.
        max_tokens: Longest window, in tokens.
        demonstration_fraction: Share of the window's tokens that go into the demonstration.
        min_tokens: Documents with fewer tokens are too short.

    Raises:
        ConfigError: A number is impossible, or the tokenizer does not know where tokens end.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, demonstration_fraction: float, min_tokens: int
    ) -> None:
        if not 2 <= min_tokens <= max_tokens or not 0 < demonstration_fraction < 1:
            raise ConfigError(
                "Expected 2 <= min_tokens <= max_tokens and 0 < demonstration_fraction < 1, got "
                f"min_tokens={min_tokens}, max_tokens={max_tokens}, demonstration_fraction={demonstration_fraction}: "
                "change what lies outside."
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

    def is_long_enough(self, text: str) -> bool:
        """Return whether a document has the fewest tokens between the white space around it."""
        text = text.strip()
        # The head of a long document settles it nearly always, and spares tokenising the whole collection up front.
        head = text[: 16 * self.min_tokens]
        return len(self._token_ends(head)) >= self.min_tokens or (
            len(text) > len(head) and len(self._token_ends(text)) >= self.min_tokens
        )

    def cut(self, text: str, rng: random.Random) -> dict[str, Any]:
        """Return a row of a document that is long enough: of all of it, or of a window that is drawn.

        Neither a document nor the demonstration begins with nothing but white space.
        """
        text = text.lstrip()
        # A token is taken to begin where the one before ends: its own offsets may leave out the blank in front of it.
        borders = [0, *self._token_ends(text)]
        borders[-1] = len(text)
        num_tokens = min(len(borders) - 1, self.max_tokens)
        num_shown = min(max(round(num_tokens * self.demonstration_fraction), 1), num_tokens - 1)
        start = rng.randrange(len(borders) - num_tokens)
        if not text[borders[start] : borders[start + num_shown]].strip():
            start = 0
        return {
            "demonstrations": [text[borders[start] : borders[start + num_shown]]],
            "query": "",
            "target": text[borders[start + num_shown] : borders[start + num_tokens]],
        }

    def _token_ends(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]


class TextDataset(Dataset[dict[str, Any]]):
    """Rows of plain text: the first part of a document as the only demonstration, the rest as the target.

    Row i depends on the seed, on i and on the texts only. The demonstration and the target, put together, are the
    document as it is written, without white space in front, or a window of it if it is longer than `max_tokens`;
    `query` is empty.

    Args:
        texts: Documents; each is as likely as every other.
        tokenizer: Counts the tokens, and says where in the text each of them ends.
        max_tokens: Longest window, in tokens.
        demonstration_fraction: Share of the window's tokens that go into the demonstration.
        min_tokens: Documents with fewer tokens, the white space around them not counted, are left out with a warning.
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
        self._cutter = WindowCutter(
            tokenizer,
            max_tokens=max_tokens,
            demonstration_fraction=demonstration_fraction,
            min_tokens=min_tokens,
        )
        check_num_rows(num_rows)
        self.num_rows = num_rows
        self.seed = seed
        texts = list(texts)
        self.texts = [text for text in texts if self._cutter.is_long_enough(text)]
        report_short_documents(len(texts) - len(self.texts), len(texts), min_tokens)

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
        return self._cutter.cut(*self._draw(index))

    def row_lengths(self) -> list[int]:
        """Return the characters of every row's document: the more, the longer the row, until it is a whole window."""
        return [len(self._draw(index)[0]) for index in range(self.num_rows)]

    def _draw(self, index: int) -> tuple[str, random.Random]:
        # A string as the seed is hashed alike in every process and Python version; hash() is not.
        rng = random.Random(f"{self.seed}:{index}")
        return rng.choice(self.texts), rng


def check_num_rows(num_rows: int) -> None:
    """Refuse a data set without rows."""
    if num_rows < 1:
        raise ConfigError(f"Expected num_rows of 1 or more, got {num_rows}: raise it.")


def report_short_documents(num_short: int, num_texts: int, min_tokens: int) -> None:
    """Warn of documents that are left out.

    Raises:
        DataError: That is all of them.
    """
    if num_short == num_texts:
        raise DataError(
            f"Expected a document of at least {min_tokens} tokens, got {num_short} shorter ones: "
            "lower min_tokens or give longer documents."
        )
    if num_short:
        warnings.warn(
            f"{num_short} of {num_texts} documents have fewer than {min_tokens} tokens and are left out.",
            stacklevel=3,
        )
