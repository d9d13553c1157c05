"""The distiller: reads demonstration tokens once and writes vectors, or keys and values.

Shapes: N chunks, B tasks, D demonstration tokens, V virtual tokens, S prefix slots, E embedding width of the base
model, R width of the reader.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from mend_hf.architectures import accepts, check_length, embed_tokens, get_backbone, get_embedding_width
from mend_hf.config import MendConfig
from mend_hf.demonstrations import EncodedTask
from mend_hf.errors import ConfigError
from mend_hf.fingerprint import hash_tensors
from mend_hf.prefix import (
    EmbeddingPrefix,
    KeyValuePrefix,
    Prefix,
    gather_slots,
    join_chunks,
    make_cache,
    pack_right,
    positions_of,
    stack_rows,
)

ADAPTER_NAME = "mend"


@dataclass(frozen=True)
class DemonstrationBatch:
    """Token ids of the demonstrations of B tasks, cut into N chunks, padded on the left.

    Attributes:
        input_ids (N, D): Token ids.
        attention_mask (N, D): 1 where there is a token.
        anchor_mask (N, D): True at the tokens whose keys and values are kept.
        task_rows (N,): Which task a chunk belongs to, ascending from 0; a task's chunks follow one another.
    """

    input_ids: Tensor
    attention_mask: Tensor
    anchor_mask: Tensor
    task_rows: Tensor

    @classmethod
    def from_columns(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchor_mask: Tensor | None = None,
        task_rows: Tensor | None = None,
    ) -> DemonstrationBatch:
        """Take a collator's columns as they are; what is left out means no padding, no anchors, one chunk a task."""
        return cls(
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            torch.zeros_like(input_ids, dtype=torch.bool) if anchor_mask is None else anchor_mask,
            torch.arange(input_ids.shape[0], device=input_ids.device) if task_rows is None else task_rows,
        )

    @classmethod
    def from_tasks(cls, tasks: list[EncodedTask], pad_token_id: int) -> DemonstrationBatch:
        """Pad the chunks of several tasks to one length."""
        chunks = [(row, chunk) for row, task in enumerate(tasks) for chunk in task.chunks]
        length = max(len(chunk.input_ids) for _, chunk in chunks)
        input_ids = torch.full((len(chunks), length), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        anchor_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for index, (_, chunk) in enumerate(chunks):
            start = length - len(chunk.input_ids)
            input_ids[index, start:] = torch.tensor(chunk.input_ids)
            attention_mask[index, start:] = 1
            anchor_mask[index, [start + position for position in chunk.anchor_positions]] = True
        return cls(input_ids, attention_mask, anchor_mask, torch.tensor([row for row, _ in chunks]))

    def to(self, device: torch.device) -> DemonstrationBatch:
        """Return the batch on a device."""
        return DemonstrationBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def rounds(self) -> Iterator[tuple[DemonstrationBatch, Tensor]]:
        """Yield the first chunks of all tasks, then the second ones, ...: each with the rows of its tasks."""
        same = self.task_rows[:, None] == self.task_rows[None, :]
        chunk_number = same.tril(-1).sum(1)  # [N]
        for number in range(int(chunk_number.max()) + 1):
            index = (chunk_number == number).nonzero().squeeze(1)
            rows = self.task_rows[index]
            yield (
                DemonstrationBatch(
                    self.input_ids[index],
                    self.attention_mask[index],
                    self.anchor_mask[index],
                    torch.arange(len(rows), device=rows.device),
                ),
                rows,
            )


class DemonstrationDistiller(nn.Module):
    """Reads demonstrations with V placeholder embeddings behind them and returns a prefix.

    A *shared* distiller reads with the base model itself while a LoRA adapter is on; a *separate* one has a model of
    its own. Both are harmless at birth: vectors start as token embeddings of the base model, keys and values as the
    base model's own.

    Args:
        config: With `prefix_form` decided.
        base_model: The frozen base model. A shared distiller puts its LoRA matrices into it, switched off.
        reader: The model of a separate distiller.
        prompt_ids: The empty prompt as the base model's token ids, which vectors start as; None: random tokens.
        reader_prompt_ids: The same for the reader's placeholders.
    """

    def __init__(
        self,
        config: MendConfig,
        base_model: PreTrainedModel,
        reader: PreTrainedModel | None = None,
        prompt_ids: list[int] | None = None,
        reader_prompt_ids: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.reader = reader
        self._hash: tuple[tuple[tuple[int, int], ...], str] | None = None
        self._base = [base_model]  # in a list, and so no submodule: it is not the distiller's to save
        if reader is not None:
            reader.requires_grad_(config.lora_r == 0)
        num_vectors, base_width = config.num_virtual_tokens, get_embedding_width(base_model)
        width = get_embedding_width(self._model)
        self.placeholders = nn.Parameter(_initial_rows(self._model, num_vectors, reader_prompt_ids))  # [V, R]
        if config.prefix_form == "embeds":
            self.base_vectors = nn.Parameter(_initial_rows(base_model, num_vectors, prompt_ids))  # [V, E]
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.projection = nn.Linear(width, base_width)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
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
            inject_adapter_in_model(_lora_config(self.config), self._adapted, adapter_name=ADAPTER_NAME)
        if self.config.is_shared:
            self._switch_adapter(enabled=False)

    @contextmanager
    def adapter_on(self) -> Iterator[None]:
        """Read with the LoRA adapter; outside of this context a shared base model is the bare base model."""
        if self.reader is not None:
            yield
            return
        self._switch_adapter(enabled=True)
        try:
            yield
        finally:
            self._switch_adapter(enabled=False)

    def forward(self, batch: DemonstrationBatch) -> Prefix:
        """Distil the demonstrations of B tasks.

        Args:
            batch: N chunks of B tasks.

        Returns:
            A prefix of B rows. Its slots are, of every chunk, the V placeholders and in the kv form before them the
            first token and the anchors.
        """
        with self.adapter_on():
            if self.config.overflow == "recurrent":
                return self._distil_in_turn(batch)
            prefix = self._distil_chunks(batch, None)
        if batch.task_rows.shape[0] == int(batch.task_rows[-1]) + 1:
            return prefix
        rows_of_task = [(batch.task_rows == row).nonzero().squeeze(1) for row in range(int(batch.task_rows[-1]) + 1)]
        return stack_rows([join_chunks([prefix.select(row[None]) for row in rows]) for rows in rows_of_task])

    def _distil_in_turn(self, batch: DemonstrationBatch) -> Prefix:
        """Distil chunk after chunk; each also reads the prefix of those before it."""
        prefixes: dict[int, Prefix] = {}
        for chunks, rows in batch.rounds():
            past = stack_rows([prefixes[row] for row in rows.tolist()]) if prefixes else None
            new = self._distil_chunks(chunks, past)
            for index, row in enumerate(rows.tolist()):
                prefixes[row] = new.select([index])
        return stack_rows([prefixes[row] for row in sorted(prefixes)])

    def _distil_chunks(self, batch: DemonstrationBatch, past: Prefix | None) -> Prefix:
        """Distil every chunk as a row of its own, going on from the prefix of what was read before."""
        num_chunks, num_vectors = batch.input_ids.shape[0], self.config.num_virtual_tokens
        embeddings = embed_tokens(self._model, batch.input_ids)
        embeddings = torch.cat([embeddings, self.placeholders.to(embeddings.dtype).expand(num_chunks, -1, -1)], dim=1)
        mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(num_chunks, num_vectors)], dim=1)
        if self.config.prefix_form == "embeds":
            return self._read_vectors(embeddings, mask, past if isinstance(past, EmbeddingPrefix) else None)
        keep = torch.cat([batch.anchor_mask, mask[:, batch.input_ids.shape[1] :].bool()], dim=1)
        return self._read_keys_and_values(
            embeddings, mask, keep, batch.attention_mask, past if isinstance(past, KeyValuePrefix) else None
        )

    def _read_vectors(self, embeddings: Tensor, mask: Tensor, past: EmbeddingPrefix | None) -> EmbeddingPrefix:
        if past is not None:
            embeddings = torch.cat([past.vectors.to(embeddings.dtype), embeddings], dim=1)
            mask = torch.cat([past.mask.to(mask.dtype), mask], dim=1)
        check_length(self._model, mask.sum(1))
        hidden = self._read_states(embeddings, mask)[:, -self.config.num_virtual_tokens :]  # [N, V, R]
        update = self.projection(self.norm(hidden.to(self.projection.weight.dtype)))
        if self.config.projection == "tanh":
            update = update.tanh()
        vectors = self.base_vectors + update  # [N, V, E]
        new = EmbeddingPrefix(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))
        return new if past is None else _append(past, new)

    def _read_states(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states (N, D + V, R) of what is read.

        A reader that is told no positions may count places (BART's encoder), so padding moves behind what it reads.
        """
        if accepts(self._backbone, "position_ids"):
            positions = positions_of(mask)
            output = self._backbone(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions)
            return output.last_hidden_state
        order = torch.argsort((mask == 0).to(torch.uint8), dim=1, stable=True)
        embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
        states = self._backbone(inputs_embeds=embeddings, attention_mask=mask.gather(1, order)).last_hidden_state
        return states.gather(1, order.argsort(1)[..., None].expand_as(states))

    def _read_keys_and_values(
        self, embeddings: Tensor, mask: Tensor, keep: Tensor, text_mask: Tensor, past: KeyValuePrefix | None
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
        if past is None:
            cache, past_mask = DynamicCache(), mask[:, :0]
            keep = keep | (mask.bool() & (mask.cumsum(1) == 1))
        else:
            cache, past_mask = make_cache(past), past.mask.to(mask.dtype)
            positions = positions + past.next_positions[:, None]
            lengths = lengths + past.next_positions
            keep = torch.cat([past.mask, keep], dim=1)
        check_length(self._model, lengths)
        self._backbone(
            inputs_embeds=embeddings,
            attention_mask=torch.cat([past_mask, mask], dim=1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        index, slot_mask = pack_right(keep)
        return KeyValuePrefix(
            tuple(gather_slots(layer.keys, index) for layer in cache.layers),
            tuple(gather_slots(layer.values, index) for layer in cache.layers),
            slot_mask,
            lengths,
        )

    def _switch_adapter(self, *, enabled: bool) -> None:
        """Switch the adapter without touching `requires_grad`, which peft clears on switching off."""
        for layer in self.adapter_layers():
            parameters = [*layer.parameters()]
            flags = [parameter.requires_grad for parameter in parameters]
            layer.enable_adapters(enabled)
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


def load_reader(config: MendConfig) -> PreTrainedModel:
    """Load the model of a separate distiller; of an encoder-decoder model its encoder."""
    reader = AutoModel.from_pretrained(config.distiller_name_or_path, revision=config.distiller_revision or "main")
    return get_backbone(reader)


def _append(past: EmbeddingPrefix, new: EmbeddingPrefix) -> EmbeddingPrefix:
    return EmbeddingPrefix(torch.cat([past.vectors, new.vectors], dim=1), torch.cat([past.mask, new.mask], dim=1))


def _lora_config(config: MendConfig) -> LoraConfig:
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
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
