"""Demonstrations as they should not be: what a method keeps of its score says what it reads in them.

After Min et al., "Rethinking the Role of Demonstrations", EMNLP 2022, arXiv 2202.12837.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mend_hf.data.metaicl import Example
from mend_hf.demonstrations import Demonstration
from mend_hf.errors import ConfigError, DataError
from mend_hf.model import MendModel
from mend_hf.prompt_format import change_prompt_format

Variation = Callable[[Sequence[Example], random.Random], list[Demonstration]]

AS_GIVEN, OTHER_FORMAT = "as given", "other prompt format"
OTHER_TEXTS = {"input_prefix": "Q: ", "output_prefix": "\nA:"}


def as_given(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """Inputs with their outputs."""
    return [Demonstration(example.input, example.output) for example in examples]


def no_input(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """Outputs behind nothing."""
    return [Demonstration("", example.output) for example in examples]


def no_label(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """Inputs with nothing behind them."""
    return [Demonstration(example.input, "") for example in examples]


def random_labels(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """Outputs drawn from the options, the right one among them."""
    return [Demonstration(example.input, rng.choice(_options_of(example))) for example in examples]


def wrong_labels(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """Outputs drawn from the other options."""
    return [
        Demonstration(example.input, rng.choice([each for each in _options_of(example) if each != example.output]))
        for example in examples
    ]


def permuted_order(examples: Sequence[Example], rng: random.Random) -> list[Demonstration]:
    """The same ones in another order."""
    return as_given(rng.sample(examples, len(examples)), rng)


VARIATIONS: dict[str, Variation] = {
    AS_GIVEN: as_given,
    "no input": no_input,
    "no label": no_label,
    "random labels": random_labels,
    "wrong labels": wrong_labels,
    "permuted order": permuted_order,
    OTHER_FORMAT: as_given,  # demonstrations and queries are written otherwise, see `in_format_of`
}


@contextmanager
def in_format_of(variation: str, model: MendModel) -> Iterator[None]:
    """Let a model write demonstrations and queries as `Q:` and `A:` inside the block, where a variation asks for it.

    Not for a model that another thread uses meanwhile.
    """
    before = model.mend_config
    if variation == OTHER_FORMAT:
        model.mend_config = change_prompt_format(before, OTHER_TEXTS)
    try:
        yield
    finally:
        model.mend_config = before


def vary(examples: Sequence[Example], variation: str, seed: int) -> list[Demonstration]:
    """Return a task's demonstrations, changed.

    Args:
        examples: As they were drawn.
        variation: One of `VARIATIONS`.
        seed: Fixes what is drawn.

    Raises:
        ConfigError: There is no such variation.
        DataError: Labels are to be drawn, and there are not two options to draw from.
    """
    if variation not in VARIATIONS:
        raise ConfigError(f"Expected a variation among {', '.join(VARIATIONS)}, got {variation!r}.")
    return VARIATIONS[variation](examples, random.Random(f"{variation}:{seed}"))


def _options_of(example: Example) -> tuple[str, ...]:
    if len(example.options) < 2:
        raise DataError(
            f"Expected options to draw labels from, got none for {example.input!r} of {example.task}: leave the task "
            "out, or the variations of labels."
        )
    return example.options
