from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import build_tiny_model, ids_of
from transformers import (
    AutoModelForCausalLM,
)

from mend_hf import (
    AutoMendModel,
    DistilledDemonstrations,
    MendCollator,
    MendConfig,
    MendModel,
    get_mend_model,
)
from mend_hf.errors import CheckpointError, ConfigError, DataError, ShapeError, UnsupportedModelError
from mend_hf.scoring import score_options

SHOTS = [("great film", "positive"), ("a bore", "negative")]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model(tiny_model, tokenizer):
    torch.manual_seed(0)
    return get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3), tokenizer).eval()


def test_the_prefix_form_follows_the_distiller(model, tiny_model, tokenizer):
    assert model.mend_config.prefix_form == "kv"
    assert model.mend_config.task_type == "CAUSAL_LM"
    embeds = get_mend_model(tiny_model("llama"), MendConfig(prefix_form="embeds", num_virtual_tokens=2), tokenizer)
    assert embeds.mend_config.prefix_form == "embeds"


def test_raw_and_distilled_demonstrations_answer_alike(model):
    query = model.tokenize("bad")
    raw = model(**query, demonstrations=SHOTS).logits
    assert raw.equal(model(**query, demonstrations=model.distill(SHOTS)).logits)
    assert raw.shape[1] == query["input_ids"].shape[1]


def test_bound_demonstrations_are_used_until_the_block_ends_also_by_an_error(model):
    query = model.tokenize("bad")
    bare, expected = model(**query).logits, model(**query, demonstrations=SHOTS).logits

    def fail():
        with model.use_demonstrations(SHOTS):
            assert model(**query).logits.equal(expected)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model(**query).logits.equal(bare)
    model.set_demonstrations(SHOTS)
    assert model(**query).logits.equal(expected)
    with model.use_demonstrations(SHOTS[:1]):
        assert not model(**query).logits.equal(expected)
    assert model(**query).logits.equal(expected)
    model.set_demonstrations(None)
    assert model(**query).logits.equal(bare)


def test_two_sources_of_demonstrations_are_refused(model):
    model.set_demonstrations(SHOTS)
    with pytest.raises(DataError, match=r"set_demonstrations\(None\)"):
        model(**model.tokenize("bad"), demonstrations=SHOTS)


def test_generate_returns_the_users_tokens_and_the_new_ones(model):
    query = model.tokenize("moving and funny")
    distilled = model.distill(SHOTS)
    ids = model.generate(**query, demonstrations=distilled, **GREEDY)
    length = query["input_ids"].shape[1]
    assert ids[:, :length].equal(query["input_ids"])
    assert ids.shape[1] <= length + 5
    assert ids.equal(model.generate("moving and funny", demonstrations=distilled, **GREEDY))
    assert ids.equal(model.generate(inputs=query["input_ids"], demonstrations=distilled, **GREEDY))
    limited = model.generate(**query, demonstrations=distilled, max_length=length + 2, do_sample=False, pad_token_id=0)
    assert limited.equal(ids[:, : length + 2])
    scores = model.generate(**query, demonstrations=distilled, **GREEDY, return_dict_in_generate=True)
    assert scores.sequences.equal(ids)


def test_answers_end_where_the_separator_begins(model, monkeypatch):
    monkeypatch.setattr(
        model.prompt.tokenizer.__class__, "batch_decode", lambda *_, **__: [" positive\n\nInput: more"]
    )
    assert model.answer(["bad"], SHOTS) == ["positive"]


def test_of_options_the_likeliest_is_answered(model):
    queries, options = ["moving and funny", "bad", "very good"], ["positive", "negative", "good food"]
    several = model.distill([SHOTS, SHOTS[:1], SHOTS[1:]])
    for demonstrations, prefix in (
        (None, None),
        (SHOTS, model.distill(SHOTS).prefix),
        (several, several.prefix),
        (several.prefix, several.prefix),
    ):
        scores = score_options(model, queries, [options] * 3, prefix)
        expected = [options[row.index(max(row))] for row in scores]
        assert model.answer(queries, demonstrations, options=options) == expected
    assert model.answer("bad", SHOTS, options=options) == model.answer(["bad"], SHOTS, options=options)
    chosen = model.answer(queries, SHOTS, options=options)
    assert chosen == model.answer(queries, SHOTS, options=options[::-1])
    with model.use_demonstrations(SHOTS):
        assert model.answer(queries, options=options) == chosen
        with model.disable_adapter():
            assert model.answer(queries, options=options) == model.answer(queries, options=options[::-1])


@pytest.mark.parametrize("options", [[], ["positive"], ["positive", "positive"], "positive"])
def test_options_that_are_no_choice_are_refused(model, options):
    with pytest.raises(DataError, match=r"two or more different texts, got .*: correct it"):
        model.answer(["bad"], SHOTS, options=options)


