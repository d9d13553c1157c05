"""The recipes of examples/recipes, with a tiny base model and a handful of rows."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mend_hf import MendConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = EXAMPLES / "recipes"
sys.path.insert(0, str(EXAMPLES))
from tiny import load_tiny  # noqa: E402

SMALL = {
    "TEXT": str(EXAMPLES / "data" / "text.jsonl"), "TASKS": str(EXAMPLES / "data"), "TEXT_ROWS": "4", "TASK_ROWS": "4",
    "SEEDS": "13", "MAX_QUERIES": "2", "QUERIES": "2", "VIRTUAL_TOKENS": "3",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for part in load_tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    sides = {"train": ["support_tickets"], "test": ["restaurant_notes"]}
    (tmp_path / "mine.json").write_text(json.dumps(sides))
    return tmp_path / "mine.json"


def run(name: str, *words: object, **settings: object) -> str:
    """Run a recipe and return what it printed."""
    command = ["bash", str(RECIPES / name), *map(str, words)]
    given = SMALL | {key: str(value) for key, value in settings.items()}
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def methods_in(folder: Path) -> set[str]:
    return {json.loads(line)["method"] for line in (folder / "scores" / "results.jsonl").read_text().splitlines()}


def test_a_recipe_trains_evaluates_and_goes_on_where_it_stood(base: Path, setting: Path, tmp_path: Path) -> None:
    words = ("smollm2-kv.sh", setting, tmp_path / "out")
    changed = {"BASE": base, "DTYPE": "bfloat16", "BALANCE": 1, "KD_WEIGHT": 0.5}
    assert "Saved the distiller" in run(*words, **changed)
    assert "Saved the distiller" not in run(*words, **changed)
    own = {"MEND", "MEND, batch-calibrated"}
    baselines = {"zero-shot", "in-context", "in-context, cut", "training-free anchors"}
    assert methods_in(tmp_path / "out" / "mine") == baselines | own


def test_a_separate_distiller_reads_for_another_model(base: Path, setting: Path, tmp_path: Path) -> None:
    run("smollm2-separate.sh", setting, tmp_path / "out", BASE=base, READER=base, METHODS="MEND")
    config = MendConfig.from_pretrained(tmp_path / "out" / "mine")
    assert (config.distiller_name_or_path, config.prefix_form, config.num_virtual_tokens) == (str(base), "embeds", 3)
    assert methods_in(tmp_path / "out" / "mine") == {"MEND"}


def test_metaicl_tunes_the_base_model_and_is_compared_with_it(base: Path, setting: Path, tmp_path: Path) -> None:
    run("smollm2-metaicl.sh", setting, tmp_path, BASE=base, DTYPE="bfloat16")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "metaicl-mine")
    assert tuned.dtype == torch.float32
    assert methods_in(tmp_path / "metaicl-mine") == {"in-context", "MetaICL"}


def test_ablations_train_what_is_named_and_compare_it(base: Path, tmp_path: Path) -> None:
    sides = {"train": ["support_tickets"], "test": ["restaurant_notes"], "validation": ["other_notes"]}
    (tmp_path / "mine.json").write_text(json.dumps(sides))
    shutil.copytree(EXAMPLES / "data", tmp_path / "tasks")
    for side in ("train", "test"):
        text = (tmp_path / "tasks" / f"restaurant_notes.{side}.jsonl").read_text(encoding="utf-8")
        renamed = text.replace("restaurant_notes", "other_notes")
        (tmp_path / "tasks" / f"other_notes.{side}.jsonl").write_text(renamed, encoding="utf-8")
    changed = {
        "BASE": base,
        "SETTING": tmp_path / "mine.json",
        "TASKS": tmp_path / "tasks",
        "ROWS": 4,
        "PROBE_ROWS": 1,
    }
    *_, first, second = run("ablations.sh", tmp_path, "no-teacher", "embeds", **changed).splitlines()
    assert re.fullmatch(r"no-teacher: NLL [\d.]+ -> [\d.]+ \(teacher [\d.]+\), KL [\d.]+ -> [\d.]+", first)
    assert second.startswith("embeds: NLL ")
    embeds = MendConfig.from_pretrained(tmp_path / "ablations" / "embeds")
    assert (embeds.prefix_form, embeds.num_virtual_tokens) == ("embeds", 32)
    log = json.loads((tmp_path / "ablations" / "no-teacher" / "training_log.json").read_text())["log"]
    assert not any("kd_loss" in entry for entry in log)
    assert [entry["step"] for entry in log if "probe_kl" in entry] == [0, 1]
    assert methods_in(tmp_path / "ablations") == {"zero-shot", "no-teacher", "embeds"}


def test_a_small_t5_is_pretrained_and_distilled_for(setting: Path, tmp_path: Path) -> None:
    run("small-t5.sh", setting, tmp_path / "out", STEPS=2, METHODS="zero-shot;MEND")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "small-t5")
    text = "Naïve: two lines\n\nand  blanks"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "small-t5").config.vocab_size == len(tokenizer)
    assert MendConfig.from_pretrained(tmp_path / "out" / "t5" / "mine").task_type == "SEQ_2_SEQ_LM"
    assert methods_in(tmp_path / "out" / "t5" / "mine") == {"zero-shot", "MEND"}


@pytest.mark.parametrize("length", [2, 3, 20, 128, 1000])
def test_spans_that_are_cut_out_stand_behind_their_sentinels(length: int) -> None:
    corrupt = runpy.run_path(str(RECIPES / "small_t5.py"))["corrupt"]
    ids, sentinels, end = [*range(1000, 1000 + length)], [*range(100)], 999
    for seed in range(20):
        row = corrupt(ids, sentinels, end, random.Random(seed))
        *source, source_end = row["input_ids"]
        *target, target_end = row["labels"]
        assert source_end == target_end == end
        spans: dict[int, list[int]] = {}
        for token in target:
            spans.setdefault(token, []) if token < end else spans[[*spans][-1]].append(token)
        assert [*spans] == sentinels[: len(spans)]
        assert all(spans.values())
        whole = [each for token in source for each in (spans[token] if token < end else [token])]
        assert whole == ids
        assert abs(sum(map(len, spans.values())) - 0.15 * length) <= 1
