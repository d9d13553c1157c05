"""What a method comes down to: a model that has read a task's demonstrations, and now chooses or writes answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from mend_hf.demonstrations import Demonstration
from mend_hf.model import MendModel
from mend_hf.prefix import Prefix
from mend_hf.scoring import batch_by_length, score_options

Demonstrations = Sequence[Demonstration]


@dataclass(frozen=True)
class Reader:
    """A model with a prefix in front of every query; a method that does more than that is a subclass.

    Attributes:
        model: What reads the queries.
        prefix: One row, prepared; None: nothing stands in front.
    """

    model: MendModel
    prefix: Prefix | None = None

    @property
    def num_slots(self) -> int:
        """Positions that every query attends to in place of the demonstrations."""
        return self.prefix.num_slots if self.prefix else 0

    @property
    def num_bytes(self) -> int:
        """What is kept for the task between queries, in bytes."""
        return self.prefix.num_bytes if self.prefix else 0

    def for_labels(self, labels: Sequence[str] | None) -> Reader:
        """Return what reads the queries of a task that all have these options; None: each query has its own."""
        return self

    def score_options(
        self, queries: Sequence[str], options: Sequence[Sequence[str]], *, batch_size: int
    ) -> list[list[float]]:
        """Return, for every query, a score of each of its options: the mean log-likelihood a token, in nats."""
        return score_options(self.model, queries, options, self.prefix, batch_size=batch_size)

    def generate(self, queries: Sequence[str], *, batch_size: int) -> list[str]:
        """Return the first line that is written for every query."""
        answers = [""] * len(queries)
        # Zero-shot is the bare base model, also where demonstrations are bound.
        with self.model.disable_adapter() if self.prefix is None else nullcontext():
            for rows in batch_by_length(self.model, queries, batch_size):
                written = self.model.answer([queries[row] for row in rows], self.prefix)
                for row, answer in zip(rows, written, strict=True):
                    answers[row] = answer.split("\n")[0]
        return answers


Method = Callable[[MendModel, Demonstrations], Reader]
