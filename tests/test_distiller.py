from __future__ import annotations

import dataclasses

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from mend_hf import Demonstration, MendConfig, MendModel, get_mend_model
from mend_hf.distiller import DemonstrationBatch
from mend_hf.errors import ConfigError, ShapeError

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
LONG = SHOTS * 3


def parse(shots):
    return [Demonstration(*shot) for shot in shots]


@pytest.fixture
def wrap(tiny_model, tokenizer):
    def wrap(**settings):
        torch.manual_seed(5)
        config = MendConfig(**{"num_virtual_tokens": 3, **settings})
        return get_mend_model(tiny_model("llama"), config, tokenizer).eval()

    return wrap


def keys_of(model, shots):
    return torch.stack(model.distill(shots).prefix.keys)


def test_slots_are_sink_anchors_and_placeholders(wrap):
    [chunk] = wrap().distiller_prompt.encode_demonstrations(parse(SHOTS)).chunks
    num_anchors = len(chunk.anchor_positions)
    assert wrap().distill(SHOTS).num_slots == 1 + num_anchors + 3
    assert wrap(anchor_tokens="none").distill(SHOTS).num_slots == 1 + 3
    assert wrap(num_virtual_tokens=0, lora_r=0).distill(SHOTS).num_slots == 1 + num_anchors
    assert wrap(prefix_form="embeds").distill(SHOTS).vectors.shape == (1, 3, 32)


def test_sink_and_anchors_are_the_base_models_own_at_birth(wrap):
    model = wrap()
    text, distilled = model.read(SHOTS).prefix, model.distill(SHOTS).prefix
    [chunk] = model.prompt.encode_demonstrations(parse(SHOTS)).chunks
    slots = [0, *chunk.anchor_positions]
    for layer, kept in zip(text.keys, distilled.keys, strict=True):
        torch.testing.assert_close(kept[:, :, : len(slots)], layer[:, :, slots])
    assert distilled.next_positions.tolist() == text.next_positions.tolist() == [len(chunk.input_ids)]


def test_placeholders_start_as_the_empty_prompt_where_a_tokenizer_is_known(wrap, tiny_model):
    model = wrap()
    ids = torch.tensor(model.prompt.empty_prompt_ids)[:3]
    assert model.distiller.placeholders.equal(model.base_model.get_input_embeddings()(ids))
    assert not wrap(placeholder_initialization="vocabulary").distiller.placeholders.equal(model.distiller.placeholders)
    without = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3))
    assert without.mend_config.placeholder_initialization == "vocabulary"


def test_vectors_start_as_token_embeddings_and_tanh_changes_them_once_trained(wrap):
    models = [wrap(prefix_form="embeds", projection=projection) for projection in ("linear", "tanh")]
    assert models[0].distill(SHOTS).vectors[0].equal(models[0].distiller.base_vectors)
    for model in models:
        torch.manual_seed(2)
        torch.nn.init.normal_(model.distiller.projection.weight)
    assert not models[0].distill(SHOTS).vectors.allclose(models[1].distill(SHOTS).vectors)


def test_the_adapter_is_off_outside_of_distilling_even_after_an_error(wrap):
    model = wrap()
    with torch.no_grad():
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(0.1)
    before = model.read(SHOTS).prefix.keys[-1]
    with model.distiller.adapter_on():
        assert not model.read(SHOTS).prefix.keys[-1].equal(before)
    assert model.read(SHOTS).prefix.keys[-1].equal(before)

    def fail():
        with model.distiller.adapter_on():
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert model.read(SHOTS).prefix.keys[-1].equal(before)
    assert all(tensor.requires_grad for _, tensor in model.distiller.trained_tensors())


def test_lora_settings_change_the_adapter(wrap):
    assert not any(isinstance(module, BaseTunerLayer) for module in wrap(lora_r=0).modules())
    names = [name for name, _ in wrap(lora_target_modules=("q_proj",)).distiller.trained_tensors() if "lora" in name]
    assert {name.split(".")[-3] for name in names} == {"q_proj"}
    assert wrap(lora_r=2).distiller.adapter_layers()[0].r == {"mend": 2}
    assert wrap(lora_r=2, lora_alpha=6).distiller.adapter_layers()[0].scaling == {"mend": 3.0}


def test_lora_dropout_acts_in_training_only(wrap):
    model = wrap(lora_dropout=0.5)
    with torch.no_grad():
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(0.1)
    assert keys_of(model, SHOTS).equal(keys_of(model, SHOTS))
    model.train()
    assert not keys_of(model, SHOTS).equal(keys_of(model, SHOTS))
    assert not model.base_model.training


