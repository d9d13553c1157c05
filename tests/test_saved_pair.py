"""What is saved appears whole or not at all, and what is damaged is refused before it does harm."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from save_again_and_again import make

from mend_hf import DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.errors import CheckpointError, MendError
from mend_hf.files import write_folder

SHOTS = [("great film", "positive"), ("a bore", "negative")]
SCRIPT = Path(__file__).with_name("save_again_and_again.py")
RECORD, WEIGHTS = "distilled_demonstrations.json", "distilled_demonstrations.safetensors"


def numbers_of(found: DistilledDemonstrations) -> set[int]:
    return {*found.provenance.num_tokens, *map(int, found.vectors.unique())}


def test_a_process_killed_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "200"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [[int(word) for word in line.split()] for line in result.stdout.splitlines()]
    assert len(rows) == 200
    assert all(len({record, first, last}) == 1 for record, first, last in rows)
    assert len({record for record, *_ in rows}) > 10  # the children did come to save, also on a busy machine


def test_files_that_count_but_have_not_been_moved_are_read_and_moved_by_the_next_save(tmp_path: Path) -> None:
    make(1).save_pretrained(tmp_path)
    make(2).save_pretrained(tmp_path / "next")
    (tmp_path / "next").rename(tmp_path / ".saved")
    os.replace(tmp_path / ".saved" / RECORD, tmp_path / RECORD)  # killed after the first of two
    assert numbers_of(DistilledDemonstrations.from_pretrained(tmp_path)) == {2}
    with write_folder(tmp_path) as folder:
        (folder / "other").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, WEIGHTS, "other"]
    assert numbers_of(DistilledDemonstrations.from_pretrained(tmp_path)) == {2}


def test_a_folder_is_loaded_and_saved_into_by_several_threads_at_once(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    stop = threading.Event()

    def save(start: int) -> None:
        number = start
        while not stop.is_set():
            make(number).save_pretrained(tmp_path)
            number += 2

    writers = [threading.Thread(target=save, args=(start,)) for start in (1, 2)]
    for writer in writers:
        writer.start()
    seen: set[int] = set()
    try:
        while len(seen) < 20:
            [number] = numbers_of(DistilledDemonstrations.from_pretrained(tmp_path))
            seen.add(number)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert {number % 2 for number in seen} == {0, 1}


def test_tensors_of_another_save_are_refused(tmp_path: Path) -> None:
    make(1).save_pretrained(tmp_path / "one")
    make(2).save_pretrained(tmp_path / "two")
    os.replace(tmp_path / "two" / WEIGHTS, tmp_path / "one" / WEIGHTS)
    with pytest.raises(CheckpointError, match="take weights_sha256 out of"):
        DistilledDemonstrations.from_pretrained(tmp_path / "one")
    record = json.loads((tmp_path / "one" / RECORD).read_text())
    del record["weights_sha256"]
    (tmp_path / "one" / RECORD).write_text(json.dumps(record))
    assert DistilledDemonstrations.from_pretrained(tmp_path / "one").vectors.unique().tolist() == [2.0]


@pytest.fixture
def distiller(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=3, lora_r=2), tokenizer).eval()
    model.save_pretrained(tmp_path / "distiller")
    model.distill(SHOTS).save_pretrained(tmp_path / "kv")
    return tmp_path / "distiller"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, record: str, weights: str, **changes: torch.Tensor) -> None:
    save_file(load_file(folder / weights) | changes, folder / weights)
    values = json.loads((folder / record).read_text())
    del values["weights_sha256"]
    (folder / record).write_text(json.dumps(values))


def test_the_wrong_base_model_is_refused_before_the_tensors_are_read(
    distiller: Path, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mend_hf.saved_pair.load", None)
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        MendModel.from_pretrained(tiny_model("qwen3"), distiller, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 10**9}, r"placeholders: expected shape \(1000000000, n\), got \(3, "),
        ({"lora_r": 10**9}, r"lora_A.weight: expected a multiple of rank 1000000000 along axis 0, got \(2, "),
        ({"format_version": 2}, "format_version from 1 to 1 in mend_config.json, got 2: upgrade mend_hf"),
        ({"format_version": True}, "got True"),
    ],
)
def test_a_config_that_asks_for_what_the_file_does_not_hold_is_refused_before_the_tensors_are_read(
    distiller: Path,
    tiny_model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("mend_hf.saved_pair.load", None)
    change_json(distiller / "mend_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        MendModel.from_pretrained(tiny_model("llama"), distiller, tokenizer)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((3, 16), float("nan")), "finite numbers in .* got others in placeholders"),
        (torch.zeros(3, 16, dtype=torch.int64), "expected a floating-point type, got I64"),
    ],
)
def test_tensors_of_a_distiller_that_cannot_be_are_refused(
    distiller: Path, tiny_model: Any, tokenizer: Any, tensor: torch.Tensor, message: str
) -> None:
    change_tensors(distiller, "mend_config.json", "mend_model.safetensors", placeholders=tensor)
    with pytest.raises(CheckpointError, match=message):
        MendModel.from_pretrained(tiny_model("llama"), distiller, tokenizer)


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_what_an_earlier_version_saved_is_read_for_ever(form: str, tiny_model: Any, tokenizer: Any) -> None:
    """The folders never change; a newer version that cannot read them has to learn it."""
    folder = Path(__file__).parent / "assets" / "saved_by_0.1.0" / form
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MendModel.from_pretrained(tiny_model("llama"), folder / "distiller", tokenizer)
        saved = DistilledDemonstrations.from_pretrained(folder / "demonstrations")
    assert model.distiller.content_hash() == saved.provenance.distiller_hash
    assert saved.num_slots == {"kv": 9, "embeds": 2}[form]
    assert saved.provenance.num_demonstrations == [2]
    query = model.tokenize("bad")
    logits = model(**query, demonstrations=saved).logits
    assert not torch.allclose(logits, model(**query).logits)


def test_a_record_with_a_key_twice_is_refused(distiller: Path) -> None:
    path = distiller / "mend_config.json"
    path.write_text(path.read_text().replace("{", '{"lora_r": 4,', 1))
    with pytest.raises(CheckpointError, match="a key twice among"):
        MendConfig.from_pretrained(distiller)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mask", lambda mask: mask[:, :-1]),
        ("mask", lambda mask: mask.flip(1).index_fill(1, torch.tensor([2]), False)),
        ("next_positions", lambda positions: -positions),
        ("keys.0", lambda keys: keys[:, :, :-1]),
        ("keys.1", lambda keys: keys.long()),
        ("more", lambda _: torch.zeros(1)),
    ],
)
def test_tensors_that_are_no_prefix_are_refused(distiller: Path, name: str, change: Any) -> None:
    folder = distiller.with_name("kv")
    tensor = change(load_file(folder / WEIGHTS).get(name, torch.zeros(1)))
    change_tensors(folder, RECORD, WEIGHTS, **{name: tensor.contiguous()})
    with pytest.raises(CheckpointError, match="again"):
        DistilledDemonstrations.from_pretrained(folder)


def header_and_rest(data: bytes) -> tuple[bytes, bytes]:
    [length] = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


@st.composite
def mutations(draw: st.DrawFn, text: bytes) -> bytes:
    """Change a few bytes, cut some out, or put one JSON value in the place of another one."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(text) - 1, 0)))
        length = draw(st.integers(0, 12))
        piece = draw(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(
                    [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"\\ud800"', b"9" * 25, b"[" * 3000]
                ),
            )
        )
        text = text[:place] + piece + text[place + length :]
    return text


