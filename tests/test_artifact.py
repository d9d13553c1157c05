from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mend_hf import DistilledDemonstrations, MendConfig, MendModel, get_mend_model, join_demonstrations
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
    assert distilled.select([-3, -1]).provenance.num_demonstrations == [2, 1]
    for ask in (distilled.__getitem__, lambda row: distilled.select([0, row])):
        for row in (3, -4):
            with pytest.raises(IndexError, match=f"from 0 to 2, got {row}"):
                ask(row)


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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}))
    with pytest.raises(CheckpointError, match="upgrade mend_hf"):
        DistilledDemonstrations.from_pretrained(saved)


def test_a_file_of_format_1_is_read_and_knows_no_single_demonstrations(model, saved):
    expected, path = model.distill(SHOTS), saved / "distilled_demonstrations.json"
    record = json.loads(path.read_text()) | {"format_version": 1}
    for name in ("chunks", "overflow", "max_slots", "anchor_pooling"):
        del record["provenance"][name]
    del record["weights_sha256"]
    lists = {"num_demonstrations": [2], "num_tokens": [31], "num_lost_tokens": [4], "demonstrations_hash": ["0f"]}
    path.write_text(json.dumps(record | {"provenance": record["provenance"] | lists}))
    tensors = load_file(saved / "distilled_demonstrations.safetensors")
    del tensors["anchor_labels"]
    save_file(tensors, saved / "distilled_demonstrations.safetensors")
    loaded = DistilledDemonstrations.from_pretrained(saved)
    facts = loaded.provenance
    assert (facts.num_demonstrations, facts.num_tokens, facts.num_lost_tokens) == ([2], [31], [4])
    assert all(got.equal(key) for got, key in zip(loaded.prefix.keys, expected.prefix.keys, strict=True))
    assert loaded.join(expected).num_slots == 2 * expected.num_slots - 1
    with pytest.raises(DataError, match="files of older versions"):
        loaded.drop(SHOTS[:1])


def test_tensors_that_do_not_belong_to_the_record_are_refused(saved):
    path = saved / "distilled_demonstrations.safetensors"
    tensors = load_file(path)
    del tensors["mask"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="save or fetch the whole folder again"):
        DistilledDemonstrations.from_pretrained(saved)


def test_saving_over_a_file_is_refused(model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="give another path"):
        model.distill(SHOTS).save_pretrained(tmp_path / "taken")


MORE = [("good food", "positive"), ("bad food", "negative"), ("very funny", "positive")]


def same(one, other):
    """Whether two artefacts are equal, bit for bit and down to their provenance, wherever a slot counts."""
    if one.provenance != other.provenance or not one.chunks.mask.equal(other.chunks.mask):
        return False
    mask, tensors, others = one.chunks.mask, one._tensors(), other._tensors()
    pairs = [(tensors[name], others[name]) for name in tensors]
    pairs = [(a.transpose(1, 2), b.transpose(1, 2)) if a.dim() == 4 else (a, b) for a, b in pairs]
    return all(a.equal(b) if a.dim() == 1 else a[mask].equal(b[mask]) for a, b in pairs)


