"""Readers with calibrated options: what an option would get whatever is asked does not count for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.evaluation.readers import Demonstrations, Reader
from mend_hf.model import MendModel
from mend_hf.scoring import option_priors

# Inputs that say nothing (Zhao et al., 2021, section 5).
CONTENT_FREE_INPUTS = ("N/A", "", "[MASK]")
# Demonstrations whose inputs are asked. Where no two demonstrations have the same output, queries have options of
# their own, and each input more costs as much as all the scoring.
MAX_INPUTS, MAX_INPUTS_FOR_OWN_OPTIONS = 8, 4


@dataclass(frozen=True)
class CalibratedReader(Reader):
    """A reader whose options are scored against what they get for other inputs. Writing is not changed by it.

    Attributes:
        inputs: Without content, it is contextual calibration (Zhao et al., "Calibrate Before Use", ICML 2021, arXiv
            2102.09690); inputs of the task, here the demonstrations' own, make it batch calibration (Zhou et al.,
            ICLR 2024, arXiv 2309.17249), which needs no query.
    """

    inputs: Sequence[str] = CONTENT_FREE_INPUTS
    _priors: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

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


def zero_shot_batch_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Nothing in front of the query; of the demonstrations only their inputs, which calibrate the options."""
    return CalibratedReader(model, None, _inputs_of(demonstrations))


def in_context_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Vanilla ICL with contextual calibration."""
    return _calibrate(model, model.read(list(demonstrations)), CONTENT_FREE_INPUTS)


def in_context_batch_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Vanilla ICL, calibrated by the demonstrations' inputs."""
    return _calibrate(model, model.read(list(demonstrations)), _inputs_of(demonstrations))


def mend_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The model's distiller, with contextual calibration."""
    return _calibrate(model, model.distill(list(demonstrations)), CONTENT_FREE_INPUTS)


def mend_batch_calibrated(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The model's distiller, calibrated by the demonstrations' inputs."""
    return _calibrate(model, model.distill(list(demonstrations)), _inputs_of(demonstrations))


def _calibrate(model: MendModel, read: DistilledDemonstrations, inputs: Sequence[str]) -> Reader:
    return CalibratedReader(model, model.route.prepare(read.prefix), inputs)


def _inputs_of(demonstrations: Demonstrations) -> list[str]:
    outputs = [demonstration.output for demonstration in demonstrations]
    has_classes = len({*outputs}) < len(outputs)
    return [shot.input for shot in demonstrations[: MAX_INPUTS if has_classes else MAX_INPUTS_FOR_OWN_OPTIONS]]
