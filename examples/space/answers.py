"""What the Space does, without its pages: read demonstrations, distil, ask three methods, pack and unpack files.

Everything that comes from a user is checked here and refused with an error of mend_hf, which the pages show.
"""

from __future__ import annotations

import json
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mend_hf import Demonstration, DistilledDemonstrations, MendModel
from mend_hf.data.rows import get_text, read_rows
from mend_hf.demonstrations import parse_demonstrations
from mend_hf.errors import CheckpointError, DataError
from mend_hf.evaluation.attention import measure_slots
from mend_hf.evaluation.methods import in_context, zero_shot
from mend_hf.evaluation.readers import Reader
from mend_hf.fingerprint import check_fingerprint
from mend_hf.library import RECORD_NAME, WEIGHTS_NAME
from mend_hf.prefix import KeyValuePrefix

MAX_TEXT_BYTES = 1_000_000
MAX_ARCHIVE_BYTES = 64_000_000
MAX_DEMONSTRATIONS = 256
MAX_QUERY_CHARACTERS = 4000
MAX_OPTIONS = 16
METHODS = ("Zero-shot", "In-context learning", "MEND")

_FILES = (RECORD_NAME, WEIGHTS_NAME)
_GREY = "#808080"  # read well on a light page and on a dark one


@dataclass(frozen=True)
class Task:
    """What one user works with.

    Attributes:
        distilled: One task.
        demonstrations: As text; none where the distilled file alone was uploaded.
        milliseconds: What distilling took; None: it was done earlier, for the file.
    """

    distilled: DistilledDemonstrations
    demonstrations: tuple[Demonstration, ...] = ()
    milliseconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one method says to one query.

    Attributes:
        text: The likeliest option, or what was written.
        probabilities: Of the options, adding up to 1: the softmax of their mean log-likelihoods a token. Empty where
            the answer was written.
        num_tokens: Tokens that the model read for this query.
        num_slots: Positions in front of the query that it did not have to read.
        milliseconds: From the query to the answer.
    """

    text: str
    probabilities: dict[str, float]
    num_tokens: int
    num_slots: int
    milliseconds: float


def parse_lines(text: str) -> list[Demonstration]:
    """Return the demonstrations in JSON lines, objects with `input` and `output`.

    Raises:
        DataError: A line is no such object, or there are none or too many.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pasted.jsonl"
        path.write_text(text, encoding="utf-8", errors="replace")
        return read_file(path)


def read_file(path: str | Path) -> list[Demonstration]:
    """Return the demonstrations of a .jsonl file.

    Raises:
        DataError: It is another kind of file or too large, or what `parse_lines` refuses.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise DataError(f"Expected a file that ends in .jsonl, got {path.name}: convert or rename it.")
    _check_size(path, MAX_TEXT_BYTES)
    try:
        pairs = [(get_text(row, "input", place), get_text(row, "output", place)) for place, row in read_rows(path)]
    except DataError as error:
        raise DataError(str(error).replace(str(path), path.name)) from error  # the server's folders are its own
    return _check(pairs)


def parse_table(rows: Iterable[Sequence[object]]) -> list[Demonstration]:
    """Return the demonstrations of a table's rows (input, output); empty rows are passed over.

    Raises:
        DataError: A row has only one of the two, or there are none or too many.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        given, answer = (str(cell or "").strip() for cell in (*row, "", "")[:2])
        if bool(given) != bool(answer):
            missing = "output" if given else "input"
            raise DataError(
                f"Row {number}: expected input and output, got no {missing}: fill it in, or clear the row."
            )
        if given:
            pairs.append((given, answer))
    return _check(pairs)


def _check(pairs: list[tuple[str, str]]) -> list[Demonstration]:
    if len(pairs) > MAX_DEMONSTRATIONS:
        raise DataError(
            f"Expected at most {MAX_DEMONSTRATIONS} demonstrations, got {len(pairs)}: leave some out; what a "
            "distiller does not hold would be cut away."
        )
    return parse_demonstrations(pairs)[0][0]


def parse_options(text: str) -> list[str]:
    """Return the options, one a line, each once.

    Raises:
        DataError: There is only one, or too many.
    """
    options = [*dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())]
    if len(options) == 1 or len(options) > MAX_OPTIONS:
        raise DataError(
            f"Expected 2 to {MAX_OPTIONS} different options, one a line, or none, got {len(options)}: add or remove "
            "some; without options the model writes its answer."
        )
    return options


