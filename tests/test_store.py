from __future__ import annotations

import json
import threading

import pytest
import torch
from save_again_and_again import make

from mend_hf import DemonstrationStore, DistilledDemonstrations
from mend_hf.errors import CheckpointError, ConfigError, DataError

SIZE = 3 * 4 * 4  # of one of `make`: three vectors of four numbers in float32


@pytest.fixture
def store(tmp_path):
    store = DemonstrationStore(tmp_path / "tasks", max_bytes=2 * SIZE)
    for number in (1, 2, 3):
        store.add(f"task-{number}", make(number))
    return store


def number_of(demonstrations):
    [number] = demonstrations.vectors.unique().tolist()
    return int(number)


def held(store):
    return {name for name in store if name in store._held}


def test_it_is_a_mapping_of_what_was_added(store, tmp_path):
    (tmp_path / "tasks" / "no-demonstrations").mkdir()
    assert list(store) == ["task-1", "task-2", "task-3"]
    assert len(store) == 3
    assert "task-2" in store
    assert "no-demonstrations" not in store
    assert {name: number_of(kept) for name, kept in store.items()} == {"task-1": 1, "task-2": 2, "task-3": 3}
    assert store.get("task-9") is None
    assert list(DemonstrationStore(tmp_path / "nothing")) == []


def test_an_unknown_name_is_answered_with_the_nearest(store):
    for ask in (store.__getitem__, store.remove):
        with pytest.raises(KeyError, match=r"3 names .*got 'tusk-2' \(nearest: task-2, .*\): correct it, or add"):
            ask("tusk-2")
        with pytest.raises(DataError, match="got 'mails': correct it"):
            ask("mails")


def test_those_asked_for_last_are_held_within_the_budget(store):
    assert store.num_bytes == 0
    first = store["task-1"]
    assert store["task-1"] is first
    _ = store["task-2"], store["task-1"], store["task-3"]  # task-2 is the one not asked for the longest
    assert held(store) == {"task-1", "task-3"}
    assert store.num_bytes == 2 * SIZE
    assert store["task-1"] is first


def test_what_leaves_the_memory_stays_whole_for_who_still_uses_it(store):
    kept = store["task-1"]
    _ = store["task-2"], store["task-3"]
    assert held(store) == {"task-2", "task-3"}
    assert number_of(kept) == 1


def test_one_larger_than_the_budget_is_held_alone(tmp_path):
    store = DemonstrationStore(tmp_path, max_bytes=0)
    store.add("a", make(1))
    store.add("b", make(2))
    assert store["a"] is store["a"]
    assert number_of(store["b"]) == 2
    assert held(store) == {"b"}


def test_what_another_process_replaced_is_read_anew(store):
    assert number_of(store["task-1"]) == 1
    other = DemonstrationStore(store.folder)
    with pytest.raises(DataError, match="give overwrite=True"):
        other.add("task-1", make(7))
    other.add("task-1", make(7), overwrite=True)
    assert number_of(store["task-1"]) == 7
    assert store.num_bytes == SIZE
    other.remove("task-1")
    with pytest.raises(KeyError):
        store["task-1"]
    assert store.num_bytes == 0


def test_what_is_removed_is_gone(store):
    _ = store["task-2"]
    store.remove("task-2")
    assert "task-2" not in store
    assert not (store.folder / "task-2").exists()
    assert store.num_bytes == 0
    with pytest.raises(KeyError):
        store.remove("task-2")


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".saved", "-x", "x" * 129, "a\n"])
def test_a_name_that_leads_elsewhere_is_refused(store, name):
    with pytest.raises(DataError, match="choose another one"):
        store.add(name, make(1))
    assert name not in store
    with pytest.raises(KeyError):
        store[name]
    with pytest.raises(DataError, match="choose another one"):
        DistilledDemonstrations.from_pretrained(store.folder, name=name)


def test_one_of_a_library_is_loaded_by_its_name(store):
    assert number_of(DistilledDemonstrations.from_pretrained(store.folder, name="task-3")) == 3
    assert (
        number_of(DistilledDemonstrations.from_pretrained(store.folder.parent, name="task-3", subfolder="tasks")) == 3
    )


def test_damaged_files_are_an_error_and_not_held(store):
    path = store.folder / "task-1" / "distilled_demonstrations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="upgrade mend_hf"):
        store["task-1"]
    assert store.num_bytes == 0


def test_they_are_held_in_the_type_asked_for(store):
    half = DemonstrationStore(store.folder, dtype=torch.bfloat16)
    assert half["task-1"].vectors.dtype == torch.bfloat16
    assert half.num_bytes == SIZE // 2


def test_a_budget_below_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="raise it"):
        DemonstrationStore(tmp_path, max_bytes=-1)


def test_many_threads_ask_one_store(store):
    wrong = []

    def ask(start):
        for turn in range(60):
            number = 1 + (start + turn) % 3
            if number_of(store[f"task-{number}"]) != number:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.num_bytes == sum(SIZE for _ in store._held) <= 2 * SIZE
