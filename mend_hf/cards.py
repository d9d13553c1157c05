"""Cards: what the page of a repository on the Hub says, written from templates, and a person's words kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from mend_hf.architectures import AUTO_CLASS_NAMES, TaskType
from mend_hf.config import MendConfig
from mend_hf.errors import CheckpointError

CARD_NAME = "README.md"
BEGIN = "<!-- mend_hf writes what stands between these two marks anew; write your own words above or below. -->"
END = "<!-- End of what mend_hf writes. -->"

_NO_BASE = "path/or/hub-id/of/the/base-model"
# What the Hub calls a task type.
_PIPELINE_TAGS: dict[TaskType, str] = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says that no config knows.

    Attributes:
        datasets: What a distiller was trained on: Hub ids, or names.
        license: As the Hub spells it: apache-2.0, cc-by-nc-4.0, other ...
        language: Codes such as en.
        eval_results: Scores, for the Hub's own table; `evaluation.card.read_results_for_card` makes them.
        results: The same and more as Markdown.
    """

    datasets: Sequence[str] = ()
    license: str | None = None
    language: Sequence[str] = ()
    eval_results: Sequence[EvalResult] = ()
    results: str = ""


def make_card(
    config: MendConfig, facts: CardFacts | None = None, *, name: str | None = None, subfolder: str | None = None
) -> ModelCard:
    """Return the model card of a distiller, with the metadata that the Hub reads.

    Args:
        config: Of the distiller.
        facts: What else is known.
        name: Under which it will be loaded: a Hub id or a folder.
        subfolder: Inside that place.
    """
    facts = facts or CardFacts()
    task_type = config.task_type or "CAUSAL_LM"
    data = _make_data(config.base_model_name_or_path, _PIPELINE_TAGS[task_type], "demonstration-distillation", facts)
    if facts.eval_results:
        data.model_name = (name or "distiller").split("/")[-1]
        data.eval_results = list(facts.eval_results)
    return ModelCard.from_template(
        data,
        template_path=_find_template("model_card.md"),
        begin=BEGIN,
        end=END,
        config=config,
        facts=facts,
        base=config.base_model_name_or_path or _NO_BASE,
        auto_class=AUTO_CLASS_NAMES[task_type],
        name=name or "path/or/hub-id/of/this/distiller",
        subfolder=subfolder,
    )


def make_demonstrations_card(
    base_model: str | None,
    prefix_form: str,
    prompt_format: dict[str, str],
    facts: CardFacts | None = None,
    *,
    name: str | None = None,
    names: Sequence[str] = (),
) -> ModelCard:
    """Return the card of distilled demonstrations.

    Args:
        base_model: For which they are.
        prefix_form: "kv" or "embeds".
        prompt_format: The fields of the config that queries have to be written with.
        facts: What else is known.
        name: Under which they will be loaded: a Hub id or a folder.
        names: Of a library, those of all in it.
    """
    settings: dict[str, Any] = {"num_virtual_tokens": int(prefix_form == "embeds"), "lora_r": 0}
    settings |= {"prefix_form": prefix_form, **prompt_format}
    defaults = MendConfig()
    given = [f"{key}={value!r}" for key, value in settings.items() if value != getattr(defaults, key)]
    return ModelCard.from_template(
        _make_data(base_model, "text-generation", "distilled-demonstrations", facts or CardFacts()),
        template_path=_find_template("demonstrations_card.md"),
        begin=BEGIN,
        end=END,
        base=base_model or _NO_BASE,
        settings=", ".join(given),
        name=name or "path/or/hub-id/of/these/demonstrations",
        names=sorted(names),
    )


