"""What belongs to which part, by a clock that the test turns."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from mend_hf import stopwatch as module
from mend_hf.stopwatch import Stopwatch


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_every_moment_belongs_to_the_innermost_part(clock):
    watch = Stopwatch("cpu")
    watch.start()
    clock.pass_time(1)
    with watch.measure("backward"):
        clock.pass_time(2)
        with watch.measure("student"):
            clock.pass_time(4)
            with watch.measure("teacher"):
                clock.pass_time(8)
            clock.pass_time(16)
        clock.pass_time(32)
    clock.pass_time(64)
    assert watch.pop() == {"rest": 1 + 64, "backward": 2 + 32, "student": 4 + 16, "teacher": 8}


def test_what_was_asked_for_is_not_counted_again_also_in_the_middle_of_a_part(clock):
    watch = Stopwatch("cpu")
    watch.start()
    with watch.measure("student"):
        clock.pass_time(1)
        assert watch.pop()["student"] == 1
        clock.pass_time(2)
    assert watch.pop() == {"student": 2, "rest": 0}


def test_nothing_is_counted_in_a_pause_before_the_start_and_behind_the_stop(clock):
    watch = Stopwatch("cpu")
    with watch.measure("student"):
        clock.pass_time(1)
    assert watch.pop() == {}
    watch.start()
    with watch.measure("student"):
        clock.pass_time(2)
        with watch.pause():
            clock.pass_time(4)
            with watch.measure("teacher"):
                clock.pass_time(8)
        clock.pass_time(16)
    watch.stop()
    clock.pass_time(32)
    assert watch.pop() == {"rest": 0, "student": 18}
    watch.start()
    assert watch.pop() == {"rest": 0}


def test_a_part_ends_where_an_error_leaves_it(clock):
    watch = Stopwatch("cpu")
    watch.start()
    with suppress(ZeroDivisionError), watch.measure("student"):
        clock.pass_time(1)
        raise ZeroDivisionError
    clock.pass_time(2)
    assert watch.pop() == {"rest": 2, "student": 1}


class Sleeper(nn.Module):
    """A module that takes as long as it is told to."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, seconds):
        self.clock.pass_time(seconds)
        return 1 / seconds


def test_calls_of_a_module_are_a_part_inside_the_block_and_no_longer(clock):
    watch, sleeper = Stopwatch("cpu"), Sleeper(clock)
    watch.start()
    with watch.measure_calls(sleeper, "distiller"), watch.measure("student"):
        sleeper(1)
        with pytest.raises(ZeroDivisionError):
            sleeper(0)
        clock.pass_time(2)
    sleeper(4)
    assert watch.pop() == {"rest": 4, "distiller": 1, "student": 2}


def test_a_compiled_module_runs_unharmed_and_belongs_to_the_part_around():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU())
    watch = Stopwatch("cpu")
    watch.start()
    with watch.measure_calls(layer, "distiller"), watch.measure("student"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        expected = model(torch.ones(1, 2))
        watch.pop()
        assert compiled(torch.ones(1, 2)).equal(expected)
    assert set(watch.pop()) == {"student", "rest"}


class Gpu:
    """A GPU that is behind: its events happen when it is told to go on."""

    def __init__(self):
        self.queue = []
        self.seconds = self.num_waits = 0

    def make_event(self, enable_timing):
        assert enable_timing
        return GpuEvent(self)

    def go_on(self, num_events=None):
        """Come to the next events, a second of work each."""
        for event in self.queue[:num_events]:
            self.seconds += 1
            event.seconds = self.seconds
        del self.queue[:num_events]


class GpuEvent:
    """What `torch.cuda.Event` offers."""

    def __init__(self, gpu):
        self.gpu, self.seconds = gpu, None

    def record(self):
        self.gpu.queue.append(self)

    def query(self):
        return self.seconds is not None

    def synchronize(self):
        self.gpu.num_waits += 1
        self.gpu.go_on()

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.make_event)
    return gpu


def test_on_a_gpu_nothing_waits_before_the_times_are_asked_for(gpu):
    watch = Stopwatch("cuda")
    watch.start()
    for _ in range(3):
        with watch.measure("student"), watch.measure("teacher"):
            pass
    gpu.go_on(4)
    assert gpu.num_waits == 0
    assert watch.pop() == {"rest": 4, "student": 6, "teacher": 3}
    assert gpu.num_waits == 1


def test_on_a_gpu_a_long_training_does_not_keep_all_its_events(gpu):
    watch = Stopwatch("cuda")
    watch.start()
    for _ in range(10 * module._MAX_OPEN_LAPS):
        with watch.measure("student"):
            gpu.go_on()
    assert len(watch._laps) <= module._MAX_OPEN_LAPS + 1
    assert sum(watch.pop().values()) == 20 * module._MAX_OPEN_LAPS + 1
    assert gpu.num_waits == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_parts_add_up_to_the_whole_and_the_long_one_is_the_longest():
    watch, matrix = Stopwatch("cuda"), torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    watch.start()
    for _ in range(600):  # more laps than are kept open
        with watch.measure("short"):
            matrix[:8] @ matrix
        with watch.measure("long"):
            matrix @ matrix
    seconds = watch.pop()
    end.record()
    end.synchronize()
    assert seconds["long"] > 10 * seconds["short"] > 0
    assert sum(seconds.values()) == pytest.approx(start.elapsed_time(end) / 1000, rel=0.02)
