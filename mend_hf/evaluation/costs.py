"""What a method computes: floating-point operations, counted by formula from the lengths that a model is given.

A multiplication with an addition counts as two operations, as in `torch.utils.flop_counter`. What is counted are
products of matrices: the linear layers, the attention scores and the sums of values that they weigh, the head, and the
LoRA matrices where they are read through. Attention counts every pair of a query and a key that it is given, hidden or
not, and padding counts as it is computed.

Shapes: B rows, T tokens read, P positions before them in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mend_hf.adapter_switch import adapter_is_on
from mend_hf.architectures import CACHE_NAME, get_backbone, holds_prefix_in_cache, rename_cache
from mend_hf.model import MendModel


@dataclass
class FlopCount:
    """Floating-point operations so far.

    Attributes:
        total: Their number; NaN where the models at work have parts that the formula does not know.
    """

    total: float = 0.0


@contextmanager
def count_flops(model: MendModel) -> Iterator[FlopCount]:
    """Count what a model and its distiller compute inside the block.

    Known are decoder-only models that keep keys and values, each layer with the same heads; under a sliding window the
    count is an upper bound. Mixtures of experts, models with other states and encoder-decoders give NaN.

    Yields:
        The count, which goes on while the block does. Where gradients flow, a layer counts once more for those of its
        inputs, and attention twice more; the base model's weights have none.
    """
    count = FlopCount()
    with ExitStack() as stack:
        base = model.base_model
        models = [base, *([model.distiller.reader] if model.distiller.reader is not None else [])]
        for each in models:
            if _is_known(each):
                stack.enter_context(_hooked(get_backbone(each), _count_reading(each, count)))
            else:
                count.total = math.nan
        head = base.get_output_embeddings()
        parts = [head, *(part for name, part in model.distiller.named_modules() if not name.startswith("reader"))]
        for part in parts:
            if isinstance(part, nn.Linear):
                stack.enter_context(_hooked(part, _count_linear(part, count)))
        yield count


def _is_known(model: PreTrainedModel) -> bool:
    backbone = get_backbone(model)
    has_matrices_only = all(parameter.dim() <= 2 for parameter in backbone.parameters())
    return not model.config.is_encoder_decoder and holds_prefix_in_cache(model) and has_matrices_only


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _count_linear(layer: nn.Linear, count: FlopCount) -> Callable[..., None]:
    size = layer.weight.numel()

    def add(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states = args[0]  # [..., width]
        count.total += 2 * size * states.numel() / states.shape[-1] * (2 if _flows_back(states) else 1)

    return add


def _count_reading(model: PreTrainedModel, count: FlopCount) -> Callable[..., None]:
    """Return a hook that counts one forward pass of a model without its head."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    size_of_attention = config.num_hidden_layers * num_heads * width
    matrices = {
        f"{name}.{kind}": parameter.numel()
        for name, module in get_backbone(model).named_modules()
        if not isinstance(module, nn.Embedding)
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2
    }
    size_of_adapter = sum(size for name, size in matrices.items() if ".lora_" in name)
    size = sum(matrices.values()) - size_of_adapter

    def add(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
        states = next(tensor for tensor in given if tensor is not None)
        num_rows, num_tokens = states.shape[:2]  # B, T
        cache = rename_cache(kwargs).get(CACHE_NAME)
        num_before = int(cache.get_seq_length()) if cache is not None else 0  # P
        backwards = _flows_back(states)
        matrices_size = size + (size_of_adapter if adapter_is_on() else 0)
        linear = 2 * num_rows * num_tokens * matrices_size
        attention = 4 * size_of_attention * num_rows * num_tokens * (num_before + num_tokens)
        count.total += linear * (2 if backwards else 1) + attention * (3 if backwards else 1)

    return add


def _flows_back(states: Tensor) -> bool:
    return torch.is_grad_enabled() and states.requires_grad
