"""Encoder-decoder base models: the prefix stands in front of the encoder's input embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from mend_hf.architectures import embed_tokens, get_backbone, get_max_positions
from mend_hf.errors import DataError, ShapeError
from mend_hf.prefix import EmbeddingPrefix, Prefix, check_vectors, gather_tokens, pack_left
from mend_hf.routes.base import Route


class EncoderRoute(Route):
    """Vectors in front of the query that the encoder reads; the decoder attends to both, and to nothing else.

    An encoder may count places and not tokens (BART's position table), so every row is packed: vectors, query,
    padding on the right, whatever side the query was padded on. The outputs for the prefix are kept among the
    encoder's, which is what the decoder answers from.
    """

    def prepare(self, prefix: Prefix) -> EmbeddingPrefix:
        """Return the prefix on the base model's device: an encoder sees both ways, so nothing can be read ahead.

        Raises:
            ShapeError: These are keys and values, or vectors of another width.
        """
        if not isinstance(prefix, EmbeddingPrefix):
            raise ShapeError(
                "Expected vectors for an encoder-decoder base model, got keys and values, which were made for a "
                "decoder-only one: distil again with this model."
            )
        check_vectors(self.base_model, prefix.vectors)
        return prefix.to(self.base_model.device, self.base_model.dtype)

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> EmbeddingPrefix:
        """Return the text's token embeddings: in front of a query they are the text in front of it."""
        return EmbeddingPrefix(embed_tokens(self.base_model, input_ids), attention_mask.bool())

    def target_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the decoder's inputs (B, A): the labels one place to the right, as the base model moves them."""
        return {"decoder_input_ids": self.base_model.prepare_decoder_input_ids_from_labels(labels=labels)}

    def encode(self, prefix: Prefix | None, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Run the encoder once over queries behind a prefix.

        Args:
            prefix: B rows; None: the queries alone.
            input_ids (B, T): The queries' tokens.
            attention_mask (B, T): Of the queries alone.

        Returns:
            `encoder_outputs` and `attention_mask`, which the base model takes in place of a query.
        """
        if prefix is None:
            prefix = self.read_tokens(input_ids[:, :0], attention_mask[:, :0])
        inputs = self._join(prefix, embed_tokens(self.base_model, input_ids), attention_mask)
        return {
            "encoder_outputs": get_backbone(self.base_model)(**inputs),
            "attention_mask": inputs["attention_mask"],
        }

    def forward(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> ModelOutput:
        """Run encoder and decoder; the logits are the decoder's, one for each label or decoder input.

        Raises:
            DataError: Neither labels nor decoder inputs are given.
            ShapeError: Prefix and query are longer than the encoder's position table.
        """
        targets = ("labels", "decoder_input_ids", "decoder_inputs_embeds")
        if all(kwargs.get(name) is None for name in targets):
            raise DataError(
                "Expected labels or decoder_input_ids for the decoder of an encoder-decoder base model, got neither: "
                "pass one of them, or call generate."
            )
        query = kwargs.pop("inputs_embeds") if input_ids is None else embed_tokens(self.base_model, input_ids)
        return self.base_model(**self._join(prefix, query, attention_mask), **kwargs)

    def generate(self, prefix: Prefix, input_ids: Tensor | None, attention_mask: Tensor, **generation: Any) -> Any:
        """Generate the decoder's tokens; the encoder runs once, for all beams and returned sequences."""
        query = generation.pop("inputs_embeds", None)
        if input_ids is not None:
            query = embed_tokens(self.base_model, input_ids)
        return self.base_model.generate(**self._join(prefix, query, attention_mask), **generation)

    def _join(self, prefix: Prefix, query: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the encoder's `inputs_embeds` (B, N, E) and `attention_mask` (B, N), packed to the left."""
        if not isinstance(prefix, EmbeddingPrefix):
            raise ShapeError("Expected vectors, got keys and values: call prepare first.")
        embeddings = torch.cat([prefix.vectors.to(query.dtype), query], dim=1)
        mask = torch.cat([prefix.mask.to(attention_mask.dtype), attention_mask], dim=1)
        index, mask = pack_left(mask)
        limit = get_max_positions(self.base_model)
        if limit is not None and mask.shape[1] > limit:
            raise ShapeError(
                f"Expected demonstrations and query to fit the encoder's {limit} positions, got {mask.shape[1]} "
                f"vectors and tokens, {prefix.num_slots} of them in the prefix: use fewer demonstrations or a shorter "
                "query."
            )
        return {"inputs_embeds": gather_tokens(embeddings, index), "attention_mask": mask}
