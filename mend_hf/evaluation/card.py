"""What an evaluation says on the card of a distiller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from huggingface_hub import EvalResult

from mend_hf.errors import DataError
from mend_hf.evaluation.report import cost_rows, method_rows, summarise, task_rows, to_markdown
from mend_hf.evaluation.results import TaskResult, read_results
from mend_hf.evaluation.variations import AS_GIVEN

# The Hub's word for the kind of task, and for the metric, by what we call the metric.
_HUB_WORDS = {
    "macro_f1": ("text-classification", "f1", "Macro-F1"),
    "accuracy": ("multiple-choice", "accuracy", "Accuracy"),
    "exact_match": ("text-generation", "exact_match", "Exact match"),
    "rouge_l": ("text-generation", "rouge", "ROUGE-L"),
}


def read_results_for_card(folder: str | Path, method: str = "MEND") -> tuple[list[EvalResult], str]:
    """Return the scores of a method for the Hub's own table, and tables of all methods as Markdown.

    Args:
        folder: One that `mend evaluate` wrote into.
        method: Whose scores are the card's.

    Raises:
        DataError: The folder has no results of this method on demonstrations as they are given.
    """
    results = [result for result in read_results(Path(folder)) if result.variation == AS_GIVEN]
    own = [result for result in results if result.method == method]
    if not own:
        known = ", ".join(dict.fromkeys(result.method for result in results)) or "none"
        raise DataError(f"Expected results of {method} in {folder}, got those of: {known}. Name another folder.")
    summaries = summarise(results)
    tables = (method_rows(summaries), cost_rows(summaries), task_rows(results))
    seeds, queries = {result.seed for result in own}, sum(result.num_queries for result in own)
    said = (
        f"{len({result.task for result in own})} task(s), {len(seeds)} seed(s), {queries} answers by {method}, "
        "`mend evaluate`. Points of 100; costs are those of one machine."
    )
    return _score(own), "\n\n".join([said, *(to_markdown(rows).strip() for rows in tables)])


def _score(results: Sequence[TaskResult]) -> list[EvalResult]:
    groups: dict[tuple[str, str, int], list[float]] = {}
    for result in results:
        groups.setdefault((result.task, result.metric, result.num_demonstrations), []).append(result.score)
    return [
        EvalResult(
            task_type=_HUB_WORDS[metric][0],
            dataset_type=task,
            dataset_name=task,
            dataset_args={"num_demonstrations": count},
            metric_type=_HUB_WORDS[metric][1],
            metric_name=_HUB_WORDS[metric][2],
            metric_value=round(fmean(scores), 4),
        )
        for (task, metric, count), scores in groups.items()
    ]
