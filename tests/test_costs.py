"""The formula for floating-point operations gives what torch counts while the same thing is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mend_hf import Demonstration, MendConfig, get_mend_model
from mend_hf.evaluation.costs import count_flops
from mend_hf.evaluation.methods import METHODS

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES, OPTIONS = ["moving and funny", "bad"], [["positive", "very bad"]] * 2


@pytest.fixture(params=["gpt2", "llama", "qwen3", "bloom"])
def base(request, tiny_model):
    base = tiny_model(request.param)
    base.set_attn_implementation("eager")  # torch does not know every kernel
    return base


def count_both(model, work):
    with FlopCounterMode(display=False) as counter:
        work()
    with count_flops(model) as count:
        work()
    return count.total, counter.get_total_flops()


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_distilling_and_answering_count_as_torch_counts(base, tokenizer, form):
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3, prefix_form=form), tokenizer).eval()
    got, expected = count_both(model, lambda: model.distill(SHOTS))
    assert got == pytest.approx(expected, rel=1e-3)
    for name in ("zero-shot", "in-context", "MEND"):
        reader = METHODS[name](model, [Demonstration(*pair) for pair in SHOTS])
        got, expected = count_both(model, lambda reader=reader: reader.score_options(QUERIES, OPTIONS, batch_size=2))
        assert got == pytest.approx(expected, rel=2e-2), name


def test_under_a_sliding_window_the_count_is_an_upper_bound(tiny_model, tokenizer):
    base = tiny_model("gemma3_text")
    base.set_attn_implementation("eager")
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).eval()
    reader = METHODS["in-context"](model, [Demonstration(*pair) for pair in SHOTS])
    got, expected = count_both(model, lambda: reader.score_options(QUERIES, OPTIONS, batch_size=2))
    assert expected < got < 1.1 * expected


def test_a_query_behind_a_prefix_costs_what_it_was_worked_out_to(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer).eval()
    config = model.base_model.config
    width, heads = config.hidden_size, config.num_attention_heads
    own = config.num_key_value_heads * (width // heads)
    a_layer = 2 * width * width + 2 * width * own + 3 * width * config.intermediate_size
    num_slots, num_tokens = model.distill(SHOTS).num_slots, 5
    linear = 2 * num_tokens * config.num_hidden_layers * a_layer
    attention = 4 * config.num_hidden_layers * width * num_tokens * (num_slots + num_tokens)
    head = 2 * num_tokens * width * config.vocab_size
    prefix = model.distill(SHOTS)
    with count_flops(model) as count, torch.no_grad():
        model(input_ids=torch.ones(1, num_tokens, dtype=torch.long), demonstrations=prefix)
    assert count.total == linear + attention + head


def test_the_adapter_counts_where_it_is_read_through(tiny_model, tokenizer):
    totals = []
    for rank in (0, 4):
        config = MendConfig(num_virtual_tokens=0, lora_r=rank)
        model = get_mend_model(tiny_model("llama"), config, tokenizer).eval()
        for work in (model.distill, model.read):
            with count_flops(model) as count:
                work(SHOTS)
            totals.append(count.total)
    distilled, read, distilled_with_adapter, read_with_adapter = totals
    assert distilled == read == read_with_adapter < distilled_with_adapter


def test_gradients_count_as_torch_counts(tiny_model, tokenizer):
    base = tiny_model("llama")
    base.set_attn_implementation("eager")
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=0), tokenizer).eval()
    vectors = torch.randn(1, 6, base.config.hidden_size, requires_grad=True)

    def work():
        base(inputs_embeds=vectors).logits.sum().backward()

    got, expected = count_both(model, work)
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_what_the_formula_does_not_know_is_not_a_number(tiny_model, tokenizer, name):
    model = get_mend_model(tiny_model(name), MendConfig(num_virtual_tokens=3), tokenizer).eval()
    with count_flops(model) as count:
        model.distill(SHOTS)
    assert math.isnan(count.total)
