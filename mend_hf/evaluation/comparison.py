"""Other distillers and other language models as methods, beside the ones of the model that is evaluated."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from mend_hf.evaluation.methods import in_context, mend
from mend_hf.evaluation.readers import Demonstrations, Method, Reader
from mend_hf.model import MendModel


def share_weights(base_model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model whose weights are the first one's own tensors, for another distiller.

    Its modules are its own: LoRA layers and hooks that a distiller puts into one model are not in the other.

    Args:
        base_model: One that no distiller has been put into yet.
    """
    return copy.deepcopy(base_model, {id(parameter): parameter for parameter in base_model.parameters()})


def distil_with(other: MendModel) -> Method:
    """Return a method that distils with this model's distiller and answers with its base model."""

    def distil(model: MendModel, demonstrations: Demonstrations) -> Reader:
        return mend(other, demonstrations)

    return distil


def read_with(other: MendModel) -> Method:
    """Return in-context learning with this model's base model, such as one that MetaICL tuned."""

    def read(model: MendModel, demonstrations: Demonstrations) -> Reader:
        return in_context(other, demonstrations)

    return read
