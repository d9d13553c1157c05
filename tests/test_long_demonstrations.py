"""Demonstrations of ten times the window: chunk by chunk, at the right positions, in bounded memory."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import MAX_POSITIONS, wrap_tiny_model

from mend_hf.errors import ShapeError

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
TEXT = "the film was good and the food was bad "
TABLES = ["gpt2", "opt"]
FORMS = ["kv", "embeds"]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def wrap(base, tokenizer, **settings):
    defaults = {"num_virtual_tokens": 2, "overflow": "concat", "max_distiller_tokens": MAX_POSITIONS - 100}
    return wrap_tiny_model(base, tokenizer, seed=3, **defaults | settings)


def many(tokenizer, num_tokens):
    per_shot = len(tokenizer(TEXT, add_special_tokens=False).input_ids)
    return [(TEXT * 4, answer) for _, answer in SHOTS] * (num_tokens // (16 * per_shot) + 1)


@pytest.fixture
def widest_reading(monkeypatch):
    """How many chunks the base model's backbone read at once, at most."""
    sizes = []

    def watch(model):
        backbone, read = model.distiller._backbone, model.distiller._backbone.forward

        @functools.wraps(read)  # the distiller asks for the signature
        def count(**inputs):
            texts = inputs.get("inputs_embeds")
            sizes.append((inputs["input_ids"] if texts is None else texts).shape[0])
            return read(**inputs)

        monkeypatch.setattr(backbone, "forward", count)
        return sizes

    return watch


@pytest.mark.parametrize("name", [*TABLES, "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_ten_windows_concatenated_answer_and_do_not_overrun(tiny_model, tokenizer, name, form):
    model = wrap(tiny_model(name), tokenizer, prefix_form=form)
    distilled = model.distill(many(tokenizer, 10 * MAX_POSITIONS), batch_size=4)
    [num_tokens] = distilled.provenance.num_tokens
    assert num_tokens > 10 * MAX_POSITIONS
    [chunks] = distilled.provenance.chunks
    if form == "kv":
        assert distilled.prefix.next_positions.item() == max(chunk.num_tokens for chunk in chunks) < MAX_POSITIONS
    else:
        assert distilled.num_slots == 2 * len(chunks)
    batch = model.tokenize("moving and funny")
    tokens = model.generate(**batch, demonstrations=distilled, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 3


def test_ten_windows_in_turn_go_on_at_the_positions_of_one_text(tiny_model, tokenizer):
    model = wrap(tiny_model("llama"), tokenizer, overflow="recurrent")
    distilled = model.distill(many(tokenizer, 10 * MAX_POSITIONS))
    assert distilled.prefix.next_positions.tolist() == distilled.provenance.num_tokens
    assert distilled.provenance.num_tokens[0] > 10 * MAX_POSITIONS


@pytest.mark.parametrize("name", TABLES)
def test_reading_in_turn_beyond_the_position_table_is_refused(tiny_model, tokenizer, name):
    model = wrap(tiny_model(name), tokenizer, overflow="recurrent")
    with pytest.raises(ShapeError, match=r'at most 512 tokens in all chunks together.*Use overflow="concat"'):
        model.distill(many(tokenizer, 2 * MAX_POSITIONS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("overflow", ["concat", "recurrent"])
def test_distilling_batch_by_batch_equals_all_at_once(tiny_model, tokenizer, widest_reading, form, overflow):
    model = wrap(tiny_model("llama"), tokenizer, prefix_form=form, overflow=overflow, max_distiller_tokens=30)
    tasks, query = [SHOTS * 3, SHOTS[:1], SHOTS[::-1] * 2], model.tokenize(["moving and funny"] * 3)
    at_once = model.distill(tasks)
    sizes = widest_reading(model)
    in_batches = model.distill(tasks, batch_size=2)
    assert max(sizes) == 2 < len(tasks)
    assert in_batches.provenance == at_once.provenance
    got, expected = (model(**query, demonstrations=distilled).logits for distilled in (in_batches, at_once))
    torch.testing.assert_close(got, expected, **CLOSE)