class TestOverflow:
    WINDOW = 40

    @pytest.mark.parametrize("form", ["kv", "embeds"])
    def test_concat_joins_chunks_that_were_distilled_apart(self, wrap, form):
        model = wrap(overflow="concat", max_distiller_tokens=self.WINDOW, prefix_form=form)
        task = model.prompt.encode_demonstrations(parse(LONG))
        assert len(task.chunks) > 1
        joined, parts = model.distill(LONG), []
        for chunk in task.chunks:
            parts.append(
                model.distiller(DemonstrationBatch.from_tasks([dataclasses.replace(task, chunks=[chunk])], 0))
            )
        sinks = len(parts) - 1 if form == "kv" else 0
        assert joined.num_slots == sum(part.num_slots for part in parts) - sinks
        if form == "embeds":
            torch.testing.assert_close(joined.vectors, torch.cat([part.vectors for part in parts], dim=1))
        else:
            kept = [parts[0].keys[-1], *(part.keys[-1][:, :, 1:] for part in parts[1:])]
            torch.testing.assert_close(joined.prefix.keys[-1], torch.cat(kept, dim=2))
            assert joined.prefix.next_positions.item() == max(len(chunk.input_ids) for chunk in task.chunks)

    @pytest.mark.parametrize("form", ["kv", "embeds"])
    def test_recurrent_chunks_see_those_before(self, wrap, form):
        settings = {"max_distiller_tokens": self.WINDOW, "prefix_form": form}
        concat, recurrent = (wrap(overflow=overflow, **settings) for overflow in ("concat", "recurrent"))
        for model in (concat, recurrent):
            if form == "embeds":
                torch.manual_seed(2)
                torch.nn.init.normal_(model.distiller.projection.weight)
        apart, in_turn = concat.distill(LONG), recurrent.distill(LONG)
        assert apart.num_slots == in_turn.num_slots
        first, other = (
            (apart.vectors, in_turn.vectors) if form == "embeds" else (apart.prefix.keys[-1], in_turn.prefix.keys[-1])
        )
        dim = 1 if form == "embeds" else 2
        assert first.narrow(dim, 0, 3).allclose(other.narrow(dim, 0, 3), atol=1e-5)
        assert not first.narrow(dim, -3, 3).allclose(other.narrow(dim, -3, 3), atol=1e-3)

    @pytest.mark.parametrize("overflow", ["concat", "recurrent"])
    def test_a_batch_of_tasks_with_different_numbers_of_chunks_equals_each_alone(self, wrap, overflow):
        model = wrap(overflow=overflow, max_distiller_tokens=self.WINDOW)
        together = model.distill([LONG, SHOTS[:1], SHOTS])
        for row, task in enumerate([LONG, SHOTS[:1], SHOTS]):
            alone, got = model.distill(task).prefix, together[row].prefix
            assert got.next_positions.equal(alone.next_positions)
            torch.testing.assert_close(got.keys[-1], alone.keys[-1], atol=1e-5, rtol=1e-5)

    def test_truncate_says_what_is_lost(self, wrap):
        with pytest.warns(UserWarning, match="were cut away"):
            record = wrap(max_distiller_tokens=self.WINDOW).distill(LONG).provenance
        assert record.num_lost_tokens[0] > 0
        assert record.num_demonstrations[0] < len(LONG)


class TestASeparateDistiller:
    @pytest.mark.parametrize("lora_r", [0, 4])
    def test_saves_what_it_trains_and_nothing_of_the_base_model(
        self, tiny_model, tokenizer, reader_folder, tmp_path, lora_r
    ):
        config = MendConfig(distiller_name_or_path=reader_folder, lora_r=lora_r, num_virtual_tokens=3)
        model = get_mend_model(tiny_model("llama"), config, tokenizer)
        assert model.mend_config.prefix_form == "embeds"
        with torch.no_grad():
            for _, parameter in model.distiller.trained_tensors():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        names = {name for name, _ in model.distiller.trained_tensors()}
        assert {"placeholders", "base_vectors", "projection.weight"} < names
        assert any(name.startswith("reader.wte") for name in names) == (lora_r == 0)
        assert any("lora_A" in name for name in names) == (lora_r > 0)
        model.save_pretrained(tmp_path / "saved")
        loaded = MendModel.from_pretrained(tiny_model("llama"), tmp_path / "saved", tokenizer)
        assert loaded.distill(SHOTS).vectors.equal(model.eval().distill(SHOTS).vectors)

    def test_gradients_reach_the_reader(self, tiny_model, tokenizer, reader_folder):
        config = MendConfig(distiller_name_or_path=reader_folder, lora_r=0, num_virtual_tokens=3)
        model = get_mend_model(tiny_model("llama"), config, tokenizer)
        torch.nn.init.normal_(model.distiller.projection.weight)
        batch = model.tokenize("moving and funny")
        model(**batch, labels=batch["input_ids"], demonstrations=SHOTS).loss.backward()
        missing = [name for name, tensor in model.distiller.trained_tensors() if tensor.grad is None]
        assert missing == []
        assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_more_placeholders_than_the_vocabulary_has_rows_are_refused(wrap):
    with pytest.raises(ConfigError, match="use fewer"):
        wrap(num_virtual_tokens=100_000)


