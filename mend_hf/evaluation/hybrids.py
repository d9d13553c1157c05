"""A distilled prefix with raw demonstrations behind it.

Shapes: S prefix slots, N tokens of raw demonstrations, V vectors, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mend_hf.architectures import CACHE_NAME, embed_tokens, get_backbone
from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.evaluation.readers import Demonstrations, Method, Reader
from mend_hf.guards import check_positions
from mend_hf.model import MendModel
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, Prefix, make_cache, position_inputs, positions_of
from mend_hf.prompt_encoder import PromptEncoder


def mend_with_raw(num_raw: int) -> Method:
    """Return a method that distils all demonstrations but the last ones, which it reads as text behind the prefix.

    Args:
        num_raw: How many stay text. At least one demonstration is distilled.
    """

    def distil_and_read(model: MendModel, demonstrations: Demonstrations) -> Reader:
        num_distilled = max(len(demonstrations) - num_raw, 1)
        distilled, raw = demonstrations[:num_distilled], demonstrations[num_distilled:]
        prefix = model.distill(list(distilled)).prefix
        return Reader(model, model.route.prepare(read_behind(model, prefix, raw) if raw else prefix))

    return distil_and_read


@torch.no_grad()
def read_behind(model: MendModel, prefix: Prefix, demonstrations: Demonstrations) -> Prefix:
    """Return a prefix with demonstrations' text behind it, as the bare base model reads it there.

    Args:
        model: Its base model reads, in its prompt format.
        prefix: One row. Vectors get the text's token embeddings behind them; keys and values those of the text.
        demonstrations: (input, output) pairs; those that the budget does not hold are left out.

    Raises:
        ShapeError: The base model has no positions left.
    """
    ids = _encode_behind(model, demonstrations)  # [1, N]
    mask = torch.ones_like(ids)
    if isinstance(prefix, EmbeddingPrefix):
        embeddings = embed_tokens(model.base_model, ids)
        vectors = torch.cat([prefix.vectors.to(embeddings), embeddings], dim=1)  # [1, V + N, E]
        return EmbeddingPrefix(vectors, torch.cat([prefix.mask, mask.bool()], dim=1))
    check_positions(model.base_model, mask, prefix.next_positions)
    whole = torch.cat([prefix.mask, mask.bool()], dim=1)  # [1, S + N]
    backbone, cache = get_backbone(model.base_model), make_cache(prefix)
    backbone(
        inputs_embeds=embed_tokens(model.base_model, ids),
        attention_mask=whole.long(),
        **position_inputs(backbone, positions_of(mask, prefix.next_positions)),
        **{CACHE_NAME: cache},
        use_cache=True,
    )
    return KeyValuePrefix(
        tuple(layer.keys for layer in cache.layers),
        tuple(layer.values for layer in cache.layers),
        whole,
        prefix.next_positions + mask.sum(1),
    )


def _encode_behind(model: MendModel, demonstrations: Demonstrations) -> Tensor:
    """Return the ids of demonstrations (1, N) without what opens a text, which the prefix stands for."""
    prompt = PromptEncoder(model.tokenizer, model.mend_config.without_chunks())
    task = prompt.encode_demonstrations(demonstrations)
    batch = DemonstrationBatch.from_tasks([task], prompt.pad_token_id).to(model.device)
    return batch.input_ids[:, len(prompt.opening_ids) :]
