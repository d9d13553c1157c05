"""What the Space does, without its page."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import answers
import pytest
import torch
from tiny import load_tiny

from mend_hf import Demonstration, DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.artifact import RECORD_NAME, WEIGHTS_NAME
from mend_hf.errors import CheckpointError, DataError
from mend_hf.scoring import score_options

ROOT = Path(__file__).parents[1]
SHOTS = [Demonstration("great film", "good"), Demonstration("a bore", "bad"), Demonstration("fine", "good")]
LINES = answers.to_lines(SHOTS)
QUERY = "moving and funny"


@pytest.fixture(scope="module")
def model() -> MendModel:
    base, tokenizer = load_tiny()
    return get_mend_model(base, MendConfig(num_virtual_tokens=4), tokenizer).eval()


@pytest.fixture(scope="module")
def task(model: MendModel) -> answers.Task:
    return answers.distil(model, SHOTS)


def test_lines_a_file_and_a_table_give_the_same_demonstrations(tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text(LINES, encoding="utf-8")
    table = [["great film ", "good"], ["", None], ["a bore", "bad"], ["fine", "good"]]
    assert answers.parse_lines(LINES) == answers.read_file(tmp_path / "shots.jsonl") == SHOTS
    assert answers.parse_table(table) == SHOTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "pasted.jsonl:1: expected a JSON object"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', "pasted.jsonl:2: expected a field 'output'"),
        ('{"input": 3, "output": "b"}', "to be a string"),
        ("", "at least one demonstration"),
        ('{"input": "a", "output": "b"}\n' * 300, "at most 256 demonstrations"),
    ],
)
def test_wrong_lines_are_refused_without_naming_the_servers_folders(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        answers.parse_lines(text)
    assert "/" not in str(error.value)


def test_half_a_row_and_files_of_another_kind_or_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Row 2: .* no output"):
        answers.parse_table([["a", "b"], ["c", ""]])
    with pytest.raises(DataError, match=r"ends in \.jsonl, got shots\.csv"):
        answers.read_file(tmp_path / "shots.csv")
    (tmp_path / "large.jsonl").write_bytes(b" " * (answers.MAX_TEXT_BYTES + 1))
    with pytest.raises(DataError, match=r"at most 1,000,000 bytes, got large\.jsonl"):
        answers.read_file(tmp_path / "large.jsonl")


def test_options_are_the_outputs_unless_they_are_free_text() -> None:
    assert answers.find_options(SHOTS) == ["good", "bad"]
    sentences = [Demonstration("a", "This is the first one."), Demonstration("b", "And here is another.")]
    assert answers.find_options(sentences) == []
    assert answers.parse_options(" good\n\nbad\ngood") == ["good", "bad"]
    with pytest.raises(DataError, match="2 to 16 different options"):
        answers.parse_options("good")


def test_every_method_says_what_it_finds_likely_and_what_it_read(model: MendModel, task: answers.Task) -> None:
    found = answers.ask(model, task, QUERY, ["good", "bad"])
    assert tuple(found) == answers.METHODS
    prefixes = (None, model.read(SHOTS).prefix, task.distilled.prefix)
    for answer, prefix in zip(found.values(), prefixes, strict=True):
        assert answer is not None
        [scores] = score_options(model, [QUERY], [["good", "bad"]], prefix)
        assert list(answer.probabilities.values()) == pytest.approx(torch.tensor(scores).softmax(0).tolist())
        assert answer.text == max(answer.probabilities, key=lambda option: answer.probabilities[option])
    alone, text, distilled = found.values()
    assert (alone.num_slots, text.num_slots, distilled.num_slots) == (0, 0, task.distilled.num_slots)
    assert alone.num_tokens == len(model.prompt.encode_query(QUERY, is_alone=True))
    assert distilled.num_tokens == len(model.prompt.encode_query(QUERY))
    assert text.num_tokens == distilled.num_tokens + prefixes[1].num_slots


def test_without_options_answers_are_written(model: MendModel, task: answers.Task) -> None:
    found = answers.ask(model, task, QUERY, [])
    expected = model.answer([QUERY], task.distilled)[0].split("\n")[0]
    assert found["MEND"].text == expected
    assert not any(answer.probabilities for answer in found.values())


def test_nothing_distilled_and_no_query_are_refused(model: MendModel, task: answers.Task, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="distil some"):
        answers.ask(model, None, QUERY, [])
    with pytest.raises(DataError, match="distil some"):
        answers.pack(None, tmp_path / "none.zip")
    with pytest.raises(DataError, match="write one"):
        answers.ask(model, task, " ", [])
    with pytest.raises(DataError, match="shorten it"):
        answers.draw_attention(model, task, "a" * 5000)


def test_the_heat_map_names_the_slots(model: MendModel, task: answers.Task) -> None:
    axes = answers.draw_attention(model, task, QUERY).axes[0]
    assert axes.images[0].get_array().shape == (2, task.distilled.num_slots)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["sink", f"{task.distilled.num_slots - 5} anchors", "4 placeholders"]


def test_a_packed_file_answers_the_same_without_the_text(model: MendModel, task: answers.Task, tmp_path: Path) -> None:
    path = answers.pack(task, tmp_path / "distilled.zip")
    assert b"great film" not in path.read_bytes()
    found, again = (answers.ask(model, each, QUERY, ["good", "bad"]) for each in (task, answers.unpack(model, path)))
    assert again["MEND"].probabilities == found["MEND"].probabilities
    assert again["In-context learning"] is None
    zipfile.ZipFile(path).extractall(tmp_path / "folder")
    assert DistilledDemonstrations.from_pretrained(tmp_path / "folder").num_slots == task.distilled.num_slots


def write_zip(path: Path, files: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "folder/" + RECORD_NAME, "more.txt"])
def test_archives_with_other_files_are_refused_and_write_nothing(
    model: MendModel, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("a file was written"))
    path = write_zip(tmp_path / "bad.zip", {RECORD_NAME: b"{}", WEIGHTS_NAME: b"", name: b"{}"})
    with pytest.raises(CheckpointError, match=r"and nothing else in bad\.zip"):
        answers.unpack(model, path)


def test_damaged_archives_are_refused(model: MendModel, task: answers.Task, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("not an archive")
    with pytest.raises(CheckpointError, match=r"whole \.zip file .* text\.zip"):
        answers.unpack(model, tmp_path / "text.zip")
    wrong = write_zip(tmp_path / "wrong.zip", {RECORD_NAME: b"[1, 2", WEIGHTS_NAME: b"abc"})
    with pytest.raises(CheckpointError, match=r"wrong\.zip") as error:
        answers.unpack(model, wrong)
    assert "/tmp" not in str(error.value)
    bomb = {RECORD_NAME: b"{}", WEIGHTS_NAME: bytes(answers.MAX_ARCHIVE_BYTES + 1)}
    with pytest.raises(CheckpointError, match="once unpacked"):
        answers.unpack(model, write_zip(tmp_path / "bomb.zip", bomb, compression=zipfile.ZIP_DEFLATED))
    slow = write_zip(tmp_path / "slow.zip", {RECORD_NAME: b"{}", WEIGHTS_NAME: b""}, compression=zipfile.ZIP_LZMA)
    with pytest.raises(CheckpointError, match="stored or deflated"):
        answers.unpack(model, slow)


def test_a_file_for_another_model_is_refused_also_where_it_lies(
    model: MendModel, task: answers.Task, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    task.distilled.save_pretrained(folder)
    record = json.loads((folder / RECORD_NAME).read_text())
    record["provenance"]["base_model_fingerprint"]["num_layers"] = 7
    files = {RECORD_NAME: json.dumps(record).encode(), WEIGHTS_NAME: (folder / WEIGHTS_NAME).read_bytes()}
    with pytest.raises(CheckpointError, match="another base model"):
        answers.unpack(model, write_zip(tmp_path / "other.zip", files))
    base, tokenizer = load_tiny()
    vectors = get_mend_model(base, MendConfig(num_virtual_tokens=4, prefix_form="embeds"), tokenizer).distill(SHOTS)
    vectors.save_pretrained(folder)
    lying = {name: (folder / name).read_bytes() for name in (RECORD_NAME, WEIGHTS_NAME)}
    with pytest.raises(CheckpointError, match="keys and values of 2 layers"):
        answers.unpack(model, write_zip(tmp_path / "lying.zip", lying))


def test_the_card_names_what_a_space_needs() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "examples" / "space"
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert {"title", "sdk", "sdk_version", "app_file", "license"} <= set(card)
    assert (folder / card["app_file"]).is_file()
    assert "mend_hf" in (folder / "requirements.txt").read_text()
