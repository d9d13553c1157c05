"""Families of base models x features, every cell measured: writes docs/reference/architectures.md.

    python examples/benchmarks/families.py

The checks are those that the tests run (tests/family_checks.py), and for PEFT's soft prompts tests/peft_checks.py. A
row is an entry of tests/tiny_models.py, a column an entry of `FEATURES`. Takes a minute or two of two cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import torch
import transformers
from rich.progress import track
from transformers import AutoTokenizer

from mend_hf.errors import MendError

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import family_checks
import peft_checks
from build_tokenizer import FOLDER
from family_checks import Family, Measured
from peft_checks import SoftPrompt
from tiny_encoder_decoders import TINY_ENCODER_DECODERS
from tiny_models import TINY_MODELS, build_tiny_model, ids_of

ROOT = Path(__file__).parents[2]
INTRODUCTION = """\
# Architectures

<!-- Written by examples/benchmarks/families.py: change that, not this. -->

What every family of causal base models was measured to do, on models of three layers made from their configs, with
transformers {transformers}, PEFT {peft} and torch {torch} on a CPU. `python examples/benchmarks/families.py` writes
this page; `tests/test_families.py` runs the same checks.

| cell | meaning |
|---|---|
| exact | numbers within {atol:g} + {rtol:g} times their size, tokens equal; bare model, save, load: bit for bit |
| a number | the largest difference of a logit; in brackets what the same padding changes in the bare model |
| tokens | how many of the generated tokens differ in a row |
| bf16 | the mean error against fp32, as a multiple of the base model's own when it reads the same in one piece |
| refused | an error says so beforehand, and what to do instead |
| fails | an error from underneath |
| - | there is no such thing |

Where the kv form is refused, the cache holds more than keys and values, or its slots are the positions (MPT): vectors
are read in front of every query there (the embeds form). In BLOOM and in Falcon with ALiBi the distance between two
tokens is counted in what the attention mask keeps. So the slots of a kv prefix stand side by side there, whatever lay
between them in the text; with learned or rotary positions they keep the positions at which they were read.

Quantised base models (torchao int8 weights, optimum-quanto int8, bitsandbytes 8 bits) distil, answer and train a
distiller on a CPU (`tests/test_quantized.py`). bitsandbytes in 4 bits answers there, and training is refused: on a CPU
its layers lose the gradients after the first pass in evaluation mode.

"""

COLUMNS = {
    "embeds: logits": "behind vectors, the logits of the bare model with the vectors in front of the query",
    "embeds: gradients": "the same for the gradients of the vectors",
    "text kept: logits": "behind the text of the demonstrations as a prefix, the logits of the whole text",
    "greedy": "the tokens of the bare model that reads the same, vectors or text",
    "beams": "as greedy, three beams",
    "sampling": "as greedy, three samples with the same seed",
    "prompt lookup": "the greedy tokens",
    "static cache": "the greedy tokens",
    "kv: batch = rows": "rows with other tasks, prefix lengths and padding against each alone: logits, tokens",
    "embeds: batch = rows": "the same in the embeds form; PEFT: one prompt for all rows, ids and mask given as here",
    "bare model": "without demonstrations, and switched off",
    "kv: save, load": "the distiller and what it distilled",
    "embeds: save, load": "the same in the embeds form",
    "bf16": "logits behind vectors",
}


ENCODERS = """\
The vectors stand in front of the encoder's input embeddings, the only form there. A column is a test of
`tests/test_encoder_decoder.py`, which compares with the bare model given the same embeddings: exact where all its
cases pass. Training means that the loss falls, that every weight of the distiller moves and none of the base model's.

"""


def measure_cell(check: Callable[[Any], Measured] | None, subject: Any, notes: list[str], *, is_ratio: bool) -> str:
    """Return a cell's text; what an error says becomes a footnote."""
    if check is None:
        return "-"
    try:
        measured = check(subject)
    except MendError as error:
        return f"refused {note(error, notes)}"
    except Exception as error:  # whatever a library underneath raises is a measurement here
        return f"fails {note(error, notes)}"
    if is_ratio:
        return f"{measured.difference:.2f}"
    if measured.is_exact:
        return "exact"
    parts = []
    if measured.difference:
        parts.append(f"{measured.difference:.1g}" if measured.difference < 1 else f"{measured.difference:.2f}")
    if measured.own_difference:
        parts.append(f"({measured.own_difference:.1g})")
    if measured.num_tokens:
        parts.append(f"{measured.num_tokens} tokens")
    return " ".join(parts)


