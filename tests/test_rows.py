"""Reading rows: every format gives the same, and what is broken is named with its place."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mend_hf.data.rows import load_hub_splits, read_rows
from mend_hf.errors import DataError, MissingExtraError

ROWS = [{"text": "one\u2028line"}, {"text": "zwölf"}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    frames = zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name, places in {"a.jsonl": [1, 3], "a.jsonl.zst": [1, 3], "a.parquet": [1, 2]}.items():
        expected = [(f"{tmp_path / name}:{place}", row) for place, row in zip(places, ROWS, strict=True)]
        assert list(read_rows(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + b'\n{"text": "cut', r"a\.jsonl:4: .*mend or remove the line"),
        ("a.jsonl", b'{"a": "b" 1}\n', r"a\.jsonl:1: .*no JSON \(Expecting ',' delimiter at column 11\): mend or"),
        ("a.jsonl", b'{"a": "b\n', r"got text that is no JSON \(Unterminated string starting at column 7\): mend or"),
        ("a.jsonl", b'{"a": 1,\n', r"got text that is no JSON \(.* at column 9\): mend or remove the line"),
        ("a.jsonl", b'{"a": "\xff"}', r"no JSON \('utf-8' codec can't decode .*\): mend or remove the line"),
        ("a.jsonl", b"[1, 2]", r"a\.jsonl:1: .*got list: mend or remove the line"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-4], r"a\.jsonl\.zst, got a truncated one: fetch it again"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst, got a truncated one: fetch it again"),
        ("a.jsonl.zst", LINES, r"Zstandard file at .*a\.jsonl\.zst, .*fetch it again"),
        ("a.parquet", b"PAR1", r"Parquet file at .*a\.parquet, .*fetch it again"),
        ("a.csv", LINES, r"a\.csv: convert or rename it"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["none.jsonl", "none"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))}.*check the path"):
        load_hub_splits(tmp_path / name)


def test_what_is_neither_here_nor_on_the_hub_is_said_to_be_in_neither_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a file nor a folder here and which `datasets` cannot load"):
        load_hub_splits(tmp_path / "none")
    with pytest.raises(DataError, match="is a folder here and which `datasets` cannot load"):
        load_hub_splits(tmp_path)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r'pip install "mend_hf\[data\]"'):
        list(read_rows(tmp_path / "a.jsonl.zst"))


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match="got a folder: check the path"):
        list(read_rows(tmp_path))