@pytest.mark.parametrize("part", ["record", "header", "tensors"])
def test_mutated_files_are_loaded_or_refused_and_never_anything_else(tmp_path: Path, part: str) -> None:
    record = json.loads(_save(tmp_path)[0])
    del record["weights_sha256"]  # or nothing behind it would be reached
    text = json.dumps(record).encode()
    header, rest = header_and_rest((tmp_path / WEIGHTS).read_bytes())

    @settings(max_examples=3400, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(changed=mutations({"record": text, "header": header, "tensors": rest}[part]))
    def load(changed: bytes) -> None:
        parts = {"record": text, "header": header, "tensors": rest} | {part: changed}
        (tmp_path / RECORD).write_bytes(parts["record"])
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(parts["header"])) + parts["header"] + parts["tensors"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = DistilledDemonstrations.from_pretrained(tmp_path)
            except MendError:
                return
            assert len(loaded) == len(loaded.chunks)
            repr(loaded)

    load()


def _save(folder: Path) -> list[bytes]:
    make(1).save_pretrained(folder)
    return [(folder / name).read_bytes() for name in (RECORD, WEIGHTS)]


def test_inputs_that_a_fuzzer_finds_load_or_are_refused(tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or system")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_saved.py")), "-runs=3000", "-timeout=10", "-seed=1"]
    fuzzer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert fuzzer.returncode == 0, fuzzer.stderr[-2000:]
    assert "Done 3000 runs" in fuzzer.stderr
