"""A prefix as a PEFT adapter: what people without mend_hf load answers as ours does."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run_mend
from peft import PeftModel
from peft_checks import PAIR_IS_RIGHT
from tiny_models import ids_of, make_model, wrap_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mend_hf.errors import CheckpointError, DataError, UnsupportedModelError
from mend_hf.integrations import peft as peft_export
from mend_hf.integrations.peft import export_to_peft

needs_right_pair = pytest.mark.skipif(not PAIR_IS_RIGHT, reason="this PEFT does not know this transformers' cache")

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("so slow", "negative")]
TURNED = ["llama", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3_text", "mistral", "olmo2", "phi3", "falcon"]
SCALED = {"original_max_position_embeddings": 32, "factor": 4.0, "rope_theta": 10000.0}


def logits(model, ids: Tensor, **given) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[:, -ids.shape[1] :]


def tokens(model, ids: Tensor, **given) -> Tensor:
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            **given,
        )
    return made[:, -6:]


def assert_answers_alike(adapter, model, distilled) -> None:
    ids = model.tokenize("moving and funny")["input_ids"]
    expected = logits(model, ids, demonstrations=distilled)
    torch.testing.assert_close(logits(adapter, ids), expected, atol=2e-5, rtol=1e-4)
    assert tokens(adapter, ids).equal(tokens(model, ids, demonstrations=distilled))


@needs_right_pair
@pytest.mark.parametrize("family", TURNED)
def test_keys_and_values_answer_alike(tiny_model, tokenizer, tmp_path, family):
    model = wrap_tiny_model(tiny_model(family), tokenizer, num_virtual_tokens=3, lora_r=2)
    distilled = model.distill(SHOTS)
    assert int(distilled.prefix.next_positions) > distilled.num_slots, "so the keys have to be turned"
    export_to_peft(model, distilled, tmp_path)
    assert_answers_alike(PeftModel.from_pretrained(tiny_model(family), tmp_path), model, distilled)


@needs_right_pair
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mpt", "lfm2", *TURNED])
def test_vectors_answer_alike(tiny_model, tokenizer, tmp_path, family):
    model = wrap_tiny_model(tiny_model(family), tokenizer, num_virtual_tokens=3, lora_r=2, prefix_form="embeds")
    distilled = model.distill(SHOTS)
    export_to_peft(model, distilled, tmp_path)
    assert_answers_alike(PeftModel.from_pretrained(tiny_model(family), tmp_path), model, distilled)


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon_alibi"])
def test_positions_that_cannot_be_moved_are_refused(tiny_model, tokenizer, tmp_path, family):
    model = wrap_tiny_model(tiny_model(family), tokenizer, num_virtual_tokens=3, lora_r=2)
    with pytest.raises(UnsupportedModelError, match="embeds"):
        export_to_peft(model, SHOTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def rotary_model(tokenizer, rotation: dict):
    """A tiny Llama whose rotary positions are scaled in a way of their own."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**settings, max_position_embeddings=128, rope_parameters=rotation, **ids_of(tokenizer))
    return make_model(AutoModelForCausalLM, config)


@needs_right_pair
@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_type": "linear"},
        {"rope_type": "yarn"},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda rotation: rotation["rope_type"],
)
def test_scaled_rotations_answer_long_queries_alike(tokenizer, tmp_path, rotation):
    model = wrap_tiny_model(rotary_model(tokenizer, SCALED | rotation), tokenizer, num_virtual_tokens=3, lora_r=2)
    distilled = model.distill(SHOTS)
    export_to_peft(model, distilled, tmp_path)
    adapter = PeftModel.from_pretrained(rotary_model(tokenizer, SCALED | rotation), tmp_path)
    ids = torch.arange(4, 54)[None]
    expected = logits(model, ids, demonstrations=distilled)
    torch.testing.assert_close(logits(adapter, ids), expected, atol=5e-5, rtol=1e-4)


