"""The command line: what each command makes and prints, and what bad input gets."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
import zstandard
from command_line import run_mend
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf import DistilledDemonstrations, MendConfig, MendTrainer, __version__, auto, get_mend_model
from mend_hf.cli import app
from mend_hf.cli.options import load_for_answering, read_demonstrations
from mend_hf.evaluation.methods import METHODS, TRAINED_METHODS

SENTENCE = "the boy went home because it was a good day for her walk into town ."
PAIRS = [("good film", "positive"), ("dull film", "negative"), ("very funny", "positive"), ("a waste", "negative")]
FEW_STEPS = ["--num-rows", "8", "--batch-size", "2", "--save-steps", "2"]
NEW_DISTILLER = ["--num-virtual-tokens", "3", "--set", "lora_r=2"]

Mend = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def mend(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mend:
    """A function that runs `mend` with the given words."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: object) -> Result:
        code = run_mend(words)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def base_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """A tiny Llama and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def distiller_folder(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> Path:
    """A new distiller for the tiny Llama, saved."""
    folder = tmp_path_factory.mktemp("distiller")
    base = tiny_model("llama")
    base.name_or_path = str(base_folder)
    get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text.jsonl`, `mine.jsonl`, the tasks `film` and `plant`, and a partition of them."""
    folder = tmp_path_factory.mktemp("data")
    text = " ".join([SENTENCE] * 5)
    write_lines(folder / "text.jsonl", [{"text": f"{word} {text}"} for word in ("one", "two", "three")])
    write_lines(folder / "mine.jsonl", [{"input": text, "output": label} for text, label in PAIRS])
    (folder / "tasks").mkdir()
    for task, thing in (("film", "film"), ("plant", "tree")):
        rows = [
            {"task": task, "input": f"{word} {thing}", "output": label, "options": ["positive", "negative"]}
            for word, label in zip(SENTENCE.split()[:10], ["positive", "negative"] * 5, strict=True)
        ]
        write_lines(folder / "tasks" / f"{task}.train.jsonl", rows)
        asked = [row | {"input": f"another {row['input']}"} for row in rows[:4]]
        write_lines(folder / "tasks" / f"{task}.test.jsonl", asked)
    (folder / "partition.json").write_text('{"train": ["film"], "test": ["plant"]}')
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_refused(result: Result, *parts: str) -> None:
    """The command said `error: ...` with these parts, and nothing like a traceback."""
    assert result.code == 2
    [line] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    message = result.err[result.err.index(line) :]
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in result.err


def test_help_lists_every_command(mend: Mend) -> None:
    result = mend("--help")
    assert result.code == 0
    for command in ("pretrain", "finetune", "distill", "generate", "evaluate", "info"):
        assert f" {command} " in result.out


def test_the_version_is_shown_without_a_command(mend: Mend) -> None:
    result = mend("--version")
    assert (result.code, result.out, result.err) == (0, f"mend_hf {__version__}\n", "")


def test_help_of_every_command_explains_every_option(mend: Mend) -> None:
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help
        assert all(parameter.help for parameter in command.params), name
        result = mend(name, "--help")
        assert result.code == 0
        assert [
            option for p in command.params for option in p.opts if option.startswith("--") and option not in result.out
        ] == []


def test_unknown_option_and_missing_option_are_refused(mend: Mend) -> None:
    for words, part in ((["info", "folder", "--loudly"], "--loudly"), (["distill"], "--demonstrations")):
        result = mend(*words)
        assert result.code == 2
        assert part in result.err
        assert "Traceback" not in result.err


