"""Where the time of a training goes."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

REST = "rest"
_MAX_OPEN_LAPS = 1024


class Stopwatch:
    """Adds up the seconds that parts of a training take.

    From `start` on, every moment belongs to one part: the innermost that is being measured, or else "rest". While it
    is paused, nothing is counted.

    On CUDA, a moment is when the GPU comes to it: events are put among the work that is queued, and the processor
    waits for none of them before `pop`. Elsewhere it is the processor's own clock.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._part: str | None = None  # None: not running
        self._since: Any = None
        self._laps: deque[tuple[str, Any, Any]] = deque()
        self._seconds: dict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Count from now on, from nothing."""
        self._laps.clear()
        self._seconds.clear()
        self._part, self._since = REST, self._read_clock()

    def stop(self) -> None:
        """Count no more; what was counted stays until `start`."""
        self._switch(None)

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Let the time inside the block belong to a part, except for what is measured or paused within."""
        return self._turn_to(part)

    def pause(self) -> AbstractContextManager[None]:
        """Count nothing inside the block, whatever is measured within."""
        return self._turn_to(None)

    @contextmanager
    def measure_calls(self, module: nn.Module, part: str) -> Iterator[None]:
        """Inside the block, let the calls of a module belong to a part.

        What `torch.compile` has made of the module, together with the code around it, is one piece and belongs to the
        part around.
        """
        opened: list[AbstractContextManager[None]] = []

        def open_part(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                opened.append(self.measure(part))
                opened[-1].__enter__()

        def close_part(*_: Any) -> None:
            if not torch.compiler.is_compiling() and opened:
                opened.pop().__exit__(None, None, None)

        hooks = [
            module.register_forward_pre_hook(open_part),
            module.register_forward_hook(close_part, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pop(self) -> dict[str, float]:
        """Return the seconds of every part since the last time, and start anew; on CUDA, wait for the GPU."""
        if self._part is not None:
            self._switch(self._part)
        if self._is_cuda and self._laps:
            self._laps[-1][2].synchronize()
        self._add_up()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    @contextmanager
    def _turn_to(self, part: str | None) -> Iterator[None]:
        if self._part is None:
            yield
            return
        before = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, part: str | None) -> None:
        now = self._read_clock()
        if self._part is not None:
            self._laps.append((self._part, self._since, now))
        self._part, self._since = part, now
        if not self._is_cuda or len(self._laps) > _MAX_OPEN_LAPS:
            self._add_up()

    def _add_up(self) -> None:
        """Add the laps that are over to their parts; on CUDA, those that the GPU has come to the end of."""
        while self._laps and (not self._is_cuda or self._laps[0][2].query()):
            part, start, end = self._laps.popleft()
            self._seconds[part] += start.elapsed_time(end) / 1000 if self._is_cuda else end - start

    def _read_clock(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
