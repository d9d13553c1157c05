"""What a model answers from when nobody says: set for the whole model, or for the length of a block.

A block counts for the thread, or the asyncio task, that entered it: several can ask one model at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from mend_hf.artifact import DistilledDemonstrations

_BLOCKS: ContextVar[Mapping[Binding, DistilledDemonstrations | None]] = ContextVar(
    "demonstrations of the blocks around", default=MappingProxyType({})
)
_DISABLED: ContextVar[frozenset[Binding]] = ContextVar("models that are bare here", default=frozenset())


class Binding:
    """Which demonstrations one model is bound to, here."""

    def __init__(self) -> None:
        self._everywhere: DistilledDemonstrations | None = None

    @property
    def demonstrations(self) -> DistilledDemonstrations | None:
        """What the innermost block around says, and outside of blocks what was set for the model."""
        return _BLOCKS.get().get(self, self._everywhere)

    @property
    def is_disabled(self) -> bool:
        """Whether a block around makes the model the bare base model."""
        return self in _DISABLED.get()

    def set_everywhere(self, demonstrations: DistilledDemonstrations | None) -> None:
        """Bind demonstrations for every thread, outside of its blocks."""
        self._everywhere = demonstrations

    @contextmanager
    def bind_here(self, demonstrations: DistilledDemonstrations | None) -> Iterator[None]:
        """Bind demonstrations inside the block, for the thread or task that entered it."""
        token = _BLOCKS.set({**_BLOCKS.get(), self: demonstrations})
        try:
            yield
        finally:
            _BLOCKS.reset(token)

    @contextmanager
    def disable_here(self) -> Iterator[None]:
        """Make the model the bare base model inside the block, for the thread or task that entered it."""
        token = _DISABLED.set(_DISABLED.get() | {self})
        try:
            yield
        finally:
            _DISABLED.reset(token)
