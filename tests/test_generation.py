"""Generation behind a prefix: every way of decoding gives the tokens of the base model that reads the whole text."""

from __future__ import annotations

import copy

import pytest
import torch
from packaging.version import Version
from tiny_models import wrap_tiny_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.utils import is_optimum_quanto_available

from mend_hf import Demonstration, MendConfig, get_mend_model, guards
from mend_hf.architectures import CACHE_NAME, CACHE_NAMES
from mend_hf.errors import ConfigError, DataError, MissingExtraError, ShapeError
from mend_hf.guards import check_release

SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERIES = ["moving and funny", "bad", "the film was good and the food was bad"]
SLIDING = ["gemma3_text", "mistral"]
FORMS = ["kv", "embeds"]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
pytestmark = pytest.mark.filterwarnings("ignore:A query of")


def wrap(base, tokenizer, form="kv", **settings):
    return wrap_tiny_model(base, tokenizer, num_virtual_tokens=4, prefix_form=form, **settings)


def text_ids(model, shots=SHOTS):
    [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in shots]).chunks
    return torch.tensor([chunk.input_ids])


@pytest.fixture(params=["gpt2", "llama", *SLIDING])
def model(request, tiny_model, tokenizer):
    return wrap(tiny_model(request.param), tokenizer)


@pytest.fixture(params=SLIDING)
def windowed(request, tiny_model, tokenizer):
    return wrap(tiny_model(request.param), tokenizer)


@pytest.fixture
def llama(tiny_model, tokenizer):
    return wrap(tiny_model("llama"), tokenizer)


def plain_tokens(model, ids, shots=SHOTS, **settings):
    """The new tokens of the base model that reads demonstrations and query as one text."""
    full = torch.cat([text_ids(model, shots).expand(len(ids), -1), ids], dim=1)
    tokens = model.base_model.generate(full, attention_mask=torch.ones_like(full), **GREEDY | settings)
    return tokens[:, full.shape[1] :].tolist()


