"""Prompt tuning and prefix tuning: PEFT's soft prompts, trained on a task's demonstrations alone.

Shapes: V virtual tokens, L layers, H key/value heads, K head width, E embedding width, W numbers a virtual token is
trained as: E of a prompt, 2 L H K of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from mend_hf.architectures import embed_tokens, get_sliding_window, holds_prefix_in_cache
from mend_hf.demonstrations import Demonstration, name_demonstration
from mend_hf.errors import ConfigError, DataError, UnsupportedModelError
from mend_hf.evaluation.readers import Demonstrations, Reader
from mend_hf.fingerprint import hash_json
from mend_hf.guards import check_gradients, check_length
from mend_hf.losses import IGNORE_INDEX
from mend_hf.model import MendModel
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, read_embeddings
from mend_hf.prompt_encoder import PromptEncoder

# AdamW without warm-up, the rate falling to 0: as in PEFT's guide "Prompt-based methods" for a few examples.
LEARNING_RATE = 3e-2
NUM_EPOCHS = 50
BATCH_SIZE = 8  # half of the guide's, so that 16 demonstrations make 100 steps

NUM_VIRTUAL_TOKENS = 20  # the guide's, where the model has no distiller with virtual tokens to be compared with


def prompt_tuning(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Vectors in front of the query, trained on the demonstrations (Lester et al., EMNLP 2021, arXiv 2104.08691).

    There are as many as the distiller has virtual tokens. They start as the embeddings of the answers in the prompt
    format, over and over: of the paper's starting points the best, class labels.

    Args:
        model: Its base model stays frozen and is left as it was.
        demonstrations: What is trained on; they also fix the order.

    Raises:
        ConfigError: The virtual tokens do not fit the base model's sliding window, or gradient checkpointing is on.
        DataError: A demonstration has no answer.
        UnsupportedModelError: The base model is no decoder-only language model whose cache is keys and values, or no
            gradients pass through it.
    """
    start = embed_tokens(model.base_model, _starting_ids(model, demonstrations))  # [1, V, E]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=start.shape[1])
    vectors = _train(model, demonstrations, config, start[0])[None]
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    with torch.no_grad():
        return Reader(model, model.route.prepare(EmbeddingPrefix(vectors, mask)))


