"""The display of a training: what a terminal shows, what a pipe gets, and who keeps quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from mend_hf import progress as module
from mend_hf.progress import TrainingProgress

SPEED = {"rows_per_second": 4.312, "teacher_time_fraction": 0.25, "distiller_time_fraction": 0.0}
PROBE = {"probe_zero_shot_nll": 9.87, "probe_teacher_nll": 1.86}


class Clock:
    """A clock that goes on by ten seconds whenever it is read."""

    now = 0.0

    def perf_counter(self):
        self.now += 10
        return self.now


def train(tmp_path, monkeypatch, *, terminal, is_main=True, disable_tqdm=False, stop=None, width=80):
    """Show a training of three steps, of which the first was done before, and return what was written."""
    monkeypatch.setattr(module, "time", Clock())
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=disable_tqdm)
    state = TrainerState(max_steps=3, global_step=1, is_world_process_zero=is_main, is_local_process_zero=True)
    control, out = TrainerControl(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, force_interactive=terminal, width=width, color_system=None)
    with TrainingProgress(console) as shown:
        shown.on_train_begin(args, state, control)
        shown.on_log(args, state, control, {**PROBE, "probe_nll": 9.5, "probe_kl": 2.0})
        for step in (2, 3):
            state.global_step = step
            shown.on_step_end(args, state, control)
            losses = {"loss": 6.0 / step, "nll_loss": 4.0 / step, "kd_loss": 2.0 / step, "learning_rate": 5e-4}
            shown.on_log(args, state, control, losses | SPEED | {"rest_time_fraction": 0.75})
            shown.on_log(args, state, control, {"eval_loss": 5.0, "eval_kd_loss": 2.5, "eval_runtime": 3.0})
            if step == stop:
                raise KeyboardInterrupt
        shown.on_log(args, state, control, {**PROBE, "probe_nll": 1.5, "probe_kl": 0.5})
        shown.on_log(args, state, control, {"train_runtime": 9.0, "train_loss": 2.5})
        shown.on_train_end(args, state, control)
    return out.getvalue()


LINES = """\
step 1/3  probe: nll 9.500 (zero-shot 9.870, teacher 1.860), KL 2.000
step 2/3  loss 3.000  nll 2.000  kd 1.000  4.31 rows/s  lr 5.0e-04  0:00:10 left
step 2/3  held out: loss 5.000  kd 2.500
step 3/3  loss 2.000  nll 1.333  kd 0.667  4.31 rows/s  lr 5.0e-04  0:00:00 left
step 3/3  held out: loss 5.000  kd 2.500
step 3/3  probe: nll 1.500 (zero-shot 9.870, teacher 1.860), KL 0.500
2 steps in 0:00:30 (teacher 25%, rest 75%)
loss 3.000 -> 2.000
probe: nll 9.500 -> 1.500 (zero-shot 9.870, teacher 1.860), KL 2.000 -> 0.500
"""


@pytest.mark.parametrize("width", [20, 80])
def test_a_pipe_gets_a_line_for_every_log_however_narrow_it_claims_to_be(tmp_path, monkeypatch, width):
    assert train(tmp_path, monkeypatch, terminal=False, width=width) == LINES


def test_a_terminal_without_a_bar_gets_the_same_lines(tmp_path, monkeypatch):
    assert train(tmp_path, monkeypatch, terminal=True, disable_tqdm=True) == LINES


def test_a_terminal_shows_a_bar_of_one_line_with_losses_speed_and_time_left(tmp_path, monkeypatch):
    written = train(tmp_path, monkeypatch, terminal=True)
    frames = [frame for frame in written.replace("\r", "\n").split("\n") if "3/3 " in frame and "step" not in frame]
    assert "━" in frames[-1]
    assert frames[-1].endswith("loss 2.000  nll 1.333  kd 0.667  4.31 rows/s 0:00:00 left")
    assert len(frames[-1].removeprefix("\x1b[2K")) == 80
    assert "loss 3.000  nll" not in "".join(line for line in written.split("\n") if line.startswith("step"))
    for line in LINES.splitlines():
        if "lr" not in line:
            assert line in written


def test_the_bar_says_why_it_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=False)
    state, control = TrainerState(max_steps=3), TrainerControl()
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=80, color_system=None)
    said = []
    with TrainingProgress(console) as shown:
        shown.on_prediction_step(args, state, control)  # of an evaluation before the training
        shown.on_train_begin(args, state, control)
        state.global_step = 1
        for event in (shown.on_step_end, shown.on_prediction_step, shown.on_evaluate):
            event(args, state, control)
            said.append(shown._bar.tasks[0].fields["left"])
    assert said == ["0:00:20 left", "evaluating", "0:00:40 left"]


def test_only_the_main_process_shows_anything(tmp_path, monkeypatch):
    for terminal in (False, True):
        assert train(tmp_path, monkeypatch, terminal=terminal, is_main=False) == ""


def test_a_training_that_breaks_off_gives_the_terminal_back(tmp_path, monkeypatch):
    shown = []
    show_cursor = Console.show_cursor
    monkeypatch.setattr(
        Console, "show_cursor", lambda console, show: (shown.append(show), show_cursor(console, show))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, monkeypatch, terminal=True, stop=2)
    assert shown == [False, True]