def note(error: Exception, notes: list[str]) -> str:
    """Return the mark of a footnote with what an error says; the same words share one."""
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()
    text = re.sub(r"\b\w+(?=ForCausalLM|LMHeadModel)", "…", text)
    text = re.sub(r"\d+ slots", "… slots", text)
    text = re.sub(r"of \d+ tokens, got", "of … tokens, got", text).replace("<", "&lt;").replace("|", "\\|")
    text = text if len(text) <= 320 else f"{text[:320]} …"
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def measure_row(name: str, checks: Mapping[str, Callable[[Any], Measured]], subject: Any, notes: list[str]) -> str:
    """Return a row of the table."""
    cells = [measure_cell(checks.get(column), subject, notes, is_ratio=column == "bf16") for column in COLUMNS]
    return f"| {' | '.join([name, *cells])} |"


ENCODER_TESTS = {
    "logits, loss": "test_logits_and_loss",
    "greedy, beams, sampling": "test_generated_tokens",
    "one encoder pass": "test_the_encoder_runs_once_for_all_beams",
    "gradients": "test_gradients_reach_everything_that_is_trained_and_nothing_else",
    "batch = rows": "test_with_other_tasks_lengths_and_paddings",
    "distilled batch = rows": "test_in_distilling",
    "bare model": "test_bit_for_bit",
    "save, load": "test_saving_and_loading_changes_no_bit",
    "scores": "test_scores_are_those_of_plain_forwards",
    "training": "test_lowers_the_loss_and_moves_the_distiller_alone",
}


def run_encoder_tests() -> list[str]:
    """Run the tests of the encoder-decoders and return a table of what passed, family by family."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_encoder_decoder.py", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = list(ElementTree.parse(report).iter("testcase"))
    rows = []
    for family in TINY_ENCODER_DECODERS:
        cells = []
        for test in ENCODER_TESTS.values():
            name = re.compile(rf"{test}\[(.*-)?{family}(-.*)?\]")
            found = [case for case in cases if name.fullmatch(case.get("name", ""))]
            num_failed = sum(case.find("failure") is not None or case.find("error") is not None for case in found)
            cells.append(f"{num_failed} of {len(found)} fail" if num_failed or not found else "exact")
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure every cell and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reference" / "architectures.md")
    parser.add_argument("--families", nargs="+", default=list(TINY_MODELS), choices=TINY_MODELS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    build = partial(build_tiny_model, **ids_of(tokenizer))

    notes: list[str] = []
    rows = [
        measure_row(name, family_checks.FEATURES, Family(name, partial(build, name), tokenizer), notes)
        for name in track(args.families, "families")
    ]
    prompts = {
        f"PEFT {method}, {name}": SoftPrompt(method, partial(build, name), tokenizer)
        for method in ("prompt tuning", "prefix tuning")
        for name in ("llama", "gpt2")
    }
    rows += [measure_row(name, peft_checks.FEATURES, prompt, notes) for name, prompt in prompts.items()]
    beside = [
        f"| {name} | " + " | ".join(measure_cell(check, prompt, notes, is_ratio=False) for prompt in prompts.values())
        for name, check in peft_checks.BESIDE.items()
    ]
    versions = {module.__name__: module.__version__ for module in (transformers, peft)}
    text = INTRODUCTION.format(
        torch=torch.__version__.partition("+")[0],
        atol=family_checks.ABSOLUTE_TOLERANCE,
        rtol=family_checks.RELATIVE_TOLERANCE,
        **versions,
    )
    text += "| column | what is compared |\n|---|---|\n"
    text += "".join(f"| {column} | {meaning} |\n" for column, meaning in COLUMNS.items())
    text += f"\n## Measured\n\n| family | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|\n"
    text += "\n".join(rows)
    text += f"\n\n## Encoder-decoders\n\n{ENCODERS}"
    text += f"| family | {' | '.join(ENCODER_TESTS)} |\n|---{'|---' * len(ENCODER_TESTS)}|\n"
    text += "\n".join(run_encoder_tests())
    text += f"\n\n## PEFT, beside the table\n\n| | {' | '.join(prompts)} |\n|---{'|---' * len(prompts)}|\n"
    text += "\n".join(f"{line} |" for line in beside)
    text += "\n\n## Notes\n\n" + "\n".join(f"{number}. {words}" for number, words in enumerate(notes, 1)) + "\n"
    args.output.write_text(text, encoding="utf-8")
    print(f"Wrote {args.output.name}: {len(rows)} rows, {len(COLUMNS)} columns, {len(notes)} notes.")


if __name__ == "__main__":
    main()
