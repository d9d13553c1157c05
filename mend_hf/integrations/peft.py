"""One task's prefix as a PEFT adapter, for people without mend_hf: `PeftModel.from_pretrained(base_model, folder)`.

Vectors become prompt tuning's, keys and values a CARTRIDGE (PEFT's prefix of plain keys and values).

PEFT lets queries go on at the position that is the number of slots; ours go on behind the demonstrations' full
length. Keys that a rotation has put at their positions are therefore turned by the difference, which keeps all
distances. Where they come from a table, that cannot be had; a model that counts the slots itself (BLOOM) needs no
turning. Nothing is written before PEFT's logits and ours have been compared on the base model at hand, for a query and
behind a token that PEFT has written.

Shapes: S slots, H key/value heads, K head width, L layers, V vectors, E embedding width.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import CartridgeConfig, PeftModel, PeftModelForCausalLM, PeftType, PromptTuningConfig
from torch import Tensor
from transformers import PreTrainedModel

from mend_hf.architectures import CACHE_NAME, accepts, get_backbone, rotates_by_length
from mend_hf.artifact import DistilledDemonstrations
from mend_hf.errors import DataError, UnsupportedModelError
from mend_hf.files import check_output_folder, write_folder
from mend_hf.model import MendModel
from mend_hf.prefix import EmbeddingPrefix, KeyValuePrefix

# How far PEFT's logits may be from ours, as a share of their norm: what the order of sums does, and turning the keys.
# In bfloat16 that is up to 0.03 on tiny dense models; a single position too many makes 0.065 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_IN_SHORT_TYPES = 0.05
_NUM_PROBE_TOKENS = 8

_CARD = """---
library_name: peft
base_model: {base}
tags:
- mend
---

