"""Readers with calibrated options: what an option would get whatever is asked does not count for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.evaluation.readers import Demonstrations, Reader
from mend_hf.model import MendModel

# Inputs that say nothing (Zhao et al., 2021, section 5).
CONTENT_FREE_INPUTS = ("N/A", "", "[MASK]")


@dataclass(frozen=True)
class CalibratedReader(Reader):
    """A reader whose options are scored against what they get for inputs without content.

    Contextual calibration (Zhao et al., "Calibrate Before Use", ICML 2021, arXiv 2102.09690) divides an option's
    probability by the mean of its probabilities under content-free inputs. Writing is not changed by it.
    """

    _scores_for_nothing: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def score_options(
        self, queries: Sequence[str], options: Sequence[Sequence[str]], *, batch_size: int
    ) -> list[list[float]]:
        """Return, for every query, its options' mean log-likelihoods a token less those under content-free inputs.

        What is found for an option is kept: every option is read behind the content-free inputs once a reader.
        """
        distinct = dict.fromkeys(option for choices in options for option in choices)
        new = [option for option in distinct if option not in self._scores_for_nothing]
        if new:
            rows = super().score_options(CONTENT_FREE_INPUTS, [new] * len(CONTENT_FREE_INPUTS), batch_size=batch_size)
            self._scores_for_nothing.update(zip(new, map(_log_of_mean, zip(*rows, strict=True)), strict=True))
        scores = super().score_options(queries, options, batch_size=batch_size)
        return [
            [score - self._scores_for_nothing[option] for option, score in zip(choices, row, strict=True)]
            for choices, row in zip(options, scores, strict=True)
        ]


def in_context_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Vanilla ICL with contextual calibration."""
    return _calibrate(model, model.read(list(demonstrations)))


def mend_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The model's distiller, with contextual calibration."""
    return _calibrate(model, model.distill(list(demonstrations)))


def _calibrate(model: MendModel, read: DistilledDemonstrations) -> Reader:
    return CalibratedReader(model, model.route.prepare(read.prefix))


def _log_of_mean(log_values: Sequence[float]) -> float:
    """Return the logarithm of the mean of numbers given as logarithms, none of which can underflow."""
    highest = max(log_values)
    return highest + math.log(sum(math.exp(value - highest) for value in log_values) / len(log_values))
