"""Channel scoring: how likely the input is behind every option, in place of every option behind the input.

After Min et al., "Noisy Channel Language Model Prompting for Few-Shot Text Classification", ACL 2022,
arXiv 2108.04106.
"""

from __future__ import annotations

from collections.abc import Sequence

from mend_hf.demonstrations import Demonstration
from mend_hf.errors import DataError
from mend_hf.evaluation.readers import Demonstrations, Reader


def swap_demonstrations(demonstrations: Demonstrations) -> list[Demonstration]:
    """Return demonstrations that ask for the input of an output.

    Raises:
        DataError: One is plain text, which has no output.
    """
    swapped = []
    for demonstration in demonstrations:
        if demonstration.output is None:
            raise DataError(
                f"Expected demonstrations with an output for channel scoring, got the text {demonstration.input!r}: "
                'give (input, output) pairs, or use scoring="direct".'
            )
        swapped.append(Demonstration(demonstration.output, demonstration.input))
    return swapped


def score_by_channel(
    reader: Reader, queries: Sequence[str], options: Sequence[Sequence[str]], *, batch_size: int
) -> list[list[float]]:
    """Return, for every query, the mean log-likelihood a token of its text behind each of its options, in nats.

    The text is the same behind all options of a query, so the mean ranks them as the sum does.

    Args:
        reader: Has read demonstrations that were swapped.
        queries: B texts.
        options: The answers to choose from, for every query.
        batch_size: Options read at once, and a few times as many queries behind them.

    Raises:
        DataError: A query is empty.
    """
    if not all(query.strip() for query in queries):
        raise DataError(
            "Expected inputs with text, whose likelihood channel scoring measures, got an empty one: leave it out, "
            'or use scoring="direct".'
        )
    asked: dict[str, dict[str, None]] = {}  # an option: the queries that have it, each once
    for query, choices in zip(queries, options, strict=True):
        for option in choices:
            asked.setdefault(option, {})[query] = None
    texts = [sorted(having, key=len) for having in asked.values()]  # like lengths side by side need little padding
    scores = reader.score_options(list(asked), texts, batch_size=batch_size)
    found = {
        (option, text): score
        for option, row, values in zip(asked, texts, scores, strict=True)
        for text, score in zip(row, values, strict=True)
    }
    return [[found[option, query] for option in choices] for query, choices in zip(queries, options, strict=True)]
