"""The distiller: reads demonstration tokens once and writes vectors, or keys and values.

Shapes: N chunks, B tasks, D demonstration tokens, V virtual tokens, S prefix slots, E embedding width of the base
model, R width of the reader.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, DynamicCache, PreTrainedModel

from mend_hf.adapter_switch import adapter_on, switch_by_thread
from mend_hf.architectures import (
    CACHE_NAME,
    accepts,
    embed_tokens,
    get_backbone,
    get_embedding_width,
    get_max_positions,
    get_unadaptable_modules,
)
from mend_hf.config import MendConfig
from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.errors import ConfigError, ShapeError
from mend_hf.fingerprint import hash_tensors
from mend_hf.guards import check_length, check_padding
from mend_hf.pooling import label_anchors, pool_anchors
from mend_hf.prefix import (
    EmbeddingPrefix,
    KeyValuePrefix,
    Prefix,
    gather_slots,
    gather_tokens,
    join_tasks,
    make_cache,
    pack_left,
    pack_right,
    position_inputs,
    positions_of,
    stack_rows,
)
from mend_hf.projection import KeyValueProjection, find_sink_id, read_starting_vectors

ADAPTER_NAME = "mend"


class DemonstrationDistiller(nn.Module):
    """Reads demonstrations with V placeholder embeddings behind them and returns a prefix.

    A *shared* distiller reads with the base model itself while a LoRA adapter is on; a *separate* one has a model of
    its own. Both are harmless at birth: vectors start as token embeddings of the base model, keys and values as the
    base model's own: a shared distiller's of the text, a separate one's of the vectors that it starts from.

    Args:
        config: With `prefix_form` decided.
        base_model: The frozen base model. A shared distiller puts its LoRA matrices into it, switched off.
        reader: The model of a separate distiller.
        prompt_ids: The empty prompt as the base model's token ids, which vectors start as; None: random tokens.
        reader_prompt_ids: The same for the reader's placeholders.
        sink_id: The token that a text of the base model begins with, the sink of keys and values that a separate
            distiller writes; None: the one that the base model's config calls so, else the vocabulary's first.
    """

    def __init__(
        self,
        config: MendConfig,
        base_model: PreTrainedModel,
        reader: PreTrainedModel | None = None,
        prompt_ids: list[int] | None = None,
        reader_prompt_ids: list[int] | None = None,
        sink_id: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.reader = reader
        self._hash: tuple[tuple[tuple[int, int], ...], str] | None = None
        self._base = [base_model]  # in a list, and so no submodule: it is not the distiller's to save
        if reader is not None:
            reader.requires_grad_(config.lora_r == 0)
        num_vectors, base_width = config.num_virtual_tokens, get_embedding_width(base_model)
        width = base_width if reader is None else _hidden_width(reader)
        self.placeholders = nn.Parameter(_initial_rows(self._model, num_vectors, reader_prompt_ids))  # [V, R]
        if config.prefix_form == "embeds" or reader is not None:
            self.base_vectors = nn.Parameter(_initial_rows(base_model, num_vectors, prompt_ids))  # [V, E]
        if config.prefix_form == "embeds":
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.projection = nn.Linear(width, base_width)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        elif reader is not None:
            self._sink_id = find_sink_id(base_model) if sink_id is None else sink_id
            with torch.no_grad(), _evaluation_mode(base_model):
                own = read_starting_vectors(base_model, self._sink_id, self.base_vectors)
            is_bounded = config.projection == "tanh"
            self.layer_projection = KeyValueProjection(width, own, config.projection_rank, is_bounded=is_bounded)
        if config.lora_r:
            self._add_adapter()
        self.to(base_model.device)

    @property
    def _model(self) -> PreTrainedModel:
        return self.reader if self.reader is not None else self._base[0]

    @property
    def _backbone(self) -> PreTrainedModel:
        return self.reader if self.reader is not None else get_backbone(self._base[0])

    @property
    def _adapted(self) -> PreTrainedModel:
        """The part that gets LoRA matrices: of an encoder-decoder the encoder, for its decoder never distils."""
        return self._backbone if self._model.config.is_encoder_decoder else self._model

    def trained_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what training changes and a saved distiller holds, by name.

        That is the placeholders, the projection, the LoRA matrices, and all of a separate reader without LoRA.
        """
        for name, parameter in self.named_parameters():
            if not name.startswith("reader.") or not self.config.lora_r:
                yield name, parameter
        if self.config.lora_r:
            for name, parameter in self._model.named_parameters():
                if f".{ADAPTER_NAME}." in name:
                    yield f"adapter.{name.replace(f'.{ADAPTER_NAME}.', '.')}", parameter

    def content_hash(self) -> str:
        """Return a hash of the trained tensors, computed anew only after they changed."""
        tensors = dict(self.trained_tensors())
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        if self._hash is None or self._hash[0] != versions:
            self._hash = (versions, hash_tensors(tensors))
        return self._hash[1]

    def remove_adapter(self) -> None:
        """Take the LoRA matrices out of the model that reads and leave its own layers in their places."""
        for name, layer in self._adapter_layers():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, layer.get_base_layer())
        if self.config.lora_r and hasattr(self._adapted, "peft_config"):
            del self._adapted.peft_config

    def adapter_layers(self) -> list[BaseTunerLayer]:
        """Return the layers that carry this distiller's LoRA matrices."""
        return [layer for _, layer in self._adapter_layers()]

    def _adapter_layers(self) -> list[tuple[str, BaseTunerLayer]]:
        if not self.config.lora_r:
            return []
        return [(name, module) for name, module in self._model.named_modules() if isinstance(module, BaseTunerLayer)]

    def _add_adapter(self) -> None:
        """Put LoRA matrices into the model that reads; into a base model switched off."""
        if self.adapter_layers():
            raise ConfigError(
                "Expected a base model without LoRA layers, got one that has some: unload() the MendModel around it "
                "first, or merge the adapter that it came with."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sets it right itself
            inject_adapter_in_model(_lora_config(self.config, self._model), self._adapted, adapter_name=ADAPTER_NAME)
        # As peft's own models do: steps of training are too small for weights in bfloat16.
        cast_adapter_dtype(self._adapted, ADAPTER_NAME)
        if self.config.is_shared:
            for layer in self.adapter_layers():
                switch_by_thread(layer)

    def adapter_on(self) -> AbstractContextManager[None]:
        """Read with the LoRA adapter, in this thread; outside of the block a shared base model is as bare as ever."""
        return adapter_on() if self.config.is_shared and self.config.lora_r else nullcontext()

    def forward(self, batch: DemonstrationBatch) -> Prefix:
        """Distil the demonstrations of B tasks.

        Args:
            batch: N chunks of B tasks.

        Returns:
            A prefix of B rows. Its slots are, of every chunk, the V placeholders and in the kv form before them the
            first token and, of a shared distiller, the anchors, which are pooled beyond `max_slots`.
        """
        prefix = self.distil_chunks(batch)
        if self.config.overflow != "recurrent":
            prefix = join_tasks(prefix, batch.task_rows.tolist())
        if isinstance(prefix, KeyValuePrefix) and self.config.max_slots is not None:
            return pool_anchors(prefix, self.config.max_slots, self.config.anchor_pooling)
        return prefix

    def distil_chunks(self, batch: DemonstrationBatch, batch_size: int | None = None) -> Prefix:
        """Distil the chunks of B tasks without joining or pooling them.

        Args:
            batch: N chunks of B tasks.
            batch_size: Chunks that are read at once, which bounds the memory; None: all.

        Returns:
            A prefix of one row a chunk; under `recurrent`, where a chunk goes on from those before it and cannot be
            told from them, one row a task.

        Raises:
            ConfigError: `batch_size` is no number of chunks.
        """
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError(
                f"Expected batch_size to be a whole number of chunks from 1 on, got {batch_size!r}: give fewer chunks "
                "to save memory, or None to read all at once."
            )
        with self.adapter_on():
            if self.config.overflow == "recurrent":
                return self._distil_in_turn(batch, batch_size)
            return self._distil_batches(batch, None, batch_size)

    def _distil_in_turn(self, batch: DemonstrationBatch, batch_size: int | None) -> Prefix:
        """Distil chunk after chunk; each also reads the prefix of those before it."""
        prefixes: dict[int, Prefix] = {}
        for chunks, rows in batch.rounds():
            past = stack_rows([prefixes[row] for row in rows.tolist()]) if prefixes else None
            new = self._distil_batches(chunks, past, batch_size)
            for index, row in enumerate(rows.tolist()):
                prefixes[row] = new.select([index])
        return stack_rows([prefixes[row] for row in sorted(prefixes)])

    def _distil_batches(self, batch: DemonstrationBatch, past: Prefix | None, batch_size: int | None) -> Prefix:
        num_chunks = batch.input_ids.shape[0]
        if batch_size is None or batch_size >= num_chunks:
            return self._distil_chunks(batch, past)
        parts = []
        for rows in torch.arange(num_chunks, device=batch.input_ids.device).split(batch_size):
            parts.append(self._distil_chunks(batch.select(rows), None if past is None else past.select(rows)))
        return stack_rows(parts)

    def _distil_chunks(self, batch: DemonstrationBatch, past: Prefix | None) -> Prefix:
        """Distil every chunk as a row of its own, going on from the prefix of what was read before."""
        num_chunks, num_vectors = batch.input_ids.shape[0], self.config.num_virtual_tokens
        embeddings = embed_tokens(self._model, batch.input_ids)
        embeddings = torch.cat([embeddings, self.placeholders.to(embeddings.dtype).expand(num_chunks, -1, -1)], dim=1)
        mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(num_chunks, num_vectors)], dim=1)
        if self.config.prefix_form == "embeds":
            return self._read_vectors(embeddings, mask, past if isinstance(past, EmbeddingPrefix) else None)
        if self.reader is not None:
            own = read_starting_vectors(self._base[0], self._sink_id, self.base_vectors)
            return self.layer_projection(self._read_placeholders(embeddings, mask), own)
        labels = F.pad(label_anchors(batch.input_ids, batch.anchor_mask), (0, num_vectors))
        return self._read_keys_and_values(
            embeddings, mask, labels, batch.attention_mask, past if isinstance(past, KeyValuePrefix) else None
        )

    def _read_vectors(self, embeddings: Tensor, mask: Tensor, past: EmbeddingPrefix | None) -> EmbeddingPrefix:
        if past is not None:
            embeddings = torch.cat([past.vectors.to(embeddings.dtype), embeddings], dim=1)
            mask = torch.cat([past.mask.to(mask.dtype), mask], dim=1)
        hidden = self._read_placeholders(embeddings, mask)
        update = self.projection(self.norm(hidden.to(self.projection.weight.dtype)))
        if self.config.projection == "tanh":
            update = update.tanh()
        vectors = self.base_vectors + update  # [N, V, E]
        new = EmbeddingPrefix(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))
        return new if past is None else _append(past, new)

    def _read_placeholders(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states (N, V, R) at the placeholders, with which every row ends.

        Padding moves behind what is read, and no positions are given: a reader then numbers its tokens in its own way
        (BART's encoder counts places, RoBERTa begins behind the padding's id), and right in either.
        """
        check_length(self._model, mask.sum(1))
        check_padding(self._model, mask)
        index, mask = pack_left(mask)
        inputs: dict[str, Any] = {"inputs_embeds": gather_tokens(embeddings, index), "attention_mask": mask}
        if accepts(self._backbone, "use_cache"):
            inputs["use_cache"] = False
        states = self._backbone(**inputs).last_hidden_state
        num_vectors = self.config.num_virtual_tokens
        places = mask.sum(1, keepdim=True) - num_vectors + torch.arange(num_vectors, device=mask.device)  # [N, V]
        return gather_tokens(states, places)

    def _read_keys_and_values(
        self, embeddings: Tensor, mask: Tensor, labels: Tensor, text_mask: Tensor, past: KeyValuePrefix | None
    ) -> KeyValuePrefix:
        """Keep the keys and values of the sink, the anchors and the placeholders.

        The placeholders' positions are spread evenly over the text, so that the query can follow the text directly
        (after Zhao et al., 2025, "Position IDs Matter", arXiv 2409.14364).
        """
        lengths = text_mask.sum(1)  # [N]
        text_positions = positions_of(text_mask)
        steps = torch.arange(1, self.config.num_virtual_tokens + 1, device=lengths.device)
        spread = (lengths[:, None] * steps // max(len(steps), 1) - 1).clamp(min=0)  # [N, V]
        positions = torch.cat([text_positions, spread], dim=1)
        keep = (labels != 0) | F.pad(torch.zeros_like(text_mask), (0, len(steps)), value=1).bool()
        if past is None:
            cache, past_mask = DynamicCache(), mask[:, :0]
            is_sink = mask.bool() & (mask.cumsum(1) == 1)
            keep, labels = keep | is_sink, labels.masked_fill(is_sink, 0)
        else:
            cache, past_mask = make_cache(past), past.mask.to(mask.dtype)
            positions = positions + past.next_positions[:, None]
            lengths = lengths + past.next_positions
            keep, labels = torch.cat([past.mask, keep], dim=1), torch.cat([past.labels, labels], dim=1)
            _check_recurrent_length(self._model, lengths)
        check_length(self._model, lengths)
        self._backbone(
            inputs_embeds=embeddings,
            attention_mask=torch.cat([past_mask, mask], dim=1),
            **position_inputs(self._backbone, positions),
            **{CACHE_NAME: cache},
            use_cache=True,
        )
        index, slot_mask = pack_right(keep)
        return KeyValuePrefix(
            tuple(gather_slots(layer.keys, index) for layer in cache.layers),
            tuple(gather_slots(layer.values, index) for layer in cache.layers),
            slot_mask,
            lengths,
            labels.gather(1, index),
        )


def load_reader(config: MendConfig) -> PreTrainedModel:
    """Load the model of a separate distiller; of an encoder-decoder model its encoder."""
    reader = AutoModel.from_pretrained(config.distiller_name_or_path, revision=config.distiller_revision or "main")
    return get_backbone(reader)


def _check_recurrent_length(model: PreTrainedModel, lengths: Tensor) -> None:
    limit = get_max_positions(model)
    if limit is not None and int(lengths.max()) > limit:
        raise ShapeError(
            f"Expected at most {limit} tokens in all chunks together, for which {type(model).__name__} has positions, "
            f'got {int(lengths.max())}: overflow="recurrent" numbers the chunks on and on. Use overflow="concat", '
            "where every chunk begins at position 0, or give fewer demonstrations."
        )


def _append(past: EmbeddingPrefix, new: EmbeddingPrefix) -> EmbeddingPrefix:
    return EmbeddingPrefix(torch.cat([past.vectors, new.vectors], dim=1), torch.cat([past.mask, new.mask], dim=1))


def _lora_config(config: MendConfig, model: PreTrainedModel) -> LoraConfig:
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        exclude_modules=get_unadaptable_modules(model) or None,
    )


def _initial_rows(model: PreTrainedModel, num_rows: int, prompt_ids: list[int] | None) -> Tensor:
    """Return what V placeholders start as, (V, width), in the scale of the model's input embeddings."""
    weight = model.get_input_embeddings().weight
    num_tokens = weight.shape[0]
    if num_rows > num_tokens:
        raise ConfigError(
            f"Expected num_virtual_tokens up to the vocabulary size {num_tokens}, got {num_rows}: use fewer."
        )
    if prompt_ids:
        ids = torch.tensor(prompt_ids).repeat(num_rows // len(prompt_ids) + 1)[:num_rows]
    else:
        ids = torch.randperm(num_tokens)[:num_rows]
    with torch.no_grad():
        return embed_tokens(model, ids.to(weight.device)).float().clone()


def _hidden_width(reader: PreTrainedModel) -> int:
    """Return R, which need not be the width of the reader's embeddings (ELECTRA, ALBERT)."""
    token = torch.zeros(1, 1, dtype=torch.long, device=reader.device)
    with torch.no_grad():
        return reader(inputs_embeds=embed_tokens(reader, token)).last_hidden_state.shape[-1]


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Read without dropout, and with the cache that activation checkpointing drops in training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
