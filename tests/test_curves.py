"""The picture of a training: what is in it, when it is drawn, and what happens where it cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from mend_hf import curves
from mend_hf.curves import CURVES_NAME, TrainingCurves, plot_training
from mend_hf.errors import DataError, MissingExtraError

PNG = b"\x89PNG\r\n\x1a\n"


def make_log(num_steps, *, with_probe=True):
    log = []
    for step in range(num_steps + 1):
        if with_probe:
            probe = {"probe_nll": 9 / (step + 1), "probe_kl": 2 / (step + 1)}
            log.append({"step": step, **probe, "probe_teacher_nll": 1.86, "probe_zero_shot_nll": 9.87})
        if step:
            losses = {"loss": 6 / step, "nll_loss": 4 / step, "kd_loss": 2 / step, "learning_rate": 1e-4 / step}
            log.append({"step": step, **losses, "rows_per_second": 4.3, "tokens_per_second": 1234.5,
                        "teacher_time_fraction": 0.2, "rest_time_fraction": 0.8})  # fmt: skip
    return log


@pytest.fixture
def figures(monkeypatch):
    """All figures that are drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []

    class Figure(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(curves, "_import_figure", lambda: Figure)
    return drawn


def curves_of(axes):
    """The labelled lines of a panel, by their labels, as lists of points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_the_panels_show_what_was_logged(figures, tmp_path):
    plot_training(make_log(3), tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(PNG)
    losses, rate, nll, kl = figures[0].get_axes()
    shown = curves_of(losses)
    assert shown["loss (weighted sum)"] == [(1, 6), (2, 3), (3, 2)]
    assert shown["NLL of the targets"] == [(1, 4), (2, 2), (3, 4 / 3)]
    assert shown["divergence from the teacher"] == [(1, 2), (2, 1), (3, 2 / 3)]
    assert list(curves_of(rate).values()) == [[(1, 1e-4), (2, 5e-5), (3, 1e-4 / 3)]]
    shown = curves_of(nll)
    assert shown["student (prefix): 2.25"] == [(0, 9), (1, 4.5), (2, 3), (3, 2.25)]
    assert {height for _, height in shown["teacher (full text): 1.86"]} == {1.86}
    assert {height for _, height in shown["zero-shot: 9.87"]} == {9.87}
    assert curves_of(kl)["KL(teacher ‖ student): 0.5"] == [(0, 2), (1, 1), (2, 2 / 3), (3, 0.5)]
    assert figures[0].get_suptitle() == "step 3  ·  4.3 rows/s, 1,234 tokens/s  ·  time: teacher 20%, rest 80%"
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_ylabel() for axes in figures[0].get_axes())


def test_without_a_probe_there_are_two_panels_and_held_out_losses_are_points(figures, tmp_path):
    log = [*make_log(3, with_probe=False), {"step": 2, "eval_loss": 7.0, "eval_nll_loss": 5.0}]
    plot_training(log, tmp_path / "curves.png")
    losses, _ = figures[0].get_axes()
    shown = curves_of(losses)
    assert (shown["loss (weighted sum), held out"], shown["NLL of the targets, held out"]) == ([(2, 7)], [(2, 5)])


def test_many_points_are_shown_with_their_running_mean(figures, tmp_path):
    log = [{"step": step, "loss": float(step % 2), "learning_rate": 0.0} for step in range(1, 101)]
    plot_training(log, tmp_path / "curves.png")
    lines = figures[0].get_axes()[0].get_lines()
    assert [len(line.get_ydata()) for line in lines] == [100, 100]
    assert lines[1].get_ydata()[50] == pytest.approx(5 / 11)  # 5 on either side


def test_a_loss_that_is_all_that_is_trained_is_drawn_once_and_what_is_not_finite_is_left_out(figures, tmp_path):
    log = [
        {"step": step, "loss": value, "kd_loss": value, "nll_loss": 7.0}
        for step, value in [(1, 2.0), (2, float("nan")), (3, 1.0)]
    ]
    plot_training(log, tmp_path / "curves.png")
    shown = curves_of(figures[0].get_axes()[0])
    assert sorted(shown) == ["NLL of the targets", "divergence from the teacher"]
    assert shown["divergence from the teacher"] == [(1, 2), (3, 1)]


def test_a_kept_log_is_drawn_in_the_format_of_the_suffix(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "training_log.json").write_text(json.dumps({"log": make_log(2)}))
    plot_training(json.loads((tmp_path / "training_log.json").read_text())["log"], tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_log_without_losses_is_refused(tmp_path):
    with pytest.raises(DataError, match="train for at least logging_steps steps"):
        plot_training([{"step": 0, "probe_nll": 1.0}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_named_with_its_extra_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mend_hf\[train\]"'):
        TrainingCurves()


def watch(folder, log, *, behind=(), is_main=True):
    """Let a training save and end; return whether there was a picture when it had saved.

    Args:
        folder: The output folder.
        log: What is logged before the training is saved.
        behind: What is logged between that and the end.
        is_main: This is the main process.
    """
    args = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    state = TrainerState(log_history=log, is_world_process_zero=is_main)
    callback = TrainingCurves()
    callback.on_save(args, state, TrainerControl())
    written = (folder / CURVES_NAME).exists()
    state.log_history = [*log, *behind, {"step": 9, "train_runtime": 3.0}]
    callback.on_train_end(args, state, TrainerControl())
    return written


def test_it_is_drawn_at_every_save_and_at_the_end_by_the_main_process(figures, tmp_path):
    assert watch(tmp_path, make_log(1), behind=make_log(2))
    assert len(figures) == 2
    assert [path.name for path in tmp_path.iterdir()] == [CURVES_NAME]
    assert not watch(tmp_path / "other", make_log(1), is_main=False)
    assert not watch(tmp_path / "empty", [])
    assert len(figures) == 2


def test_it_is_not_drawn_again_where_nothing_was_logged_since_the_save(figures, tmp_path):
    assert watch(tmp_path, make_log(1))
    assert len(figures) == 1


def test_a_picture_that_cannot_be_written_stops_no_training_and_leaves_the_last_one(figures, tmp_path, monkeypatch):
    assert watch(tmp_path, make_log(1))
    before = (tmp_path / CURVES_NAME).read_bytes()

    def fail(figure, path, **_):
        Path(path).write_bytes(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.warns(UserWarning, match="was not written.*No space left"):
        watch(tmp_path, make_log(2))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(CURVES_NAME, before)]
