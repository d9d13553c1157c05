"""Separate distillers that write keys and values, and readers that number their tokens in their own ways."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from command_line import run_mend
from transformers import AutoModel, ElectraConfig, RobertaConfig, RoFormerConfig

from mend_hf import Demonstration, DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.architectures import embed_tokens
from mend_hf.errors import ConfigError, ShapeError

FAMILIES = ["gpt2", "llama", "gemma3_text", "bloom"]
SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
TASKS = [SHOTS, SHOTS[:1], SHOTS[1:3]]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
NUM_VECTORS = 4


@pytest.fixture(params=FAMILIES)
def base(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture
def wrap(tokenizer, reader_folder):
    def wrap(base, *, is_trained=True, **settings):
        torch.manual_seed(7)
        defaults = {"distiller_name_or_path": reader_folder, "prefix_form": "kv", "num_virtual_tokens": NUM_VECTORS}
        model = get_mend_model(base, MendConfig(**{**defaults, "lora_r": 2, **settings}), tokenizer)
        if is_trained:
            with torch.no_grad():
                for _, tensor in model.distiller.trained_tensors():
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
        return model.eval()

    return wrap


@pytest.fixture
def encoder_folder(tokenizer, tmp_path):
    """A function from an encoder's config class to the folder of one with room for 64 positions."""

    def save(config_class, **settings):
        torch.manual_seed(1)
        config = config_class(
            vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=64, **settings,
        )  # fmt: skip
        AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
        tokenizer.save_pretrained(tmp_path / "encoder")
        return str(tmp_path / "encoder")

    return save


def parse(shots):
    return [Demonstration(*shot) for shot in shots]


def greedy(**settings):
    return {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **settings}


def trained(model):
    return {name: tensor.detach().clone() for name, tensor in model.distiller.trained_tensors()}


class TestAtBirth:
    def test_keys_and_values_answer_as_vectors_read_into_the_cache(self, base, wrap):
        kv = wrap(base, is_trained=False)
        embeds = wrap(copy.deepcopy(base), is_trained=False, prefix_form="embeds", num_virtual_tokens=1 + NUM_VECTORS)
        sink = embed_tokens(base, torch.tensor([kv.prompt.first_id]))
        with torch.no_grad():
            embeds.distiller.base_vectors.copy_(torch.cat([sink, kv.distiller.base_vectors]))
        query = kv.tokenize("the film was good")
        expected = embeds(**query, demonstrations=SHOTS).logits
        torch.testing.assert_close(kv(**query, demonstrations=SHOTS).logits, expected, **CLOSE)
        tokens = [m.generate(**query, demonstrations=SHOTS, **greedy()) for m in (kv, embeds)]
        assert tokens[0].equal(tokens[1])

    def test_they_answer_as_the_empty_prompt_would_as_text(self, base, wrap):
        bare = copy.deepcopy(base)
        model = wrap(base, is_trained=False)
        empty = model.prompt.empty_prompt_ids
        text = [model.prompt.first_id, *(empty * NUM_VECTORS)[:NUM_VECTORS]]
        ids = model.tokenize("the film was good")["input_ids"]
        expected = bare(torch.cat([torch.tensor([text]), ids], dim=1)).logits[:, len(text) :]
        torch.testing.assert_close(model(input_ids=ids, demonstrations=SHOTS).logits, expected, **CLOSE)

    def test_without_a_tokenizer_the_sink_is_the_begin_of_text_token(self, tiny_model, reader_folder):
        config = MendConfig(distiller_name_or_path=reader_folder, prefix_form="kv", num_virtual_tokens=2, lora_r=0)
        model = get_mend_model(tiny_model("llama"), config).eval()
        first = model.read_tokens(torch.tensor([[model.base_model.config.bos_token_id]]), torch.ones(1, 1).long())
        kept = model.distill(SHOTS).prefix
        torch.testing.assert_close(kept.keys[-1][:, :, :1], first.keys[-1], **CLOSE)

    def test_a_base_model_in_training_under_checkpointing_is_read_and_left_as_it_was(self, tiny_model, wrap):
        base = tiny_model("llama")
        base.activation_checkpointing_enable()
        base.train()
        base.model.layers[1].eval()
        modes = [module.training for module in base.modules()]
        with pytest.raises(ValueError, match="no_such"):
            wrap(base, lora_target_modules=("no_such",))
        assert [module.training for module in base.modules()] == modes
        model = wrap(base)
        assert len(model.distiller.layer_projection.keys) == 3
        assert model.distill(SHOTS).num_slots == 1 + NUM_VECTORS