def test_token_ids_can_be_distilled_without_a_tokenizer(tiny_model):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3))
    distilled = model.distill(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]))
    assert (len(distilled), distilled.num_slots) == (2, 4)
    assert model(input_ids=torch.tensor([[5, 6]]), demonstrations=distilled[0]).logits.shape[1] == 2
    with pytest.raises(ConfigError, match="pass tokenizer="):
        model.distill(SHOTS)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt", "gemma3_text", "mistral"])
@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_steps_from_birth_move_all_that_is_trained_and_nothing_else(tiny_model, tokenizer, name, form):
    """B is zero at birth and so is A's gradient, and before them the projection's: it takes three steps."""
    torch.manual_seed(3)
    base = tiny_model(name)
    before_base = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=2, prefix_form=form), tokenizer).train()
    trained = dict(model.distiller.trained_tensors())
    before = {key: tensor.detach().clone() for key, tensor in trained.items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    query = model.tokenize("moving and funny")
    for _ in range(3):
        optimizer.zero_grad()
        model(**query, labels=query["input_ids"], demonstrations=SHOTS).loss.backward()
        optimizer.step()
    still = {key for key, tensor in trained.items() if tensor.equal(before[key])}
    # the kv form ends with the last layer's keys and values: what that layer does after them reaches nobody
    assert all(form == "kv" and ".2." in key and "k_proj" not in key and "v_proj" not in key for key in still)
    after_base = model.unload().state_dict()
    assert all(after_base[key].equal(tensor) for key, tensor in before_base.items())


def test_a_separate_distiller_has_nothing_to_do_with_adapters_on_the_base_model(tiny_model, tokenizer, reader_folder):
    base = tiny_model("llama")
    shared = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).eval()
    expected = shared.distill(SHOTS).prefix.keys[-1]
    config = MendConfig(distiller_name_or_path=reader_folder, lora_r=2, num_virtual_tokens=3)
    separate = get_mend_model(base, config, tokenizer).eval()
    assert separate.distill(SHOTS).vectors.shape == (1, 3, 32)
    separate.unload()
    assert shared.distill(SHOTS).prefix.keys[-1].equal(expected)


def test_a_reader_with_too_small_a_position_table_is_refused(tiny_model, tokenizer, reader_folder):
    config = MendConfig(distiller_name_or_path=reader_folder, lora_r=0, num_virtual_tokens=3)
    model = get_mend_model(tiny_model("llama"), config, tokenizer)
    with pytest.raises(ShapeError, match="at most 256 tokens at once, for which GPT2Model has positions"):
        model.distill(SHOTS * 12)


class TestTwoModelsOnOneBaseModel:
    def test_a_second_adapter_is_refused_and_the_first_stays_whole(self, tiny_model, tokenizer):
        base = tiny_model("llama")
        first = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).eval()
        before = first.distiller.content_hash()
        with pytest.raises(ConfigError, match=r"unload\(\) the MendModel around it first"):
            get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=4), tokenizer)
        assert first.distiller.content_hash() == before
        assert all(tensor.requires_grad for _, tensor in first.distiller.trained_tensors())
        again = get_mend_model(first.unload(), MendConfig(num_virtual_tokens=3, lora_r=4), tokenizer)
        assert again.distiller.adapter_layers()[0].r == {"mend": 4}

    def test_training_free_anchors_never_switch_another_models_adapter_on(self, tiny_model, tokenizer):
        base = tiny_model("llama")
        settings = MendConfig(num_virtual_tokens=0, lora_r=0)
        expected = get_mend_model(tiny_model("llama"), settings, tokenizer).distill(SHOTS).prefix.keys
        early = get_mend_model(base, settings, tokenizer)
        model = get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).eval()
        with torch.no_grad():
            for _, tensor in model.distiller.trained_tensors():
                tensor.add_(0.1)
        trained = keys_of(model, SHOTS)
        late = get_mend_model(base, settings, tokenizer)
        for anchors in (early, late):
            assert all(a.equal(b) for a, b in zip(anchors.distill(SHOTS).prefix.keys, expected, strict=True))
            anchors.unload()
        assert keys_of(model, SHOTS).equal(trained)

    @pytest.mark.parametrize("settings", [{"num_virtual_tokens": 100_000}, {"lora_target_modules": ("no_such",)}])
    def test_a_failed_wrapping_leaves_the_base_model_as_it_was(self, tiny_model, tokenizer, settings):
        base = tiny_model("llama").train()
        names = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(ValueError, match=r"use fewer|no_such"):
            get_mend_model(base, MendConfig(**settings), tokenizer)
        assert [(name, type(module)) for name, module in base.named_modules()] == names
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert base.training
        assert get_mend_model(base, MendConfig(num_virtual_tokens=3), tokenizer).distill(SHOTS).num_slots > 3
