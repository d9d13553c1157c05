from __future__ import annotations

import pytest

from mend_hf.errors import CheckpointError
from mend_hf.files import check_output_folder, fetch_file, write_folder


def test_a_failing_save_leaves_the_old_files(tmp_path):
    (tmp_path / "a").write_text("old")

    def save():
        with write_folder(tmp_path) as folder:
            (folder / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_save_replaces_its_files_and_keeps_others(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("kept")
    with write_folder(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "kept"}


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="give another path"):
        check_output_folder(tmp_path / "file" / "folder")


def test_a_failing_first_save_leaves_no_folder(tmp_path):
    def save():
        with write_folder(tmp_path / "new"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()
    assert not list(tmp_path.iterdir())


def test_a_save_replaces_a_link_and_leaves_alone_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere").write_text("somebody else's")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "elsewhere")
    with write_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert (tmp_path / "elsewhere").read_text() == "somebody else's"


def test_a_file_that_a_folder_does_not_hold_is_told_from_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="this folder has no such file: check the path"):
        fetch_file(tmp_path, "mend_config.json")
    with pytest.raises(CheckpointError, match="no such folder here, and of the Hub"):
        fetch_file("a/b/c", "mend_config.json")