def test_priors_are_what_options_get_on_average_and_are_taken_off(model):
    queries, options, inputs = ["moving and funny", "bad"], ["positive", "negative", "good food"], ["a bore", "good"]
    for demonstrations, prefix in ((None, None), (SHOTS, model.distill(SHOTS).prefix)):
        rows = score_options(model, inputs, [options] * 2, prefix)
        means = [sum(map(math.exp, column)) / 2 for column in zip(*rows, strict=True)]
        priors = model.option_priors(options, inputs, demonstrations)
        assert [math.exp(priors[option]) for option in options] == pytest.approx(means, rel=1e-4)
        scores = score_options(model, queries, [options] * 2, prefix)
        less = [[score - priors[option] for option, score in zip(options, row, strict=True)] for row in scores]
        expected = [options[row.index(max(row))] for row in less]
        assert model.answer(queries, demonstrations, options=options, option_priors=priors) == expected
    for option in options:
        priors = dict.fromkeys(options, 0.0) | {option: -1e3}
        assert model.answer(queries, SHOTS, options=options, option_priors=priors) == [option] * 2


def test_priors_that_do_not_fit_are_refused(model):
    options = ["positive", "negative"]
    with pytest.raises(DataError, match=r"prior of every option, got none of \['negative'\]"):
        model.answer(["bad"], SHOTS, options=options, option_priors={"positive": 0.0})
    with pytest.raises(ConfigError, match="Expected options to take option_priors off, got none"):
        model.answer(["bad"], SHOTS, option_priors={"positive": 0.0})
    for wrong in ([], "bad"):
        with pytest.raises(DataError, match="Expected inputs and options as two lists of texts"):
            model.option_priors(options, wrong, SHOTS)
    with pytest.raises(ShapeError, match="demonstrations of one task, got those of 2"):
        model.option_priors(options, ["bad", "good"], [SHOTS, SHOTS])


def test_options_beside_settings_of_generation_are_refused(model):
    with pytest.raises(ConfigError, match="got num_beams, max_new_tokens too: leave out"):
        model.answer(["bad"], SHOTS, options=["positive", "negative"], num_beams=2, max_new_tokens=3)