def prefixed_tokens(model, ids, shots=SHOTS, **settings):
    tokens = model.generate(ids, demonstrations=model.read(shots), **GREEDY | settings)
    assert tokens[:, : ids.shape[1]].tolist() == ids.repeat_interleave(len(tokens) // len(ids), 0).tolist()
    return tokens[:, ids.shape[1] :].tolist()


class TestUnderASlidingWindow:
    TASKS = (SHOTS, SHOTS[:1], SHOTS[1:])

    def test_padded_rows_behind_the_same_text_equal_one_text_each(self, windowed):
        batch = windowed.tokenize(QUERIES)
        logits = windowed(**batch, demonstrations=windowed.read(SHOTS)).logits
        tokens = windowed.generate(**batch, demonstrations=windowed.read(SHOTS), **GREEDY | {"max_new_tokens": 24})
        for row, query in enumerate(QUERIES):
            ids = windowed.tokenize(query)["input_ids"]
            full = torch.cat([text_ids(windowed), ids], dim=1)
            alone = windowed.base_model(full).logits[0, -ids.shape[1] :]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, **CLOSE)
            assert tokens[row, -24:].tolist() == plain_tokens(windowed, ids, max_new_tokens=24)[0]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_rows_of_different_tasks_and_paddings_equal_each_alone_past_the_window(self, windowed, beams):
        batch, distilled = windowed.tokenize(QUERIES), windowed.distill(list(self.TASKS))
        settings = GREEDY | {"max_new_tokens": 20, "num_beams": beams}
        together = windowed.generate(**batch, demonstrations=distilled, **settings)
        for row, (query, task) in enumerate(zip(QUERIES, self.TASKS, strict=True)):
            alone = windowed.generate(query, demonstrations=task, **settings)
            assert together[row, -20:].tolist() == alone[0, -20:].tolist()

    def test_padding_on_the_right_and_hidden_states_too(self, windowed):
        left = windowed.tokenize(QUERIES)
        distilled = windowed.distill(list(self.TASKS))
        before = windowed(**left, demonstrations=distilled, output_hidden_states=True)
        right = {name: torch.zeros_like(value) for name, value in left.items()}
        lengths = left["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            for name in right:
                right[name][row, :length] = left[name][row, -length:]
        after = windowed(**right, demonstrations=distilled, output_hidden_states=True)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(after.logits[row, :length], before.logits[row, -length:], **CLOSE)
            states = [output.hidden_states[1][row] for output in (after, before)]
            torch.testing.assert_close(states[0][:length], states[1][-length:], **CLOSE)

    def test_kept_logits_and_the_loss_are_those_of_the_rows_alone(self, windowed):
        batch, distilled = windowed.tokenize(QUERIES), windowed.distill(list(self.TASKS))
        whole = windowed(**batch, demonstrations=distilled).logits
        last = windowed(**batch, demonstrations=distilled, logits_to_keep=1).logits
        assert last.equal(whole[:, -1:])
        labels = batch["input_ids"].clone()
        labels[:, :-1] = -100  # of every row the last token counts
        losses = [
            windowed(**own, demonstrations=task, labels=labels[row : row + 1, -own["input_ids"].shape[1] :]).loss
            for row, (task, query) in enumerate(zip(self.TASKS, QUERIES, strict=True))
            if (own := windowed.tokenize(query))["input_ids"].shape[1] > 1
        ]
        together = windowed(**batch, demonstrations=distilled, labels=labels).loss
        assert len(losses) == len(QUERIES)
        torch.testing.assert_close(together, torch.stack(losses).mean(), **CLOSE)

    def test_a_hand_written_loop_goes_on_from_padded_rows(self, windowed):
        batch, distilled = windowed.tokenize(QUERIES), windowed.distill(list(self.TASKS))
        expected = windowed.generate(**batch, demonstrations=distilled, **GREEDY)[:, -8:]
        assert loop_tokens(windowed, batch, distilled, 8).equal(expected)

    def test_chunks_read_in_turn_by_rows_of_different_length_equal_each_alone(self, tiny_model, tokenizer):
        model = wrap(tiny_model("mistral"), tokenizer, overflow="recurrent", max_distiller_tokens=24)
        tasks = [SHOTS * 3, SHOTS[:1] + SHOTS]
        together = model.distill(tasks)
        batch = model.tokenize(QUERIES[:1])
        for row, task in enumerate(tasks):
            expected = model(**batch, demonstrations=model.distill(task)).logits
            torch.testing.assert_close(model(**batch, demonstrations=together[row]).logits, expected, **CLOSE)

    def test_a_query_that_leaves_the_demonstrations_behind_is_warned_of(self, tiny_model, tokenizer):
        model = wrap(tiny_model("mistral"), tokenizer)
        with pytest.warns(UserWarning, match="no longer sees the demonstrations"):
            model.generate("bad", demonstrations=SHOTS, **GREEDY | {"max_new_tokens": 30})


def loop_tokens(model, batch, distilled, num_steps):
    """Greedy tokens of a decoding loop written by hand."""
    mask, output = batch["attention_mask"], model(**batch, demonstrations=distilled, use_cache=True)
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(num_steps - 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(tokens[-1], mask, demonstrations=distilled, past_key_values=output.past_key_values)
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


class NeverToken(LogitsProcessor):
    """Forbids every token that stands in the ids that it is shown, and remembers the ids."""

    def __init__(self):
        self.first = None

    def __call__(self, input_ids, scores):
        if self.first is None:
            self.first = input_ids.clone()
        return scores.scatter(1, input_ids, float("-inf"))


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def skip_if_refused(settings: dict) -> None:
    """Leave out what the installed transformers gets wrong, and the model refuses."""
    try:
        check_release(settings)
    except ConfigError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"])
def test_what_an_older_transformers_gets_wrong_is_refused(model, monkeypatch, name):
    ids = model.tokenize(QUERIES[0])["input_ids"]
    monkeypatch.setattr(guards, "INSTALLED", Version("5.17.0"))
    with pytest.raises(ConfigError, match="upgrade it"):
        model.generate(ids, demonstrations=SHOTS, **{name: 2})
    monkeypatch.setattr(guards, "INSTALLED", Version("5.21.0"))
    check_release({name: 2})


class TestEveryWayOfDecodingEqualsTheText:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"min_new_tokens": 5},
            {"no_repeat_ngram_size": 0, "prefill_chunk_size": 2},
            {"prompt_lookup_num_tokens": 2},
            {"cache_implementation": "dynamic"},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "num_beams": 2},
        ],
        ids=str,
    )
    def test_the_same_tokens(self, model, settings):
        skip_if_refused(settings)
        ids = model.tokenize(QUERIES[0])["input_ids"]
        assert prefixed_tokens(model, ids, **settings) == plain_tokens(model, ids, **settings)

    def test_sampling_with_the_same_seed(self, model):
        ids, tokens = model.tokenize(QUERIES[0])["input_ids"], []
        for ask in (plain_tokens, prefixed_tokens):
            torch.manual_seed(3)
            tokens.append(ask(model, ids, do_sample=True, num_return_sequences=3))
        assert tokens[0] == tokens[1]

    @pytest.mark.parametrize("as_argument", [True, False])
    def test_lengths_count_the_users_tokens(self, llama, as_argument):
        ids = llama.tokenize(QUERIES[0])["input_ids"]
        lengths = {"max_length": ids.shape[1] + 5, "min_length": ids.shape[1] + 2}
        settings = lengths if as_argument else {"generation_config": GenerationConfig(**lengths)}
        tokens = llama.generate(ids, demonstrations=SHOTS, do_sample=False, pad_token_id=0, **settings)
        assert ids.shape[1] + 2 <= tokens.shape[1] <= ids.shape[1] + 5

    def test_processors_and_criteria_see_the_users_tokens_only(self, llama):
        ids, processor = llama.tokenize(QUERIES[0])["input_ids"], NeverToken()
        criteria = [StopAfter(ids.shape[1] + 3)]
        tokens = llama.generate(
            ids, demonstrations=SHOTS, logits_processor=[processor], stopping_criteria=criteria, **GREEDY
        )
        assert processor.first.equal(ids)
        assert tokens.shape[1] == ids.shape[1] + 3

    def test_streamers_get_the_new_text(self, llama, tokenizer, capsys):
        ids = llama.tokenize(QUERIES[0])["input_ids"]
        text = tokenizer.decode(prefixed_tokens(llama, ids)[0])
        prefixed_tokens(llama, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out.split() == text.split()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        prefixed_tokens(llama, ids, streamer=streamer)
        assert "".join(streamer).split() == text.split()

    def test_scores_and_logits_are_returned(self, model):
        ids, steps = model.tokenize(QUERIES[0])["input_ids"], 4
        full = torch.cat([text_ids(model), ids], dim=1)
        settings = GREEDY | {"max_new_tokens": steps, "output_logits": True, "return_dict_in_generate": True}
        plain = model.base_model.generate(full, attention_mask=torch.ones_like(full), **settings)
        prefixed = model.generate(ids, demonstrations=model.read(SHOTS), **settings)
        torch.testing.assert_close(torch.stack(prefixed.logits), torch.stack(plain.logits), **CLOSE)

    @pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"max_new_tokens": None, "max_length": 12}])
    def test_the_users_embeddings_in_place_of_ids(self, model, settings):
        ids = model.tokenize(QUERIES[0])["input_ids"]
        embeddings = model.base_model.get_input_embeddings()(ids)
        tokens = model.generate(inputs_embeds=embeddings, demonstrations=SHOTS, **GREEDY | settings)
        expected = model.generate(ids, demonstrations=SHOTS, **GREEDY | settings)
        assert tokens.tolist() == expected[:, ids.shape[1] :].tolist()

    def test_an_empty_static_cache_of_the_users(self, model):
        ids = model.tokenize(QUERIES[0])["input_ids"]
        cache = StaticCache(config=model.base_model.config, max_cache_len=96)
        assert prefixed_tokens(model, ids, past_key_values=cache) == plain_tokens(model, ids)

    def test_a_compiled_forward_pass(self, llama):
        batch, distilled = llama.tokenize(QUERIES), llama.distill(SHOTS)
        compiled = torch.compile(llama.forward, backend="aot_eager")
        with torch.no_grad():
            expected = llama(**batch, demonstrations=distilled).logits
            torch.testing.assert_close(compiled(**batch, demonstrations=distilled).logits, expected, **CLOSE)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_an_assistant_gives_the_greedy_tokens(self, tiny_model, tokenizer, name):
        model, assistant = wrap(tiny_model(name), tokenizer), tiny_model(name)
        skip_if_refused({"assistant_model": assistant})
        ids = model.tokenize(QUERIES[0])["input_ids"]
        assert prefixed_tokens(model, ids, assistant_model=assistant) == plain_tokens(model, ids)


