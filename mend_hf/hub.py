"""What a saved distiller's folder holds, and the card that goes with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor

from mend_hf.architectures import DISTILLER_RECORD, DISTILLER_RECORD_NAME
from mend_hf.cards import CARD_NAME, CardFacts, complete_facts, make_card, update_card
from mend_hf.config import CONFIG_NAME, MendConfig
from mend_hf.errors import CheckpointError
from mend_hf.files import find_file, write_folder, write_json
from mend_hf.saved_pair import Headers, read_pair, write_pair
from mend_hf.upload import PushOptions, join_path, push_files

WEIGHTS_NAME = "mend_model.safetensors"
LOG_NAME = "training_log.json"
DISTILLER_NAMES = (CONFIG_NAME, WEIGHTS_NAME, DISTILLER_RECORD_NAME)


def save_distiller(
    save_directory: str | Path, config: MendConfig, tensors: Mapping[str, Tensor], facts: CardFacts | None = None
) -> None:
    """Write a distiller's folder: config, trained tensors, and a card, in which a person's own words stay.

    Args:
        save_directory: Made if need be; either all files are written or none.
        config: Of the distiller.
        tensors: What was trained, by name.
        facts: What the card should say beside.

    Raises:
        CheckpointError: The folder cannot be written into, or has a card that cannot be read.
    """
    card = Path(save_directory) / CARD_NAME
    existing = card.read_text(encoding="utf-8") if card.is_file() else None
    text = update_card(existing, make_card(config, complete_facts(facts, existing, str(card))), str(card))
    with write_folder(save_directory) as folder:
        write_pair(folder, CONFIG_NAME, config.to_record(), WEIGHTS_NAME, tensors)
        write_json(folder / DISTILLER_RECORD_NAME, DISTILLER_RECORD)
        (folder / CARD_NAME).write_text(text, encoding="utf-8")


def write_card(
    config: MendConfig,
    facts: CardFacts | None,
    subfolder: str | None,
    existing: str | None,
    repo_id: str,
    paths: list[str],
) -> str:
    """Return the text of a distiller's card on the Hub; the last three arguments are those of `push_files`."""
    where = f"{repo_id}/{join_path(subfolder, CARD_NAME)}"
    card = make_card(config, complete_facts(facts, existing, where), name=repo_id, subfolder=subfolder)
    return update_card(existing, card, where)


def push_distiller_folder(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    facts: CardFacts | None = None,
    **options: Any,
) -> CommitInfo:
    """Upload a folder that `save_pretrained` wrote to the Hub; the base model is not needed.

    The page's own card is kept as `MendModel.push_to_hub` keeps it; where there is none, the folder's is the start.

    Args:
        folder: Holds a whole distiller; a training's log goes with it.
        repo_id: `name` or `owner/name`; the repository is made if need be.
        subfolder: Where in it; None: at its top.
        facts: What the card should say that the config does not know.
        **options: As for `MendModel.push_to_hub`.

    Raises:
        CheckpointError: The folder holds no whole distiller.
        HubError: The Hub refuses, or cannot be reached.
    """
    config, _ = load_distiller(folder, lambda _: None)
    found = {name: find_file(Path(folder), name) for name in (*DISTILLER_NAMES, LOG_NAME, CARD_NAME)}
    own_card = found.pop(CARD_NAME)
    own = own_card.read_text(encoding="utf-8") if own_card else None

    def write(existing: str | None, repo_id: str, paths: list[str]) -> str:
        return write_card(config, facts, subfolder, existing or own, repo_id, paths)

    files: dict[str, Path | bytes] = {join_path(subfolder, name): path for name, path in found.items() if path}
    if not found[DISTILLER_RECORD_NAME]:  # folders of 0.1.0's first versions have none
        files[join_path(subfolder, DISTILLER_RECORD_NAME)] = json.dumps(DISTILLER_RECORD).encode()
    return push_files(repo_id, files, write, PushOptions(**options), join_path(subfolder, CARD_NAME))


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
