"""How a prefix reaches a frozen base model: one route a kind of model, all with the same few methods."""

from __future__ import annotations

from transformers import PreTrainedModel

from mend_hf.routes.base import Route
from mend_hf.routes.cached import CachedRoute
from mend_hf.routes.encoder import EncoderRoute


def get_route(base_model: PreTrainedModel) -> Route:
    """Return the route by which this base model reads a prefix.

    Args:
        base_model: One that `architectures.check_base_model` accepts.
    """
    if base_model.config.is_encoder_decoder:
        return EncoderRoute(base_model)
    return CachedRoute(base_model)
