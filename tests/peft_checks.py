"""The checks of `family_checks` for PEFT's own soft prompts, so that the table says what those do on the same models.

A learned prompt stands in for the distilled vectors; what PEFT has no word for has no check.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import peft
import torch
from family_checks import QUERIES, Measured, compare, compare_tokens, greedy, worst
from packaging.version import Version
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf.architectures import CACHE_NAME

NUM_VIRTUAL_TOKENS = 4

# PEFT 0.21 knows a cache by the name that it had before transformers 5.24, and writes wrong tokens from there on.
PAIR_IS_RIGHT = CACHE_NAME == "past_key_values" or Version(peft.__version__) >= Version("0.22")


@dataclass
class SoftPrompt:
    """A tiny base model behind a prompt that PEFT learns.

    Attributes:
        method: "prompt tuning" or "prefix tuning".
        build: Returns the base model, the same at every call.
        tokenizer: Its tokenizer, which pads on the left.
    """

    method: str
    build: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model as it is without a prompt."""
        return self.build()

    def wrap(self, base: PreTrainedModel | None = None) -> PeftModel:
        """Return a base model with a prompt, equal at every call."""
        torch.manual_seed(7)
        config = PromptTuningConfig if self.method == "prompt tuning" else PrefixTuningConfig
        settings = config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_VIRTUAL_TOKENS)
        return get_peft_model(copy.deepcopy(self.base) if base is None else base, settings).eval()

    @cached_property
    def model(self) -> PeftModel:
        """The model with its prompt."""
        return self.wrap()

    def encode(self, queries: list[str]) -> dict[str, Tensor]:
        """Return ids and mask, padded on the left."""
        return dict(self.tokenizer(queries, return_tensors="pt", padding=True))

    def logits(self, model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the query's tokens alone."""
        return model(**batch).logits[:, -batch["input_ids"].shape[1] :]

    def new_tokens(self, batch: dict[str, Tensor], **settings: object) -> Tensor:
        """Return what is generated behind a batch, with a seed of its own."""
        torch.manual_seed(3)
        return self.model.generate(**batch, **greedy(**settings))[:, batch["input_ids"].shape[1] :]

    def prepended(self) -> Tensor:
        """Return prompt and query as embeddings; prompt tuning only."""
        prompt = self.model.get_prompt(batch_size=1)
        return torch.cat([prompt, self.base.get_input_embeddings()(self.query["input_ids"])], dim=1)

    @cached_property
    def query(self) -> dict[str, Tensor]:
        """One query without padding."""
        return self.encode(QUERIES[:1])

    def expected_tokens(self, **settings: object) -> Tensor:
        """Return what the bare model generates behind the same prompt."""
        torch.manual_seed(3)
        if self.method == "prompt tuning":
            inputs = self.prepended()
            mask = torch.ones(inputs.shape[:2], dtype=torch.long)
            return self.base.generate(inputs_embeds=inputs, attention_mask=mask, **greedy(**settings))
        num_copies = settings.get("num_beams") or settings.get("num_return_sequences") or 1
        cache = self.model.get_prompt(batch_size=1)
        cache.batch_repeat_interleave(num_copies)
        ids = self.query["input_ids"]
        mask = torch.ones(1, NUM_VIRTUAL_TOKENS + ids.shape[1], dtype=torch.long)
        ids = self.base.generate(ids, past_key_values=cache, attention_mask=mask, **greedy(**settings))
        return ids[:, self.query["input_ids"].shape[1] :]


@torch.no_grad()
def logits_equal_prepended_prompt(prompt: SoftPrompt) -> Measured:
    """As for vectors: the bare model with the prompt in front; of keys and values, in its cache."""
    got = prompt.logits(prompt.model, prompt.query)
    if prompt.method == "prompt tuning":
        expected = prompt.base(inputs_embeds=prompt.prepended()).logits
    else:
        expected = prompt.base(
            **prompt.query | {"attention_mask": None}, past_key_values=prompt.model.get_prompt(1)
        ).logits
    return compare(got, expected[:, -got.shape[1] :])


def tokens_equal_prepended_prompt(**settings: object) -> Callable[[SoftPrompt], Measured]:
    """Return a check that generating with these settings gives the bare model's tokens behind the same prompt."""

    @torch.no_grad()
    def check(prompt: SoftPrompt) -> Measured:
        return compare_tokens(prompt.new_tokens(prompt.query, **settings), prompt.expected_tokens(**settings))

    return check


def tokens_equal_greedy(**settings: object) -> Callable[[SoftPrompt], Measured]:
    """Return a check that another way of greedy generating gives the greedy tokens."""

    @torch.no_grad()
    def check(prompt: SoftPrompt) -> Measured:
        return compare_tokens(prompt.new_tokens(prompt.query, **settings), prompt.new_tokens(prompt.query))

    return check


@torch.no_grad()
def batch_equals_rows_alone(prompt: SoftPrompt) -> Measured:
    """A batch padded on the left, all rows behind the one prompt there is: logits and tokens."""
    batch, differences = prompt.encode(QUERIES), []
    logits, tokens = prompt.logits(prompt.model, batch), prompt.new_tokens(batch)
    for row, query in enumerate(QUERIES):
        own = prompt.encode([query])
        alone = prompt.logits(prompt.model, own)[0]
        differences.append(compare(logits[row, -len(alone) :], alone))
        expected = prompt.new_tokens(own)
        differences.append(compare_tokens(tokens[row : row + 1, : expected.shape[1]], expected))
    return worst(differences)


@torch.no_grad()
def bare_model_bit_for_bit(prompt: SoftPrompt) -> Measured:
    """Under `disable_adapter` it is the base model."""
    with prompt.model.disable_adapter():
        got = prompt.model(**prompt.query).logits
    difference = (got - prompt.base(**prompt.query).logits).abs().max().item()
    return Measured(difference, difference == 0)


@torch.no_grad()
def saved_and_loaded(prompt: SoftPrompt) -> Measured:
    """The same logits after saving and loading, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        prompt.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(prompt.build(), folder).eval()
    difference = (prompt.logits(loaded, prompt.query) - prompt.logits(prompt.model, prompt.query)).abs().max().item()
    return Measured(difference, difference == 0)


@torch.no_grad()
def a_prompt_for_every_row(prompt: SoftPrompt) -> Measured:
    """Two rows, each with an adapter of its own."""
    prompt.model.add_adapter("other", prompt.model.peft_config["default"])
    batch = prompt.encode([QUERIES[0]] * 2)
    try:
        rows = [prompt.logits(prompt.model, prompt.query)]
        together = prompt.model(**batch, adapter_names=["default", "other"]).logits
        prompt.model.set_adapter("other")
        rows.append(prompt.logits(prompt.model, prompt.query))
        return compare(together[:, -rows[0].shape[1] :], torch.cat(rows))
    finally:
        prompt.model.set_adapter("default")


def gradients_under_checkpointing(prompt: SoftPrompt) -> Measured:
    """The prompt's gradients with activation checkpointing equal those without."""
    gradients = []
    for is_on in (False, True):
        base = prompt.build()
        if is_on:
            base.gradient_checkpointing_enable()
        model = prompt.wrap(base).train()
        model(**prompt.query, labels=prompt.query["input_ids"]).loss.backward()
        gradients.append(next(p.grad for p in model.parameters() if p.requires_grad))
    return compare(*gradients)


# The columns of `family_checks.FEATURES` that PEFT has too.
FEATURES: dict[str, Callable[[SoftPrompt], Measured]] = {
    "embeds: logits": logits_equal_prepended_prompt,
    "greedy": tokens_equal_prepended_prompt(),
    "beams": tokens_equal_prepended_prompt(num_beams=3),
    "sampling": tokens_equal_prepended_prompt(do_sample=True, num_return_sequences=3),
    "prompt lookup": tokens_equal_greedy(prompt_lookup_num_tokens=3),
    "static cache": tokens_equal_greedy(cache_implementation="static"),
    "embeds: batch = rows": batch_equals_rows_alone,
    "bare model": bare_model_bit_for_bit,
    "embeds: save, load": saved_and_loaded,
}
# What the table's columns do not show.
BESIDE: dict[str, Callable[[SoftPrompt], Measured]] = {
    "a prompt for every row": a_prompt_for_every_row,
    "gradients under activation checkpointing": gradients_under_checkpointing,
}