class TestGoingOnFromACache:
    @pytest.mark.parametrize("beams", [1, 2])
    def test_a_second_turn_equals_one_text(self, model, beams):
        distilled, ids = model.read(SHOTS), model.tokenize(QUERIES[0])["input_ids"]
        first = model.generate(ids, demonstrations=distilled, return_dict_in_generate=True, **GREEDY)
        history = torch.cat([first.sequences, model.tokenize(QUERIES[1])["input_ids"]], dim=1)
        settings = GREEDY | {"num_beams": beams}
        second = model.generate(history, demonstrations=distilled, past_key_values=first.past_key_values, **settings)
        assert second[:, : history.shape[1]].equal(history)
        assert second[:, history.shape[1] :].tolist() == plain_tokens(model, history, num_beams=beams)

    def test_a_second_turn_of_a_bound_model_after_a_forward_pass(self, model):
        ids = model.tokenize(QUERIES[0])["input_ids"]
        with model.use_demonstrations(model.read(SHOTS)):
            read = model(ids, use_cache=True).past_key_values
            history = torch.cat([ids, model.tokenize(QUERIES[1])["input_ids"]], dim=1)
            tokens = model.generate(history, past_key_values=read, max_length=history.shape[1] + 4, do_sample=False)
        expected = plain_tokens(model, history, max_new_tokens=4)[0]
        assert tokens[0, history.shape[1] :].tolist() == expected[: tokens.shape[1] - history.shape[1]]

    @pytest.mark.parametrize("form", FORMS)
    def test_a_hand_written_loop_gives_the_greedy_tokens(self, tiny_model, tokenizer, form):
        model = wrap(tiny_model("llama"), tokenizer, form)
        batch, distilled = model.tokenize(QUERIES), model.distill([SHOTS, SHOTS[:1], SHOTS[1:]])
        expected = model.generate(**batch, demonstrations=distilled, **GREEDY)[:, -8:]
        assert loop_tokens(model, batch, distilled, 8).equal(expected)

    def test_a_cache_is_taken_by_either_name_that_transformers_has_for_it(self, llama):
        ids, new = llama.tokenize("bad")["input_ids"], llama.tokenize("dull")["input_ids"]
        mask = torch.ones(1, ids.shape[1] + new.shape[1], dtype=torch.long)
        expected = llama(torch.cat([ids, new], dim=1), demonstrations=SHOTS).logits[:, ids.shape[1] :]
        for name in CACHE_NAMES:
            cache = llama(ids, demonstrations=SHOTS, use_cache=True)[CACHE_NAME]
            got = llama(new, mask, demonstrations=SHOTS, **{name: cache}).logits
            torch.testing.assert_close(got, expected, **CLOSE)
        with pytest.raises(ConfigError, match="the same argument"):
            llama(new, mask, demonstrations=SHOTS, **dict.fromkeys(CACHE_NAMES, cache))

    def test_the_bare_model_takes_it_by_either_name_too(self, llama):
        ids = llama.tokenize("moving and funny")["input_ids"]
        expected = llama.base_model(ids).logits[:, -1:]
        for name in CACHE_NAMES:
            cache = llama.base_model(ids[:, :-1], use_cache=True)[CACHE_NAME]
            torch.testing.assert_close(llama(ids[:, -1:], **{name: cache}).logits, expected, **CLOSE)

    def test_a_cache_without_the_prefix_is_refused(self, llama):
        ids = llama.tokenize("bad")["input_ids"][:, :2]
        cache = llama.base_model(ids, use_cache=True).past_key_values
        for ask in (llama.generate, llama):
            with pytest.raises(ShapeError, match="what a call with these demonstrations returned"):
                ask(ids, demonstrations=SHOTS, past_key_values=copy.deepcopy(cache))

    def test_a_history_without_new_tokens_is_refused(self, llama):
        ids = llama.tokenize("bad")["input_ids"]
        cache = llama(ids, demonstrations=SHOTS, use_cache=True).past_key_values
        with pytest.raises(ShapeError, match="the whole history and the new tokens"):
            llama.generate(ids, demonstrations=SHOTS, past_key_values=cache)

    def test_rows_that_go_on_with_padding_under_a_window_are_refused(self, windowed):
        ids = windowed.tokenize(["bad", "bad"])["input_ids"]
        distilled = windowed.distill(SHOTS)
        cache = windowed(ids, demonstrations=distilled, use_cache=True).past_key_values
        history = torch.cat([ids, ids[:, :3]], dim=1)
        mask = torch.ones_like(history)
        mask[0, ids.shape[1]] = 0
        with pytest.raises(ShapeError, match="one by one"):
            windowed.generate(history, mask, demonstrations=distilled, past_key_values=cache)

    @pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "prefill_chunk_size"])
    def test_what_cannot_go_on_from_embeddings_is_refused(self, llama, name):
        skip_if_refused({name: 2})
        embeddings = llama.base_model.get_input_embeddings()(llama.tokenize("bad")["input_ids"])
        with pytest.raises(ConfigError, match=f"{name}.* leave it out"):
            llama.generate(inputs_embeds=embeddings, demonstrations=SHOTS, **{name: 2})


