from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mend_hf import MendConfig, MendModel, get_mend_model
from mend_hf.cards import make_card
from mend_hf.errors import CheckpointError
from mend_hf.hub import check_tensor_names

SHOTS = [("great film", "positive"), ("a bore", "negative")]


@pytest.fixture
def model(tiny_model, tokenizer):
    torch.manual_seed(0)
    return get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer).eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def state_of(base):
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}, {
        name: parameter.requires_grad for name, parameter in base.named_parameters()
    }


def test_a_folder_holds_config_weights_and_card_and_no_base_weights(model, saved):
    assert {path.name for path in saved.iterdir()} == {
        "README.md", "config.json", "mend_config.json", "mend_model.safetensors",
    }  # fmt: skip
    names = set(load_file(saved / "mend_model.safetensors"))
    assert names == {name for name, _ in model.distiller.trained_tensors()}
    assert all(name == "placeholders" or ".lora_" in name for name in names)


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_a_distiller_without_lora_is_saved_and_loaded(tiny_model, tokenizer, tmp_path, form):
    config = MendConfig(num_virtual_tokens=0 if form == "kv" else 2, lora_r=0, prefix_form=form)
    model = get_mend_model(tiny_model("llama"), config, tokenizer).eval()
    model.save_pretrained(tmp_path)
    loaded = MendModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer)
    query = model.tokenize("bad")
    assert loaded(**query, demonstrations=SHOTS).logits.equal(model(**query, demonstrations=SHOTS).logits)


@pytest.mark.parametrize("name", ["mend_config.json", "mend_model.safetensors"])
def test_a_missing_file_is_named(saved, tiny_model, tokenizer, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        MendModel.from_pretrained(tiny_model("llama"), saved, tokenizer)


def test_all_differences_between_config_and_weights_are_listed():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        check_tensor_names(expected, {"a": torch.zeros(1), "c": torch.zeros(1)}, "somewhere")
    for line in ("b is missing", "c is not known", "a: expected shape (2,), got (1,)", "fetch the whole folder again"):
        assert line in str(caught.value)


@pytest.mark.parametrize("damage", ["cut off", "tensor missing", "other shape"])
def test_a_failed_load_leaves_the_base_model_as_it_was(saved, model, tiny_model, tokenizer, damage):
    path = saved / "mend_model.safetensors"
    whole = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(whole[:100])
    else:
        tensors = load_file(path)
        placeholders = tensors.pop("placeholders")
        save_file(tensors | ({"placeholders": placeholders[:1]} if damage == "other shape" else {}), path)
    base = tiny_model("llama").train()
    before, flags = state_of(base)
    with pytest.raises(CheckpointError, match="again"):
        MendModel.from_pretrained(base, saved, tokenizer)
    after, flags_after = state_of(base)
    assert list(after) == list(before)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert flags_after == flags
    assert base.training
    path.write_bytes(whole)
    loaded = MendModel.from_pretrained(base, saved, tokenizer)
    assert loaded.distill(SHOTS).provenance.distiller_hash == model.distill(SHOTS).provenance.distiller_hash


@pytest.mark.parametrize("config", [None, MendConfig(num_virtual_tokens=3, lora_r=2)])
def test_another_base_model_is_refused_also_with_a_config_of_ones_own(saved, tiny_model, tokenizer, config):
    with pytest.raises(CheckpointError, match="architecture: expected LlamaForCausalLM, got Qwen3ForCausalLM"):
        MendModel.from_pretrained(tiny_model("qwen3"), saved, tokenizer, config=config)


def test_a_config_of_ones_own_changes_the_budgets(saved, tiny_model, tokenizer):
    config = MendConfig(num_virtual_tokens=3, lora_r=2, max_anchor_tokens_per_demonstration=1)
    loaded = MendModel.from_pretrained(tiny_model("llama"), saved, tokenizer, config=config)
    assert loaded.distill(SHOTS).num_slots == 1 + 2 + 3


def test_the_card_names_the_base_model_for_the_hub():
    card = make_card(MendConfig(base_model_name_or_path="someone/base", prefix_form="kv"))
    assert card.data.base_model == "someone/base"
    assert "base_model:adapter:someone/base" in card.data.tags
    nameless = make_card(MendConfig(prefix_form="kv"))
    assert nameless.data.base_model is None


def test_no_machine_path_of_the_distiller_is_saved(saved):
    assert str(saved) not in (saved / "mend_config.json").read_text()
    assert json.loads((saved / "mend_config.json").read_text())["base_model_fingerprint"]["num_key_value_heads"] == 2