@needs_right_pair
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_rounding_in_bfloat16_is_not_refused(tiny_model, tokenizer, tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path / "base")
    base, bare = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16) for _ in range(2))
    model = wrap_tiny_model(base, tokenizer, num_virtual_tokens=0, lora_r=0)
    distilled = model.distill(SHOTS * 6)
    export_to_peft(model, distilled, tmp_path / "adapter")
    ids = model.tokenize("moving and funny")["input_ids"]
    expected = logits(model, ids, demonstrations=distilled)
    got = logits(PeftModel.from_pretrained(bare, tmp_path / "adapter"), ids)
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("distance", [-1, 1])
def test_keys_at_the_wrong_positions_are_refused(tiny_model, tokenizer, tmp_path, monkeypatch, distance):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2)
    find = peft_export._find_rotations
    monkeypatch.setattr(peft_export, "_find_rotations", lambda base, by, layers: find(base, by + distance, layers))
    with pytest.raises(UnsupportedModelError, match="apart"):
        export_to_peft(model, SHOTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize(
    "rotation",
    [{"rope_type": "dynamic"}, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}],
    ids=lambda rotation: rotation["rope_type"],
)
def test_rotations_that_change_with_the_length_are_refused(tokenizer, tmp_path, rotation, form):
    base = rotary_model(tokenizer, SCALED | rotation)
    model = wrap_tiny_model(base, tokenizer, num_virtual_tokens=3, lora_r=2, prefix_form=form)
    with pytest.raises(UnsupportedModelError, match="length of the text"):
        export_to_peft(model, SHOTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@needs_right_pair
def test_a_model_that_counts_slots_needs_no_turning(tiny_model, tokenizer, tmp_path):
    model = wrap_tiny_model(tiny_model("bloom"), tokenizer, num_virtual_tokens=3, lora_r=2)
    distilled = model.distill(SHOTS)
    export_to_peft(model, distilled, tmp_path)
    assert_answers_alike(PeftModel.from_pretrained(tiny_model("bloom"), tmp_path), model, distilled)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_a_state_space_model_is_refused(tiny_model, tokenizer, tmp_path, family):
    model = wrap_tiny_model(tiny_model(family), tokenizer, num_virtual_tokens=3, lora_r=2)
    with pytest.raises(UnsupportedModelError, match="attention heads"):
        export_to_peft(model, SHOTS, tmp_path / "adapter")


@needs_right_pair
def test_a_prefix_without_holes_needs_no_turning(tiny_model, tokenizer, tmp_path):
    model = wrap_tiny_model(tiny_model("gpt2"), tokenizer, num_virtual_tokens=3, lora_r=2)
    text = model.read(SHOTS)
    export_to_peft(model, text, tmp_path)
    assert_answers_alike(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path), model, text)


@needs_right_pair
def test_one_task_of_several_leaves_its_unused_slots_behind(tiny_model, tokenizer, tmp_path):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2)
    distilled = model.distill([SHOTS, SHOTS[:1]])
    with pytest.raises(DataError, match="2 tasks"):
        export_to_peft(model, distilled, tmp_path)
    export_to_peft(model, distilled[1], tmp_path)
    assert_answers_alike(PeftModel.from_pretrained(tiny_model("llama"), tmp_path), model, distilled[1])


@needs_right_pair
def test_the_folder_is_peft_own_and_names_the_base_model(tiny_model, tokenizer, tmp_path):
    model = wrap_tiny_model(
        tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2, base_model_name_or_path="user/tiny"
    )
    export_to_peft(model, SHOTS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("CARTRIDGE", "user/tiny")
    assert 'from_pretrained("user/tiny")' in (tmp_path / "README.md").read_text()


@pytest.mark.skipif(PAIR_IS_RIGHT, reason="this PEFT and this transformers go together")
@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_a_transformers_that_peft_does_not_know_is_refused(tiny_model, tokenizer, tmp_path, form):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2, prefix_form=form)
    with pytest.raises(UnsupportedModelError, match=r'behind a written token.* pip install "transformers<5.24"'):
        export_to_peft(model, SHOTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@needs_right_pair
def test_the_model_is_left_as_it_was(tiny_model, tokenizer, tmp_path):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2)
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    names = [name for name, _ in model.named_modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    expected = model.answer(["moving and funny"], SHOTS)
    export_to_peft(model, SHOTS, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert [set(vars(module)) for module in model.modules()] == attributes
    for name, tensor in model.named_parameters():
        assert tensor.equal(before[name][0])
        assert tensor.requires_grad == before[name][1]
    assert model.answer(["moving and funny"], SHOTS) == expected


def test_what_belongs_elsewhere_is_refused(tiny_model, tiny_encoder_decoder, tokenizer, tmp_path):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3, lora_r=2)
    other = wrap_tiny_model(tiny_model("qwen3"), tokenizer, num_virtual_tokens=3, lora_r=2)
    with pytest.raises(CheckpointError, match="another base model"):
        export_to_peft(model, other.distill(SHOTS), tmp_path / "adapter")
    encoder_decoder = wrap_tiny_model(tiny_encoder_decoder("t5"), tokenizer, num_virtual_tokens=3, lora_r=2)
    with pytest.raises(UnsupportedModelError, match="SEQ_2_SEQ_LM"):
        export_to_peft(encoder_decoder, SHOTS, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@needs_right_pair
def test_the_command_exports_a_file_of_demonstrations(tiny_model, tokenizer, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "films.jsonl").write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in SHOTS))
    words = ["export-peft", "--base-model", tmp_path / "base", "--output-dir", tmp_path / "adapter"]
    assert run_mend([*words, "--demonstrations", tmp_path / "films.jsonl"]) == 0
    assert "Saved the adapter" in capsys.readouterr().out
    adapter = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    anchors = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=0, lora_r=0)
    assert_answers_alike(adapter, anchors, anchors.distill(SHOTS))
