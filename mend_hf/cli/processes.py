"""Several processes that a launcher started, where a command splits its work among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those of a command.

    Attributes:
        index: Its number, from 0.
        number: How many there are.
    """

    index: int = 0
    number: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes have come so far."""
        if self.number > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """Join the other processes inside the block, if there are any, and leave them behind it.

    Args:
        device: Of the models; of the processes on one machine each gets a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    yield Processes(state.process_index, state.num_processes)
    # Not after an error, where the others may be waiting for this one: the launcher ends them.
    state.destroy_process_group()


def choose_device(device: str | None) -> str:
    """Return the device of this process: a GPU of its own if there are any and no other is asked for."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