def find_options(demonstrations: Sequence[Demonstration]) -> list[str]:
    """Return the outputs as options to choose from, or none where they look like free text."""
    outputs = [*dict.fromkeys(item.output for item in demonstrations if item.output)]
    repeats = len(outputs) < len(demonstrations) or all(len(output.split()) <= 3 for output in outputs)
    return outputs if 2 <= len(outputs) <= MAX_OPTIONS and repeats else []


def distil(model: MendModel, demonstrations: Sequence[Demonstration]) -> Task:
    """Return the demonstrations, distilled."""
    start = time.perf_counter()
    distilled = model.distill([*demonstrations])
    return Task(distilled, tuple(demonstrations), 1000 * (time.perf_counter() - start))


def ask(model: MendModel, task: Task | None, query: str, options: Sequence[str]) -> dict[str, Answer | None]:
    """Return the answer of every method in `METHODS`; None for in-context learning without the demonstrations' text.

    Zero-shot reads the query, in-context learning the demonstrations' text and the query, and MEND the query behind
    the distilled prefix.

    Args:
        model: With its distiller.
        task: What was distilled or uploaded.
        query: What is asked.
        options: To choose from; none: the answer is written.

    Raises:
        DataError: There is no task or no query, or the query is too long.
    """
    task = _check_task(task)
    _check_query(query)
    readers: dict[str, Callable[[], Reader]] = {
        "Zero-shot": lambda: zero_shot(model, ()),
        "In-context learning": lambda: in_context(model, task.demonstrations),
        "MEND": lambda: Reader(model, model.route.prepare(task.distilled.prefix)),
    }
    return {
        name: _answer(readers[name], query, options, reads_prefix=name == "In-context learning")
        if task.demonstrations or name != "In-context learning"
        else None
        for name in METHODS
    }


def _answer(make: Callable[[], Reader], query: str, options: Sequence[str], reads_prefix: bool) -> Answer:
    start = time.perf_counter()
    reader = make()
    probabilities: dict[str, float] = {}
    if options:
        [scores] = reader.score_options([query], [options], batch_size=1)
        probabilities = dict(zip(options, torch.tensor(scores).softmax(0).tolist(), strict=True))
        text = max(probabilities, key=probabilities.__getitem__)
    else:
        [text] = reader.generate([query], batch_size=1)
    milliseconds = 1000 * (time.perf_counter() - start)
    num_tokens = reader.model.tokenize([query], is_alone=reader.prefix is None)["input_ids"].shape[1]
    if reads_prefix:
        return Answer(text, probabilities, num_tokens + reader.num_slots, 0, milliseconds)
    return Answer(text, probabilities, num_tokens, reader.num_slots, milliseconds)


