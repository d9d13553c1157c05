"""Many distilled demonstrations in one place, each under a name: what names may be, and the card of them all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mend_hf.cards import CARD_NAME, CardFacts, complete_facts, make_demonstrations_card, update_card
from mend_hf.errors import DataError
from mend_hf.provenance import Provenance

RECORD_NAME, WEIGHTS_NAME = "distilled_demonstrations.json", "distilled_demonstrations.safetensors"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_name(name: str) -> str:
    """Return the name of one of many distilled demonstrations.

    Raises:
        DataError: It cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            "Expected a name of at most 128 letters, digits, '_', '-' and '.', with no '-' or '.' in front, got "
            f"{name!r}: choose another one."
        )
    return name


def list_names(paths: Sequence[str]) -> list[str]:
    """Return the names of the demonstrations in a place, of the paths of its files."""
    folders = [path.removesuffix(f"/{RECORD_NAME}") for path in paths if path.endswith(f"/{RECORD_NAME}")]
    return sorted(folder for folder in folders if _NAME.fullmatch(folder))


def write_library_card(
    origin: Provenance,
    prefix_form: str,
    facts: CardFacts | None,
    existing: str | None,
    repo_id: str,
    paths: list[str],
) -> str:
    """Return the text of a card for distilled demonstrations; the last three arguments are those of `push_files`.

    Args:
        origin: Of one of them, which stands for all.
        prefix_form: "kv" or "embeds".
        facts: What the card should say beside.
        existing: The card that is there.
        repo_id: Where.
        paths: Of all files there.
    """
    where = f"{repo_id}/{CARD_NAME}"
    card = make_demonstrations_card(
        origin.base_model_name_or_path,
        prefix_form,
        origin.prompt_format,
        complete_facts(facts, existing, where),
        name=repo_id,
        names=list_names(paths),
    )
    return update_card(existing, card, where)
