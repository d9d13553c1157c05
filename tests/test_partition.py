"""Partitions load, and no task is on two sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mend_hf.data.partition import Partition, load_partition
from mend_hf.errors import DataError


def test_a_partition_file_loads_without_its_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text('{"train": ["a", "b"], "test": ["c"], "unseen_domain_test": []}')
    assert load_partition(path) == Partition(("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["a", "b"], "test": ["b", "c"]}', "got b on both sides: remove each from one"),
        ('{"train": ["a"]}', "write both lists"),
        ('{"train": [', "check the path and the file"),
    ],
)
def test_a_bad_partition_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "partition.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_partition(path)