def complete_facts(facts: CardFacts | None, existing: str | None, where: str = CARD_NAME) -> CardFacts:
    """Return facts, and in place of those not given what an existing card's metadata says.

    Raises:
        CheckpointError: The existing card's metadata cannot be read.
    """
    facts = facts or CardFacts()
    if existing is None:
        return facts
    data = _parse(existing, where).data
    scores = facts.eval_results or getattr(data, "eval_results", None) or ()
    return CardFacts(
        datasets=facts.datasets or as_list(data.datasets),
        license=facts.license or data.license,
        language=facts.language or as_list(data.language),
        eval_results=scores,
        results=facts.results or _tabulate(scores),
    )


def _parse(text: str, where: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise CheckpointError(
            f"Expected a card with readable metadata at {where}, got {error}: mend or remove it, and try again."
        ) from error


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """Return one text, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def _tabulate(scores: Sequence[EvalResult]) -> str:
    lines = [f"| {score.dataset_name} | {score.metric_type} | {score.metric_value} |" for score in scores]
    return "\n".join(["| data | metric | score |", "|---|---|---:|", *lines]) if lines else ""


def update_card(existing: str | None, new: ModelCard, where: str = CARD_NAME) -> str:
    """Return a card's text with what is new, and all that a person wrote or set kept.

    Between the two marks stands what is new. A card without marks is a person's own: only its metadata grows. Metadata
    that is there stays, lists get what they lack, and of scores those of the same data and metric are replaced.

    Args:
        existing: The text that is there; None: none.
        new: What would be written if there were none.
        where: Names the existing card in errors.

    Raises:
        CheckpointError: The existing card's metadata or marks cannot be read.
    """
    if existing is None or not existing.strip():
        return str(new)
    card = _parse(existing, where)
    card.text = _replace_block(card.text, new.text, where)
    before = card.data.to_dict()
    _update_data(card.data, new.data)
    return str(card) if card.data.to_dict() != before else _keep_head(existing, card)


def add_tags(text: str, tags: Sequence[str]) -> str:
    """Return a card's text with further tags in its metadata."""
    card = ModelCard(text)
    missing = [tag for tag in tags if tag not in (card.data.tags or ())]
    if not missing:
        return text
    card.data.tags = [*(card.data.tags or ()), *missing]
    return str(card)


def _keep_head(existing: str, card: ModelCard) -> str:
    """Return a card whose metadata is the same as before, letter by letter."""
    old = ModelCard(existing)
    return existing if old.text == card.text else existing[: len(existing) - len(old.text)] + card.text


def _replace_block(text: str, new: str, where: str) -> str:
    num_marks = (text.count(BEGIN), text.count(END))
    if num_marks == (0, 0):
        return text
    if num_marks != (1, 1) or text.index(BEGIN) > text.index(END):
        raise CheckpointError(
            f"Expected one block between the marks of mend_hf in {where}, got {num_marks[0]} beginnings and "
            f"{num_marks[1]} ends: remove them all to keep the card as it is, or mend the block."
        )
    block = new[new.index(BEGIN) : new.index(END)]
    return text[: text.index(BEGIN)] + block + text[text.index(END) :]


def _update_data(data: Any, new: Any) -> None:
    """Add what a card's metadata lacks."""
    for key, value in vars(new).items():
        own = getattr(data, key, None)
        if key == "eval_results":
            added = list(value or ())
            kept = [old for old in own or () if not any(old.is_equal_except_value(one) for one in added)]
            data.eval_results = [*kept, *added] or own
        elif own is None:
            setattr(data, key, value)
        elif isinstance(own, list) and isinstance(value, list):
            setattr(data, key, [*own, *(item for item in value if item not in own)])


def _make_data(base: str | None, pipeline_tag: str, tag: str, facts: CardFacts) -> ModelCardData:
    base = base if base and _may_be_on_the_hub(base) else None
    return ModelCardData(
        library_name="mend_hf",
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag=pipeline_tag,
        license=facts.license,
        language=list(facts.language) or None,
        datasets=list(facts.datasets) or None,
        tags=["mend", tag, *([f"base_model:adapter:{base}"] if base else [])],
    )


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _find_template(name: str) -> str:
    return str(files("mend_hf").joinpath(name))
