"""Scores of answers as `evaluate.Metric`s that need no network: macro-F1, accuracy, exact match and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from mend_hf.errors import ConfigError, import_extra

_FEATURES = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


class _TextMetric(evaluate.Metric):
    """Compares answers with gold answers, both as text; shares lie between 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions, references: lists of strings",
            features=datasets.Features(_FEATURES),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> dict[str, float]:
        return {self.name: self.score(predictions, references, labels)}

    def score(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> float:
        """Return the score; labels, where given, are all the classes that there are."""
        raise NotImplementedError


class MacroF1(_TextMetric):
    """F1 of every gold label that can be chosen, averaged; a label that no gold answer has does not count."""

    def score(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> float:
        """Return the score."""
        f1_score = import_extra("sklearn.metrics", "eval").f1_score
        labels = sorted(set(references) if labels is None else set(references).intersection(labels))
        return float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0))


class Accuracy(_TextMetric):
    """Share of answers that are the gold answer."""

    def score(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> float:
        """Return the score."""
        return sum(map(str.__eq__, predictions, references)) / len(references)


class ExactMatch(_TextMetric):
    """Share of answers that are the gold answer, whatever their case, punctuation and blanks."""

    def score(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> float:
        """Return the score."""
        return sum(_words(a) == _words(b) for a, b in zip(predictions, references, strict=True)) / len(references)


class RougeL(_TextMetric):
    """F-measure of the longest common subsequence of words, averaged (Lin, 2004)."""

    def score(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
    ) -> float:
        """Return the score."""
        pairs = [(_words(a), _words(b)) for a, b in zip(predictions, references, strict=True)]
        return sum(2 * _common(a, b) / max(len(a) + len(b), 1) for a, b in pairs) / len(pairs)


METRICS: dict[str, type[_TextMetric]] = {
    "macro_f1": MacroF1,
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "rouge_l": RougeL,
}


def check_metric(name: str) -> None:
    """Refuse a metric that is not known.

    Raises:
        ConfigError: It is not.
    """
    if name not in METRICS:
        raise ConfigError(f"Expected a metric among {', '.join(METRICS)}, got {name!r}.")


def compute_metric(
    name: str, predictions: Sequence[str], references: Sequence[str], *, labels: Sequence[str] | None = None
) -> float:
    """Return a metric's score, from 0 to 1.

    Args:
        name: One of `METRICS`.
        predictions: Answers.
        references: Gold answers. One that is no label makes its answer a wrong one and is no class of its own.
        labels: The classes that there are; None: every gold answer is one. Macro-F1 alone asks for them.

    Raises:
        ConfigError: The metric is not known.
    """
    check_metric(name)
    metric = METRICS[name](config_name=name, keep_in_memory=True)
    results: dict[str, Any] = metric.compute(predictions=predictions, references=references, labels=labels)
    return results[metric.name]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for index, other in enumerate(b):
            row.append(before[index] + 1 if word == other else max(before[index + 1], row[index]))
    return row[-1]
