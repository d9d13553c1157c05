"""Rows of plain text from documents that are read as they come, for collections too large to hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from mend_hf.data.text import WindowCutter, check_num_rows, report_short_documents
from mend_hf.errors import ConfigError, DataError


class StreamingTextDataset(IterableDataset[dict[str, Any]]):
    """Rows as those of `TextDataset`, one of every document in turn; after the last document it begins anew.

    The rows and their order depend on the seed, the buffer and the documents only, and every iteration gives the same:
    a training that goes on after a stop reads past the rows that it has seen. Another pass over the documents gives
    other windows in another order. Every worker of a process reads all documents and cuts up only its own, and every
    process keeps its own batches: of the `num_rows` rows none comes twice.

    Args:
        texts: Documents that can be iterated over more than once, such as a `TextStream`.
        tokenizer: As in `TextDataset`.
        max_tokens: As in `TextDataset`.
        demonstration_fraction: As in `TextDataset`.
        min_tokens: As in `TextDataset`; the warning comes after the first pass.
        num_rows: Rows of one iteration.
        seed: Fixes windows and order.
        shuffle_buffer: Documents held at a time, of which the next is drawn; 1: in the order they are read.
        batch_size: Rows that all processes together read in one forward pass. Workers take turns by so many rows, and
            so many are one batch: rows then come in the same order with any number of workers.

    Raises:
        ConfigError: A number is impossible, or the tokenizer does not know where tokens end.
        DataError: The texts can be read only once; while reading: no document is long enough.
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
        shuffle_buffer: int = 1000,
        batch_size: int = 1,
    ) -> None:
        if min(shuffle_buffer, batch_size) < 1:
            raise ConfigError(
                f"Expected shuffle_buffer and batch_size of 1 or more, got {shuffle_buffer} and {batch_size}: raise "
                "them."
            )
        check_num_rows(num_rows)
        if isinstance(texts, Iterator):
            raise DataError(
                f"Expected texts that can be read more than once, got a {type(texts).__name__}, which is spent after "
                "one reading: give a TextStream, a list, or a class whose __iter__ begins anew."
            )
        self._cutter = WindowCutter(
            tokenizer, max_tokens=max_tokens, demonstration_fraction=demonstration_fraction, min_tokens=min_tokens
        )
        self.texts = texts
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of rows of one iteration, over all workers and processes."""
        return self.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows; in a worker of a DataLoader, its share of them."""
        worker = get_worker_info()
        place, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (text, name) in enumerate(itertools.islice(self._draw(), self.num_rows)):
            if number // self.batch_size % num_workers == place:
                yield self._cutter.cut(text, random.Random(f"{self.seed}:{name}"))

    def _draw(self) -> Iterator[tuple[str, str]]:
        """Yield documents in the order of the rows, each with a name of its own in every pass."""
        rng = random.Random(str(self.seed))
        for pass_number in itertools.count():
            waiting: list[tuple[str, str]] = []
            num_texts = num_short = 0
            for text in self.texts:
                num_texts += 1
                if not self._cutter.is_long_enough(text):
                    num_short += 1
                    continue
                waiting.append((text, f"{pass_number}:{num_texts}"))
                if len(waiting) >= self.shuffle_buffer:
                    yield _take(waiting, rng)
            if pass_number == 0:
                report_short_documents(num_short, num_texts, self._cutter.min_tokens)
            while waiting:
                yield _take(waiting, rng)


def _take(waiting: list[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
    """Remove one of the waiting documents; the last takes its place."""
    place = rng.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()
