"""What stands in front of a query: one function a method, from demonstrations to what reads the queries."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.errors import ConfigError
from mend_hf.evaluation.calibration import calibrate_by_inputs, calibrate_contextually
from mend_hf.evaluation.hybrids import mend_with_raw
from mend_hf.evaluation.readers import Demonstrations, Method, Reader
from mend_hf.evaluation.tuned import prefix_tuning, prompt_tuning
from mend_hf.model import MendModel
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix, Prefix, gather_slots, pack_right
from mend_hf.prompt_encoder import PromptEncoder


def zero_shot(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Nothing: the base model sees the query alone."""
    return Reader(model)


def in_context(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The demonstrations' text, read by the bare base model (vanilla ICL), its keys and values kept."""
    return _read_behind(model, model.read(list(demonstrations)).prefix)


def in_context_cut(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """Vanilla ICL with as many of the demonstrations as have no more tokens than the distilled prefix has slots.

    At least one demonstration is kept.
    """
    budget = model.distill(list(demonstrations)).num_slots
    num_kept = len(demonstrations)
    while num_kept > 1 and _count_tokens(model, demonstrations[:num_kept]) > budget:
        num_kept -= 1
    return in_context(model, demonstrations[:num_kept])


def _count_tokens(model: MendModel, demonstrations: Demonstrations) -> int:
    """Return how many tokens the demonstrations' text has, those that the window does not hold included."""
    task = model.prompt.encode_demonstrations(demonstrations, warn=False)
    return task.num_tokens + task.num_lost_tokens


def training_free_anchors(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The bare base model's keys and values at the first token and at the answers' own tokens."""
    config = model.mend_config.without_chunks(anchor_tokens="answers")
    prompt = PromptEncoder(model.tokenizer, config)
    task = prompt.encode_demonstrations(list(demonstrations))
    batch = DemonstrationBatch.from_tasks([task], prompt.pad_token_id).to(model.device)
    text = model.read_tokens(batch.input_ids, batch.attention_mask)
    if isinstance(text, EmbeddingPrefix):
        raise ConfigError(
            "Expected a decoder-only base model, whose keys and values anchors are, got an encoder-decoder: leave the "
            'method "training-free anchors" out.'
        )
    keep = batch.anchor_mask.clone()
    keep[:, 0] = True
    index, mask = pack_right(keep)
    anchors = KeyValuePrefix(
        tuple(gather_slots(keys, index) for keys in text.keys),
        tuple(gather_slots(values, index) for values in text.values),
        mask,
        text.next_positions,
    )
    return _read_behind(model, anchors)


def mend(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """The model's distiller."""
    return _read_behind(model, model.distill(list(demonstrations)).prefix)


def random_prefix(model: MendModel, demonstrations: Demonstrations) -> Reader:
    """A prefix of the distilled one's size that says nothing about the task; the same for the same demonstrations.

    Vectors are drawn with the mean and spread of the distilled ones, keys and values so layer by layer and head by
    head; the sink, without which any prefix of keys and values does harm, is kept.
    """
    distilled = model.distill(list(demonstrations)).prefix
    generator = torch.Generator().manual_seed(0)
    if isinstance(distilled, EmbeddingPrefix):
        drawn = _draw_like(distilled.vectors[:, None], generator, first=0)[:, 0]
        return _read_behind(model, EmbeddingPrefix(drawn, distilled.mask))
    noise = KeyValuePrefix(
        tuple(_draw_like(keys, generator, first=1) for keys in distilled.keys),
        tuple(_draw_like(values, generator, first=1) for values in distilled.values),
        distilled.mask,
        distilled.next_positions,
    )
    return _read_behind(model, noise)


def _read_behind(model: MendModel, prefix: Prefix) -> Reader:
    return Reader(model, model.route.prepare(prefix))


def _draw_like(states: torch.Tensor, generator: torch.Generator, first: int) -> torch.Tensor:
    """Replace the slots of one task (1, H, S, K) from `first` on by noise of the same mean and spread a channel."""
    kept, replaced = states[:, :, :first], states[:, :, first:]
    noise = torch.randn(replaced.shape, generator=generator).to(states)
    spread = replaced.std(2, keepdim=True, unbiased=False)
    return torch.cat([kept, replaced.mean(2, keepdim=True) + spread * noise], dim=2)


METHODS: dict[str, Method] = {
    "zero-shot": zero_shot,
    "zero-shot, batch-calibrated": calibrate_by_inputs(zero_shot),
    "in-context": in_context,
    "in-context, cut": in_context_cut,
    "in-context, calibrated": calibrate_contextually(in_context),
    "in-context, batch-calibrated": calibrate_by_inputs(in_context),
    "training-free anchors": training_free_anchors,
    "random prefix": random_prefix,
    "prompt tuning": prompt_tuning,
    "prefix tuning": prefix_tuning,
    "MEND": mend,
    "MEND, calibrated": calibrate_contextually(mend),
    "MEND, batch-calibrated": calibrate_by_inputs(mend),
    "MEND + 2 raw": mend_with_raw(2),
}

# Trained for every task and seed, which takes many times as long as all others: only by name.
TRAINED_METHODS = frozenset({"prompt tuning", "prefix tuning"})
# What needs a distiller that was trained.
DISTILLING_METHODS = frozenset({"random prefix", "MEND", "MEND, calibrated", "MEND, batch-calibrated", "MEND + 2 raw"})


def pick_methods(names: Sequence[str]) -> dict[str, Method]:
    """Return the methods of these names.

    Raises:
        ConfigError: One is not known.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        known, got = ", ".join(map(repr, METHODS)), ", ".join(map(_ask_back, unknown))
        raise ConfigError(
            f"Expected the names of methods, got {got}, not among {known}: correct the names, capitals too."
        )
    return {name: METHODS[name] for name in names}


def _ask_back(name: str) -> str:
    """Return a wrong name with the nearest method's, in whatever capitals, if one is near."""
    known = {method.lower(): method for method in METHODS}
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"{name!r} (did you mean {known[near[0]]!r}?)" if near else repr(name)