class TestSlots:
    def test_the_sink_is_the_base_models_own_and_the_others_tell_demonstrations_apart(self, base, wrap):
        born, model = wrap(copy.deepcopy(base), is_trained=False), wrap(base)
        own, first, other = (m.distill(task).prefix for m, task in ((born, SHOTS), (model, SHOTS), (model, SHOTS[:2])))
        for layer in range(3):
            for states in ("keys", "values"):
                before, after, elsewhere = (getattr(prefix, states)[layer] for prefix in (own, first, other))
                torch.testing.assert_close(after[:, :, 0], before[:, :, 0], **CLOSE)
                differences = (after - elsewhere).abs().amax(dim=(0, 1, 3))
                assert differences[0] == 0
                assert differences[1:].min() > 1e-4
        assert first.mask.all()
        assert first.next_positions.tolist() == [1 + NUM_VECTORS]

    def test_a_batch_of_tasks_answers_as_each_alone(self, base, wrap):
        model = wrap(base)
        queries = ["moving and funny", "bad", "the film was good"]
        batch, distilled = model.tokenize(queries), model.distill(TASKS)
        together = model(**batch, demonstrations=distilled).logits
        tokens = model.generate(**batch, demonstrations=distilled, **greedy())
        for row, (query, task) in enumerate(zip(queries, TASKS, strict=True)):
            alone = model.tokenize(query)
            expected = model(**alone, demonstrations=task).logits[0]
            torch.testing.assert_close(together[row, -len(expected) :], expected, **CLOSE)
            new = model.generate(**alone, demonstrations=task, **greedy())[0, alone["input_ids"].shape[1] :]
            assert tokens[row, batch["input_ids"].shape[1] :][: len(new)].tolist() == new.tolist()

    def test_chunks_that_are_distilled_apart_are_joined_around_one_sink(self, base, wrap):
        model = wrap(base, overflow="concat", max_demonstrations_per_chunk=2)
        whole = model.distill(SHOTS)
        halves = [model.distill(SHOTS[:2]), model.distill(SHOTS[2:])]
        assert whole.num_slots == 1 + 2 * NUM_VECTORS
        assert whole.prefix.next_positions.tolist() == [1 + NUM_VECTORS]
        query = model.tokenize("the film was good")
        expected = model(**query, demonstrations=whole).logits
        joined = halves[0].join(halves[1])
        torch.testing.assert_close(model(**query, demonstrations=joined).logits, expected, **CLOSE)
        in_turn = model.distill(SHOTS, batch_size=1)
        torch.testing.assert_close(model(**query, demonstrations=in_turn).logits, expected, **CLOSE)
        assert not model(**query, demonstrations=halves[0]).logits.allclose(expected, atol=1e-3)

    def test_tanh_bounds_the_update(self, tiny_model, wrap):
        moved = {}
        for projection in ("linear", "tanh"):
            model = wrap(tiny_model("llama"), is_trained=False, projection=projection)
            before = model.distill(SHOTS).prefix.values[-1]
            torch.nn.init.normal_(model.distiller.layer_projection.values[-1].weight, std=3.0)
            moved[projection] = (model.distill(SHOTS).prefix.values[-1] - before).abs().max()
        assert moved["linear"] > 2
        assert 0.5 < moved["tanh"] <= 1 + 1e-5

    def test_a_low_rank_saves_weights(self, tiny_model, wrap):
        """Of the tiny Llama: 3 layers with 2 key/value heads of width 8; the reader is 24 wide."""
        counts = {}
        for rank in (0, 5):
            projection = wrap(tiny_model("llama"), projection_rank=rank).distiller.layer_projection
            counts[rank] = sum(parameter.numel() for parameter in projection.parameters())
        assert counts == {0: 3 * 2 * (24 + 1) * 16, 5: 24 * 5 + 3 * 2 * (5 + 1) * 16}