# Demonstrations of one task as a PEFT adapter

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/or/hub-id/of/this/adapter")
```

Queries are written as `{format}` and tokenised with `add_special_tokens=False`, one at a time: PEFT's answers to
batches that are padded on the left are not those to the queries alone.
"""


def export_to_peft(model: MendModel, demonstrations: Any, save_directory: str | Path) -> None:
    """Write one task's prefix as a PEFT adapter: `adapter_config.json`, `adapter_model.safetensors` and a card.

    Args:
        model: On the base model that the adapter is for; it is left as it was.
        demonstrations: Of one task, raw or distilled.
        save_directory: Made if need be; either all files are written or none.

    Raises:
        DataError: They are of several tasks.
        UnsupportedModelError: The base model is no decoder-only language model, or PEFT would give it the prefix at
            positions at which it means something else.
        CheckpointError: The folder cannot be written into, or the demonstrations belong to another base model.
    """
    check_output_folder(save_directory)
    _check_base_model(model)
    distilled = (
        demonstrations if isinstance(demonstrations, DistilledDemonstrations) else model.distill(demonstrations)
    )
    if len(distilled) != 1:
        raise DataError(
            f"Expected demonstrations of one task, got {len(distilled)} tasks: export them one by one, as in "
            "`for task in demonstrations`."
        )
    prefix = distilled.prefix.to(model.device, model.dtype)
    with torch.no_grad(), _left_as_it_was(model.base_model):
        if isinstance(prefix, EmbeddingPrefix):
            config, weights = PromptTuningConfig, prefix.vectors[0, prefix.mask[0]]
            num_heads, width = model.config.get_text_config(decoder=True).num_attention_heads, prefix.vectors.shape[-1]
        else:
            config, weights = CartridgeConfig, _flatten(_move_to_slots(prefix, model.base_model))
            num_heads, width = prefix.keys[0].shape[1], prefix.keys[0].shape[1] * prefix.keys[0].shape[3]
        adapter = PeftModelForCausalLM(
            model.base_model,
            config(
                task_type="CAUSAL_LM",
                num_virtual_tokens=len(weights),
                num_attention_heads=num_heads,  # PEFT guesses it, and wrongly where all heads share one key (Falcon)
                token_dim=width,
                base_model_name_or_path=model.mend_config.base_model_name_or_path,
                inference_mode=True,
            ),
        )
        _load(adapter, weights)
        _check(adapter, model, distilled)
        with tempfile.TemporaryDirectory() as staged:
            adapter.save_pretrained(staged)
            base, own = model.mend_config.base_model_name_or_path, model.prompt.config
            query = f"{own.input_prefix}...{own.output_prefix}" if own.prompt_format == "plain" else "a chat"
            card = _CARD.format(base=base or "path/or/hub-id/of/the/base-model", format=query.replace("\n", "\\n"))
            (Path(staged) / "README.md").write_text(card, encoding="utf-8")
            with write_folder(save_directory) as folder:
                for path in Path(staged).iterdir():
                    shutil.copyfile(path, folder / path.name)


def _check_base_model(model: MendModel) -> None:
    """Refuse what a comparison of a few logits cannot: models that PEFT answers wrongly later on."""
    if model.mend_config.task_type != "CAUSAL_LM":
        raise UnsupportedModelError(
            f"Expected a decoder-only language model, got the task type {model.mend_config.task_type}: PEFT's prompts "
            "for other models are others."
        )
    if getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None) is None:
        raise UnsupportedModelError(
            f"Expected a base model with attention heads, whose number PEFT asks for, got "
            f"{type(model.base_model).__name__}, of whose state PEFT does not know either: answer with mend_hf."
        )
    if rotates_by_length(model.base_model):
        raise UnsupportedModelError(
            "Expected rotary positions that stay as they are, got some that change with the length of the text "
            '(rope_type "dynamic" or "longrope"): PEFT, which counts other positions, would change them at another '
            "token. Answer with mend_hf."
        )


def _flatten(prefix: KeyValuePrefix) -> Tensor:
    """Return keys and values as (S, L * 2 * H * K), without slots that do not count."""
    layers = [states for pair in zip(prefix.keys, prefix.values, strict=True) for states in pair]
    if len({layer.shape for layer in layers}) > 1:
        raise UnsupportedModelError(
            "Expected layers of one shape, got several: PEFT holds keys and values of all layers in one tensor."
        )
    return torch.stack([layer[0, :, prefix.mask[0]].transpose(0, 1) for layer in layers], dim=1).flatten(1)


def _move_to_slots(prefix: KeyValuePrefix, base_model: PreTrainedModel) -> KeyValuePrefix:
    """Turn the keys so that queries may go on at the number of slots."""
    distance = int(prefix.mask.sum()) - int(prefix.next_positions)
    if distance == 0 or not accepts(base_model, "position_ids"):
        return prefix
    rotations = _find_rotations(base_model, distance, len(prefix.keys))
    keys = tuple(_rotate(keys, *rotation) for keys, rotation in zip(prefix.keys, rotations, strict=True))
    return KeyValuePrefix(keys, prefix.values, prefix.mask, prefix.next_positions + distance, prefix.anchor_labels)


def _find_rotations(base_model: PreTrainedModel, distance: int, num_layers: int) -> list[tuple[Tensor, Tensor]]:
    """Return cosines and sines (R,) that turn a layer's keys by a distance, proved on the keys of single tokens.

    A token that stands alone attends to itself, wherever it stands: its keys at two positions differ by the rotation
    and by nothing else.
    """
    backbone = get_backbone(base_model)
    module = getattr(backbone, "rotary_emb", None)
    if module is None:
        raise _cannot_move(distance, "it has no rotary positions")
    layer_types = getattr(backbone.config, "layer_types", None) if accepts(module, "layer_type") else None
    probe = torch.zeros(1, 1, 1, device=base_model.device)
    place = torch.tensor([[distance]], device=base_model.device)
    rotations = []
    for layer in range(num_layers):
        cosine, sine = module(probe, place, *([layer_types[layer]] if layer_types else []))
        cosine, sine = cosine[0, 0], sine[0, 0]
        scale = (cosine**2 + sine**2).sqrt()  # what some models multiply keys with, and have already
        rotations.append((cosine / scale, sine / scale))
    token = _make_probe(base_model)[:, None]
    before, after = (_read_keys(backbone, token, max(place, 0)) for place in (-distance, distance))
    for own, expected, rotation in zip(before, after, rotations, strict=True):
        if not _are_close(_rotate(own, *rotation), expected):
            raise _cannot_move(distance, "turning its keys does not move them")
    return rotations


def _make_probe(base_model: PreTrainedModel) -> Tensor:
    vocabulary_size = base_model.get_input_embeddings().weight.shape[0]
    return torch.arange(_NUM_PROBE_TOKENS, device=base_model.device) % vocabulary_size


def _read_keys(backbone: PreTrainedModel, tokens: Tensor, position: int) -> Sequence[Tensor]:
    places = torch.full_like(tokens, position)
    cache = backbone(input_ids=tokens, position_ids=places, use_cache=True)[CACHE_NAME]
    return [layer.keys for layer in cache.layers]


def _rotate(keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn keys (..., K) in their first R numbers: Su et al., RoFormer, arXiv 2104.09864, in halves."""
    turned, rest = keys[..., : len(cosine)].float(), keys[..., len(cosine) :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(keys.dtype), rest], dim=-1)


def _cannot_move(distance: int, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected a base model whose keys can be moved by {distance} positions, to where PEFT would read them; "
        f"{reason}. "
        'Distil with prefix_form="embeds", which PEFT reads at the right positions.'
    )


def _are_close(got: Tensor, expected: Tensor) -> bool:
    share = _TOLERANCE.get(expected.dtype, _TOLERANCE_IN_SHORT_TYPES)
    return bool((got.float() - expected.float()).norm() <= share * expected.float().norm())


def _load(adapter: PeftModel, weights: Tensor) -> None:
    encoder = adapter.prompt_encoder[adapter.active_adapter]
    if adapter.active_peft_config.peft_type == PeftType.CARTRIDGE:
        encoder.load_prompt_embeddings(weights)
    else:
        encoder.embedding.weight.copy_(weights)


def _check(adapter: PeftModel, model: MendModel, distilled: DistilledDemonstrations) -> None:
    """Refuse an adapter that does not read or write as the prefix does."""
    ids = _make_probe(model.base_model)[None]
    got = adapter(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    _compare(got, model(input_ids=ids, demonstrations=distilled).logits, "for a query")
    written = adapter.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    longer = torch.cat([ids, written.sequences[:, -2:-1]], dim=1)
    expected = model(input_ids=longer, demonstrations=distilled).logits
    _compare(written.logits[1], expected[:, -1], "behind a written token")


def _compare(got: Tensor, expected: Tensor, place: str) -> None:
    if _are_close(got, expected):
        return
    remedy = "Answer with mend_hf."
    if CACHE_NAME != "past_key_values":
        remedy = 'Export with pip install "transformers<5.24", or a newer PEFT: 0.21 knows no later name of the cache.'
    raise UnsupportedModelError(
        f"Expected PEFT to answer as the prefix does, got logits {float((got - expected).abs().max()):.2g} "
        f"apart {place}: this base model, peft {peft.__version__} and transformers {transformers.__version__} do not "
        f"go together. {remedy}"
    )


@contextmanager
def _left_as_it_was(base_model: PreTrainedModel) -> Iterator[None]:
    """Undo what PEFT changes: gradients of parameters, and attributes that its `generate` leaves behind."""
    flags = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
    attributes = [(vars(module), dict(vars(module))) for module in (base_model, get_backbone(base_model))]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