def test_both_stages_then_distill_and_generate(mend: Mend, base_folder: Path, data: Path, tmp_path: Path) -> None:
    stage1, stage2, distilled = tmp_path / "stage1", tmp_path / "stage2", tmp_path / "distilled"
    words = ["--base-model", base_folder, "--text", data / "text.jsonl", "--max-tokens", 80, "--output-dir", stage1]
    result = mend("pretrain", *words, *NEW_DISTILLER, *FEW_STEPS, "--base-model-id", "someone/tiny")
    assert result.code == 0, result.err
    assert result.out.endswith(f"Saved the distiller in {stage1}\n")
    config = MendConfig.from_pretrained(stage1)
    assert (config.base_model_name_or_path, config.num_virtual_tokens, config.lora_r) == ("someone/tiny", 3, 2)
    log = json.loads((stage1 / "training_log.json").read_text())
    assert (log["recipe"], next(entry["step"] for entry in log["log"] if "loss" in entry)) == ("pretrain", 1)
    assert [entry["step"] for entry in log["log"] if "probe_kl" in entry] == [0, 4]
    assert (stage1 / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((stage1 / "training_run.json").read_text())["arguments"]["nll_loss_weight"] == 0.0

    words = ["--base-model", base_folder, "--distiller", stage1, "--tasks", data / "tasks", "--output-dir", stage2]
    few = ["--partition", data / "partition.json", "--num-demonstrations", "2-4", "--max-demonstration-tokens", 32]
    result = mend("finetune", *words, *few, *FEW_STEPS)
    assert result.code == 0, result.err
    assert json.loads((stage2 / "training_log.json").read_text())["recipe"] == "finetune"
    assert json.loads((stage2 / "training_run.json").read_text())["arguments"]["nll_loss_weight"] == 1.0
    both = MendConfig.from_pretrained(stage2)
    assert [stage["nll_loss_weight"] for stage in both.training_stages] == [0.0, 1.0]
    assert dataclasses.replace(both, training_stages=config.training_stages) == config
    before, after = (load_file(folder / "mend_model.safetensors") for folder in (stage1, stage2))
    assert not torch.equal(before["placeholders"], after["placeholders"])

    words = ["--base-model", base_folder, "--distiller", stage2]
    result = mend("distill", *words, "--demonstrations", data / "mine.jsonl", "--output-dir", distilled)
    assert result.code == 0, result.err
    kept = DistilledDemonstrations.from_pretrained(distilled)
    assert result.out.startswith(f"4 demonstrations, {kept.provenance.num_tokens[0]} tokens -> {kept.num_slots} slots")
    answers = [
        mend("generate", *words, "--demonstrations", source, "--max-new-tokens", 3, "good film", "a dull day")
        for source in (distilled, data / "mine.jsonl")
    ]
    assert answers[0].out.count("\n") == 2
    assert answers[0] == answers[1]
    assert (answers[0].code, answers[0].err) == (0, "")
    chosen = mend("generate", *words, "--demonstrations", distilled, "--options", "a, the", "good film", "a dull day")
    assert (chosen.code, chosen.err) == (0, "")
    assert {*chosen.out.splitlines()} <= {"a", "the"}
    assert chosen.out.count("\n") == 2
    choice = ["--options", "positive, negative", "--calibrate", "good film"]
    calibrated = mend("generate", *words, "--demonstrations", data / "mine.jsonl", *choice)
    model = load_for_answering(str(stage2), str(base_folder), None)
    pairs, labels = read_demonstrations(data / "mine.jsonl"), ["positive", "negative"]
    priors = model.option_priors(labels, [text for text, _ in pairs], pairs)
    expected = model.answer("good film", pairs, options=labels, option_priors=priors)
    assert (calibrated.code, calibrated.err, calibrated.out.splitlines()) == (0, "", expected)


def test_a_recipe_and_arguments_of_the_trainer_decide_the_losses(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, *FEW_STEPS]
    one, other = tmp_path / "one", tmp_path / "other"
    result = mend("finetune", *words, *NEW_DISTILLER, "--recipe", "hypertuning", "--output-dir", one)
    assert result.code == 0, result.err
    entries = json.loads((one / "training_log.json").read_text())["log"]
    assert any("nll_loss" in entry for entry in entries)
    assert not any("kd_loss" in entry for entry in entries)
    assert not any("option_loss" in entry for entry in entries)
    chosen = [
        "--option-loss-weight",
        0.5,
        "--max-options",
        2,
        "--arg",
        "kd_divergence=reverse_kl",
        "--arg",
        "kd_top_k=4",
        "--arg",
        "warmup_steps=0",
    ]
    result = mend("finetune", *words, *NEW_DISTILLER, *chosen, "--output-dir", other)
    assert result.code == 0, result.err
    assert any("option_loss" in entry for entry in json.loads((other / "training_log.json").read_text())["log"])
    arguments = json.loads((other / "training_run.json").read_text())["arguments"]
    assert arguments["option_loss_weight"] == 0.5
    assert [arguments[name] for name in ("kd_divergence", "kd_top_k", "warmup_steps")] == ["reverse_kl", 4, 0]


def test_metaicl_tunes_the_base_model_and_saves_it_with_its_tokenizer(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, *FEW_STEPS]
    result = mend("finetune", *words, "--recipe", "metaicl", "--output-dir", tmp_path / "tuned")
    assert result.code == 0, result.err
    assert result.out.endswith(f"Saved the model in {tmp_path / 'tuned'}\n")
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, tmp_path / "tuned"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    result = mend("generate", "--base-model", tmp_path / "tuned", "--demonstrations", data / "mine.jsonl", "good film")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--recipe", "fast"], "Expected a recipe among pretrain, finetune"),
        (["--arg", "kd_divergense=x"], "nearest: kd_divergence"),
        (["--arg", "kd_divergence=x"], "kd_divergence: expected forward_kl or"),
        (["--arg", "lr_scheduler_type=x"], "The training arguments do not go: x is not a valid SchedulerType"),
        (["--recipe", "metaicl", "--distiller", "NEW"], "tunes the base model itself"),
    ],
)
def test_wrong_training_settings_are_errors_of_one_line(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, wrong: list[str], message: str
) -> None:
    if "NEW" in wrong:
        new = tmp_path / "new"
        words = ["--base-model", base_folder, "--text", data / "text.jsonl", "--max-tokens", 80, "--output-dir", new]
        assert mend("pretrain", *words, *NEW_DISTILLER, *FEW_STEPS).code == 0
        wrong = [str(new) if word == "NEW" else word for word in wrong]
    words = ["--tasks", data / "tasks", "--num-demonstrations", 2, "--output-dir", tmp_path / "out"]
    result = mend("finetune", "--base-model", base_folder, *words, *FEW_STEPS, *wrong)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_second_training_into_the_same_folder_is_refused_before_anything_is_loaded(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--tasks", data / "tasks", "--num-demonstrations", 2, *FEW_STEPS, "--output-dir", tmp_path / "out"]
    assert mend("finetune", "--base-model", base_folder, *NEW_DISTILLER, *words).code == 0
    result = mend("finetune", "--base-model", "no/such-model", *NEW_DISTILLER, *words)
    assert result.code == 2
    assert "without checkpoints for a new training" in result.err


def test_finetune_holds_out_tasks_and_logs_the_loss_on_them(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, "--num-eval-tasks", 1]
    result = mend("finetune", *words, "--output-dir", tmp_path, *NEW_DISTILLER, *FEW_STEPS)
    assert result.code == 0, result.err
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    assert [entry["eval_loss"] > 0 for entry in log if "eval_loss" in entry] == [True] * 2


@pytest.mark.parametrize(("options", "kept"), [([], 2), (["--no-load-best-model-at-end"], 4)])
def test_finetune_saves_the_checkpoint_that_is_best_on_held_out_tasks(
    mend: Mend,
    base_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    kept: int,
) -> None:
    evaluate = MendTrainer.evaluate

    def rise_from_step_2(trainer: MendTrainer, *args: object, **kwargs: object) -> dict[str, float]:
        return evaluate(trainer, *args, **kwargs) | {"eval_loss": abs(trainer.state.global_step - 2.0)}

    monkeypatch.setattr(MendTrainer, "evaluate", rise_from_step_2)
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, "--num-eval-tasks", 1]
    result = mend("finetune", *words, "--output-dir", tmp_path, *NEW_DISTILLER, *FEW_STEPS, *options)
    assert result.code == 0, result.err
    saved, best = (
        load_file(folder / "mend_model.safetensors") for folder in (tmp_path, tmp_path / f"checkpoint-{kept}")
    )
    assert [name for name in saved if not torch.equal(saved[name], best[name])] == []


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.zst"])
def test_pretrain_reads_text_as_a_stream(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr("mend_hf.data.text.TextDataset.__init__")
    lines = (data / "text.jsonl").read_bytes()
    (tmp_path / name).write_bytes(zstandard.compress(lines) if name.endswith(".zst") else lines)
    words = ["--base-model", base_folder, "--streaming", *NEW_DISTILLER, *FEW_STEPS, "--probe-rows", 0]
    result = mend("pretrain", *words, "--text", tmp_path / name, "--output-dir", tmp_path / "out")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "checkpoint-4" / "mend_model.safetensors").is_file()
    missing = mend("pretrain", *words, "--text", tmp_path / "none.jsonl", "--output-dir", tmp_path / "other")
    assert_refused(missing, "none.jsonl, got none: check the path")


