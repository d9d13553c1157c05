"""Streamed rows: the same from every iteration and any number of workers and processes, and nothing is held."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import zstandard
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.documents import TextStream
from mend_hf.data.rows import read_rows
from mend_hf.data.streaming import StreamingTextDataset
from mend_hf.errors import ConfigError, DataError

WORDS = ["good", "bad", "film", "food", "funny", "boring", "was", "very", "the", "and"]
DOCUMENTS = [" ".join([WORDS[number % 10], WORDS[number // 10], *WORDS]) for number in range(20)]
SETTINGS: dict[str, Any] = {"max_tokens": 10, "min_tokens": 5, "seed": 3, "shuffle_buffer": 4}


@pytest.fixture
def stream(tokenizer):
    def stream(texts=DOCUMENTS, **settings):
        return StreamingTextDataset(texts, tokenizer=tokenizer, **{"num_rows": 20} | SETTINGS | settings)

    return stream


def whole(row):
    return row["demonstrations"][0] + row["target"]


def read(dataset, num_workers=0, num_processes=1, process=0):
    """The batches of two rows that a process of a training reads."""
    loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=list)
    return [*prepare_data_loader(loader, None, num_processes, process, put_on_device=False, dispatch_batches=False)]


def test_a_pass_gives_a_window_of_every_document_and_the_next_pass_another(stream):
    rows = [*stream(num_rows=40)]
    for start in (0, 20):
        sources = [{text for text in DOCUMENTS if whole(row).strip() in text} for row in rows[start : start + 20]]
        assert all(sources)
        assert set().union(*sources) == {*DOCUMENTS}
    assert rows[:20] != rows[20:]
    assert rows == [*stream(num_rows=40)]
    assert rows != [*stream(num_rows=40, seed=4)]
    assert rows[:7] == [*stream(num_rows=7)]


def test_documents_are_drawn_from_a_buffer_that_is_never_larger(stream):
    names = [str(number) + " good" * 9 for number in range(30)]
    order = [
        int(row["demonstrations"][0].split()[0]) for row in stream(names, num_rows=30, max_tokens=20, shuffle_buffer=4)
    ]
    assert sorted(order) == [*range(30)]
    assert order != sorted(order)
    assert all(number < place + 4 for place, number in enumerate(order))
    in_order = stream(names, num_rows=30, max_tokens=20, shuffle_buffer=1)
    assert [int(row["demonstrations"][0].split()[0]) for row in in_order] == [*range(30)]


def test_only_the_documents_in_the_buffer_are_read_ahead(stream):
    class Counting(list):
        num_read = 0

        def __iter__(self):
            for text in super().__iter__():
                self.num_read += 1
                yield text

    texts = Counting(DOCUMENTS)
    rows = iter(stream(texts, shuffle_buffer=4))
    next(rows)
    assert texts.num_read == 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_and_their_order_do_not_depend_on_workers_and_processes(stream, num_workers, num_processes):
    dataset = stream(batch_size=2 * num_processes)
    shares = [read(dataset, num_workers, num_processes, process) for process in range(num_processes)]
    together = [row for batches in zip(*shares, strict=True) for batch in batches for row in batch]
    assert together == [*stream()]


def test_workers_that_do_not_know_the_batch_size_still_share_the_rows_out(stream):
    rows = [row for batch in read(stream(), num_workers=2) for row in batch]
    assert Counter(map(whole, rows)) == Counter(map(whole, stream()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_in_shards_is_read_whole_by_every_worker(stream, num_workers):
    table = datasets.Dataset.from_list([{"text": text, "number": 1} for text in DOCUMENTS])
    texts = TextStream(table.to_iterable_dataset(num_shards=2))
    assert [*texts] == DOCUMENTS
    rows = [row for batch in read(stream(texts, batch_size=2), num_workers) for row in batch]
    assert rows == [*stream()]


def test_a_data_set_of_the_hub_is_streamed_too(tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    lines = [json.dumps({"content": text}) for text in DOCUMENTS]
    (tmp_path / "hub" / "data" / "validation.jsonl").write_text("\n".join(lines))
    hub = {"split": "validation", "streaming": True, "cache_dir": str(tmp_path / "cache")}
    texts = TextStream(tmp_path / "hub", text_column="content", **hub)
    assert [*texts] == [*texts] == DOCUMENTS
    with pytest.raises(DataError, match=r"\(validation\):1: expected a field 'text'"):
        list(TextStream(tmp_path / "hub", **hub))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_that_goes_on_makes_the_losses_of_one_never_stopped(
    tiny_model, tokenizer, tmp_path, stream, num_workers
):
    def train(checkpoint=None):
        torch.manual_seed(0)
        model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer)
        args = MendTrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, save_steps=2, use_cpu=True,
            logging_steps=1, report_to="none", disable_tqdm=True, dataloader_num_workers=num_workers,
            nll_loss_weight=0.0,
        )  # fmt: skip
        trainer = MendTrainer(model=model, args=args, train_dataset=stream(num_rows=8, batch_size=2))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = train()
    assert len({*losses}) == 4
    assert train(str(tmp_path / "out" / "checkpoint-2")) == pytest.approx(losses, abs=1e-6)


def test_a_compressed_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "texts.jsonl.zst"
    lines = [json.dumps({"text": f"{number} " + "x" * 50}).encode() + b"\n" for number in range(100_000)]
    frames = [zstandard.compress(b"".join(lines[:70_000])), zstandard.compress(b"".join(lines[70_000:]))]
    path.write_bytes(b"".join(frames))
    assert [int(text.split()[0]) for text in TextStream(path)] == [*range(100_000)]
    path.write_bytes(b"".join(frames)[:-1])
    rows = read_rows(path)
    assert next(rows)[1]["text"].startswith("0 ")
    with pytest.raises(DataError, match="truncated one: fetch it again"):
        list(rows)


def test_blank_and_short_documents_are_left_out_with_a_warning(stream):
    with pytest.warns(UserWarning, match="3 of 5 documents have fewer than 5 tokens and are left out"):
        rows = [*stream(["", " \n" * 50, "good", *DOCUMENTS[:2]], num_rows=3)]
    assert len(rows) == 3
    with pytest.raises(DataError, match="2 shorter ones: lower min_tokens or give longer documents"):
        next(iter(stream(["good", "\n" * 50])))


def test_what_can_be_read_only_once_and_impossible_numbers_are_refused(stream, tmp_path: Path):
    with pytest.raises(DataError, match="spent after one reading: give a TextStream"):
        stream(text for text in DOCUMENTS)
    with pytest.raises(DataError, match="got a list_iterator, which is spent after one reading"):
        TextStream(iter([{"text": "good"}]))
    for settings in ({"shuffle_buffer": 0}, {"batch_size": 0}, {"num_rows": 0}):
        with pytest.raises(ConfigError, match="raise"):
            stream(**settings)
    with pytest.raises(DataError, match="list:2: expected a field 'text', got only 'body'"):
        list(TextStream([{"text": "good"}, {"body": "bad"}]))


def test_batches_of_several_processes_are_never_cut_apart(tmp_path):
    args = MendTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.accelerator_config.dispatch_batches is False
    with pytest.raises(ConfigError, match="dispatch_batches=False"):
        MendTrainingArguments(output_dir=str(tmp_path), accelerator_config={"dispatch_batches": True})