@pytest.mark.parametrize("form", ["kv", "embeds"])
class TestJoiningAndDropping:
    @pytest.fixture
    def apart(self, tiny_model, tokenizer, form):
        """Every chunk holds two demonstrations."""
        torch.manual_seed(3)
        config = MendConfig(num_virtual_tokens=3, prefix_form=form, overflow="concat", max_demonstrations_per_chunk=2)
        model = get_mend_model(tiny_model("llama"), config, tokenizer).eval()
        with torch.no_grad():
            for _, tensor in model.distiller.trained_tensors():
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
        return model

    def test_joined_equals_distilled_at_once(self, apart):
        query = apart.tokenize("moving and funny")
        joined, whole = apart.distill(SHOTS).join(apart.distill(MORE)), apart.distill(SHOTS + MORE)
        assert joined.provenance == whole.provenance
        assert joined.num_slots == whole.num_slots
        got, expected = (apart(**query, demonstrations=distilled).logits for distilled in (joined, whole))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        ids = query["input_ids"]
        tokens = [apart.generate(ids, demonstrations=d, max_new_tokens=5, do_sample=False) for d in (joined, whole)]
        assert tokens[0].tolist() == tokens[1].tolist()

    @pytest.mark.parametrize("raw", [True, False])
    def test_dropping_undoes_joining_bit_for_bit_on_either_side(self, apart, raw):
        first, second = apart.distill(SHOTS), apart.distill(MORE)
        joined = first.join(second)
        assert same(joined.drop(MORE if raw else second), first)
        assert same(joined.drop(SHOTS if raw else first), second)
        assert same(join_demonstrations([first, second, first]).drop(first), joined)

    def test_rows_of_a_batch_join_and_drop_task_by_task(self, apart):
        tasks, others = [SHOTS, MORE], [MORE[:1], SHOTS]
        first, second = apart.distill(tasks), apart.distill(others)
        joined = first.join(second)
        assert same(joined.drop(others), first)
        for row in range(2):
            assert same(joined[row], first[row].join(second[row]))
        assert same(joined.select([1, 0]).select([1, 0]), joined)

    def test_what_is_saved_and_loaded_joins_and_drops(self, apart, tmp_path):
        first, second = apart.distill(SHOTS), apart.distill(MORE)
        first.join(second).save_pretrained(tmp_path)
        loaded = DistilledDemonstrations.from_pretrained(tmp_path)
        assert same(loaded, first.join(second))
        assert same(loaded.drop(SHOTS).join(first), second.join(first))

    def test_a_part_of_a_chunk_cannot_be_dropped(self, apart):
        distilled = apart.distill(SHOTS + MORE)
        with pytest.raises(DataError, match=r"1 that share a chunk.*max_demonstrations_per_chunk=1"):
            distilled.drop(SHOTS[:1])
        assert distilled.drop(MORE[2:]).provenance.num_demonstrations == [4]

    def test_what_is_not_there_or_all_there_is_cannot_be_dropped(self, apart):
        with pytest.raises(DataError, match="2 that it does not"):
            apart.distill(SHOTS).drop(MORE[:2])
        with pytest.raises(DataError, match="got all of them"):
            apart.distill(SHOTS).drop(SHOTS)

    def test_a_plain_text_of_several_chunks_is_dropped_whole(self, apart):
        text = "the film was good and the food was bad " * 30
        apart.mend_config = dataclasses.replace(apart.mend_config, max_distiller_tokens=100)
        first = apart.distill(SHOTS)
        joined = first.join(apart.distill([text]))
        assert len(joined.provenance.chunks[0]) > 2
        assert joined.provenance.num_demonstrations == [3]
        assert same(joined.drop([text]), first)

    def test_what_another_distiller_made_is_refused(self, apart):
        first = apart.distill(SHOTS)
        with torch.no_grad():
            apart.distiller.placeholders[0, 0] += 1
        with pytest.raises(DataError, match=r"(?s)distiller_hash: .* and .*same distiller"):
            first.join(apart.distill(MORE))
        with pytest.raises(DataError, match="tasks: 1 and 2"):
            apart.distill(SHOTS).join(apart.distill([SHOTS, MORE]))

    def test_chunks_that_have_read_those_before_are_not_joined(self, tiny_model, tokenizer, form):
        config = MendConfig(num_virtual_tokens=3, prefix_form=form, overflow="recurrent", max_distiller_tokens=24)
        model = get_mend_model(tiny_model("llama"), config, tokenizer)
        distilled = model.distill(SHOTS + MORE)
        with pytest.raises(DataError, match='with overflow="concat"'):
            distilled.join(distilled)
        with pytest.raises(DataError, match="share a chunk"):
            distilled.drop(MORE)


def test_nothing_cannot_be_joined():
    with pytest.raises(DataError, match="give one or more"):
        join_demonstrations([])
