from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mend_hf import DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.errors import CheckpointError, DataError, ShapeError

SHOTS = [("great film", "positive"), ("a bore", "negative")]


@pytest.fixture
def model(tiny_model, tokenizer):
    return get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3), tokenizer).eval()


@pytest.fixture
def saved(model, tmp_path):
    model.distill(SHOTS).save_pretrained(tmp_path / "kept")
    return tmp_path / "kept"


def test_it_is_a_sequence_of_tasks(model):
    distilled = model.distill([SHOTS, SHOTS[:1], SHOTS[1:]])
    assert len(distilled) == 3
    assert [task.provenance.num_demonstrations for task in distilled] == [[2], [1], [1]]
    assert distilled[-1].provenance == distilled[2].provenance
    assert distilled.select([2, 0, 2]).provenance.num_demonstrations == [1, 2, 1]
    with pytest.raises(IndexError, match="from 0 to 2"):
        distilled[3]


def test_picking_a_short_task_drops_the_slots_it_does_not_use(model):
    distilled = model.distill([SHOTS, SHOTS[:1]])
    assert distilled[1].num_slots == model.distill(SHOTS[:1]).num_slots < distilled.num_slots


def test_provenance_says_what_was_distilled_by_what(model, tmp_path):
    record = model.distill([SHOTS, SHOTS[:1]]).provenance
    assert record.num_demonstrations == [2, 1]
    assert record.num_tokens[0] > record.num_tokens[1]
    assert record.num_lost_tokens == [0, 0]
    assert record.demonstrations_hash[0] != record.demonstrations_hash[1]
    assert record.demonstrations_hash == model.distill([SHOTS, SHOTS[:1]]).provenance.demonstrations_hash
    assert record.prompt_format["output_prefix"] == "\nOutput:"
    assert record.base_model_fingerprint["num_layers"] == 3
    assert model.read(SHOTS).provenance.distiller_hash is None
    model.save_pretrained(tmp_path)
    model.load_distiller(tmp_path)
    assert model.distill(SHOTS).provenance.distiller_name_or_path == str(tmp_path)


def test_the_distillers_hash_follows_its_weights(model):
    before = model.distill(SHOTS).provenance.distiller_hash
    with torch.no_grad():
        model.distiller.placeholders[0, 0] += 1
    assert model.distill(SHOTS).provenance.distiller_hash != before


def test_its_size_is_that_of_its_keys_and_values(model):
    distilled = model.distill(SHOTS)
    layers, heads, width, fp32 = 3, 2, 8, 4
    assert distilled.num_bytes == 2 * layers * heads * width * fp32 * distilled.num_slots


def test_keys_and_values_have_no_vectors(model):
    with pytest.raises(DataError, match='distil with prefix_form="embeds"'):
        _ = model.distill(SHOTS).vectors


def test_another_base_model_is_refused_with_what_differs(saved, tiny_model, tokenizer):
    other = get_mend_model(tiny_model("qwen3"), MendConfig(num_virtual_tokens=3), tokenizer)
    with pytest.raises(CheckpointError, match="architecture: expected LlamaForCausalLM, got Qwen3ForCausalLM"):
        other(input_ids=torch.tensor([[4]]), demonstrations=DistilledDemonstrations.from_pretrained(saved))


def test_a_distiller_of_another_base_model_is_refused(model, tiny_model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)architecture: expected Llama.*made for"):
        MendModel.from_pretrained(tiny_model("gpt2"), tmp_path, tokenizer)


def test_another_vocabulary_is_refused(model, tiny_model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "mend_config.json"
    record = json.loads(path.read_text())
    record["base_model_fingerprint"]["vocabulary_hash"] = "0" * 16
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="vocabulary_hash: expected 0000000000000000"):
        MendModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer)


def test_a_wrong_number_of_tasks_is_refused(model):
    with pytest.raises(ShapeError, match=r"pick one a row with \.select"):
        model(**model.tokenize(["bad", "bad", "bad"]), demonstrations=model.distill([SHOTS, SHOTS]))


@pytest.mark.parametrize("name", ["distilled_demonstrations.json", "distilled_demonstrations.safetensors"])
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        DistilledDemonstrations.from_pretrained(saved)


def test_a_newer_format_is_refused(saved):
    path = saved / "distilled_demonstrations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="upgrade mend_hf"):
        DistilledDemonstrations.from_pretrained(saved)


def test_tensors_that_do_not_belong_to_the_record_are_refused(saved):
    path = saved / "distilled_demonstrations.safetensors"
    tensors = load_file(path)
    del tensors["mask"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="save them again"):
        DistilledDemonstrations.from_pretrained(saved)


def test_saving_over_a_file_is_refused(model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="give another path"):
        model.distill(SHOTS).save_pretrained(tmp_path / "taken")