class TestTraining:
    @pytest.mark.parametrize("lora_r", [0, 2])
    def test_gradients_reach_everything_that_is_trained_and_nothing_else(self, base, wrap, lora_r):
        model = wrap(base, lora_r=lora_r).train()
        query = model.tokenize("moving and funny")
        model(**query, labels=query["input_ids"], demonstrations=SHOTS).loss.backward()
        tensors = dict(model.distiller.trained_tensors())
        assert [name for name, tensor in tensors.items() if tensor.grad is None or not tensor.grad.any()] == []
        ids = {id(tensor) for tensor in tensors.values()}
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in ids)

    @pytest.mark.parametrize("lora_r", [0, 2])
    def test_steps_from_birth_move_all_that_is_trained_and_nothing_else(self, base, wrap, lora_r):
        """The layers' matrices are zero at birth, and before they move nothing behind them does; so is LoRA's B."""
        model = wrap(base, is_trained=False, lora_r=lora_r).train()
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        before = trained(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        query = model.tokenize("moving and funny")
        for _ in range(4):
            optimizer.zero_grad()
            model(**query, labels=query["input_ids"], demonstrations=SHOTS).loss.backward()
            optimizer.step()
        assert [name for name, tensor in trained(model).items() if tensor.equal(before[name])] == []
        parameters = dict(model.named_parameters())
        assert any(name.startswith("base_model.") for name in frozen)
        assert any(name.startswith("distiller.reader.") for name in frozen) == (lora_r > 0)
        assert all(parameters[name].equal(tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("lora_r", [0, 2])
def test_saving_and_loading_changes_nothing(base, wrap, tokenizer, tmp_path, lora_r):
    bare, model = copy.deepcopy(base), wrap(base, lora_r=lora_r, projection_rank=5)
    query, distilled = model.tokenize("moving and funny"), model.distill(SHOTS)
    expected = model(**query, demonstrations=distilled).logits
    model.save_pretrained(tmp_path / "distiller")
    distilled.save_pretrained(tmp_path / "distilled")
    loaded = MendModel.from_pretrained(bare, tmp_path / "distiller", tokenizer)
    assert loaded.mend_config.projection_rank == 5
    assert loaded(**query, demonstrations=SHOTS).logits.equal(expected)
    kept = DistilledDemonstrations.from_pretrained(tmp_path / "distilled")
    assert loaded(**query, demonstrations=kept).logits.equal(expected)


def test_keys_and_values_are_in_the_base_models_type(tiny_model, wrap):
    model = wrap(tiny_model("llama").to(torch.bfloat16))
    assert {tensor.dtype for tensor in model.distill(SHOTS).prefix.keys} == {torch.bfloat16}
    assert model.distiller.base_vectors.dtype == torch.float32


class TestRefusals:
    def test_a_base_model_whose_cache_holds_more_than_keys_and_values(self, tiny_model, wrap):
        with pytest.raises(ConfigError, match="leave prefix_form out"):
            wrap(tiny_model("mamba"))

    def test_an_encoder_decoder(self, tiny_encoder_decoder, wrap):
        with pytest.raises(ConfigError, match="leave prefix_form out"):
            wrap(tiny_encoder_decoder("t5"))

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5, "two"])
    def test_a_batch_size_that_is_no_number_of_chunks(self, tiny_model, wrap, batch_size):
        with pytest.raises(ConfigError, match="None to read all at once"):
            wrap(tiny_model("llama")).distill(SHOTS, batch_size=batch_size)

    def test_the_default_form_stays_vectors(self, tiny_model, wrap):
        assert wrap(tiny_model("llama"), prefix_form=None).mend_config.prefix_form == "embeds"


class TestEncodersThatRead:
    ENCODERS = (
        (RobertaConfig, {"pad_token_id": 3}, 60),
        (ElectraConfig, {"embedding_size": 16}, 64),
        (RoFormerConfig, {}, 64),
    )

    @pytest.mark.parametrize("form", ["kv", "embeds"])
    @pytest.mark.parametrize(("config_class", "settings", "limit"), ENCODERS)
    def test_they_number_tokens_as_they_do_alone(
        self, tiny_model, wrap, encoder_folder, config_class, settings, limit, form
    ):
        folder = encoder_folder(config_class, **settings)
        model = wrap(tiny_model("llama"), distiller_name_or_path=folder, prefix_form=form)
        distiller, reader = model.distiller, model.distiller.reader
        seen = []
        hook = reader.register_forward_hook(lambda _, inputs, output: seen.append(output.last_hidden_state))
        model.distill(SHOTS[:1])
        ids = torch.tensor([model.distiller_prompt.encode_demonstrations(parse(SHOTS[:1])).chunks[0].input_ids])
        hook.remove()
        text = reader.get_input_embeddings()(ids)
        own = reader(inputs_embeds=torch.cat([text, distiller.placeholders[None]], dim=1)).last_hidden_state
        torch.testing.assert_close(seen[0], own, **CLOSE)
        query, together = model.tokenize("the film was good"), model.distill(TASKS)
        for row, task in enumerate(TASKS):
            expected = model(**query, demonstrations=task).logits
            torch.testing.assert_close(model(**query, demonstrations=together[row]).logits, expected, **CLOSE)

    @pytest.mark.parametrize(("config_class", "settings", "limit"), ENCODERS)
    def test_more_than_their_position_table_holds_is_refused(
        self, tiny_model, wrap, encoder_folder, config_class, settings, limit
    ):
        folder = encoder_folder(config_class, **settings)
        model = wrap(tiny_model("llama"), distiller_name_or_path=folder)
        num_tokens = limit - NUM_VECTORS
        assert model.distill(torch.full((1, num_tokens), 5)).num_slots == 1 + NUM_VECTORS
        with pytest.raises(ShapeError, match=rf"at most {limit} tokens at once.*got {limit + 1}: lower"):
            model.distill(torch.full((1, num_tokens + 1), 5))


def test_the_command_line_trains_and_answers(tiny_model, tokenizer, reader_folder, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    text = "the boy went home because it was a good day for her walk into town . " * 5
    rows, shots = tmp_path / "text.jsonl", tmp_path / "shots.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{word} {text}"}) + "\n" for word in ("one", "two", "three")))
    shots.write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in SHOTS))
    settings = ["--set", "prefix_form=kv", "--set", f"distiller_name_or_path={reader_folder}"]
    settings += ["--set", "lora_r=2", "--set", "projection_rank=5", "--num-virtual-tokens", 3]
    words = ["pretrain", "--base-model", base, "--text", rows, "--max-tokens", 80, "--output-dir", out]
    assert run_mend([*words, *settings, "--num-rows", 4, "--batch-size", 2, "--save-steps", 2]) == 0
    config = MendConfig.from_pretrained(out)
    assert (config.prefix_form, config.projection_rank) == ("kv", 5)
    capsys.readouterr()
    words = ["generate", "--base-model", base, "--distiller", out, "--demonstrations", shots, "--max-new-tokens", 2]
    assert run_mend([*words, "good film", "a dull day"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
