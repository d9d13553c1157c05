"""`mend distill`, `mend generate` and `mend info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mend_hf import __version__
from mend_hf.cli.options import (
    BaseModel,
    Device,
    Distiller,
    Dtype,
    OutputFolder,
    load_demonstrations,
    load_for_answering,
    read_demonstrations,
)
from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError, ConfigError
from mend_hf.files import check_output_folder, fetch_file


def distill(
    demonstrations: Annotated[Path, typer.Option(help='A .jsonl file of {"input": ..., "output": ...} lines.')],
    output_dir: OutputFolder,
    distiller: Distiller = None,
    base_model: BaseModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Distil a file of demonstrations once and save the prefix.

    Without `--distiller` the training-free anchors of any base model are kept.
    """
    pairs = read_demonstrations(demonstrations)
    check_output_folder(output_dir)
    model = load_for_answering(distiller, base_model, device, dtype)
    distilled = model.distill(pairs)
    distilled.save_pretrained(output_dir)
    record = distilled.provenance
    print(
        f"{record.num_demonstrations[0]} demonstrations, {record.num_tokens[0]} tokens -> {distilled.num_slots} "
        f"slots, {distilled.num_bytes / 1e6:.2f} MB in {output_dir}"
    )


def generate(
    queries: Annotated[list[str], typer.Argument(help="What to ask; several are answered in one batch.")],
    demonstrations: Annotated[
        Path | None, typer.Option(help="A .jsonl file of demonstrations, or a folder that `mend distill` wrote.")
    ] = None,
    distiller: Distiller = None,
    base_model: BaseModel = None,
    options: Annotated[
        str | None,
        typer.Option(help="Answers with commas, account,billing, of which the likeliest is chosen; none is written."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Take off what every one of --options gets whatever is asked, as the inputs of raw "
            "demonstrations show it.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer that is written, in tokens.", min=1)] = 16,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Answer queries from demonstrations.

    `mend generate --distiller someone/mend-smollm2-135m --demonstrations mine.jsonl "moving and funny"`
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if options is not None:
        settings = {"options": _parse_options(options)}
    given = None if demonstrations is None else load_demonstrations(demonstrations)
    inputs = _inputs_to_calibrate_by(given, options) if calibrate else []
    model = load_for_answering(distiller, base_model, device, dtype)
    if inputs:
        given = model.distill(given)
        settings["option_priors"] = model.option_priors(settings["options"], inputs, given)
    for answer in model.answer(queries, given, **settings):
        print(answer)


def _inputs_to_calibrate_by(given: Any, options: str | None) -> list[str]:
    from mend_hf.evaluation.calibration import MAX_INPUTS

    if options is None or not isinstance(given, list):
        got = "no --options" if options is None else "none" if given is None else "distilled ones, which hold no text"
        raise ConfigError(
            f"Expected --options and raw demonstrations to --calibrate by, got {got}: give --options a,b and a .jsonl "
            "file of demonstrations, or leave --calibrate out."
        )
    return [text for text, _ in given[:MAX_INPUTS]]


def _parse_options(text: str) -> list[str]:
    options = [option.strip() for option in text.split(",")]
    if len({*options}) < max(len(options), 2) or not all(options):
        raise ConfigError(
            f"Expected --options as two or more different answers with commas, such as account,billing, got {text!r}."
        )
    return options


def info(name_or_path: Annotated[str, typer.Argument(help="A distiller or distilled demonstrations.")]) -> None:
    """Show what a saved distiller, or a folder of distilled demonstrations, holds."""
    from mend_hf.artifact import DistilledDemonstrations
    from mend_hf.library import RECORD_NAME

    if (Path(name_or_path) / RECORD_NAME).exists():
        distilled = DistilledDemonstrations.from_pretrained(name_or_path)
        facts = {
            "form": distilled.prefix_form,
            "tasks": len(distilled),
            "slots": distilled.num_slots,
            "bytes": f"{distilled.num_bytes:,}",
            **distilled.provenance.summarize(),
        }
    else:
        try:
            fetch_file(name_or_path, CONFIG_NAME)
        except CheckpointError as error:
            is_folder = Path(name_or_path).is_dir()
            got = "neither" if is_folder else f"no such folder here, and of the Hub: {error.__cause__}"
            raise CheckpointError(
                f"Expected a distiller ({CONFIG_NAME}) or distilled demonstrations ({RECORD_NAME}) in {name_or_path}, "
                f"got {got}: check the path."
            ) from error
        facts = MendConfig.from_pretrained(name_or_path).to_dict()
        if Path(name_or_path).is_dir():
            facts["files"] = ", ".join(sorted(path.name for path in Path(name_or_path).iterdir()))
    table = Table(title=f"{name_or_path} (mend_hf {__version__})", show_header=False)
    for key, value in facts.items():
        table.add_row(key, json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else repr(value))
    Console().print(table)
