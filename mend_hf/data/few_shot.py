"""Few-shot rows: demonstrations and queries of one task, and how often each task is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from mend_hf.config import MendConfig
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError, DataError
from mend_hf.prompt_format import FormatChoice, change_prompt_format

_SYLLABLES = ("ba", "co", "di", "fe", "gu", "la", "mo", "ni", "pe", "ru", "sa", "to", "vi", "ze")
_SYMBOLS = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]


Mixing = Literal["uniform", "proportional"] | float


def mixing_weights(sizes: Sequence[int], mixing: Mixing, mixing_limit: int | None = None) -> list[float]:
    """Return how likely each task is to be drawn, up to a common factor.

    T5's multi-task mixing (Raffel et al., JMLR 2020, section 3.5.2): min(size, limit) ** (1 / temperature).

    Args:
        sizes: Examples of every task.
        mixing: "uniform"; "proportional", the temperature 1; or a temperature, which lies between them if above 1.
        mixing_limit: A larger task counts as one with so many examples.

    Raises:
        ConfigError: The temperature or the limit is impossible, or a limit has no effect.
    """
    temperature = {"uniform": math.inf, "proportional": 1.0}.get(mixing, mixing) if isinstance(mixing, str) else mixing
    if isinstance(temperature, str) or not temperature > 0:
        raise ConfigError(
            f'Expected "uniform", "proportional" or a temperature above 0 as mixing, got {mixing!r}: choose one.'
        )
    if mixing_limit is not None and (mixing_limit < 1 or temperature == math.inf):
        raise ConfigError(
            "Expected mixing_limit, 1 or more examples, beside a mixing that counts them, got "
            f"mixing_limit={mixing_limit}, mixing={mixing!r}: leave it out, or mix in proportion."
        )
    return [min(size, mixing_limit or size) ** (1 / temperature) for size in sizes]


class FewShotDataset(Dataset[dict[str, Any]]):
    """Rows of demonstrations and a query of the same task.

    Row i depends on the seed, on i and on the tasks only. A row holds `demonstrations` (mappings with `input` and
    `output`), `query`, `target`, `task` and `options`; no example of it stands in two places.

    Args:
        tasks: Examples by task name. A task with too few for one row is left out with a warning.
        num_demonstrations: In a row; (low, high): drawn anew for every row, both ends included.
        queries_per_demonstrations: If more than 1, `query` and `target` are lists, and `options` is a list of lists.
        max_options: Of more options than these, the target and some others are kept, drawn anew for every query; None:
            all are.
        num_rows: Length of the data set.
        seed: Fixes the rows.
        mixing: How often a task is drawn: every one as often as every other, in proportion to its examples, or
            between both with a temperature; see `mixing_weights`.
        mixing_limit: Examples that a large task counts for at most; None: all.
        balance_queries: Let every answer of the task be as likely a query's target as every other, as macro-F1 counts
            them; what is frequent in the task is then no better a guess than what is rare.
        permute_labels: Fraction of rows in which the labels trade places, the same way in the whole row, so that only
            the demonstrations say what a label stands for. Rows of free-form tasks, and of tasks whose examples have
            options of their own, stay as they are.
        symbol_labels: Fraction of rows in which other words of no meaning stand for the labels; the two fractions
            share no row ("Symbol tuning", Wei et al., EMNLP 2023, arXiv 2305.08298).
        prompt_formats: Every row gets one of these as `prompt_format`, which `MendCollator` writes it in, so that a
            distiller does not come to depend on one; see `prompt_format.change_prompt_format`. None: the config's own.

    Raises:
        ConfigError: A number is impossible, or a prompt format.
        DataError: No task has enough examples.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Example]],
        *,
        num_demonstrations: int | tuple[int, int] = 16,
        queries_per_demonstrations: int = 1,
        max_options: int | None = None,
        num_rows: int,
        seed: int,
        mixing: Mixing = "uniform",
        mixing_limit: int | None = None,
        balance_queries: bool = False,
        permute_labels: float = 0.0,
        symbol_labels: float = 0.0,
        prompt_formats: Sequence[FormatChoice] = (),
    ) -> None:
        low, high = (num_demonstrations,) * 2 if isinstance(num_demonstrations, int) else num_demonstrations
        for name, number in (("num_rows", num_rows), ("queries_per_demonstrations", queries_per_demonstrations)):
            if number < 1:
                raise ConfigError(f"Expected {name} of 1 or more, got {number}: raise it.")
        if min(low, high) < 1:
            raise ConfigError(f"Expected num_demonstrations of 1 or more, got {num_demonstrations}: raise it.")
        if low > high:
            raise ConfigError(
                f"Expected num_demonstrations with the lower end first, got {num_demonstrations}: give a range as "
                f"(low, high), here ({high}, {low})."
            )
        if min(permute_labels, symbol_labels) < 0 or permute_labels + symbol_labels > 1:
            raise ConfigError(
                "Expected two fractions of the rows that make at most 1 together, got "
                f"permute_labels={permute_labels}, symbol_labels={symbol_labels}: lower one."
            )
        self.num_demonstrations = (low, high)
        if max_options is not None and max_options < 2:
            raise ConfigError(f"Expected max_options of 2 or more, or None for all, got {max_options}.")
        self.queries_per_demonstrations = queries_per_demonstrations
        self.max_options = max_options
        self.num_rows = num_rows
        self.seed = seed
        self.balance_queries = balance_queries
        self.permute_labels = permute_labels
        self.symbol_labels = symbol_labels
        self.prompt_formats = [dict(choice) if isinstance(choice, Mapping) else choice for choice in prompt_formats]
        for choice in self.prompt_formats:
            change_prompt_format(MendConfig(), choice)
        needed = high + queries_per_demonstrations
        small = sorted(name for name, examples in tasks.items() if len(examples) < needed)
        self.tasks = {name: tasks[name] for name in sorted(tasks) if name not in small}
        if not self.tasks:
            raise DataError(
                f"Expected a task with at least {needed} examples ({high} demonstrations and "
                f"{queries_per_demonstrations} queries), got none among {len(tasks)} tasks: "
                "ask for fewer demonstrations or add examples."
            )
        if small:
            warnings.warn(
                f"{len(small)} of {len(tasks)} tasks have fewer than {needed} examples and are left out: "
                f"{', '.join(small)}.",
                stacklevel=2,
            )

        weights = mixing_weights([len(examples) for examples in self.tasks.values()], mixing, mixing_limit)
        self._cumulative_weights = None if len({*weights}) == 1 else [*itertools.accumulate(weights)]

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
        task = self._draw_task(rng)
        k = rng.randint(*self.num_demonstrations)
        num_queries = self.queries_per_demonstrations
        if self.balance_queries:
            shuffled = rng.sample(self.tasks[task], len(self.tasks[task]))
            picked = shuffled[:k] + _pick_balanced(shuffled[k:], num_queries, rng)
        else:
            picked = rng.sample(self.tasks[task], k + num_queries)
        chance = rng.random()
        if chance < self.permute_labels + self.symbol_labels:
            picked = _rename_labels(picked, rng, with_symbols=chance >= self.permute_labels)
        option_rng = random.Random(f"{self.seed}:{index}:options")
        queries: dict[str, list[Any]] = {
            "query": [example.input for example in picked[k:]],
            "target": [example.output for example in picked[k:]],
            "options": [self._draw_options(example, option_rng) for example in picked[k:]],
        }
        single = num_queries == 1
        return {
            "task": task,
            "demonstrations": [{"input": example.input, "output": example.output} for example in picked[:k]],
            **{column: values[0] if single else values for column, values in queries.items()},
            **({"prompt_format": rng.choice(self.prompt_formats)} if self.prompt_formats else {}),
        }

    def _draw_options(self, example: Example, rng: random.Random) -> list[str]:
        if self.max_options is None or len(example.options) <= self.max_options:
            return list(example.options)
        others = [option for option in example.options if option != example.output]
        kept = {example.output, *rng.sample(others, self.max_options - 1)}
        return [option for option in example.options if option in kept]

    def _draw_task(self, rng: random.Random) -> str:
        if self._cumulative_weights is None:
            return rng.choice(list(self.tasks))
        return rng.choices(list(self.tasks), cum_weights=self._cumulative_weights)[0]


def _pick_balanced(examples: Sequence[Example], num_examples: int, rng: random.Random) -> list[Example]:
    """Return examples whose outputs are drawn evenly from those that are left."""
    by_output: dict[str, list[Example]] = {}
    for example in examples:
        by_output.setdefault(example.output, []).append(example)
    picked = []
    for _ in range(num_examples):
        output = rng.choice(list(by_output))
        picked.append(by_output[output].pop())
        if not by_output[output]:
            del by_output[output]
    return picked


def _rename_labels(examples: list[Example], rng: random.Random, *, with_symbols: bool) -> list[Example]:
    """Return the examples with their labels permuted or replaced; unchanged where they do not share their options."""
    labels = sorted(examples[0].options)
    words = _SYMBOLS if with_symbols else labels
    if not 0 < len(labels) <= len(words) or any(sorted(example.options) != labels for example in examples):
        return examples
    names = dict(zip(labels, rng.sample(words, len(labels)), strict=True))
    return [
        dataclasses.replace(
            example, output=names[example.output], options=tuple(names[option] for option in example.options)
        )
        for example in examples
    ]
