"""The demo: two small tasks answered by SmolLM2 zero-shot, in context, and from distilled demonstrations."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from rich.console import Console
from weights import NAME, find_weights, load_smollm2

from mend_hf import Demonstration, MendModel
from mend_hf.data.metaicl import Example, load_tasks, sample_demonstrations
from mend_hf.evaluation.methods import in_context, mend, training_free_anchors, zero_shot
from mend_hf.evaluation.readers import Method
from mend_hf.evaluation.report import to_table

HERE = Path(__file__).parent
DISTILLER = HERE / "distillers" / "smollm2-135m-kv"
NUM_QUERIES = 20
# With each method: are the demonstrations read again for every query?
ROUTES: dict[str, tuple[Method, bool]] = {
    "zero-shot": (zero_shot, False),
    "16 shots, read every time": (in_context, True),
    "16 shots, kept in a cache": (in_context, False),
    "training-free anchors": (training_free_anchors, False),
    "MEND": (mend, False),
}


def ask(
    model: MendModel, shots: list[Demonstration], queries: list[Example], method: Method, read_again: bool
) -> tuple[int, float, int, int]:
    """Return right answers, milliseconds a query (median), prefix slots and prefix bytes; queries come one by one."""
    reader, num_right, milliseconds = method(model, shots), 0, []
    for query in queries:
        start = time.perf_counter()
        reader = method(model, shots) if read_again else reader
        [scores] = reader.score_options([query.input], [query.options], batch_size=1)
        milliseconds.append(1000 * (time.perf_counter() - start))
        num_right += query.options[scores.index(max(scores))] == query.output
    return num_right, statistics.median(milliseconds), reader.num_slots, reader.num_bytes


def main() -> None:
    """Print one table, and how to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-hub", action="store_true", help="load SmolLM2 by its Hub name, not from the package")
    from_hub = parser.parse_args().from_hub
    console = Console()
    console.print("Loading SmolLM2-135M-Instruct and its distiller ...")
    base, tokenizer = load_smollm2(from_hub)
    model = MendModel.from_pretrained(base, DISTILLER, tokenizer)
    train, test = (load_tasks(HERE / "data", split=split) for split in ("train", "test"))
    rows = [["right answers", *(task.replace("_", " ") for task in test), "slots", "ms a query", "prefix MB"]]
    for name, (method, read_again) in ROUTES.items():
        results = []
        for task, queries in test.items():
            shots = [Demonstration(shot.input, shot.output) for shot in sample_demonstrations(train[task], 16, 13)]
            results.append(ask(model, shots, queries[:NUM_QUERIES], method, read_again))
        right, milliseconds, slots, size = zip(*results, strict=True)
        means = (round(statistics.fmean(slots)), round(statistics.fmean(milliseconds)))
        cells = [*(f"{count}/{NUM_QUERIES}" for count in right), *map(str, means)]
        rows.append([name, *cells, f"{statistics.fmean(size) / 1e6:.1f}"])
    console.print(to_table(rows))
    console.print("Your turn: a file of demonstrations, one JSON object with input and output a line, and a query:\n")
    command = [".venv/bin/mend generate", f"--base-model {NAME if from_hub else find_weights()}"]
    command += [f"--distiller {DISTILLER}", f"--demonstrations {HERE / 'data' / 'my_demonstrations.jsonl'}"]
    command += ['"Last chance: 50 percent off all shoes!"']
    console.print(" \\\n  ".join(command), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
