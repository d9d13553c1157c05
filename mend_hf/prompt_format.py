"""The text around inputs and answers: a config's own prefixes and separators, or the turns of a chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mend_hf.config import PLAIN_FIELDS, MendConfig
from mend_hf.errors import ConfigError

# Stand for a user's and an assistant's text while a template is taken apart: words that no template writes itself.
_USER, _ASSISTANT = "mend0question{}", "mend0answer{}"

_REMEDY = (
    "give the tokenizer a chat_template that writes every turn the same wherever it stands, or use "
    'prompt_format="plain"'
)


# "chat", "plain" as a new config has it, or some of its four texts by their names in `MendConfig`.
FormatChoice = Literal["plain", "chat"] | Mapping[str, str]


@dataclass(frozen=True)
class PromptFormat:
    """Where the texts of a demonstration stand: input_prefix INPUT output_prefix answer_prefix ANSWER separator.

    A query is a demonstration up to its output_prefix.

    Attributes:
        input_prefix: Before every input.
        output_prefix: Between an input and its output.
        answer_prefix: In front of every output, tokenised together with it.
        separator: After every output.
        opening: In front of the first demonstration, or of a query without any; None: the tokenizer's own beginning.
    """

    input_prefix: str
    output_prefix: str
    answer_prefix: str
    separator: str
    opening: str | None = None

    @property
    def turn_end(self) -> str:
        """What a model that knows the format writes behind an answer."""
        return ""

    def show_input(self, text: str) -> str:
        """Return an input as it stands in the prompt, without what is around it."""
        return text

    def show_answer(self, text: str) -> str:
        """Return an answer as it stands in the prompt, without what is around it."""
        return text


@dataclass(frozen=True)
class ChatFormat(PromptFormat):
    """Demonstrations as turns of the user and the assistant; a query is a turn of the user and the generation prompt.

    The parts are differences of conversations that the template has rendered, so opening + demonstrations + query is
    the template's own text of the whole conversation. Its ids are those of that text where no token of the tokenizer
    reaches over the border of two parts, as one might if a text begins with a line break.

    Attributes:
        opening: What the template puts in front of the first turn: the begin of the text, a system turn.
        render: Renders the texts of alternating turns with the generation prompt behind them.
    """

    opening: str = ""
    render: Callable[[Sequence[str]], str] = field(kw_only=True)

    @property
    def turn_end(self) -> str:
        """What the template writes behind an answer, without the white space up to the next turn."""
        return self.separator.strip() or self.separator

    def show_input(self, text: str) -> str:
        """Return an input as the template writes it, trimmed for instance.

        Raises:
            ConfigError: With this input the template writes other text around it.
        """
        return _cut_out(self.render([text]), self.opening + self.input_prefix, self.output_prefix, text)

    def show_answer(self, text: str) -> str:
        """Return an answer as the template writes it, trimmed for instance.

        Raises:
            ConfigError: With this answer the template writes other text around it.
        """
        before = self.opening + self.input_prefix + _USER + self.output_prefix + self.answer_prefix
        after = self.separator + self.input_prefix + _USER + self.output_prefix
        return _cut_out(self.render([_USER, text, _USER]), before, after, text)


def change_prompt_format(config: MendConfig, choice: FormatChoice) -> MendConfig:
    """Return a config with another prompt format and all else as it is.

    Args:
        config: Any.
        choice: "chat"; "plain"; or the texts that differ from those of `MendConfig()`, as {"input_prefix": "Q: "}.

    Raises:
        ConfigError: There is no such format, or no such text in one.
    """
    texts = dict(choice) if isinstance(choice, Mapping) else {}
    if unknown := sorted(map(repr, {*texts}.difference(PLAIN_FIELDS))):
        raise ConfigError(f"Expected texts of a prompt format ({', '.join(PLAIN_FIELDS)}), got {', '.join(unknown)}.")
    changes: dict[str, Any] = {
        setting.name: setting.default for setting in dataclasses.fields(config) if setting.name in PLAIN_FIELDS
    }
    changes |= {"prompt_format": "plain" if isinstance(choice, Mapping) else choice} | texts
    return dataclasses.replace(config, **changes)


def get_prompt_format(tokenizer: PreTrainedTokenizerBase, config: MendConfig) -> PromptFormat:
    """Return the format that a config asks for.

    Raises:
        ConfigError: It asks for a chat, and the tokenizer has no chat template, or one whose turns cannot be told
            apart.
    """
    if config.prompt_format == "chat":
        return _read_chat_template(tokenizer)
    return PromptFormat(
        config.input_prefix, config.output_prefix, config.answer_prefix, config.demonstration_separator
    )


def _read_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Find the parts of a template in the text of conversations of one and three queries."""

    def render(texts: Sequence[str], *, add_generation_prompt: bool = True) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        try:
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            raise ConfigError(
                f"Expected a chat template that takes alternating turns of user and assistant, got {error}: {_REMEDY}."
            ) from error

    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            'Expected a tokenizer with a chat template for prompt_format="chat", got none: set '
            'tokenizer.chat_template, take the tokenizer of an instruct model, or use prompt_format="plain".'
        ) from error
    words = [name.format(number) for number in range(2) for name in (_USER, _ASSISTANT)] + [_USER.format(2)]
    whole = render(words)
    before, output_part, between, *_, output_prefix = _split_at(whole, words)
    _, _, closing = _split_at(render(words[:2], add_generation_prompt=False), words[:2])
    if not between.startswith(closing) or not output_part.startswith(output_prefix):
        raise ConfigError(
            f"Expected a chat template that ends an answer with {closing!r} wherever it stands and writes its "
            f"generation prompt {output_prefix!r} in front of answers, got {between!r} and {output_part!r}: {_REMEDY}."
        )
    num_shared = _count_shared_end(before, between[len(closing) :])
    parts = ChatFormat(
        input_prefix=before[len(before) - num_shared :],
        output_prefix=output_prefix,
        answer_prefix=output_part[len(output_prefix) :],
        separator=between[: len(between) - num_shared],
        opening=before[: len(before) - num_shared],
        render=render,
    )
    _check_parts(parts, words, whole)
    return parts


def _split_at(text: str, words: Sequence[str]) -> list[str]:
    """Return what stands before, between and after words that occur in this order, once each."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ConfigError(
                f"Expected a chat template that writes every turn once, got one that writes it {text.count(word)} "
                f"times: {_REMEDY}."
            )
        part, text = text.split(word)
        parts.append(part)
    return [*parts, text]


def _count_shared_end(first: str, second: str) -> int:
    num = 0
    while num < min(len(first), len(second)) and first[-1 - num] == second[-1 - num]:
        num += 1
    return num


def _check_parts(parts: ChatFormat, words: Sequence[str], whole: str) -> None:
    text = parts.opening
    for place, word in enumerate(words):
        is_input = place % 2 == 0
        text += parts.input_prefix + word + parts.output_prefix if is_input else parts.answer_prefix + word
        text += "" if is_input else parts.separator
    if text != whole or not parts.turn_end:
        raise ConfigError(
            f"Expected a chat template whose turns follow each other and end with a mark, got {whole!r} where the "
            f"turns one by one make {text!r}: {_REMEDY}."
        )


def _cut_out(rendered: str, before: str, after: str, text: str) -> str:
    if not rendered.startswith(before) or not rendered.endswith(after) or len(rendered) < len(before) + len(after):
        raise ConfigError(
            f"Expected the chat template to write {text!r} between {before!r} and {after!r}, got {rendered!r}: "
            f"{_REMEDY}."
        )
    return rendered[len(before) : len(rendered) - len(after)]
