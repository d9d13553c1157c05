"""What a saved distiller's folder holds, and the card that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.files import write_folder
from mend_hf.saved_pair import Headers, read_pair, write_pair

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
        write_pair(folder, CONFIG_NAME, config.to_record(), WEIGHTS_NAME, tensors)
        if not (Path(save_directory) / CARD_NAME).exists():
            make_card(config).save(folder / CARD_NAME)


def load_distiller(
    name_or_path: str | Path, check: Callable[[MendConfig], None], **hub: Any
) -> tuple[MendConfig, dict[str, Tensor]]:
    """Return the config and the trained tensors in a distiller's folder or Hub repository.

    Args:
        name_or_path: A folder that `save_distiller` wrote, or a Hub id.
        check: Gets the config before the tensors are read; raises what refuses it.
        **hub: As in `fetch_file`.

    Raises:
        CheckpointError: They are missing or damaged, or do not belong together.
    """

    def check_all(record: dict[str, Any], headers: Headers) -> None:
        config = MendConfig.from_record(record)
        check(config)
        _check_sizes(config, headers, name_or_path)

    record, tensors = read_pair(name_or_path, CONFIG_NAME, WEIGHTS_NAME, check_all, **hub)
    return MendConfig.from_record(record), tensors


def _check_sizes(config: MendConfig, headers: Headers, name_or_path: str | Path) -> None:
    """Refuse tensors of other sizes than the config asks for, as far as it tells them without the base model."""
    problems = [
        f"{name}: expected a floating-point type, got {header.dtype}"
        for name, header in headers.items()
        if not header.is_floating_point
    ]
    placeholders = headers["placeholders"].shape if "placeholders" in headers else ()
    if placeholders[:1] != (config.num_virtual_tokens,):
        problems.append(f"placeholders: expected shape ({config.num_virtual_tokens}, n), got {placeholders}")
    for name, header in headers.items():
        for ending, axis in ((".lora_A.weight", 0), (".lora_B.weight", 1)):
            # The experts of a mixture have their ranks side by side.
            if name.endswith(ending) and not _is_multiple(header.shape[axis : axis + 1], config.lora_r):
                problems.append(
                    f"{name}: expected a multiple of rank {config.lora_r} along axis {axis}, got {header.shape}"
                )
    _refuse(problems, len(headers), name_or_path)


def _is_multiple(size: tuple[int, ...], of: int) -> bool:
    return len(size) == 1 and of > 0 and size[0] > 0 and size[0] % of == 0


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
    _refuse(problems, len(expected), name_or_path)


def _refuse(problems: list[str], num_tensors: int, name_or_path: str | Path) -> None:
    if problems:
        shown = "\n".join(f"- {line}" for line in problems[:8])
        raise CheckpointError(
            f"Expected the {num_tensors} tensors that {CONFIG_NAME} asks for in {name_or_path}, got differences:\n"
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
