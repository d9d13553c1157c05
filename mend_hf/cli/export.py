"""`mend export-peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mend_hf.cli.options import (
    BaseModel,
    Device,
    Distiller,
    Dtype,
    OutputFolder,
    load_demonstrations,
    load_for_answering,
)
from mend_hf.files import check_output_folder


def export_peft(
    demonstrations: Annotated[
        Path, typer.Option(help="A .jsonl file of demonstrations, or a folder that `mend distill` wrote.")
    ],
    output_dir: OutputFolder,
    distiller: Distiller = None,
    base_model: BaseModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write one task's demonstrations as a PEFT adapter, for people without mend_hf.

    `mend export-peft --distiller someone/mend-smollm2-135m --demonstrations mine.jsonl --output-dir adapter`
    """
    from mend_hf.integrations.peft import export_to_peft

    check_output_folder(output_dir)
    given = load_demonstrations(demonstrations)
    model = load_for_answering(distiller, base_model, device, dtype)
    export_to_peft(model, given, output_dir)
    print(f"Saved the adapter in {output_dir}: PeftModel.from_pretrained(base_model, ...) loads it")
