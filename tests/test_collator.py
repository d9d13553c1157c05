from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import BatchEncoding

from mend_hf import MendCollator, MendConfig
from mend_hf.errors import DataError
from mend_hf.prompt_encoder import PromptEncoder

SHOTS = [{"input": "great film", "output": "positive"}, {"input": "a bore", "output": "negative"}]
ROW = {"demonstrations": SHOTS, "query": "bad", "target": "negative"}


@pytest.fixture
def collator(tokenizer):
    return lambda config=None, **kwargs: MendCollator(tokenizer, config or MendConfig(), **kwargs)


@pytest.fixture
def prompt(tokenizer):
    return PromptEncoder(tokenizer, MendConfig())


def test_a_row_becomes_query_target_and_separator_with_labels_on_the_target(collator, prompt):
    batch = collator()([ROW])
    query, answer, separator = prompt.encode_query("bad"), prompt.encode_answer("negative"), prompt.separator_ids
    assert batch["input_ids"].tolist() == [query + answer + separator]
    assert batch["labels"].tolist() == [[-100] * len(query) + answer + [-100] * len(separator)]
    assert batch["query_task_rows"].tolist() == [0]


def test_rows_of_different_lengths_are_padded_on_the_left(collator):
    batch = collator()([ROW, {**ROW, "demonstrations": SHOTS[:1], "query": "the film was very very good"}])
    for name in ("attention_mask", "demo_attention_mask", "teacher_attention_mask"):
        mask = batch[name]
        assert (mask.diff(dim=1) >= 0).all()
        assert mask[:, -1].all()
        assert mask.sum(1)[0] != mask.sum(1)[1]
    assert batch["input_ids"][0, 0] == collator().tokenizer.pad_token_id
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert not batch["demo_anchor_mask"][batch["demo_attention_mask"] == 0].any()


def test_teacher_and_distiller_read_the_same_tokens(collator):
    tight = collator(MendConfig(max_distiller_tokens=20))
    for collate in (collator(), tight):
        batch = collate([{**ROW, "demonstrations": SHOTS * 3}])
        assert batch["teacher_input_ids"].equal(batch["demo_input_ids"])
    assert batch["demo_input_ids"].shape[1] <= 20


def test_the_teacher_reads_all_chunks_as_one_text(collator):
    batch = collator(MendConfig(max_distiller_tokens=20, overflow="concat"))([{**ROW, "demonstrations": SHOTS * 3}])
    assert batch["demo_task_rows"].tolist() == [0] * len(batch["demo_task_rows"])
    assert len(batch["demo_task_rows"]) > 1
    assert batch["teacher_input_ids"].shape == (
        1,
        collator()([{**ROW, "demonstrations": SHOTS * 3}])["demo_input_ids"].shape[1],
    )


def test_a_shorter_teacher_window_shortens_what_the_distiller_reads(collator):
    batch = collator(max_teacher_tokens=20)([{**ROW, "demonstrations": SHOTS * 3}])
    assert batch["teacher_input_ids"].equal(batch["demo_input_ids"])
    assert batch["teacher_input_ids"].shape[1] <= 20


def test_plain_text_stands_as_it_is_and_its_first_token_has_no_label(collator, prompt):
    batch = collator()([{"demonstrations": ["the film was good."], "query": "", "target": " the food was bad"}])
    ids = prompt.encode_text(" the food was bad")
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [[-100, *ids[1:]]]


def test_several_queries_share_one_distilling(collator):
    together = collator()([{**ROW, "query": ["bad", "very funny"], "target": ["negative", "positive"]}, ROW])
    assert together["query_task_rows"].tolist() == [0, 0, 1]
    assert together["demo_input_ids"].shape[0] == 2
    apart = collator()([ROW, {**ROW, "query": "very funny", "target": "positive"}, ROW])
    for name in ("input_ids", "labels", "attention_mask"):
        assert together[name].equal(apart[name])


def test_a_long_target_loses_its_end(collator, prompt):
    batch = collator(max_target_tokens=2)([{**ROW, "target": "great film good food"}])
    assert (batch["labels"] != -100).sum() == 2
    assert batch["labels"][batch["labels"] != -100].tolist() == prompt.encode_answer("great film good food")[:2]


def test_without_a_teacher_its_columns_are_left_out(collator):
    assert not any(name.startswith("teacher") for name in collator(with_teacher=False)([ROW]))


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"demonstrations": SHOTS, "query": "bad"}, "no target: rename the columns"),
        ({**ROW, "target": 3}, "Row 0: expected query and target as strings"),
        ({**ROW, "query": ["a", "b"]}, "lists of as many strings"),
        ({**ROW, "demonstrations": []}, "give one or more"),
    ],
)
def test_malformed_rows_are_refused(collator, row, remedy):
    with pytest.raises(DataError, match=remedy):
        collator()([row])


def test_all_columns_are_tensors(collator):
    assert all(isinstance(column, torch.Tensor) for column in collator()([ROW]).values())


