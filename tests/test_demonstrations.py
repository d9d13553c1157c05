from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from transformers import BatchEncoding

from mend_hf import Demonstration, MendConfig
from mend_hf.demonstrations import parse_demonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.prompt_encoder import PromptEncoder

SHOTS = [Demonstration("great film", "positive"), Demonstration("a bore", "negative")]


@pytest.fixture
def encoder(tokenizer):
    return lambda **settings: PromptEncoder(tokenizer, MendConfig(**settings))


@pytest.mark.parametrize(
    "given",
    [
        [("great film", "positive"), ("a bore", "negative")],
        [{"input": "great film", "output": "positive"}, {"input": "a bore", "output": "negative", "task": "x"}],
        SHOTS,
    ],
)
def test_every_way_to_write_a_task_means_the_same(given):
    assert parse_demonstrations(given) == ([SHOTS], False)
    assert parse_demonstrations([given, given]) == ([SHOTS, SHOTS], True)


def test_strings_are_plain_text():
    assert parse_demonstrations(["some text"]) == ([[Demonstration("some text")]], False)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ([], "give one or more"),
        ([[("a", "b")], []], "task 1, .* give one or more"),
        ("text", "put the demonstrations into a list"),
        (Path("folder"), r"DistilledDemonstrations\.from_pretrained\(path\)"),
        ([("a", 1)], "demonstration 0: expected an output that is a string, got 1 .*convert it to text"),
        ([("a", "b"), ("a", None)], "demonstration 1: .*give the answer as text"),
        ([{"input": "a"}], "a mapping with input and output"),
        ([[("a", "b")], [("a", 2)]], "task 1, demonstration 0"),
        ([["a", "b"]], "write pairs as tuples"),
        ([("", " ")], "remove it"),
    ],
)
def test_malformed_demonstrations_are_refused_with_their_place(given, remedy):
    with pytest.raises(DataError, match=remedy):
        parse_demonstrations(given)


def test_the_prompt_reads_as_the_config_says(encoder, tokenizer):
    prompt = encoder(input_prefix="Input: ", output_prefix="\nOutput:", demonstration_separator="\n")
    [chunk] = prompt.encode_demonstrations(SHOTS).chunks
    parts = ["Input: great film", "\nOutput:", " positive", "\n", "Input: a bore", "\nOutput:", " negative", "\n"]
    bos = tokenizer("").input_ids[:1]
    assert chunk.input_ids == bos + [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]


def anchored(prompt, chunk):
    return prompt.tokenizer.convert_ids_to_tokens([chunk.input_ids[i] for i in chunk.anchor_positions])


def test_anchors_are_the_answers_the_token_before_and_the_separator(encoder):
    prompt = encoder()
    [chunk] = prompt.encode_demonstrations(SHOTS).chunks
    tokens = prompt.tokenizer.convert_ids_to_tokens(chunk.input_ids)
    answer = (
        tokens.index("positive") if "positive" in tokens else next(i for i, t in enumerate(tokens) if "positive" in t)
    )
    assert chunk.anchor_positions[:3] == [answer - 1, answer, answer + 1]
    assert len(chunk.anchor_positions) == 6


def test_a_long_answer_keeps_both_ends_of_its_anchors(encoder):
    prompt = encoder(max_anchor_tokens_per_demonstration=4)
    [chunk] = prompt.encode_demonstrations([Demonstration("bad", "great film good food very funny")]).chunks
    [full] = (
        encoder(max_anchor_tokens_per_demonstration=50)
        .encode_demonstrations([Demonstration("bad", "great film good food very funny")])
        .chunks
    )
    assert chunk.anchor_positions == full.anchor_positions[:2] + full.anchor_positions[-2:]


def test_anchors_can_be_left_out(encoder):
    [chunk] = encoder(anchor_tokens="none").encode_demonstrations(SHOTS).chunks
    assert chunk.anchor_positions == []


def test_anchors_of_plain_text_end_its_sentences(encoder):
    prompt = encoder()
    [chunk] = prompt.encode_demonstrations([Demonstration("the film was good. the food was bad.")]).chunks
    assert set(anchored(prompt, chunk)) == {"."}
    assert len(chunk.anchor_positions) == 2


def test_a_demonstration_beyond_its_budget_loses_the_end_of_its_input_with_a_warning(encoder):
    long = Demonstration("very " * 40 + "funny", "positive")
    prompt = encoder(max_demonstration_tokens=12)
    with pytest.warns(UserWarning, match="demonstration tokens were cut away"):
        first = prompt.encode_demonstrations([long])
    [chunk] = first.chunks
    bos = len(prompt.tokenizer("").input_ids[:1])
    assert len(chunk.input_ids) - bos == 12
    assert any("positive" in token for token in anchored(prompt, chunk))
    assert first.num_lost_tokens > 30
    assert prompt.encode_demonstrations([long], warn=False) == first


