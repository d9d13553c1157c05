"""Readers with calibrated options: what an option would get whatever is asked does not count for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mend_hf.evaluation.readers import Demonstrations, Method, Reader
from mend_hf.model import MendModel
from mend_hf.scoring import option_priors

# Inputs that say nothing (Zhao et al., 2021, section 5).
CONTENT_FREE_INPUTS = ("N/A", "", "[MASK]")
MAX_INPUTS = 8  # demonstrations whose inputs are asked


@dataclass(frozen=True)
class CalibratedReader(Reader):
    """A reader whose options are scored against what they get for other inputs. Writing is not changed by it.

    Attributes:
        inputs: Without content, it is contextual calibration (Zhao et al., "Calibrate Before Use", ICML 2021, arXiv
            2102.09690); inputs of the task, here the demonstrations' own, make it batch calibration (Zhou et al.,
            ICLR 2024, arXiv 2309.17249), which needs no query.
        are_of_task: Whether the inputs are the task's own. They then calibrate labels alone: an option that a single
            query has is no answer to them, and what it gets there says little, at the cost of several queries.
    """

    inputs: Sequence[str] = CONTENT_FREE_INPUTS
    are_of_task: bool = False
    _priors: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def for_labels(self, labels: Sequence[str] | None) -> Reader:
        """Return itself, or, where it can calibrate labels alone and there are none, a reader that does not."""
        return Reader(self.model, self.prefix) if labels is None and self.are_of_task else self

    def score_options(
        self, queries: Sequence[str], options: Sequence[Sequence[str]], *, batch_size: int
    ) -> list[list[float]]:
        """Return, for every query, its options' mean log-likelihoods a token less those behind the other inputs.

        What is found for an option is kept: every option is read behind these inputs once a reader.
        """
        distinct = dict.fromkeys(option for choices in options for option in choices)
        new = [option for option in distinct if option not in self._priors]
        if new:
            self._priors.update(option_priors(self.model, self.inputs, new, self.prefix, batch_size=batch_size))
        scores = super().score_options(queries, options, batch_size=batch_size)
        return [
            [score - self._priors[option] for option, score in zip(choices, row, strict=True)]
            for choices, row in zip(options, scores, strict=True)
        ]


def calibrate_contextually(method: Method) -> Method:
    """Return a method that puts the same in front of the query and calibrates options by inputs without content."""

    def calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
        reader = method(model, demonstrations)
        return CalibratedReader(reader.model, reader.prefix)

    return calibrated


def calibrate_by_inputs(method: Method) -> Method:
    """Return a method that puts the same in front of the query and calibrates labels by the demonstrations' inputs."""

    def calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
        reader = method(model, demonstrations)
        inputs = [demonstration.input for demonstration in demonstrations[:MAX_INPUTS]]
        return CalibratedReader(reader.model, reader.prefix, inputs, are_of_task=True)

    return calibrated