class TestGuards:
    def test_a_mask_of_another_length_is_refused(self, llama):
        ids = llama.tokenize("bad")["input_ids"]
        mask = torch.ones(1, ids.shape[1] + 5, dtype=torch.long)
        for ask in (llama, llama.generate):
            with pytest.raises(ShapeError, match="pass the tokenizer's mask as it is"):
                ask(ids, mask, demonstrations=SHOTS)

    def test_an_empty_row_is_refused(self, llama):
        batch = llama.tokenize(["bad", "bad"])
        batch["attention_mask"][1] = 0
        for ask in (llama, llama.generate):
            with pytest.raises(ShapeError, match=r"row 1|pad on the left"):
                ask(**batch, demonstrations=SHOTS)

    def test_padding_behind_a_query_is_refused_in_generate(self, llama):
        batch = llama.tokenize("bad")
        batch["attention_mask"][0, -1] = 0
        with pytest.raises(ShapeError, match="pad on the left"):
            llama.generate(**batch, demonstrations=SHOTS)

    def test_a_query_of_no_tokens_is_refused(self, llama):
        with pytest.raises(DataError, match="at least one token"):
            llama.generate(torch.zeros(1, 0, dtype=torch.long), demonstrations=SHOTS)

    def test_positions_of_the_users_are_refused(self, llama):
        ids = llama.tokenize("bad")["input_ids"]
        for ask in (llama, llama.generate):
            with pytest.raises(ConfigError, match="mark padding in attention_mask"):
                ask(ids, demonstrations=SHOTS, position_ids=torch.arange(ids.shape[1])[None])

    def test_new_tokens_beyond_the_position_table_are_refused(self, tiny_model, tokenizer):
        model = wrap(tiny_model("gpt2"), tokenizer)
        with pytest.raises(ShapeError, match="fewer new tokens"):
            model.generate("bad", demonstrations=SHOTS, max_new_tokens=510)

    def test_a_prefix_in_half_precision_is_converted(self, llama):
        distilled = llama.distill(SHOTS)
        half = copy.copy(distilled)
        half.prefix = type(distilled.prefix)(
            tuple(key.bfloat16() for key in distilled.prefix.keys),
            tuple(value.bfloat16() for value in distilled.prefix.values),
            distilled.prefix.mask,
            distilled.prefix.next_positions,
        )
        logits = llama(**llama.tokenize("bad"), demonstrations=half).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(
            logits, llama(**llama.tokenize("bad"), demonstrations=distilled).logits, atol=1, rtol=1
        )

    @pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
    def test_an_offloaded_cache_without_a_cuda_device_is_refused(self, llama, kind):
        with pytest.raises(ConfigError, match="in main memory already"):
            llama.generate("bad", demonstrations=SHOTS, cache_implementation=kind)

    def test_an_unknown_kind_of_cache_is_refused(self, llama):
        with pytest.raises(ConfigError, match="choose one of these"):
            llama.generate("bad", demonstrations=SHOTS, cache_implementation="paged")

    def test_a_quantised_cache_without_its_package_says_what_to_install(self, llama):
        if is_optimum_quanto_available():
            pytest.skip("optimum-quanto is installed")
        with pytest.raises(MissingExtraError, match="pip install optimum-quanto"):
            llama.generate("bad", demonstrations=SHOTS, cache_implementation="quantized")

    def test_another_cache_for_padded_rows_under_a_window_is_refused(self, windowed):
        for settings in ({"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
            with pytest.raises(ConfigError, match="one by one"):
                windowed.generate(**windowed.tokenize(QUERIES), demonstrations=SHOTS, **settings)


def test_a_quantised_cache_reads_as_one_that_the_text_was_read_into(tokenizer):
    pytest.importorskip("optimum.quanto")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = get_mend_model(base, MendConfig(num_virtual_tokens=2), tokenizer)
    ids, text = model.tokenize("bad")["input_ids"], model.read(SHOTS)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    cached = model.generate(ids, demonstrations=text, cache_implementation="quantized", **settings)
    assert isinstance(cached.past_key_values, QuantizedCache)
    cache = QuantizedCache("quanto", base.config)
    [chunk] = model.prompt.encode_demonstrations([Demonstration(*shot) for shot in SHOTS]).chunks
    base(torch.tensor([chunk.input_ids]), past_key_values=cache)
    full = torch.cat([torch.tensor([chunk.input_ids]), ids], dim=1)
    plain = base.generate(full, attention_mask=torch.ones_like(full), past_key_values=cache, **settings)
    assert cached.sequences[0, ids.shape[1] :].tolist() == plain.sequences[0, full.shape[1] :].tolist()