def test_steps_of_rows_of_like_length_are_asked_for_by_name(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, *NEW_DISTILLER, *FEW_STEPS, "--group-by-length", "--output-dir", tmp_path]
    result = mend("finetune", *words, "--tasks", data / "tasks", "--num-demonstrations", "1-6")
    assert result.code == 0, result.err
    run = json.loads((tmp_path / "checkpoint-4" / "training_run.json").read_text())
    assert run["arguments"]["train_sampling_strategy"] == "group_by_length"
    words[-1] = tmp_path / "other"
    streamed = mend("pretrain", *words, "--text", data / "text.jsonl", "--streaming")
    assert_refused(streamed, "rows that come as a stream", "leave it out")


def test_finetune_writes_rows_in_the_formats_that_are_named(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["finetune", "--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2]
    words += [*NEW_DISTILLER, *FEW_STEPS]
    weights = []
    for name, options in (
        ("own", []),
        ("same", ["--prompt-format", "plain"]),
        ("mixed", ["--prompt-format", "plain", "--prompt-format", '{"input_prefix": "good "}']),
    ):
        result = mend(*words, "--output-dir", tmp_path / name, *options)
        assert result.code == 0, result.err
        weights.append(load_file(tmp_path / name / "mend_model.safetensors"))
    own, same, mixed = weights
    assert [name for name in own if not torch.equal(own[name], same[name])] == []
    assert [name for name in own if not torch.equal(own[name], mixed[name])] != []
    refused = [*words, "--output-dir", tmp_path / "refused", "--prompt-format"]
    assert_refused(mend(*refused, "chat"), "set tokenizer.chat_template")
    assert_refused(mend(*refused, '{"input_prefix"'), "a JSON object as --prompt-format")
    assert not (tmp_path / "refused").exists()


def test_finetune_refuses_tasks_on_two_sides(mend: Mend, base_folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["finetune", "--base-model", base_folder, "--output-dir", tmp_path / "out", "--tasks", data / "tasks"]
    film = data / "tasks" / "film.train.jsonl"
    assert_refused(mend(*words, "--eval-tasks", film), "training and evaluation tasks to differ, got film")
    partition = ["--partition", data / "partition.json", "--eval-tasks", data / "tasks" / "plant.train.jsonl"]
    assert_refused(mend(*words, *partition), "evaluation and test tasks to differ, got plant")
    assert_refused(mend(*words, "--eval-tasks", film, "--num-eval-tasks", 1), "got both: leave one out")
    assert_refused(mend(*words, "--load-best-model-at-end"), "add --num-eval-tasks or --eval-tasks")
    assert_refused(mend(*words, "--num-eval-tasks", 2), "hold out fewer")


def test_a_training_shows_every_step_and_what_came_of_it_without_noise(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, *NEW_DISTILLER]
    result = mend("finetune", *words, *FEW_STEPS, "--num-eval-tasks", 1, "--output-dir", tmp_path)
    assert (result.code, result.err) == (0, "")
    first, *lines, last = result.out.splitlines()
    assert first.startswith("trainable params: ")
    starts = [r"step 0/4  probe: nll \S+ \(zero-shot \S+, teacher \S+\), KL "]
    for step in (1, 2, 3, 4):
        starts += [rf"step {step}/4  probe: nll "] * (step == 4) + [
            rf"step {step}/4  loss \S+  nll \S+  kd \S+  \S+ rows/s "
        ]
        starts += [rf"step {step}/4  held out: loss \S+  nll "] * (step % 2 == 0)
    starts += [
        r"4 steps in 0:0\S+ \(teacher ",
        r"loss \S+ -> ",
        r"probe: nll \S+ -> \S+ \(zero-shot \S+, teacher \S+\), KL \S+ -> ",
    ]
    assert len(lines) == len(starts)
    assert [line for start, line in zip(starts, lines, strict=True) if not re.match(start, line)] == []
    assert last == f"Saved the distiller in {tmp_path}"
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    assert all(isinstance(value, int | float) for entry in log for value in entry.values())


def test_a_training_without_probe_rows_probes_nothing(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2, *NEW_DISTILLER]
    result = mend("finetune", *words, *FEW_STEPS, "--probe-rows", 0, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "probe:" not in result.out


def test_a_finished_training_leaves_the_other_processes(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_when_left = []
    where = tmp_path / "training_log.json"
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda _: saved_when_left.append(where.is_file()))
    words = ["--base-model", base_folder, "--text", data / "text.jsonl", "--output-dir", tmp_path, *NEW_DISTILLER]
    assert mend("pretrain", *words, "--num-rows", 2, "--batch-size", 2).code == 0
    assert saved_when_left == [True]


def test_without_matplotlib_a_training_says_so_and_goes_on(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["--base-model", base_folder, "--text", data / "text.jsonl", "--output-dir", tmp_path, *NEW_DISTILLER]
    result = mend("pretrain", *words, "--num-rows", 2, "--batch-size", 2)
    assert result.code == 0, result.err
    assert "No training_curves.png: Expected the package" in result.out
    assert 'pip install "mend_hf[train]"' in result.out
    assert not (tmp_path / "training_curves.png").exists()


def test_resume_after_a_stop_ends_where_an_unbroken_training_ends(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["finetune", "--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2]
    words += [*NEW_DISTILLER, *FEW_STEPS, "--output-dir"]
    assert mend(*words, tmp_path / "whole").code == 0
    step = MendTrainer.training_step

    def stop_at_step_3(trainer: MendTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MendTrainer, "training_step", stop_at_step_3)
        assert mend(*words, tmp_path / "stopped").code != 0
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint-2", "training_curves.png"}
    assert mend(*words, tmp_path / "stopped", "--resume").code == 0
    whole, resumed = (load_file(tmp_path / name / "mend_model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_prefix_form_and_settings_reach_a_new_distiller(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--base-model", base_folder, "--text", data / "text.jsonl", "--output-dir", tmp_path]
    settings = ["--prefix-form", "embeds", "--set", "projection=tanh", "--set", 'lora_target_modules=["q_proj"]']
    result = mend("pretrain", *words, *settings, *NEW_DISTILLER, "--num-rows", 2, "--batch-size", 2)
    assert result.code == 0, result.err
    config = MendConfig.from_pretrained(tmp_path)
    assert (config.prefix_form, config.projection, config.lora_target_modules) == ("embeds", "tanh", ("q_proj",))
    assert "base_vectors" in load_file(tmp_path / "mend_model.safetensors")


def test_without_a_distiller_the_training_free_anchors_answer(mend: Mend, base_folder: Path, data: Path) -> None:
    words = ["--base-model", base_folder, "--demonstrations", data / "mine.jsonl"]
    result = mend("generate", *words, "--max-new-tokens", 2, "good film")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1


@pytest.mark.parametrize("options", ["positive", "positive,", "positive, positive"])
def test_options_that_are_no_choice_are_refused_before_a_model_is_loaded(
    mend: Mend, tmp_path: Path, options: str
) -> None:
    words = ["generate", "--base-model", tmp_path / "is_never_looked_for", "--options", options, "good film"]
    assert_refused(mend(*words), "two or more different answers with commas", repr(options))


def test_calibrating_without_options_or_raw_demonstrations_is_refused(mend: Mend, tmp_path: Path, data: Path) -> None:
    words = ["generate", "--base-model", tmp_path / "is_never_looked_for", "--calibrate", "good film"]
    assert_refused(mend(*words, "--demonstrations", data / "mine.jsonl"), "got no --options")
    assert_refused(mend(*words, "--options", "a,b"), "raw demonstrations to --calibrate by, got none")


def test_info_shows_a_distiller_and_what_it_distilled(
    mend: Mend, distiller_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--distiller", distiller_folder, "--demonstrations", data / "mine.jsonl", "--output-dir", tmp_path]
    assert mend("distill", *words).code == 0
    for folder, facts in (
        (distiller_folder, ("num_virtual_tokens", "mend_model.safetensors")),
        (tmp_path, ("slots", "demonstrations_hash", str(distiller_folder))),
    ):
        result = mend("info", folder)
        assert (result.code, result.err) == (0, "")
        assert [fact for fact in facts if fact not in result.out] == []


def test_evaluate_prints_and_keeps_a_table_and_goes_on_after_a_stop(
    mend: Mend, base_folder: Path, distiller_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--distiller", distiller_folder, "--tasks", data / "tasks", "--output-dir", tmp_path]
    words += ["--partition", data / "partition.json", "--num-demonstrations", 4, "--max-queries", 3]
    result = mend(*words, "--seeds", "13")
    assert result.code == 0, result.err
    table = (tmp_path / "results.md").read_text()
    for method in set(METHODS) - TRAINED_METHODS:
        assert f"plant, seed 13, {method}: " in result.out
        assert f"| {method} |" in table
    assert not any(f"| {method} |" in table for method in TRAINED_METHODS)
    assert "film" not in table  # a training task
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert {(row["task"], row["seed"]) for row in map(json.loads, lines)} == {("plant", 13)}

    (tmp_path / "results.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    result = mend(*words, "--seeds", "13,21")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(lines)
    assert rows[:2] == [json.loads(line) for line in lines[:2]]
    assert_refused(mend(*words[:-1], 2), "max_queries", "--overwrite")


def test_evaluate_trains_a_prompt_when_asked_and_names_all_methods_in_its_help(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--base-model", base_folder, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    result = mend(*words, "--num-demonstrations", 2, "--method", "prompt tuning", "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "film, seed 13, prompt tuning: " in result.out
    [option] = [p for p in typer.main.get_command(app).commands["evaluate"].params if p.name == "method"]
    assert option.help.partition(": ")[2].startswith("; ".join(METHODS) + ". Default: ")


def test_evaluate_compares_other_distillers_and_other_models_and_loads_the_base_model_once(
    mend: Mend,
    base_folder: Path,
    data: Path,
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, other = tmp_path / "short", tmp_path / "embeds"
    for folder, settings in ((first, {"input_prefix": ""}), (other, {"prefix_form": "embeds"})):
        base = tiny_model("llama")
        base.name_or_path = str(base_folder)
        get_mend_model(base, MendConfig(num_virtual_tokens=5, **settings)).save_pretrained(folder)
    loaded = []
    load = auto.load_language_model
    monkeypatch.setattr(
        auto, "load_language_model", lambda place, **options: loaded.append(place) or load(place, **options)
    )
    words = ["evaluate", "--distiller", first, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--num-demonstrations", 2, "--method", "in-context", "--output-dir", tmp_path / "out"]
    result = mend(*words, "--compare", f"embeds={other}", "--compare", f"tuned={base_folder}")
    assert result.code == 0, result.err
    rows = {
        row["method"]: row for row in map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    }
    assert list(rows) == ["in-context", "embeds", "tuned"]
    assert rows["embeds"]["prefix_slots"] == 5
    assert rows["tuned"]["prefix_slots"] == rows["in-context"]["prefix_slots"]  # in the distiller's prompt format
    assert loaded == [str(base_folder)] * 2  # the base model, and "tuned"
    assert_refused(mend(*words, "--compare", f"embeds={base_folder}"), "other compare", "--overwrite")


def test_dtype_is_that_of_every_base_model_and_of_no_distiller(
    mend: Mend, base_folder: Path, distiller_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = auto.load_language_model

    def load_and_note(place: str, **options: object) -> PreTrainedModel:
        loaded.append(load(place, **options))
        return loaded[-1]

    monkeypatch.setattr(auto, "load_language_model", load_and_note)
    words = ["evaluate", "--distiller", distiller_folder, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--num-demonstrations", 2, "--method", "MEND", "--output-dir", tmp_path / "scores"]
    result = mend(*words, "--dtype", "bfloat16", "--compare", f"tuned={base_folder}")
    assert result.code == 0, result.err
    assert [model.dtype for model in loaded] == [torch.bfloat16] * 2
    assert_refused(mend(*words, "--compare", f"tuned={base_folder}"), "other dtype", "--overwrite")

    words = ["finetune", "--distiller", distiller_folder, "--tasks", data / "tasks", "--num-demonstrations", 2]
    result = mend(*words, *FEW_STEPS, "--dtype", "bfloat16", "--arg", "bf16=true", "--output-dir", tmp_path / "stage2")
    assert result.code == 0, result.err
    assert loaded[-1].dtype == torch.bfloat16
    assert {weight.dtype for weight in load_file(tmp_path / "stage2" / "mend_model.safetensors").values()} == {
        torch.float32
    }
    words = ["--distiller", tmp_path / "stage2", "--demonstrations", data / "mine.jsonl"]
    words += ["--output-dir", tmp_path / "distilled"]
    assert mend("distill", *words, "--dtype", "bfloat16").code == 0
    assert loaded[-1].dtype == torch.bfloat16
    result = mend("distill", *words, "--dtype", "half")
    assert (result.code, "'half' is not one of 'auto', 'float32'" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--compare", "MEND=elsewhere"], ["'MEND' again: choose another"]),
        (["--compare", "a=here", "--compare", "a=there"], ["'a' again: choose another"]),
        (["--compare", "elsewhere"], ["NAME=FOLDER_OR_HUB_ID, got 'elsewhere'"]),
        (["--compare", "=elsewhere"], ["NAME=FOLDER_OR_HUB_ID"]),
        (
            ["--compare", "other=nowhere/at/all"],
            ["Expected a base model in a folder", "nowhere/at/all", "or a .gguf file"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_and_leaves_nothing(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    start = ["evaluate", "--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2]
    assert_refused(mend(*start, "--output-dir", tmp_path / "out", *words), *parts)
    assert not (tmp_path / "out").exists()


def test_evaluate_scores_free_form_tasks(mend: Mend, base_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"input": f"{split} {word}", "output": "a song"} for word in ("one", "two")]
        write_lines(tmp_path / f"song.{split}.jsonl", rows)
    words = ["--base-model", base_folder, "--tasks", tmp_path, "--output-dir", tmp_path / "out"]
    result = mend("evaluate", *words, "--num-demonstrations", 2, "--seeds", "13")
    assert result.code == 0, result.err
    assert "rouge_l" in (tmp_path / "out" / "results.md").read_text()


def test_evaluate_by_channel_is_another_evaluation(mend: Mend, base_folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--base-model", base_folder, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--num-demonstrations", 2, "--method", "in-context", "--output-dir", tmp_path]
    result = mend(*words, "--scoring", "channel")
    assert result.code == 0, result.err
    [row] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["scoring"] == "channel"
    result = mend(*words)
    assert result.code == 0, result.err
    table = (tmp_path / "results.md").read_text()
    assert "| in-context, direct |" in table
    assert "| in-context, channel |" in table


def test_evaluate_changes_demonstrations_and_their_number(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--base-model", base_folder, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--method", "in-context", "--max-queries", 2, "--output-dir", tmp_path, "--metric", "accuracy"]
    words += ["--num-demonstrations", "1,2", "--variation", "as given", "--variation", "wrong labels"]
    result = mend(*words)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {(row["num_demonstrations"], row["variation"]) for row in rows}
    assert found == {(1, "as given"), (1, "wrong labels"), (2, "as given"), (2, "wrong labels")}
    assert {row["metric"] for row in rows} == {"accuracy"}
    assert "| in-context, k = 2, wrong labels |" in (tmp_path / "results.md").read_text()
    assert all(row["flops_per_query"] > 0 for row in rows)


def test_evaluate_counts_queries_whose_answer_cannot_be_chosen_only_where_asked(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "tasks", tmp_path / "tasks")
    path = tmp_path / "tasks" / "film.test.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps(row | {"output": "mixed"}) + "\n")
    num_lines = len(path.read_text().splitlines())
    words = ["evaluate", "--base-model", base_folder, "--tasks", tmp_path / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--method", "zero-shot", "--num-demonstrations", 1, "--output-dir", tmp_path / "out"]
    assert_refused(mend(*words), f"film.test.jsonl:{num_lines}", "among the options", "'mixed'")
    assert not (tmp_path / "out").exists()
    result = mend(*words, "--on-missing-gold", "wrong")
    assert result.code == 0, result.err
    [row] = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (row["num_unanswerable"], row["num_queries"]) == (1, num_lines)


def test_a_distiller_trained_anew_in_its_folder_is_another_one(
    mend: Mend, distiller_folder: Path, data: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "--distiller", distiller_folder, "--tasks", data / "tasks", "--task", "film", "--seeds", "13"]
    words += ["--method", "zero-shot", "--num-demonstrations", 1, "--output-dir", tmp_path]
    assert mend(*words).code == 0
    path = distiller_folder / "mend_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"weights_sha256": "0"}))
        assert_refused(mend(*words), "other distiller_hashes", "--overwrite")
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seeds", "13;21"], ["numbers with commas"]),
        (["--method", "magic"], ["zero-shot", "magic"]),
        (["--task", "plants"], ["nearest: plant"]),
        (["--partition", "class_to_clas"], ["class_to_class, hr_to_lr"]),
        (["--metric", "bleu"], ["among macro_f1", "bleu"]),
        (["--variation", "upside down"], ["among as given", "upside down"]),
        (["--num-demonstrations", 50], ["ask for fewer demonstrations"]),
        (["--distiller", "nowhere/at/all"], ["mend_config.json", "nowhere/at/all"]),
    ],
    ids=str,
)
def test_bad_input_of_evaluate_is_refused_and_leaves_nothing(
    mend: Mend, base_folder: Path, data: Path, tmp_path: Path, words: list[object], parts: list[str]
) -> None:
    start = ["evaluate", "--base-model", base_folder, "--tasks", data / "tasks", "--num-demonstrations", 2]
    assert_refused(mend(*start, "--output-dir", tmp_path / "out", *words), *parts)
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_queries_that_are_demonstrations(mend: Mend, base_folder: Path, tmp_path: Path) -> None:
    rows = [{"task": "films", "input": f"film {n}", "output": "bad"} for n in range(6)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--base-model", base_folder, "--tasks", tmp_path / "films.jsonl", "--num-demonstrations", "2"]
    result = mend("evaluate", *words, "--output-dir", tmp_path / "scores")
    assert result.code == 2
    assert "both sides of films" in result.err
    assert not (tmp_path / "scores").exists()


def test_lost_tokens_are_a_warning_on_stderr(
    mend: Mend, distiller_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "long.jsonl", [{"input": " ".join([SENTENCE] * 30), "output": "positive"}])
    words = ["--distiller", distiller_folder, "--demonstrations", tmp_path / "long.jsonl"]
    result = mend("distill", *words, "--output-dir", tmp_path / "out")
    assert result.code == 0
    assert result.err.startswith("warning: ")
    assert "demonstration tokens were cut away" in result.err


BAD_FILES = {
    "broken.jsonl": ('{"input": "good", "output": "yes"}\n{"input": "bad", "out\n', "broken.jsonl:2"),
    "no_output.jsonl": ('{"input": "good"}\n', "no_output.jsonl:1"),
    "number.jsonl": ('{"input": "good", "output": 1}\n', "convert it to text"),
    "empty.jsonl": ("", "got an empty file"),
    "demonstrations.csv": ("input,output\n", "convert or rename it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_demonstrations_are_refused_before_a_model_is_loaded(mend: Mend, tmp_path: Path, name: str) -> None:
    text, remedy = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    words = ["--base-model", tmp_path / "is_never_looked_for", "--demonstrations", tmp_path / name]
    assert_refused(mend("distill", *words, "--output-dir", tmp_path / "out"), remedy)
    assert_refused(mend("generate", *words, "good film"), remedy)
    assert not (tmp_path / "out").exists()


def test_truncated_zstandard_file_is_refused(mend: Mend, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl.zst"
    path.write_bytes(zstandard.compress((data / "text.jsonl").read_bytes())[:-20])
    words = ["--base-model", tmp_path / "is_never_looked_for", "--text", path, "--output-dir", tmp_path / "out"]
    assert_refused(mend("pretrain", *words), "truncated", str(path), "fetch it again")
    assert not (tmp_path / "out").exists()


def test_bad_tasks_are_refused(mend: Mend, data: Path, tmp_path: Path) -> None:
    words = ["finetune", "--base-model", tmp_path / "is_never_looked_for", "--output-dir", tmp_path / "out", "--tasks"]
    partition = tmp_path / "partition.json"
    partition.write_text('{"train": ["plants"], "test": []}')
    assert_refused(mend(*words, data / "tasks", "--partition", partition), "'plants'", "nearest: plant")
    partition.write_text('{"train": ["film"], "test": ["plants"]}')
    assert_refused(mend(*words, data / "tasks", "--partition", partition), "'plants'", "nearest: plant")
    partition.write_text('{"train": ["film"], "test": ["film"]}')
    assert_refused(mend(*words, data / "tasks", "--partition", partition), "film on both sides")
    assert_refused(mend(*words, data / "tasks", "--num-demonstrations", "few"), "'few'")
    assert_refused(mend(*words, data / "tasks", "--num-demonstrations", "8-4"), "(8, 4)", "here (4, 8)")
    assert_refused(mend(*words, tmp_path / "nothing"), "neither a file nor a folder here", str(tmp_path / "nothing"))
    assert_refused(mend(*words, data / "mine.jsonl"), "mine.jsonl:1", "a field 'task'", "TASK.train.jsonl")
    assert_refused(mend(*words, data / "tasks", "--num-demonstrations", 2, "--num-eval-tasks", 2), "hold out fewer")
    assert_refused(mend(*words, data / "tasks", "--num-demonstrations", 50), "ask for fewer demonstrations")
    row = {"task": "odd", "input": "good", "output": "maybe", "options": ["yes", "no"]}
    write_lines(tmp_path / "odd.train.jsonl", [row])
    assert_refused(mend(*words, tmp_path), "odd.train.jsonl:1", "an output among the options")
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_a_file_is_refused(
    mend: Mend, distiller_folder: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for words in (
        ["pretrain", "--base-model", tmp_path / "is_never_looked_for", "--text", data / "text.jsonl"],
        ["finetune", "--base-model", tmp_path / "is_never_looked_for", "--tasks", data / "tasks"],
        ["evaluate", "--base-model", tmp_path / "is_never_looked_for", "--tasks", data / "tasks"],
        ["distill", "--distiller", distiller_folder, "--demonstrations", data / "mine.jsonl"],
    ):
        assert_refused(mend(*words, "--output-dir", tmp_path / "file"), "got the file", "give another path")
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_settings_are_refused(mend: Mend, distiller_folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["pretrain", "--text", data / "text.jsonl", "--output-dir", tmp_path / "out"]
    base = ["--base-model", tmp_path / "is_never_looked_for"]
    assert_refused(mend(*words, *base, "--set", "lorar=4"), "a field of MendConfig", "lora_r", "'lorar=4'")
    assert_refused(mend(*words, *base, "--set", "lora_r"), "name=value")
    both = ["--set", "lora_r=-3", "--set", "projection=cubic"]
    assert_refused(mend(*words, *base, *both), "lora_r: expected at least 0", "projection: expected 'linear'")
    assert_refused(mend(*words, *base, "--prefix-form", "keys"), "prefix_form: expected 'kv' or 'embeds'")
    assert_refused(mend(*words, "--distiller", distiller_folder, "--set", "lora_r=4"), "leave them out")
    assert not (tmp_path / "out").exists()


def test_neither_base_model_nor_distiller_is_refused(mend: Mend, data: Path, tmp_path: Path) -> None:
    for words in (
        ["pretrain", "--text", data / "text.jsonl", "--output-dir", tmp_path / "out"],
        ["finetune", "--tasks", data / "tasks", "--num-demonstrations", "2", "--output-dir", tmp_path / "out"],
        ["distill", "--demonstrations", data / "mine.jsonl", "--output-dir", tmp_path / "out"],
        ["evaluate", "--tasks", data / "tasks", "--output-dir", tmp_path / "out"],
        ["generate", "good film"],
    ):
        assert_refused(mend(*words), "--base-model", "--distiller", "got neither")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_refused(mend: Mend, base_folder: Path, data: Path, tmp_path: Path) -> None:
    mine, nowhere = ["--demonstrations", data / "mine.jsonl"], tmp_path / "nowhere"
    assert_refused(
        mend("generate", "--base-model", nowhere, *mine, "good film"), "Expected a base model", str(nowhere)
    )
    file, out = tmp_path / "nope.gguf", ["--output-dir", tmp_path / "out"]
    assert_refused(
        mend("generate", "--base-model", file, *mine, "good film"), f"a file at {file}, got none: check the"
    )
    for words in (["generate", "good film"], ["distill", *out], ["export-peft", *out]):  # before the base model
        result = mend(*words, "--distiller", nowhere, "--base-model", file, *mine)
        assert_refused(result, "mend_config.json", str(nowhere))
    for place in (nowhere, data):
        both = ["mend_config.json", "distilled_demonstrations.json", f"in {place}, got n"]
        assert_refused(mend("info", place), *both, "check the path")
    words = ["generate", "--base-model", base_folder, "--demonstrations"]
    assert_refused(mend(*words, base_folder, "good film"), "distilled_demonstrations.json", str(base_folder))
    result = mend(*words, nowhere, "good film")
    assert_refused(result, "Expected a file", "or a folder that `mend distill` wrote", str(nowhere))


def test_another_base_model_is_refused(
    mend: Mend,
    distiller_folder: Path,
    data: Path,
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    mine = ["--demonstrations", data / "mine.jsonl"]
    other = ["--base-model", tmp_path / "gpt2"]
    result = mend("generate", *other, "--distiller", distiller_folder, *mine, "good film")
    assert_refused(result, "The distiller belongs to another base model", "architecture: expected LlamaForCausalLM")
    assert mend("distill", "--distiller", distiller_folder, *mine, "--output-dir", tmp_path / "out").code == 0
    result = mend("generate", *other, "--demonstrations", tmp_path / "out", "good film")
    assert_refused(result, "What was distilled belongs to another base model")