def test_a_batch_on_literal_numbers():
    class NumberTokenizer:
        bos_token_id, pad_token_id = 1, 0

        def __call__(self, text, add_special_tokens=True):
            return BatchEncoding({"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]})

    config = MendConfig(input_prefix="", output_prefix="7", answer_prefix="", demonstration_separator="8")
    rows = [
        {"demonstrations": [("20 21", "30")], "query": ["22", "23 24"], "target": ["31", "30 32"]},
        {"demonstrations": [{"input": "25", "output": "31"}] * 2, "query": "26", "target": "30"},
    ]
    batch = MendCollator(NumberTokenizer(), config)(rows)
    ignored = -100
    assert {name: column.int().tolist() for name, column in batch.items()} == {
        "demo_input_ids": [[0, 0, 0, 1, 20, 21, 7, 30, 8], [1, 25, 7, 31, 8, 25, 7, 31, 8]],
        "demo_attention_mask": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
        "demo_anchor_mask": [[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1, 1, 1]],
        "demo_task_rows": [0, 1],
        "query_task_rows": [0, 0, 1],
        "teacher_input_ids": [[0, 0, 0, 1, 20, 21, 7, 30, 8], [1, 25, 7, 31, 8, 25, 7, 31, 8]],
        "teacher_attention_mask": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
        "input_ids": [[0, 0, 22, 7, 31, 8], [23, 24, 7, 30, 32, 8], [0, 0, 26, 7, 30, 8]],
        "attention_mask": [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]],
        "labels": [
            [ignored, ignored, ignored, ignored, 31, ignored],
            [ignored, ignored, ignored, 30, 32, ignored],
            [ignored, ignored, ignored, ignored, 30, ignored],
        ],
    }


def test_a_row_that_holds_a_batch_of_tasks_is_refused(collator):
    with pytest.raises(DataError, match=r"Row 1: .*make every task a row of its own"):
        collator()([ROW, {**ROW, "demonstrations": [[("a", "b")], [("c", "d")]]}])


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ' was ' + m.content + ' !\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant was ' }}{% endif %}"
)
FORMATS = [
    "plain",
    "chat",
    {"input_prefix": "good ", "output_prefix": " was", "answer_prefix": " very ", "demonstration_separator": " !"},
]


class TestPromptFormatsOfRows:
    @pytest.fixture
    def chat_tokenizer(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT
        return tokenizer

    @pytest.fixture
    def own(self):
        """The config's own format, which none of the rows asks for."""
        return MendConfig(input_prefix="film ", demonstration_separator=" and ")

    @pytest.mark.parametrize("choice", FORMATS)
    @pytest.mark.parametrize("overflow", ["truncate", "concat"])
    def test_a_row_of_a_format_is_that_of_a_config_with_the_format(self, chat_tokenizer, own, choice, overflow):
        texts = choice if isinstance(choice, dict) else {"prompt_format": choice}
        limits = {"max_distiller_tokens": 24, "max_demonstration_tokens": 20, "overflow": overflow}
        row = {**ROW, "demonstrations": SHOTS * 3, "query": ["bad", "good"], "target": ["negative", "positive"]}
        expected = MendCollator(chat_tokenizer, MendConfig(**texts, **limits))([row])
        collate = MendCollator(chat_tokenizer, dataclasses.replace(own, **limits))
        batch = collate([{**row, "prompt_format": choice}])
        assert batch.keys() == expected.keys()
        assert [name for name in batch if not batch[name].equal(expected[name])] == []
        assert not batch["input_ids"].equal(collate([row])["input_ids"])

    def test_rows_of_several_formats_stand_in_one_batch(self, chat_tokenizer, own):
        collate = MendCollator(chat_tokenizer, own)
        rows = [ROW, *({**ROW, "prompt_format": choice} for choice in FORMATS)]
        batch = collate(rows)
        for name, mask in (
            ("input_ids", "attention_mask"),
            ("demo_input_ids", "demo_attention_mask"),
            ("teacher_input_ids", "teacher_attention_mask"),
        ):
            together = [ids[kept.bool()].tolist() for ids, kept in zip(batch[name], batch[mask], strict=True)]
            assert together == [collate([row])[name][0].tolist() for row in rows]
            assert len({*map(tuple, together)}) == len(rows)

    def test_a_separate_distiller_reads_the_rows_format_too(self, chat_tokenizer, own):
        batch = MendCollator(chat_tokenizer, own, chat_tokenizer)([{**ROW, "prompt_format": "chat"}])
        assert batch["demo_input_ids"].equal(batch["teacher_input_ids"])

    @pytest.mark.parametrize(
        ("choice", "remedy"),
        [
            ("chatty", "Row 1: .*'chatty'"),
            ({"prefix": "a"}, r"Row 1: .*\(input_prefix, .*got 'prefix'"),
            ({"input_prefix": 3}, "Row 1: .*input_prefix: expected str, got 3"),
            ("chat", "Row 1: .*set tokenizer.chat_template"),
        ],
    )
    def test_formats_that_cannot_be_written_are_refused(self, collator, choice, remedy):
        with pytest.raises(DataError, match=f"(?s){remedy}"):
            collator()([ROW, {**ROW, "prompt_format": choice}])