def draw_attention(model: MendModel, task: Task | None, query: str) -> Figure:
    """Return a heat map of which slots the query attends to, layer by layer.

    The model's attention is another one meanwhile: let no other thread use it.

    Raises:
        DataError: There is no task or no query, or the query is too long.
        UnsupportedModelError: The base model does not tell its attention.
    """
    task = _check_task(task)
    _check_query(query)
    attention = measure_slots(model, task.distilled.prefix, query)
    shares = 100 * attention.shares.cpu()  # [L, S]
    figure = Figure(figsize=(5.0, 3.0), dpi=140, layout="constrained", facecolor="none")
    axes = figure.subplots()
    # One slot, the sink, may hold most of all attention: on a linear scale it would be the only one to be seen.
    highest = max(float(shares.max()), 1e-3)
    scale = LogNorm(highest / 1000, highest, clip=True)
    image = axes.imshow(shares.tolist(), aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    _mark_kinds(axes, attention.kinds)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("layer", color=_GREY)
    kept = 100 - float(shares.sum(1).mean())
    axes.set_title(f"attention to every slot; {kept:.0f} % stay with the query", color=_GREY, fontsize=11)
    bar = figure.colorbar(image, ax=axes, format="%g")
    bar.set_label("percent", color=_GREY)
    for each in (axes, bar.ax):
        each.tick_params(which="both", colors=_GREY)
        each.spines[:].set_visible(False)
    return figure


def _mark_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    """Name every run of slots of one kind below it, with a line between runs."""
    start, ticks, names = 0, [], []
    for kind, run in groupby(kinds):
        length = len([*run])
        ticks.append(start + (length - 1) / 2)
        names.append(f"{length} {kind}{'s' if length > 1 else ''}" if kind != "sink" else kind)
        if start:
            axes.axvline(start - 0.5, color="white", linewidth=1)
        start += length
    few = len(ticks) <= 3
    axes.set_xticks(ticks if few else [], names if few else [])
    if few and "sink" in names:
        axes.get_xticklabels()[names.index("sink")].set_horizontalalignment("right")
    axes.set_xlabel("slots", color=_GREY)


def _check_task(task: Task | None) -> Task:
    if task is None:
        raise DataError("Expected distilled demonstrations, got none yet: distil some, or upload a distilled file.")
    return task


def _check_query(query: str) -> None:
    if not query.strip() or len(query) > MAX_QUERY_CHARACTERS:
        raise DataError(
            f"Expected a query of 1 to {MAX_QUERY_CHARACTERS} characters, got {len(query.strip())}: "
            f"{'shorten it' if query.strip() else 'write one'}."
        )


def pack(task: Task | None, path: Path) -> Path:
    """Write what was distilled into a .zip file, the two files of `save_pretrained`, and return its path.

    Raises:
        DataError: Nothing was distilled.
    """
    task = _check_task(task)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as archive:
        task.distilled.save_pretrained(folder)
        for name in _FILES:
            archive.write(Path(folder) / name, name)
    return path


def unpack(model: MendModel, path: str | Path) -> Task:
    """Return what `pack` wrote, checked: the file may come from anywhere.

    Raises:
        CheckpointError: It is too large, damaged, something else, or made for another base model.
    """
    path = Path(path)
    _check_size(path, MAX_ARCHIVE_BYTES, CheckpointError)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _extract(path, Path(folder))
            distilled = DistilledDemonstrations.from_pretrained(folder)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(folder, path.name)) from error
    made_for = distilled.provenance.base_model_fingerprint
    check_fingerprint(made_for, model.mend_config.base_model_fingerprint or {}, "What was distilled")
    distilled = distilled.to(model.device, model.dtype)
    wanted, found = (_shape(each) for each in (model.distill([("a", "b")]), distilled))
    if len(distilled) != 1 or wanted != found:
        raise CheckpointError(
            f"Expected one task of {wanted} in {path.name}, got {len(distilled)} of {found}: upload a file that this "
            "Space wrote."
        )
    return Task(distilled)


def _extract(path: Path, folder: Path) -> None:
    """Write the two known files of an archive into a folder; names in the archive are compared, never followed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            kinds = {entry.compress_type for entry in entries.values()}
            if set(entries) != set(_FILES) or len(archive.infolist()) != len(_FILES):
                raise CheckpointError(
                    f"Expected {' and '.join(_FILES)} and nothing else in {path.name}, got "
                    f"{', '.join(sorted(entries)[:4]) or 'no files'}: upload a file that this Space wrote."
                )
            if not kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise CheckpointError(f"Expected {path.name} stored or deflated, got another way: pack it again.")
            if sum(entry.file_size for entry in entries.values()) > MAX_ARCHIVE_BYTES:
                raise CheckpointError(
                    f"Expected at most {MAX_ARCHIVE_BYTES:,} bytes in {path.name}, got more once unpacked: distil "
                    "fewer demonstrations."
                )
            for name in _FILES:  # `read` stops at the size that the entry names
                (folder / name).write_bytes(archive.read(entries[name]))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"Expected a whole .zip file that is not encrypted, got {path.name} ({error}): download it again."
        ) from error


def _shape(distilled: DistilledDemonstrations) -> str:
    """Say what a prefix has for every slot."""
    prefix = distilled.prefix
    if isinstance(prefix, KeyValuePrefix):
        shapes = {tuple(states.shape[1::2]) for states in (*prefix.keys, *prefix.values)}  # (H, K) of every layer
        return f"keys and values of {len(prefix.keys)} layers, heads and widths {sorted(shapes)}"
    return f"vectors of width {prefix.vectors.shape[-1]}"


def _check_size(path: Path, limit: int, error: type[DataError | CheckpointError] = DataError) -> None:
    size = path.stat().st_size
    if size > limit:
        raise error(
            f"Expected a file of at most {limit:,} bytes, got {path.name} with {size:,}: upload a smaller one."
        )


def to_lines(demonstrations: Iterable[Demonstration]) -> str:
    """Return demonstrations as the JSON lines that `parse_lines` reads."""
    rows = ({"input": item.input, "output": item.output} for item in demonstrations)
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
