"""Plain text: documents load by split, and every row is a window of one that the seed fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as TrimOffsets
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mend_hf.data.text import TextDataset, load_texts
from mend_hf.errors import ConfigError, DataError

WORDS = [first + second for first in "abcdefghij" for second in "klmnopqrst"]
DOCUMENT = " ".join(WORDS) + "\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer like GPT-2's: a word with the blank before it is one token, whose offsets omit the blank."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = TrimOffsets(trim_offsets=True)
    trainer = BpeTrainer(vocab_size=2000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([DOCUMENT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def list_rows(dataset: TextDataset) -> list[dict[str, Any]]:
    return [dataset[index] for index in range(len(dataset))]


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_documents_load_from_files_and_folders_by_split(tmp_path: Path) -> None:
    for name in ("part-00.jsonl", "part-01.jsonl", "heldout.jsonl", "books.validation.jsonl", "test-00-of-01.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "test-drive.txt").write_text("a story\nof two lines")
    assert load_texts(tmp_path) == ["part-00.jsonl", "part-01.jsonl", "a story\nof two lines"]
    assert load_texts(tmp_path, split="heldout") == ["heldout.jsonl"]
    assert load_texts(tmp_path, split="validation") == ["books.validation.jsonl"]
    assert load_texts(tmp_path, split="test") == ["test-00-of-01.jsonl"]
    assert load_texts(tmp_path / "heldout.jsonl") == ["heldout.jsonl"]
    with pytest.raises(DataError, match=r"split 'dev' in .*got heldout, test, train, validation: name one of these"):
        load_texts(tmp_path, split="dev")


def test_documents_load_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "validation.jsonl").write_text('{"content": "a text"}\n')
    hub: dict[str, Any] = {
        "name_or_path": tmp_path / "hub",
        "cache_dir": str(tmp_path / "cache"),
        "split": "validation",
    }
    assert load_texts(text_column="content", **hub) == ["a text"]
    with pytest.raises(DataError, match=r"\(validation\):1: expected a field 'text', .*'content'"):
        load_texts(**hub)


def test_files_without_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="none: name another source"):
        load_texts(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="convert the file"):
        load_texts(tmp_path / "a.txt")


def test_a_short_document_is_divided_and_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    row = TextDataset([DOCUMENT], tokenizer=tokenizer, num_rows=1, seed=0)[0]
    demonstrations, query, target = row["demonstrations"], row["query"], row["target"]
    assert demonstrations[0] + query + target == DOCUMENT
    num_tokens = count_tokens(tokenizer, DOCUMENT)
    assert count_tokens(tokenizer, demonstrations[0]) == round(0.8 * num_tokens)
    assert target.startswith(" il im")


def test_a_long_document_gives_windows_that_the_seed_fixes(tokenizer: PreTrainedTokenizerBase) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_tokens": 10, "min_tokens": 5, "num_rows": 20}
    dataset = TextDataset([DOCUMENT], seed=0, **settings)
    rows = list_rows(dataset)
    assert rows[3] == {"demonstrations": [" im in io ip iq ir is it"], "query": "", "target": " jk jl"}
    windows = [row["demonstrations"][0] + row["target"] for row in rows]
    assert all(window in DOCUMENT and count_tokens(tokenizer, window) == 10 for window in windows)
    assert len(set(windows)) > 10
    assert list_rows(TextDataset([DOCUMENT], seed=1, **settings)) != rows


def test_short_documents_are_left_out_with_a_warning(tokenizer: PreTrainedTokenizerBase) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "min_tokens": 8, "max_tokens": 8, "num_rows": 5, "seed": 0}
    with pytest.warns(UserWarning, match="2 of 3 documents have fewer than 8 tokens and are left out"):
        dataset = TextDataset(["ak al", DOCUMENT, ""], **settings)
    assert dataset.texts == [DOCUMENT]
    with pytest.raises(DataError, match="2 shorter ones: lower min_tokens or give longer documents"):
        TextDataset(["ak al", ""], **settings)


def test_blank_documents_are_left_out_and_no_demonstration_is_blank(tokenizer: PreTrainedTokenizerBase) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "min_tokens": 8, "max_tokens": 10, "num_rows": 30, "seed": 0}
    blank = " \n\t" * 100
    with pytest.warns(UserWarning, match="2 of 3 documents have fewer than 8 tokens"):
        dataset = TextDataset([blank, blank + "ak al" + blank, blank + "ak" + blank + DOCUMENT], **settings)
    rows = list_rows(dataset)
    assert all(row["demonstrations"][0].strip() for row in rows)
    assert sum(row["demonstrations"][0].startswith("ak ") for row in rows) > 10
    with pytest.raises(DataError, match="1 shorter ones: lower min_tokens or give longer documents"):
        TextDataset([blank], **settings)


def test_impossible_settings_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"demonstration_fraction=1\.0.*change what lies outside"):
        TextDataset([DOCUMENT], tokenizer=tokenizer, demonstration_fraction=1.0, num_rows=1, seed=0)
    with pytest.raises(ConfigError, match="load it with AutoTokenizer"):
        TextDataset([DOCUMENT], tokenizer=ByT5Tokenizer(), num_rows=1, seed=0)
