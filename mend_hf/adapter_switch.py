"""LoRA layers that one thread may read through while another one reads past them.

A shared distiller's LoRA matrices sit in the base model that answers queries. Whether they count is asked at the
layer, by the thread that runs it, so distilling and answering at the same time are both exact and neither waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class _Thread(threading.local):
    """What the current thread has switched on; a new thread starts with nothing."""

    adapter_is_on = False


_THREAD = _Thread()


def adapter_on() -> AbstractContextManager[None]:
    """Let this thread, inside the block, read through the adapters that `switch_by_thread` was called for.

    No caller's code may run inside: what an event loop puts in between would read through the adapter too.
    """
    return _adapter(True)


def adapter_is_on() -> bool:
    """Return whether this thread reads through adapters."""
    return _THREAD.adapter_is_on


def adapter_as_now() -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a context in which adapters are, in whatever thread, as they are here and now."""
    return partial(_adapter, _THREAD.adapter_is_on)


@contextmanager
def _adapter(is_on: bool) -> Iterator[None]:
    before, _THREAD.adapter_is_on = _THREAD.adapter_is_on, is_on
    try:
        yield
    finally:
        _THREAD.adapter_is_on = before


def switch_by_thread(layer: BaseTunerLayer) -> None:
    """Leave a layer's LoRA matrices out from here on, save in threads inside `adapter_on`."""
    layer_class: type = type(layer)
    layer.__class__ = _with_switch(layer_class)


class _SwitchedLayer(nn.Module):
    """Answers in place of peft's flag, which all threads share."""

    @property
    def disable_adapters(self) -> bool:
        return not _THREAD.adapter_is_on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Read through the adapter, or go straight to the layer underneath: queries pay for nothing else.

        Hooks that somebody put on this layer are called either way.
        """
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if _THREAD.adapter_is_on or any(hooks):
            return super().__call__(*args, **kwargs)
        return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]  # quicker than the attribute


@cache
def _with_switch(layer_class: type) -> type:
    return type(layer_class.__name__, (_SwitchedLayer, layer_class), {"__module__": layer_class.__module__})
