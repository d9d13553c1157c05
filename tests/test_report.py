"""Reports: tables in every format, pictures, and a page that opens from the file system."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run_mend

from mend_hf.data.partition import load_partition
from mend_hf.errors import DataError
from mend_hf.evaluation import plots
from mend_hf.evaluation.export import difference_rows, make_tables, score_rows, write_report
from mend_hf.evaluation.plots import find_front
from mend_hf.evaluation.results import ResultFolder, TaskResult, read_results

Results = list[TaskResult]


def result(method: str, task: str, seed: int, score: float, num_demonstrations: int = 2) -> TaskResult:
    return TaskResult(
        method=method, task=task, seed=seed, num_demonstrations=num_demonstrations, metric="accuracy", score=score,
        num_queries=1, prefix_slots=2, prefix_bytes=1_000_000, milliseconds_per_query=3.0, prepare_milliseconds=4.0,
        flops_per_query=1e9, prepare_flops=None,
    )  # fmt: skip


@pytest.fixture
def results() -> Results:
    scores = {"in-context": (0.4, 0.5), "MEND": (0.6, 0.5)}
    return [
        result(method, task, seed, score + 0.01 * seed, count)
        for method, pair in scores.items()
        for task, score in zip(("film_<b>", "plant & tree"), pair, strict=True)
        for seed in (1, 2)
        for count in (2, 4)
    ]


def keep(folder: Path, results: Results) -> Path:
    kept = ResultFolder(folder, {})
    kept.start()
    for one in results:
        kept.add(one)
    return folder


def test_a_report_has_every_table_in_every_format(results: Results, tmp_path: Path) -> None:
    tables = write_report({"cls": results, "qa": results}, tmp_path / "report", "in-context")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.md", "report.tex", "results.json", "index.html", "scores.csv", "methods_cls.csv"} <= names
    for picture in ("score_against_time", "score_against_demonstrations", "differences_mend"):
        assert {f"cls_{picture}.png", f"cls_{picture}.svg", f"cls_{picture}_dark.svg", f"qa_{picture}.png"} <= names
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert all(f"## {title}\n" in markdown for title in tables)
    with (tmp_path / "report" / "scores.csv").open(newline="") as file:
        assert list(csv.reader(file)) == tables["Scores"]
    kept = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [TaskResult(**row) for row in kept["cls"]] == results


def test_text_of_others_is_escaped(results: Results, tmp_path: Path) -> None:
    write_report({"cls": results}, tmp_path, "in-context")
    page, latex = (tmp_path / "index.html").read_text(), (tmp_path / "report.tex").read_text()
    assert "film_&lt;b&gt;" in page
    assert "<b>" not in page
    assert r"plant \& tree" in latex
    assert r"film\_<b>" in latex
    assert page.count("<img ") == 3
    assert page.index("<table>") < page.index("<img ") < page.index("<h2>Cost")
    shown = [name.split('"')[0] for word in ('src="', 'srcset="') for name in page.split(word)[1:]]
    assert len(shown) == 6
    assert all((tmp_path / name).is_file() for name in shown)


def test_the_page_says_what_its_results_and_pictures_are_of(results: Results, tmp_path: Path) -> None:
    write_report({"cls": results}, tmp_path, "in-context")
    page = (tmp_path / "index.html").read_text()
    assert "<p>2 tasks; demonstrations: 2, 4; queries a task: 1; seeds: 1, 2</p>" in page
    assert 'alt="MEND less in-context, task by task"' in page
    light, dark = ((tmp_path / f"cls_differences_mend{look}.svg").read_text() for look in ("", "_dark"))
    assert "#e8e8e8" in dark
    assert "#e8e8e8" not in light


def test_what_too_few_results_cannot_tell_is_left_empty(results: Results) -> None:
    one = [row for row in results if (row.task, row.seed, row.num_demonstrations) == ("film_<b>", 1, 2)]
    assert [row[1:5] for row in make_tables({"a": one}, "in-context")["Methods"][1:]] == [
        ["41.0", "", "", ""],
        ["61.0", "", "", ""],
    ]
    assert difference_rows(one, "in-context")[1] == ["MEND", "+20.0", "", "", "1"]
    two_tasks = [row for row in results if row.num_demonstrations == 2]
    assert all(difference_rows(two_tasks, "in-context")[1])


def test_what_stands_under_a_picture_of_differences_fits_into_it(results: Results) -> None:
    named = [replace(one, method="training-free anchors") if one.method == "MEND" else one for one in results]
    named = [replace(one, task=f"{one.task} of a rather long name") for one in named]
    method, against = "training-free anchors", "in-context"
    figure = plots._plot_differences(plots._take_differences(named, method, against), method, against, 20.0)
    figure.canvas.draw()
    text = figure.axes[0].xaxis.label.get_window_extent()
    assert 0 <= text.x0 < text.x1 <= figure.bbox.width


def test_scores_of_several_groups_stand_side_by_side(results: Results) -> None:
    few = [one for one in results if one.num_demonstrations == 2]
    rows = score_rows({"a": few, "b": [one for one in few if one.method == "MEND"]})
    assert rows == [["method", "a", "b", "mean"], ["in-context", "46.5", "", ""], ["MEND", "56.5", "56.5", "56.5"]]


def test_methods_are_compared_on_like_demonstrations_only(results: Results) -> None:
    rows = difference_rows(results, "in-context")
    assert [row[0] for row in rows[1:]] == ["MEND, k = 2", "MEND, k = 4"]
    assert rows[1][1] == "+10.0"
    assert rows[1][-1] == "2"
    assert len(difference_rows(results, "a method that is not there")) == 1


def test_the_front_has_the_points_that_none_beats_in_cost_and_score() -> None:
    assert find_front([1, 2, 3, 4], [0.2, 0.5, 0.4, 0.6]) == [0, 1, 3]
    assert find_front([2, 2, 1], [0.5, 0.6, 0.1]) == [2, 1]


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run mend evaluate first"):
        make_tables({}, "in-context")
    with pytest.raises(DataError, match="which mend evaluate writes"):
        read_results(tmp_path)


def test_the_command_prints_what_it_wrote(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = keep(tmp_path / "one", results), keep(tmp_path / "two", results)
    assert run_mend(["report", one, two, "--output-dir", tmp_path / "report"]) == 0
    printed = capsys.readouterr().out
    assert "Against in-context: two" in printed
    assert str(tmp_path / "report" / "index.html") in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_folders_of_one_name_and_folders_without_results_are_refused(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = keep(tmp_path / "one", results)
    assert run_mend(["report", one, one, "--output-dir", tmp_path / "report"]) == 2
    assert "got one twice: rename one of them" in capsys.readouterr().err
    assert run_mend(["report", tmp_path, "--output-dir", tmp_path / "report"]) == 2
    assert "which mend evaluate writes" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_seven_settings_with_long_names_fit_a_terminal(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"non_paraphrase_to_para_{number}" for number in range(7)]
    with_two = [one for one in results if one.num_demonstrations == 2]
    folders = [keep(tmp_path / name, with_two) for name in names]
    monkeypatch.setenv("COLUMNS", "80")
    assert run_mend(["report", *folders, "--output-dir", tmp_path / "report"]) == 0
    scores = capsys.readouterr().out.split("Methods: ")[0].splitlines()
    lines = [line.split() for line in scores if line.split()]
    assert [line for line in lines if "setting" in line] == [["setting", "context", "MEND"]]
    assert [line for line in lines if line[0] in {*names, "mean"}] == [
        [name, "46.5", "56.5"] for name in [*names, "mean"]
    ]
    assert max(map(len, scores)) <= 80


def test_one_folder_becomes_a_column_for_every_setting_it_has_all_test_tasks_of(tmp_path, capsys) -> None:
    tasks = {*load_partition("non_nli_to_nli").test, *load_partition("qa_to_qa").test, "elsewhere"}
    kept = [result(method, task, 1, 0.5) for method in ("in-context", "MEND") for task in sorted(tasks)]
    folder = keep(tmp_path / "all", kept)
    assert run_mend(["report", folder, "--by-setting", "--output-dir", tmp_path / "report"]) == 0
    groups = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {*groups} == {"non_nli_to_nli", "non_qa_to_qa", "qa_to_qa"}
    for name, own in groups.items():
        assert {row["task"] for row in own} == {*load_partition(name).test}


def test_settings_without_all_their_test_tasks_are_refused(results: Results, tmp_path: Path, capsys) -> None:
    almost = load_partition("non_paraphrase_to_paraphrase").test[1:]
    folder = keep(tmp_path / "almost", [result("MEND", task, 1, 0.5) for task in almost])
    output = ["--by-setting", "--output-dir", tmp_path / "report"]
    assert run_mend(["report", folder, *output]) == 2
    missing = load_partition("non_paraphrase_to_paraphrase").test[0]
    assert f"none of {missing} for non_paraphrase_to_paraphrase" in " ".join(capsys.readouterr().err.split())
    assert run_mend(["report", folder, keep(tmp_path / "b", results), *output]) == 2
    assert "one folder" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
