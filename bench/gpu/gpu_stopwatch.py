"""Times what runs on a GPU, by CUDA events around replays of a CUDA graph, and holds it against measured rates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any, TextIO

import torch

Row = dict[str, Any]
Target = Callable[[], Any]
AHEAD = 20_000_000  # cycles that the GPU sleeps while the host queues work: about 10 ms
SECONDS = 0.5  # of rounds for one kernel


class Stopwatch:
    """Times targets on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.over_l2 = torch.empty(max(2 * cache, 1 << 27), dtype=torch.uint8, device=device)

    def row(self, target: Target, *, as_called: bool = False) -> Row:
        """Return "us", "spread %" and "timed by", or "skipped" with the reason.

        Args:
            target: what is timed.
            as_called: as the host calls it, launches by Python included: for a whole forward and backward pass.
        """
        try:
            for _ in range(1 if self.device.type == "cpu" else 3):
                target()
            times, by = self._on_cpu(target) if self.device.type == "cpu" else self._on_gpu(target, as_called)
        except Exception as error:
            return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        tenth, *_, ninetieth = quantiles(times, n=10)
        middle = median(times)
        return {"us": middle, "spread %": 100 * (ninetieth - tenth) / middle, "timed by": by}

    def _on_cpu(self, target: Target) -> tuple[list[float], str]:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            target()
            times.append((time.perf_counter() - start) * 1e6)
        return times, "CPU's clock"

    def _on_gpu(self, target: Target, as_called: bool) -> tuple[list[float], str]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        target()
        torch.cuda.synchronize()
        rounds = max(10, min(100, int(SECONDS / (time.perf_counter() - start))))
        if as_called:
            return self._timed(target, rounds, torch.cuda.synchronize), "events, host included"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                target()
        except RuntimeError:
            torch.cuda.synchronize()
            by = "events, WAITING FOR THE HOST" if _waits(target) else "events, host ahead"
            return self._timed(target, rounds, partial(self._ahead, AHEAD)), by
        graph.replay()
        return self._timed(graph.replay, rounds, partial(self._ahead, AHEAD // 100)), "graph"

    def _ahead(self, cycles: int) -> None:
        self.over_l2.zero_()
        torch.cuda._sleep(cycles)

    def _timed(self, target: Target, rounds: int, before: Callable[[], None]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for first, last in events:
            before()
            first.record()
            target()
            last.record()
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(last) for first, last in events]


def _waits(target: Target) -> bool:
    """Whether a target copies from or to the host, or synchronises: what its times then hold is said."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        target()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


class Report:
    """Writes a row a kernel, with its share of the rates measured first."""

    def __init__(self, file: TextIO, device: torch.device) -> None:
        self.file, self.device, self.watch = file, device, Stopwatch(device)
        self.bytes_a_us = 0.0
        self.matrix: dict[str, float] = {}

    def time(
        self,
        group: str,
        kernel: str,
        target: Target,
        *,
        moved: int = 0,
        operations: int = 0,
        precision: str = "",
        as_called: bool = False,
    ) -> Row:
        """Time a target that moves so many bytes and does so many operations in ``precision`` at least."""
        row = {"group": group, "kernel": kernel, **self.watch.row(target, as_called=as_called)}
        if "us" in row:
            if moved:
                row |= {"MB": moved / 1e6, "GB/s": moved / row["us"] / 1e3}
            if operations:
                row["TFLOP/s"] = operations / row["us"] / 1e6
            floors = {}
            if moved and self.bytes_a_us:
                floors["copy"] = moved / self.bytes_a_us
            if operations and precision in self.matrix:
                floors[f"{precision} products"] = operations / self.matrix[precision]
            if floors:
                peak = max(floors, key=lambda name: floors[name])
                row |= {"of peak": floors[peak] / row["us"], "peak": peak}
        self._write(row)
        return row

    def skip(self, group: str, reason: str) -> None:
        """Say that a whole group could not be timed."""
        self._write({"group": group, "kernel": "all", "skipped": reason})

    def _write(self, row: Row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
