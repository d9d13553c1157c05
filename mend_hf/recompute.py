"""Activation checkpointing: layers forget what they computed and compute it again for the backward pass.

transformers' own switch asks whether a layer is in training mode, which those of a frozen base model never are; and
the second pass must read through the same adapter as the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from mend_hf.adapter_switch import adapter_as_now
from mend_hf.errors import UnsupportedModelError


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that can be computed twice.

    Raises:
        UnsupportedModelError: There are none.
    """
    layers: list[nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"Expected a model whose layers transformers can checkpoint, got {type(model).__name__}, which has none: "
            "leave activation_checkpointing off and lower max_tokens_per_pass."
        )
    return layers


@contextmanager
def recompute_layers(layers: list[nn.Module]) -> Iterator[None]:
    """Let layers, inside the block, keep nothing but their inputs; the backward pass may come after it.

    A layer that is given a cache to write into is left alone: it would write twice.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _twice(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def forward_twice(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        contexts = partial(_contexts, adapter_as_now())
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward_twice


def _contexts(
    as_before: Callable[[], AbstractContextManager[None]],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the first pass and what surrounds the second one, perhaps on another thread."""
    return nullcontext(), as_before()
