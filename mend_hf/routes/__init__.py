"""How a prefix reaches a frozen base model: one route a kind of model, all with the same few methods."""

from __future__ import annotations

from transformers import PreTrainedModel

from mend_hf.architectures import holds_prefix_in_cache
from mend_hf.routes.base import Route
from mend_hf.routes.cached import CachedRoute
from mend_hf.routes.encoder import EncoderRoute
from mend_hf.routes.prepended import PrependedRoute


def get_route(base_model: PreTrainedModel) -> Route:
    """Return the route by which this base model reads a prefix.

    Args:
        base_model: One that `architectures.check_base_model` accepts.
    """
    if base_model.config.is_encoder_decoder:
        return EncoderRoute(base_model)
    return CachedRoute(base_model) if holds_prefix_in_cache(base_model) else PrependedRoute(base_model)