def test_nothing_is_said_when_nothing_is_lost(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder().encode_demonstrations(SHOTS).num_lost_tokens == 0


def test_truncating_leaves_out_the_last_demonstrations(encoder):
    one = encoder().encode_demonstrations(SHOTS[:1])
    window = one.num_tokens + 2
    task = encoder(max_distiller_tokens=window).encode_demonstrations(SHOTS, warn=False)
    assert task.chunks == one.chunks
    assert (task.num_demonstrations, task.num_lost_tokens > 0) == (1, True)


@pytest.mark.parametrize("overflow", ["concat", "recurrent"])
def test_other_policies_open_another_chunk(encoder, overflow):
    apart = [encoder().encode_demonstrations([shot]).chunks[0] for shot in SHOTS]
    window = max(len(chunk.input_ids) for chunk in apart)
    task = encoder(max_distiller_tokens=window, overflow=overflow).encode_demonstrations(SHOTS)
    assert task.chunks == apart
    assert (task.num_demonstrations, task.num_lost_tokens) == (2, 0)


def test_queries_are_padded_on_the_left(encoder):
    prompt = encoder()
    batch = prompt.encode_queries(["bad", "the film was good"])
    short, long = prompt.encode_query("bad"), prompt.encode_query("the film was good")
    padding = [prompt.pad_token_id] * (len(long) - len(short))
    assert batch["input_ids"].tolist() == [padding + short, long]
    assert batch["attention_mask"].tolist() == [[0] * len(padding) + [1] * len(short), [1] * len(long)]


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="pass tokenizer="):
        PromptEncoder(None, MendConfig())


class NumberTokenizer:
    """Reads numbers: "3 4" has the ids 3 and 4. Begins texts with 1, where asked to."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id
        self.pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return BatchEncoding({"input_ids": bos + [int(word) for word in text.split()]})

    def decode(self, ids):
        return "." if ids == [9] else "word"


NUMBERS = {"input_prefix": "", "output_prefix": "7", "answer_prefix": "", "demonstration_separator": "8"}


@pytest.mark.parametrize(
    ("bos", "settings", "demonstrations", "ids", "anchors"),
    [
        (None, {}, [("20 21", "30")], [20, 21, 7, 30, 8], [2, 3, 4]),
        (1, {}, [("20 21", "30")], [1, 20, 21, 7, 30, 8], [3, 4, 5]),
        (1, {}, [("20", "30"), ("21", "31 32")], [1, 20, 7, 30, 8, 21, 7, 31, 32, 8], [2, 3, 4, 6, 7, 8, 9]),
        (None, {"demonstration_separator": ""}, [("20", "30"), ("21", "31")], [20, 7, 30, 21, 7, 31], [1, 2, 4, 5]),
        (None, {"max_anchor_tokens_per_demonstration": 1}, [("20", "30")], [20, 7, 30, 8], [1]),
        (None, {"max_anchor_tokens_per_demonstration": 3}, [("20", "30 31 32")], [20, 7, 30, 31, 32, 8], [1, 2, 5]),
        (None, {"anchor_tokens": "none"}, [("20", "30")], [20, 7, 30, 8], []),
        (
            None,
            {"max_demonstration_tokens": 8},
            [("20 21 22 23 24 25 26", "30")],
            [20, 21, 22, 23, 24, 7, 30, 8],
            [5, 6, 7],
        ),
        (1, {}, [("20 9 21 9", None)], [1, 20, 9, 21, 9], [2, 4]),
    ],
)
def test_ids_and_anchors_on_literal_numbers(bos, settings, demonstrations, ids, anchors):
    prompt = PromptEncoder(NumberTokenizer(bos), MendConfig(**NUMBERS | settings))
    [chunk] = prompt.encode_demonstrations([Demonstration(*item) for item in demonstrations], warn=False).chunks
    assert (chunk.input_ids, chunk.anchor_positions) == (ids, anchors)


def test_the_warning_counts_the_tokens_lost_and_the_result_is_the_same_every_time():
    prompt = PromptEncoder(NumberTokenizer(), MendConfig(**NUMBERS, max_demonstration_tokens=8))
    long = [Demonstration(" ".join(map(str, range(20, 40))), "30"), Demonstration("20", "30")]
    with pytest.warns(UserWarning, match=r"^15 of 27 demonstration tokens were cut away"):
        first = prompt.encode_demonstrations(long)
    assert (first.num_lost_tokens, first.num_tokens, first.num_demonstrations) == (15, 12, 2)
    assert prompt.encode_demonstrations(long, warn=False) == first


@pytest.mark.parametrize("overflow", ["truncate", "concat", "recurrent"])
@pytest.mark.parametrize("window", [8, 11, 60])
def test_no_chunk_is_longer_than_the_window_and_no_token_is_lost_uncounted(overflow, window):
    config = MendConfig(**NUMBERS, overflow=overflow, max_distiller_tokens=window, max_demonstration_tokens=10)
    prompt = PromptEncoder(NumberTokenizer(1), config)
    demonstrations = [Demonstration(" ".join(["20"] * length), "30 31") for length in (1, 20, 3, 5, 2)]
    task = prompt.encode_demonstrations(demonstrations, warn=False)
    assert max(len(chunk.input_ids) for chunk in task.chunks) <= window
    num_given = sum(len(item.input.split()) + 4 for item in demonstrations)
    assert task.num_tokens + task.num_lost_tokens - len(task.chunks) == num_given
    assert (len(task.chunks) == 1) == (overflow == "truncate" or window == 60)