def test_labels_give_the_loss_of_the_query_tokens(model):
    query = model.tokenize("moving and funny")
    output = model(**query, labels=query["input_ids"], demonstrations=SHOTS)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], query["input_ids"][0, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_padding_may_stand_on_the_right_in_a_forward_pass(model):
    query = model.tokenize("bad")
    ids = torch.cat([query["input_ids"], torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([query["attention_mask"], torch.zeros(1, 3, dtype=torch.long)], dim=1)
    padded = model(input_ids=ids, attention_mask=mask, demonstrations=SHOTS).logits[:, :-3]
    torch.testing.assert_close(padded, model(**query, demonstrations=SHOTS).logits, atol=2e-5, rtol=1e-5)


def test_trainable_parameters_are_printed_in_pefts_words(model, capsys):
    model.print_trainable_parameters()
    trainable = sum(tensor.numel() for _, tensor in model.distiller.trained_tensors())
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: ")


def test_attributes_of_the_base_model_are_at_hand(model):
    assert model.config is model.base_model.config
    assert model.can_generate()
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_saving_in_half_precision_halves_the_file_and_still_loads(model, tiny_model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "mend_model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    loaded = MendModel.from_pretrained(tiny_model("llama"), tmp_path / "half", tokenizer)
    assert loaded.distiller.placeholders.dtype == torch.float32
    torch.testing.assert_close(loaded.distiller.placeholders, model.distiller.placeholders, atol=0.02, rtol=0.01)


def test_a_saved_folder_has_a_card_and_leaves_a_persons_own_words(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: mend_hf" in card
    assert "| prefix form | kv |" in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    own = (tmp_path / "README.md").read_text()
    assert own.endswith("\nmine")
    assert "library_name: mend_hf" in own
    assert "prefix form" not in own


def test_auto_mend_model_loads_the_base_model_too(tiny_model, tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_mend_model(base, MendConfig(num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "distiller")
    loaded = AutoMendModel.from_pretrained(tmp_path / "distiller")
    query = loaded.tokenize("bad")
    assert loaded(**query, demonstrations=SHOTS).logits.equal(model(**query, demonstrations=SHOTS).logits)


def test_a_distiller_that_does_not_name_its_base_model_is_refused_by_auto(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "mend_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"MendModel\.from_pretrained"):
        AutoMendModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(model, tiny_model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "mend_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_virtual_tokens": 5}))
    with pytest.raises(CheckpointError, match=r"placeholders: expected shape \(5, n\), got \(3, 32\)"):
        MendModel.from_pretrained(tiny_model("llama"), tmp_path, tokenizer)


def test_text_needs_a_tokenizer(tiny_model):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="pass tokenizer="):
        model.distill(SHOTS)


def test_a_query_beyond_the_position_table_is_refused(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("gpt2"), MendConfig(num_virtual_tokens=3), tokenizer)
    long = torch.full((1, 510), 5)
    with pytest.raises(ShapeError, match="512 positions"):
        model(input_ids=long, demonstrations=SHOTS)


def test_a_query_of_no_tokens_is_refused(model):
    with pytest.raises(DataError, match="at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), demonstrations=SHOTS)


def test_no_queries_are_refused(model):
    with pytest.raises(DataError, match="at least one query, got none"):
        model.answer([], SHOTS)


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (lambda: torch.nn.Linear(2, 2), "Load the base model first"),
    ],
)
def test_models_that_cannot_read_a_prefix_are_refused(build, remedy):
    with pytest.raises(UnsupportedModelError, match=remedy):
        get_mend_model(build(), MendConfig())


@pytest.mark.parametrize("shape", [(3,), (1, 0), (0, 3), (1, 2, 3)])
def test_token_ids_of_another_shape_are_refused(model, shape):
    with pytest.raises(DataError, match="one row a task"):
        model.distill(torch.ones(shape, dtype=torch.long))


def test_refused_demonstrations_leave_those_that_are_bound(model):
    query = model.tokenize("bad")
    model.set_demonstrations(SHOTS)
    expected = model(**query).logits
    for bad in ([], [("a", 1)]):
        with pytest.raises(DataError):
            model.set_demonstrations(bad)
        with pytest.raises(DataError), model.use_demonstrations(bad):
            pass
    assert model(**query).logits.equal(expected)


def test_disable_adapter_is_undone_also_by_an_error(model):
    query = model.tokenize("bad")
    expected = model(**query, demonstrations=SHOTS).logits

    def fail():
        with model.disable_adapter(), model.disable_adapter():
            assert not model(**query, demonstrations=SHOTS).logits.equal(expected)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model(**query, demonstrations=SHOTS).logits.equal(expected)


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_sequences_returned_for_a_batch_of_tasks_belong_to_their_rows(tiny_model, tokenizer, form):
    torch.manual_seed(0)
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, prefix_form=form), tokenizer).eval()
    distilled = model.distill([SHOTS, SHOTS[:1]])
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    together = model.generate(["bad", "good"], demonstrations=distilled, **settings).reshape(2, 3, -1)
    for row, query in enumerate(["bad", "good"]):
        alone = model.generate(query, demonstrations=distilled[row], **settings)
        for beam in range(3):
            got = together[row, beam].tolist()
            expected = alone[beam].tolist()
            assert got[: len(expected)] == expected


def test_sampling_with_one_seed_gives_the_same_tokens_raw_distilled_and_loaded(model, tmp_path):
    distilled = model.distill(SHOTS)
    distilled.save_pretrained(tmp_path)
    results = []
    for demonstrations in (SHOTS, distilled, DistilledDemonstrations.from_pretrained(tmp_path), None):
        torch.manual_seed(11)
        settings = {**GREEDY, "do_sample": True, "num_return_sequences": 4, "max_new_tokens": 8}
        results.append(model.generate("bad", demonstrations=demonstrations, **settings).tolist())
    assert results[0] == results[1] == results[2] != results[3]


def test_gradients_flow_through_the_columns_of_the_collator(model):
    rows = [{"demonstrations": SHOTS, "query": "bad", "target": "negative"}]
    batch = MendCollator(model.tokenizer, model.mend_config, with_teacher=False)(rows)
    loss = model(**batch).loss
    loss.backward()
    assert model.distiller.placeholders.grad.any()
    labels = batch["labels"]
    raw = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, demonstrations=SHOTS
    )
    torch.testing.assert_close(raw.loss, loss)


def test_nothing_is_distilled_while_the_adapter_is_disabled(model, monkeypatch):
    ids = model.tokenize("bad")["input_ids"]
    expected = model(ids).logits
    monkeypatch.setattr(model.distiller, "forward", None)
    with model.disable_adapter():
        assert model(ids, demo_input_ids=ids).logits.equal(expected)


def test_the_language_model_head_reads_contiguous_states_while_wrapped(model):
    head, seen = model.base_model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].is_contiguous()))
    model(**model.tokenize(["good food", "bad"]), demonstrations=SHOTS, logits_to_keep=1)
    assert seen == [True]
    assert not model.unload().get_output_embeddings()._forward_pre_hooks


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    base = build_tiny_model("llama", **{**ids_of(tokenizer), "vocab_size": len(tokenizer) - 1})
    with pytest.raises(ConfigError, match=rf"at most {len(tokenizer) - 1} tokens.* got one of {len(tokenizer)}"):
        get_mend_model(base, MendConfig(num_virtual_tokens=2, lora_r=2), tokenizer)
