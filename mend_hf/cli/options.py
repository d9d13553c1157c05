"""Options that several commands share, and how they become models and demonstrations."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mend_hf.config import PLAIN_FIELDS, MendConfig
from mend_hf.errors import ConfigError, DataError, import_extra

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mend_hf.artifact import DistilledDemonstrations
    from mend_hf.model import MendModel

BaseModel = Annotated[
    str | None,
    typer.Option(
        help="The frozen base model: a Hub id, a folder or a .gguf file. Default: the one that the distiller names."
    ),
]
Distiller = Annotated[str | None, typer.Option(help="A saved distiller: a Hub id or a folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps ... Default: a GPU if there is one.")]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        help="Number format of the base model's weights; auto: its checkpoint's. Default: float32 on a CPU, else auto."
    ),
]
OutputFolder = Annotated[Path, typer.Option(help="Folder for what is made.")]


def load_for_answering(
    distiller: str | None, base_model: str | None, device: str | None, dtype: DtypeName | None = None
) -> MendModel:
    """Return a saved distiller on its base model; without a distiller, the base model with training-free anchors."""
    return wrap_for_answering(*load_base_of(distiller, base_model, device, dtype), distiller)


def load_base_of(
    distiller: str | None, base_model: str | None, device: str | None, dtype: DtypeName | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model that is asked for, else the one that the distiller names, and its tokenizer."""
    if distiller is None and base_model is None:
        raise ConfigError("Expected --distiller or --base-model, got neither: name a Hub id or a folder.")
    # A distiller that is not there is told before the base model takes its time.
    config = None if distiller is None else MendConfig.from_pretrained(distiller)
    if base_model is not None or config is None:
        return load_base_model(base_model, device, dtype)
    return load_base_model(config.base_model_name_or_path, device, dtype, config.base_model_revision)


def wrap_for_answering(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    distiller: str | None,
    like: MendConfig | None = None,
) -> MendModel:
    """Return a base model with a saved distiller, or with training-free anchors.

    Args:
        base_model: Is wrapped.
        tokenizer: Its tokenizer.
        distiller: A Hub id or a folder; None: none.
        like: Whose prompt format and budgets hold where there is no distiller; None: a new config's.
    """
    from mend_hf.auto import get_mend_model
    from mend_hf.model import MendModel

    if distiller is not None:
        return MendModel.from_pretrained(base_model, distiller, tokenizer)
    names = ("prompt_format", *PLAIN_FIELDS, "max_demonstration_tokens", "max_distiller_tokens")
    kept = {} if like is None else {name: getattr(like, name) for name in names}
    config = MendConfig(num_virtual_tokens=0, lora_r=0, prefix_form="kv", **kept)
    return get_mend_model(base_model, config, tokenizer).eval()


def load_base_model(
    name_or_path: str | None,
    device: str | None,
    dtype: DtypeName | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model, of the Hub's `revision` if one is named, and its tokenizer, on a GPU if there is one."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from mend_hf.auto import load_language_model

    if name_or_path is None:
        raise ConfigError("Expected --base-model: the distiller does not name its own.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:  # on many CPUs, bfloat16 is many times slower
        dtype = "float32" if device == "cpu" else "auto"
    extra: dict[str, Any] = {} if revision is None else {"revision": revision}
    given = name_or_path
    if name_or_path.endswith(".gguf"):
        path = Path(name_or_path)
        may_be_on_hub = not path.is_absolute() and len(path.parts) <= 3 and not path.parent.is_dir()
        if not path.is_file() and not may_be_on_hub:
            raise ConfigError(f"Expected a file at {path}, got none: check the path.")
        import_extra("gguf", "gguf")
        name_or_path, extra["gguf_file"] = str(path.parent), path.name
    try:
        # The progress bars of reading a GGUF file know no other switch.
        with redirect_stderr(io.StringIO()) if "gguf_file" in extra else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, **extra)
            model = load_language_model(name_or_path, dtype=dtype, **extra)
        # The weights are plain floats by now; with a quantizer's mark transformers would refuse to tune or save them.
        if "gguf_file" in extra:
            model.hf_quantizer.remove_quantization_config(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a base model in a folder or on the Hub, got {given!r}: {str(error).splitlines()[0]} "
            "Without the Hub, name a folder or a .gguf file with --base-model."
        ) from error
    return model.to(device), tokenizer


def load_demonstrations(path: Path) -> DistilledDemonstrations | list[tuple[str, str]]:
    """Return what a folder of `mend distill`, or a file of demonstrations, holds."""
    from mend_hf.artifact import DistilledDemonstrations

    if not path.exists():
        raise DataError(
            f"Expected a file of demonstrations, or a folder that `mend distill` wrote, at {path}, got neither: check "
            "the path."
        )
    return DistilledDemonstrations.from_pretrained(path) if path.is_dir() else read_demonstrations(path)


def read_demonstrations(path: Path) -> list[tuple[str, str]]:
    """Return the (input, output) pairs of a file of demonstrations."""
    from mend_hf.data.rows import get_text, read_rows

    pairs = [(get_text(row, "input", place), get_text(row, "output", place)) for place, row in read_rows(path)]
    if not pairs:
        raise DataError(f'Expected lines of {{"input": ..., "output": ...}} in {path}, got an empty file: add some.')
    return pairs
