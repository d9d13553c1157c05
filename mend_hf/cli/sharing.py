"""`mend push` and `mend pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mend_hf.cli.options import OutputFolder
from mend_hf.errors import CheckpointError, ConfigError

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")]
Token = Annotated[str | None, typer.Option(help="Default: the one that `hf auth login` saved.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the repository. Default: at its top.")]


def push(
    folder: Annotated[Path, typer.Argument(help="A saved distiller, distilled demonstrations, or a library of them.")],
    repo_id: Annotated[str, typer.Argument(help="name or owner/name; the repository is made if need be.")],
    name: Annotated[str | None, typer.Option(help="Name of distilled demonstrations among others there.")] = None,
    subfolder: Subfolder = None,
    results: Annotated[
        Path | None, typer.Option(help="A folder of `mend evaluate`, whose scores go on the card.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data, for the card; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, for the card: apache-2.0, other ...")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language code, for the card; may be repeated.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if need be. Default: main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request in place of committing.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token: Token = None,
) -> None:
    """Upload a saved distiller, or distilled demonstrations, to the Hub in one commit.

    What people wrote on the page outside the block of mend_hf stays.

    `mend push stage2 user/mend-x --results scores --dataset user/my-tasks --license apache-2.0`
    """
    from mend_hf.artifact import DistilledDemonstrations
    from mend_hf.cards import CardFacts
    from mend_hf.config import CONFIG_NAME
    from mend_hf.files import find_file
    from mend_hf.hub import push_distiller_folder
    from mend_hf.library import RECORD_NAME
    from mend_hf.store import DemonstrationStore

    scores: dict[str, Any] = {}
    if results is not None:
        from mend_hf.evaluation.card import read_results_for_card

        scores["eval_results"], scores["results"] = read_results_for_card(results)
    facts = CardFacts(datasets=dataset or (), license=license, language=language or (), **scores)
    options: dict[str, Any] = {
        "facts": facts, "revision": revision, "private": private or None, "create_pr": create_pr,
        "commit_message": commit_message, "token": token,
    }  # fmt: skip
    is_distiller = find_file(folder, CONFIG_NAME) is not None
    if results is not None and not is_distiller:
        raise ConfigError(
            "Expected a distiller's folder with --results, which are scores of a distiller: leave it out."
        )
    if subfolder is not None and not is_distiller:
        raise ConfigError("Expected --name for distilled demonstrations, got --subfolder: use --name.")
    if is_distiller:
        if name is not None:
            raise ConfigError("Expected --subfolder for a distiller, got --name: use --subfolder.")
        info = push_distiller_folder(folder, repo_id, subfolder=subfolder, **options)
    elif find_file(folder, RECORD_NAME) is not None:
        info = DistilledDemonstrations.from_pretrained(folder).push_to_hub(repo_id, name=name, **options)
    elif folder.is_dir() and len(store := DemonstrationStore(folder)):
        if name is not None:
            raise ConfigError(f"Expected no --name for a library, whose names are {', '.join(store)}: leave it out.")
        info = store.push_to_hub(repo_id, **options)
    else:
        raise CheckpointError(
            f"Expected a folder with {CONFIG_NAME} or {RECORD_NAME}, or with subfolders that have one, got {folder}: "
            "name what `mend pretrain`, `mend finetune` or `mend distill` wrote."
        )
    print(info.pr_url or info.commit_url)


def pull(
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    output_dir: OutputFolder,
    name: Annotated[str | None, typer.Option(help="Only this one of a library of demonstrations.")] = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Copy a distiller, distilled demonstrations or a library of them from the Hub into a folder, checked.

    `mend pull user/mend-x --output-dir mend-x`
    """
    from mend_hf.pull import pull as pull_from_hub

    names = pull_from_hub(repo_id, output_dir, name=name, subfolder=subfolder, revision=revision, token=token)
    print(f"Saved {', '.join(names) or repo_id} in {output_dir}")
