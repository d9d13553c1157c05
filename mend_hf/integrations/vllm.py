"""Prompts of vectors for vLLM, which puts them where the embeddings of a prompt's tokens would stand.

vLLM itself is not needed here. What it asks for is written down in its page on prompt embeddings
(https://docs.vllm.ai/en/stable/features/prompt_embeds/) and checked by `safe_load_prompt_embeds` in its source:

* one tensor a prompt, of shape (tokens, hidden size), in float32, float16 or bfloat16. Older versions need the very
  type that they serve the model in, newer ones convert what the server receives;
* to the server, at `/v1/completions` and with `--enable-prompt-embeds`, as the base64 of what `torch.save` writes,
  under the key `prompt_embeds`. No chat template is applied there;
* to `LLM(..., enable_prompt_embeds=True).generate({"prompt_embeds": tensor})` as it is.

A text under the key `prompt` would be answered beside the vectors and not behind them, so the query has to be embedded
too. The endpoint for chats puts a text of its own around what it is given and is of no use here.

Shapes: V virtual tokens, T query tokens, P = V + T, E embedding width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mend_hf.architectures import embed_tokens
from mend_hf.artifact import DistilledDemonstrations
from mend_hf.errors import ConfigError, DataError, ShapeError, UnsupportedModelError
from mend_hf.fingerprint import check_fingerprint
from mend_hf.guards import check_generates
from mend_hf.model import MendModel
from mend_hf.routes.prepended import PrependedRoute

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What vLLM refuses beside prompt_embeds, or answers beside them as a prompt of its own.
_NOT_BESIDE_EMBEDS = ("echo", "prompt", "prompt_embeds", "prompt_logprobs", "suffix")


@torch.no_grad()
def make_prompt_embeds(model: MendModel, demonstrations: Any, query: str) -> Tensor:
    """Return what the bare base model takes as `inputs_embeds` to answer a query from distilled demonstrations.

    It is what `model.generate` lets the base model read: the vectors, and behind them the query in the prompt format.
    The base model's own scale is in it (Gemma's embedding layer multiplies), and so is a begin-of-text token where the
    distiller read one.

    Args:
        model: In the embeds form, with a decoder-only language model.
        demonstrations: One task, raw or distilled.
        query: What is asked.

    Returns:
        One prompt (P, E), on the CPU, in the base model's floating-point type.

    Raises:
        ConfigError: The prefix is keys and values.
        DataError: There is not exactly one task, or the query is not a text.
        CheckpointError: The demonstrations were distilled for another base model.
        UnsupportedModelError: The base model is an encoder-decoder, or has no language-model head.
    """
    base_model = model.base_model
    check_generates(base_model)
    if base_model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a decoder-only base model, got {type(base_model).__name__}, whose encoder vLLM gives no "
            "vectors: answer with MendModel, or use a decoder-only model."
        )
    if not isinstance(query, str):
        raise DataError(f"Expected one query as text, got {type(query).__name__}: make one prompt a query.")
    prefix = PrependedRoute(base_model).prepare(_distil_one_task(model, demonstrations).prefix)
    embeddings = embed_tokens(base_model, model.tokenize(query)["input_ids"])
    return torch.cat([prefix.vectors[prefix.mask], embeddings[0]]).cpu()


def make_completion_request(
    embeds: Tensor,
    model_name: str,
    *,
    max_tokens: int = 32,
    stop: str | Sequence[str] | None = None,
    temperature: float = 0.0,
    **sampling: Any,
) -> dict[str, Any]:
    """Return the body of a request to vLLM's `/v1/completions`, ready for `json.dumps`.

    Args:
        embeds (P, E): From `make_prompt_embeds`; with `.to(...)` in the type that vLLM serves the model in, where that
            is another one.
        model_name: The name under which vLLM serves the base model.
        max_tokens: Most tokens to generate; as many as `MendModel.answer` does unless told otherwise.
        stop: Text at which an answer ends: the prompt format's separator.
        temperature: 0 is greedy, as `MendModel.answer` is.
        **sampling: Other fields of the request: `n`, `seed`, `top_p`, `stop_token_ids`, `stream` ...

    Raises:
        ShapeError: There is not exactly one prompt, or the tensor is not of a floating-point type that vLLM takes.
        ConfigError: A field does not go together with vectors.
    """
    if embeds.dim() != 2 or not embeds.numel():
        raise ShapeError(
            f"Expected one prompt of shape (tokens, hidden size), got {tuple(embeds.shape)}: make one request for "
            "each prompt."
        )
    if embeds.dtype not in DTYPES:
        raise ShapeError(
            f"Expected a prompt in {', '.join(map(str, DTYPES))}, got {embeds.dtype}: convert it with .to(...) to the "
            "type that vLLM serves the model in."
        )
    if refused := [name for name in _NOT_BESIDE_EMBEDS if name in sampling]:
        raise ConfigError(
            f"Expected fields that go together with prompt_embeds, got {', '.join(refused)}: leave them out, and give "
            "make_prompt_embeds what is asked."
        )
    request = {
        "model": model_name,
        "prompt_embeds": _encode(embeds),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    if stop is not None:
        request["stop"] = [stop] if isinstance(stop, str) else list(stop)
    return request | sampling


def _distil_one_task(model: MendModel, demonstrations: Any) -> DistilledDemonstrations:
    is_distilled = isinstance(demonstrations, DistilledDemonstrations)
    form = demonstrations.prefix_form if is_distilled else model.mend_config.prefix_form
    if form != "embeds":
        raise ConfigError(
            'Expected prefix_form="embeds", whose vectors vLLM takes in place of tokens, got "kv", keys and values of '
            'every layer, which no request carries: train a distiller with prefix_form="embeds" and distil with it.'
        )
    distilled: DistilledDemonstrations = demonstrations if is_distilled else model.distill(demonstrations)
    if len(distilled) != 1:
        raise DataError(f"Expected demonstrations of one task, got {len(distilled)}: pick one with [row].")
    made_for = distilled.provenance.base_model_fingerprint
    check_fingerprint(made_for, model.mend_config.base_model_fingerprint or {}, "What was distilled")
    return distilled


def _encode(embeds: Tensor) -> str:
    """Return the base64 of what `torch.save` writes, which vLLM reads with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # A slice that is not copied is saved with all it was cut from.
    return base64.b64encode(buffer.getvalue()).decode("ascii")