def prefix_tuning(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Keys and values in front of the query, trained on the demonstrations (Li and Liang, ACL 2021, arXiv 2101.00190).

    As many and from the same text as in `prompt_tuning`: they start as the base model's own keys and values of it, the
    paper's advice where examples are few. Takes and raises what `prompt_tuning` does.
    """
    ids = _starting_ids(model, demonstrations)
    with torch.no_grad():
        start = read_embeddings(model.base_model, embed_tokens(model.base_model, ids), torch.ones_like(ids))
    layers = [states for layer in zip(start.keys, start.values, strict=True) for states in layer]
    if len({states.shape for states in layers}) > 1:
        raise UnsupportedModelError(
            f"Expected keys and values of one shape in all layers for prefix tuning, got "
            f"{sorted({tuple(states.shape[1:]) for states in layers})}: leave the method out."
        )
    states = torch.cat(layers)  # [2 L, H, V, K]
    num_heads, num_virtual_tokens, width = states.shape[1:]
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
        num_layers=len(start.keys),
        num_attention_heads=num_heads,
        token_dim=num_heads * width,
    )
    weights = _train(model, demonstrations, config, states.permute(2, 0, 1, 3).flatten(1))
    tuned = weights.unflatten(1, (-1, num_heads, width)).permute(1, 2, 0, 3)[:, None]  # [2 L, 1, H, V, K]
    prefix = KeyValuePrefix(tuple(tuned[::2]), tuple(tuned[1::2]), start.mask, start.next_positions)
    return Reader(model, model.route.prepare(prefix))


def _starting_ids(model: MendModel, demonstrations: Demonstrations) -> Tensor:
    """Return what virtual tokens start as (1, V): the different answers in the prompt format, inputs left out."""
    _check(model, demonstrations)
    answers = dict.fromkeys(demonstration.output for demonstration in demonstrations)
    prompt = PromptEncoder(model.tokenizer, model.mend_config.without_chunks())
    task = prompt.encode_demonstrations([Demonstration("", answer) for answer in answers], warn=False)
    opening, text = prompt.opening_ids, task.chunks[0].input_ids
    num_virtual_tokens = model.mend_config.num_virtual_tokens or NUM_VIRTUAL_TOKENS
    ids = [*opening, *text[len(opening) :] * num_virtual_tokens][:num_virtual_tokens]
    return torch.tensor([ids], device=model.device)


def _check(model: MendModel, demonstrations: Demonstrations) -> None:
    base_model = model.base_model
    if model.mend_config.task_type != "CAUSAL_LM" or not holds_prefix_in_cache(base_model):
        raise UnsupportedModelError(
            "Expected a decoder-only language model whose cache is keys and values for prompt and prefix tuning, got "
            f"{type(base_model).__name__}: leave these methods out."
        )
    check_gradients(base_model)
    if any(getattr(module, "gradient_checkpointing", False) for module in base_model.modules()):
        raise ConfigError(
            "Expected no gradient checkpointing, which PEFT's prefixes do not work with, got a base model that has it "
            "on: call gradient_checkpointing_disable()."
        )
    num_virtual_tokens = model.mend_config.num_virtual_tokens or NUM_VIRTUAL_TOKENS
    window = get_sliding_window(base_model)
    if window is not None and num_virtual_tokens >= window:
        raise ConfigError(
            f"Expected fewer virtual tokens than the base model's sliding window of {window}, got "
            f"{num_virtual_tokens}: lower num_virtual_tokens."
        )
    for demonstration in demonstrations:
        if not (demonstration.output or "").strip():
            raise DataError(
                f"Expected demonstrations with answers to train on, got none for {demonstration.input!r}: leave "
                "prompt tuning and prefix tuning out."
            )


def _train(model: MendModel, demonstrations: Demonstrations, config: PromptLearningConfig, start: Tensor) -> Tensor:
    """Return the weights (V, W) of a soft prompt after training from `start` (V, W) by the NLL of the answers."""
    rows = _encode_rows(model, demonstrations)
    check_length(model.base_model, torch.tensor([len(start) + len(ids) for ids, _ in rows]))
    order = torch.Generator().manual_seed(int(hash_json([*map(name_demonstration, demonstrations)]), 16) % 2**63)
    with _soft_prompt(model.base_model, config, start) as peft_model, torch.enable_grad():
        weights: Tensor = peft_model.prompt_encoder[peft_model.active_adapter].embedding.weight
        optimizer = torch.optim.AdamW([weights], lr=LEARNING_RATE)
        num_steps = NUM_EPOCHS * math.ceil(len(rows) / BATCH_SIZE)
        schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=num_steps)
        for _ in range(NUM_EPOCHS):
            for places in torch.randperm(len(rows), generator=order).split(BATCH_SIZE):
                batch = _pad_rows([rows[place] for place in places.tolist()], model.prompt.pad_token_id)
                loss = peft_model(**{name: column.to(model.device) for name, column in batch.items()}).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return weights.detach()


def _encode_rows(model: MendModel, demonstrations: Demonstrations) -> list[tuple[list[int], int]]:
    """Return, of every demonstration, the ids as a query with its answer, and how many of them are the query's."""
    rows = []
    for demonstration in demonstrations:
        query = model.prompt.encode_query(demonstration.input)
        answer = model.prompt.encode_answer(demonstration.output or "")[: model.mend_config.max_demonstration_tokens]
        rows.append((query + answer, len(query)))
    return rows


def _pad_rows(rows: list[tuple[list[int], int]], pad_token_id: int) -> dict[str, Tensor]:
    """Return rows padded on the right, where PEFT, which gives no positions, numbers them rightly."""
    length = max(len(ids) for ids, _ in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, num_query in rows:
        padding = length - len(ids)
        columns["input_ids"].append(ids + [pad_token_id] * padding)
        columns["attention_mask"].append([1] * len(ids) + [0] * padding)
        columns["labels"].append([IGNORE_INDEX] * num_query + ids[num_query:] + [IGNORE_INDEX] * padding)
    return {name: torch.tensor(column) for name, column in columns.items()}


@contextmanager
def _soft_prompt(
    base_model: PreTrainedModel, config: PromptLearningConfig, start: Tensor
) -> Iterator[PeftModelForCausalLM]:
    """Wrap the base model in PEFT's, whose prompt starts as `start` (V, W), and leave it as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights that are then replaced
            peft_model = PeftModelForCausalLM(base_model, config)
        embedding = peft_model.prompt_encoder[peft_model.active_adapter].embedding
        embedding.weight = torch.nn.Parameter(start.float().clone())
        base_model.requires_grad_(False)
        yield peft_model
    finally:
        for parameter, required_grad in before:
            parameter.requires_grad_(required_grad)
