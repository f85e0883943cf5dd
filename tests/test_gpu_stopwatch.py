"""What the GPU bench times, and in which order it asks the device for it, by a device that only keeps a record."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import gpu_stopwatch
import pytest
import torch


class Recorder:
    """Stands in for torch.cuda: keeps the order of calls, and lets 5 ms pass between two events."""

    def __init__(self, *, captures: bool = True, waits: bool = False) -> None:
        self.calls: list[str] = []
        self.captures, self.waits, self.mode = captures, waits, "default"

    def __call__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append(name)

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    def target(self) -> None:
        self.calls.append("target")
        if self.waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recorder, gpu_stopwatch.Stopwatch]]:
    def make(**options: bool) -> tuple[Recorder, gpu_stopwatch.Stopwatch]:
        recorder = Recorder(**options)

        class Event:
            def __init__(self, **options: bool) -> None:
                self.record = recorder("record")

            def elapsed_time(self, other: Event) -> float:
                return 5.0

        class Graph:
            replay = staticmethod(recorder("replay"))

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": recorder.graph,
            "synchronize": recorder("synchronize"),
            "_sleep": recorder("sleep"),
            "get_sync_debug_mode": lambda: "default",
            "set_sync_debug_mode": recorder.set_sync_debug_mode,
        }.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, value)
        stopwatch = gpu_stopwatch.Stopwatch(torch.device("cpu"))
        stopwatch.device = torch.device("cuda")
        stopwatch.over_l2 = type("Cache", (), {"zero_": staticmethod(recorder("flush"))})()
        return recorder, stopwatch

    return make


def rounds(calls: list[str]) -> list[list[str]]:
    """The calls from each flush of the cache to the next."""
    found: list[list[str]] = []
    for call in calls:
        if call == "flush":
            found.append([])
        if found:
            found[-1].append(call)
    assert found[-1].pop() == "synchronize"
    return found


def test_replays_of_a_graph_are_timed_with_nothing_else_between_the_events(watch: Any) -> None:
    recorder, stopwatch = watch()
    row = stopwatch.row(recorder.target)
    assert row == {"us": 5000.0, "spread %": 0.0, "timed by": "graph"}
    found = rounds(recorder.calls)
    assert len(found) >= 10
    assert all(calls == ["flush", "sleep", "record", "replay", "record"] for calls in found)


@pytest.mark.parametrize(("waits", "by"), [(False, "events, host ahead"), (True, "events, WAITING FOR THE HOST")])
def test_what_can_not_be_captured_is_called_behind_a_busy_device_and_a_wait_is_said(
    watch: Any, waits: bool, by: str
) -> None:
    recorder, stopwatch = watch(captures=False, waits=waits)
    assert stopwatch.row(recorder.target)["timed by"] == by
    assert all(calls == ["flush", "sleep", "record", "target", "record"] for calls in rounds(recorder.calls))
    assert recorder.mode == "default"


def test_what_fails_is_a_row_with_its_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no memory\nmore")

    row = gpu_stopwatch.Stopwatch(torch.device("cpu")).row(fails)
    assert row == {"skipped": "RuntimeError: no memory"}


def test_a_time_is_compared_with_the_longer_of_both_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    report = gpu_stopwatch.Report(file, torch.device("cpu"))
    report.bytes_a_us, report.matrix = 1000.0, {"tf32": 500.0}
    monkeypatch.setattr(report.watch, "row", lambda target, as_called: {"us": 40.0})
    row = report.time("g", "k", lambda: None, moved=10_000, operations=10_000, precision="tf32")
    assert (row["of peak"], row["peak"]) == (0.5, "tf32 products")  # 20 us of products, 10 us of memory
    assert (row["GB/s"], row["TFLOP/s"]) == (0.25, 0.00025)
    assert report.time("g", "k", lambda: None, moved=20_000)["peak"] == "copy"
    report.skip("h", "no memory")
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert rows[0] == row
    assert rows[2]["skipped"] == "no memory"
