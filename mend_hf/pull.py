"""Fetching what is shared on the Hub into a folder, checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.cards import CARD_NAME
from mend_hf.config import CONFIG_NAME
from mend_hf.errors import CheckpointError, DataError
from mend_hf.files import check_output_folder, check_subfolder, write_folder
from mend_hf.hub import DISTILLER_NAMES, LOG_NAME, load_distiller
from mend_hf.library import RECORD_NAME, WEIGHTS_NAME, check_name, list_names
from mend_hf.upload import explain_hub_errors, join_path

_DISTILLER_FILES = (*DISTILLER_NAMES, LOG_NAME, CARD_NAME)
_DEMONSTRATION_FILES = (RECORD_NAME, WEIGHTS_NAME)


def pull(
    repo_id: str, save_directory: str | Path, *, name: str | None = None, subfolder: str | None = None, **hub: Any
) -> list[str]:
    """Copy a distiller, distilled demonstrations or a whole library of them from the Hub into a folder.

    Downloads are cached, and go on where they were cut off. Everything is read and checked before it is copied.

    Args:
        repo_id: `owner/name`.
        save_directory: Made if need be.
        name: Only this one of a library.
        subfolder: Where in the repository.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        The names of a library's demonstrations; of anything else an empty list.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
        CheckpointError: Nothing of mend_hf is there, or it is damaged; or the folder cannot be written into.
        DataError: The library has no such name.
    """
    target, subfolder = check_output_folder(save_directory), check_subfolder(subfolder, repo_id)
    if name is not None:
        check_name(name)
    files = [*_DISTILLER_FILES, *_DEMONSTRATION_FILES]
    patterns = [join_path(subfolder, folder, file) for file in files for folder in (None, name or "*")]
    with explain_hub_errors(f"pull {repo_id}"):
        snapshot = Path(snapshot_download(repo_id, allow_patterns=patterns, **hub), subfolder)
    if name is None and (snapshot / CONFIG_NAME).is_file():
        load_distiller(snapshot, lambda _: None)
        _copy(snapshot, target, _DISTILLER_FILES)
        return []
    if name is None and (snapshot / RECORD_NAME).is_file():
        DistilledDemonstrations.from_pretrained(snapshot)
        _copy(snapshot, target, (*_DEMONSTRATION_FILES, CARD_NAME))
        return []
    there = list_names([path.relative_to(snapshot).as_posix() for path in snapshot.glob(f"*/{RECORD_NAME}")])
    if not there:
        raise CheckpointError(
            f"Expected a distiller ({CONFIG_NAME}) or distilled demonstrations ({RECORD_NAME}) in {repo_id}, got "
            "neither: look at the name, the revision and the subfolder."
        )
    if name is not None and name not in there:
        raise DataError(f"Expected one of {', '.join(there)} in {repo_id}, got {name!r}: choose one of these.")
    wanted = there if name is None else [name]
    for one in wanted:
        DistilledDemonstrations.from_pretrained(snapshot, name=one)
        _copy(snapshot / one, target / one, _DEMONSTRATION_FILES)
    return wanted


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    with write_folder(target) as folder:
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
