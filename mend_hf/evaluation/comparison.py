"""Other distillers and other language models as methods, beside the ones of the model that is evaluated."""

from __future__ import annotations

import copy
from dataclasses import dataclass

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


@dataclass(frozen=True)
class BoundMethod:
    """A method bound to another model than the one that is evaluated.

    Attributes:
        model: What reads demonstrations and queries.
        method: How.
    """

    model: MendModel
    method: Method

    def __call__(self, _: MendModel, demonstrations: Demonstrations) -> Reader:
        """Return what has read the demonstrations."""
        return self.method(self.model, demonstrations)


def distil_with(other: MendModel) -> BoundMethod:
    """Return a method that distils with this model's distiller and answers with its base model."""
    return BoundMethod(other, mend)


def read_with(other: MendModel) -> BoundMethod:
    """Return in-context learning with this model's base model, such as one that MetaICL tuned."""
    return BoundMethod(other, in_context)
