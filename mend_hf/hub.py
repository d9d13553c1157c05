"""What a saved distiller's folder holds, and the card that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from mend_hf import __version__
from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.files import fetch_file, read_tensors, write_folder, write_json

WEIGHTS_NAME = "mend_model.safetensors"
CARD_NAME = "README.md"


def save_distiller(save_directory: str | Path, config: MendConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a distiller's folder: config, trained tensors, and a card unless there is one already.

    Args:
        save_directory: Made if need be; either all files are written or none.
        config: Of the distiller.
        tensors: What was trained, by name.
    """
    with write_folder(save_directory) as folder:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(folder / CONFIG_NAME, config.to_dict() | {"mend_version": __version__})
        if not (Path(save_directory) / CARD_NAME).exists():
            make_card(config).save(folder / CARD_NAME)


def load_distiller_tensors(name_or_path: str | Path, **hub: Any) -> dict[str, Tensor]:
    """Return the trained tensors in a distiller's folder or Hub repository.

    Raises:
        CheckpointError: They are missing or damaged.
    """
    return read_tensors(fetch_file(name_or_path, WEIGHTS_NAME, **hub))


def check_tensor_names(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], name_or_path: str | Path) -> None:
    """Refuse saved tensors that are not those the config asks for.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not known" for name in got if name not in expected]
    problems += [
        f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(got[name].shape)}"
        for name in expected
        if name in got and expected[name].shape != got[name].shape
    ]
    if problems:
        shown = "\n".join(f"- {line}" for line in problems[:8])
        raise CheckpointError(
            f"Expected the {len(expected)} tensors that {CONFIG_NAME} asks for in {name_or_path}, got differences:\n"
            f"{shown}"
            f"{'' if len(problems) <= 8 else f' (and {len(problems) - 8} more)'}\n"
            "The config and the weights do not belong together: save or fetch the whole folder again."
        )


def make_card(config: MendConfig) -> ModelCard:
    """Return the model card of a distiller, with the metadata that the Hub reads."""
    base = config.base_model_name_or_path
    data = ModelCardData(
        library_name="mend_hf",
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag="text-generation",
        tags=["mend", "demonstration-distillation", *([f"base_model:adapter:{base}"] if base else [])],
    )
    template = files("mend_hf").joinpath("model_card.md")
    return ModelCard.from_template(data, template_path=str(template), config=config, name=base or "a base model")
