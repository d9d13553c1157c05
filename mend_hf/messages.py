"""Chat messages as users write them, as pairs of an input and an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mend_hf.errors import DataError


def is_message(item: Any) -> bool:
    """Return whether something is a chat message: a mapping with a role and content."""
    return isinstance(item, Mapping) and {"role", "content"} <= set(item)


def pair_messages(messages: Sequence[Any], where: str = "") -> list[tuple[str, str]]:
    """Return the (input, output) pairs of a conversation.

    Args:
        messages: {"role": "user", "content": ...} and {"role": "assistant", "content": ...} in turn.
        where: Stands in front of the place that an error names.

    Raises:
        DataError: The turns do not alternate, a role is another one, or something is not a message with text.
    """
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        place = f"{where}message {index}"
        if not is_message(message):
            raise DataError(f"{place}: expected a message with role and content, got {message!r}: do not mix forms.")
        if message["role"] == "system":
            raise DataError(
                f"{place}: expected turns of user and assistant, got a system turn: put what it says in front of the "
                "first user's text."
            )
        if message["role"] != role:
            raise DataError(
                f"{place}: expected the role {role!r}, got {message['role']!r}: let user and assistant take turns, "
                "the user first."
            )
        if not isinstance(message["content"], str):
            raise DataError(f"{place}: expected content that is a string, got {message['content']!r}: give text.")
    if len(messages) % 2:
        raise DataError(
            f"{where}message {len(messages) - 1}: expected an answer behind it, got the end: leave the query out of "
            "the demonstrations, and ask it."
        )
    texts = [message["content"] for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))
