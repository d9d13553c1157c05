"""Pushing to the Hub: one commit with all files, whose card keeps what people wrote on the page meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from mend_hf import __version__
from mend_hf.cards import CARD_NAME, add_tags
from mend_hf.errors import CheckpointError, HubError, MendError

_NUM_ATTEMPTS = 5
_CONFLICTS = (409, 412)
# The HTTP library's base class, under whatever name huggingface_hub's release imports it.
_NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to push; the same names and meanings as `push_to_hub` of transformers.

    Attributes:
        commit_message: None: says what was uploaded.
        commit_description: More of it.
        private: Whether a repository that is made for this is private; None: as the owner's default.
        token: None: the one that `hf auth login` saved.
        revision: Branch to commit to, made if need be; None: main.
        create_pr: Open a pull request in place of committing to the branch.
        tags: Further tags of the card.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False
    tags: Sequence[str] = ()


def push_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    write_card: Callable[[str | None, str, list[str]], str],
    options: PushOptions,
    card_name: str = CARD_NAME,
) -> CommitInfo:
    """Commit files and a card to a repository on the Hub, which is made if need be.

    Nothing is visible there before all is. Where somebody else commits at the same moment, the card is written anew on
    top of that.

    Args:
        repo_id: `name` or `owner/name`.
        files: Their places here, or what they hold, by path in the repository.
        write_card: From the text of the card that is there (or None), the repository's full name and the paths of all
            files in it, those pushed included, to the card's new text.
        options: How to push.
        card_name: Path of the card in the repository.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
        CheckpointError: The card that is there cannot be read.
    """
    api = HfApi(token=options.token, library_name="mend_hf", library_version=__version__)
    with explain_hub_errors(f"push to {repo_id}"):
        repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
        _make_branch(api, repo_id, options)
        num_left = _NUM_ATTEMPTS
        while True:
            info = api.model_info(repo_id, revision=options.revision)
            there = [entry.rfilename for entry in info.siblings or ()]
            existing = _read_card(api, repo_id, card_name, info.sha) if card_name in there else None
            card = add_tags(write_card(existing, repo_id, sorted({*there, *files})), options.tags)
            operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            num_left -= 1
            try:
                return api.create_commit(
                    repo_id,
                    [*operations, CommitOperationAdd(card_name, card.encode())],
                    commit_message=options.commit_message or "Upload with mend_hf",
                    commit_description=options.commit_description,
                    revision=options.revision,
                    create_pr=options.create_pr,
                    parent_commit=info.sha,
                )
            except HfHubHTTPError as error:
                if _status(error) not in _CONFLICTS or not num_left:
                    raise


def push_saved(
    repo_id: str,
    save: Callable[[Path], None],
    write_card: Callable[[str | None, str, list[str]], str],
    options: PushOptions,
    subfolder: str | None = None,
    card_name: str | None = None,
) -> CommitInfo:
    """Commit what `save` writes into a folder; see `push_files`.

    Args:
        repo_id: `name` or `owner/name`.
        save: Writes files, no folders, into the folder that it is given. A card among them is left out.
        write_card: As for `push_files`.
        options: How to push.
        subfolder: Where in the repository the files belong; None: at its top.
        card_name: Path of the card in the repository; None: beside the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        files = {join_path(subfolder, path.name): path for path in Path(folder).iterdir() if path.name != CARD_NAME}
        return push_files(repo_id, files, write_card, options, card_name or join_path(subfolder, CARD_NAME))


def join_path(*parts: str | None) -> str:
    """Return a path in a repository; parts that are None or empty are left out."""
    return "/".join(part.strip("/") for part in parts if part)


def _make_branch(api: HfApi, repo_id: str, options: PushOptions) -> None:
    if options.revision is None or options.revision.startswith("refs/"):
        return
    try:
        api.create_branch(repo_id, branch=options.revision, exist_ok=True)
    except HfHubHTTPError as error:
        if not (options.create_pr and _status(error) == 403):  # others' branches are there already, or the commit says
            raise


def _read_card(api: HfApi, repo_id: str, card_name: str, sha: str | None) -> str:
    path = api.hf_hub_download(repo_id, card_name, revision=sha)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"Expected text in {card_name} of {repo_id}, got {error}: mend or remove the card there."
        ) from error


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def explain_hub_errors(action: str) -> Iterator[None]:
    """Turn what the Hub's client raises inside the block into a HubError that says what to do."""
    try:
        yield
    except MendError:
        raise
    except (_NETWORK_ERROR, OSError, ValueError) as error:
        status = _status(error)
        remedy = {
            401: "log in with `hf auth login`, or give a token",
            403: "give a token that may write there, or create_pr=True",
            404: "look at the name; private repositories need a token",
            409: "others commit there all the time: try again",
            412: "others commit there all the time: try again",
        }.get(status or 0, "look at the name and at the network, and try again")
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise HubError(f"Expected to {action}, got {said}: {remedy}.") from error
