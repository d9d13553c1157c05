from __future__ import annotations

import pytest
import torch

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.errors import DataError, ShapeError, UnsupportedModelError
from mend_hf.evaluation.attention import measure_attention, measure_slots

SHOTS = [Demonstration("great film", "positive"), Demonstration("a bore", "negative")]


def make_model(tiny_model, tokenizer, name="gpt2", **settings):
    return get_mend_model(tiny_model(name), MendConfig(num_virtual_tokens=3, **settings), tokenizer).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_the_shares_of_every_layer_sum_to_one(tiny_model, tokenizer, name, form):
    model = make_model(tiny_model, tokenizer, name, prefix_form=form)
    shares = measure_attention(model, model.distill(SHOTS).prefix, ["good", "a very bad film"])
    parts = torch.stack([shares.sink, shares.anchors, shares.placeholders, shares.query])
    assert parts.shape == (4, 3)
    torch.testing.assert_close(parts.sum(0), torch.ones(3), rtol=0, atol=1e-5)
    assert (shares.anchors > 0).all() == (form == "kv")


def test_the_first_layer_equals_a_softmax_made_by_hand(tiny_model, tokenizer):
    model = make_model(tiny_model, tokenizer)
    prefix = model.distill(SHOTS).prefix
    shares = measure_attention(model, prefix, ["great film"])

    base = model.base_model.transformer
    block, ids = base.h[0], model.tokenize("great film")["input_ids"][0]
    positions = prefix.next_positions + torch.arange(len(ids))
    with torch.no_grad():
        queries, keys, _ = block.attn.c_attn(block.ln_1(base.wte(ids) + base.wpe(positions))).split(32, dim=-1)
    num_slots, weights = prefix.num_slots, torch.zeros(prefix.num_slots + len(ids))
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        for row in range(len(ids)):
            seen = torch.cat([prefix.keys[0][0, head], keys[: row + 1, own]])
            row_weights = (seen @ queries[row, own] / 8**0.5).softmax(0)
            weights[: len(row_weights)] += row_weights.detach() / (4 * len(ids))
    anchors = (prefix.labels[0] > 0).nonzero()[:, 0].tolist()
    assert anchors
    assert 0 not in anchors
    torch.testing.assert_close(shares.sink[0], weights[0])
    torch.testing.assert_close(shares.anchors[0], weights[anchors].sum())
    torch.testing.assert_close(shares.placeholders[0], weights[num_slots - 3 : num_slots].sum())
    torch.testing.assert_close(shares.query[0], weights[num_slots:].sum())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_slots_of_a_kind_have_its_share_together(tiny_model, tokenizer, name):
    model = make_model(tiny_model, tokenizer, name)
    prefix = model.distill(SHOTS).prefix
    shares, slots = measure_attention(model, prefix, ["great film"]), measure_slots(model, prefix, "great film")
    assert slots.shares.shape == (3, prefix.num_slots)
    assert slots.kinds[0] == "sink"
    assert slots.kinds[-3:] == ("placeholder",) * 3
    for kind, share in (("sink", shares.sink), ("anchor", shares.anchors), ("placeholder", shares.placeholders)):
        own = torch.tensor([each == kind for each in slots.kinds])
        torch.testing.assert_close(slots.shares[:, own].sum(1), share)


def test_the_models_own_attention_is_back_also_after_an_error(tiny_model, tokenizer, monkeypatch):
    model = make_model(tiny_model, tokenizer)
    prefix, before = model.distill(SHOTS).prefix, model.base_model.config._attn_implementation
    assert before != "eager"
    measure_attention(model, prefix, ["good"])
    assert model.base_model.config._attn_implementation == before
    monkeypatch.setattr(model.base_model, "forward", lambda **inputs: {})
    with pytest.raises(UnsupportedModelError, match="measure a model whose layers"):
        measure_attention(model, prefix, ["good"])
    assert model.base_model.config._attn_implementation == before


def test_no_queries_and_several_rows_are_refused(tiny_model, tokenizer):
    model = make_model(tiny_model, tokenizer)
    prefix = model.distill(SHOTS).prefix
    with pytest.raises(DataError, match="add some"):
        measure_attention(model, prefix, [])
    with pytest.raises(ShapeError, match=r"select\(\[0\]\)"):
        measure_attention(model, prefix.expand(2), ["good"])
