"""What the benches share: each contender runs in alternation with ours, and a table of ratios ends the run.

These machines are shared and drift, so a time means little and a ratio within one run means something.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

Contest = Callable[..., None]


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Time ``target`` with ``ours`` run before every round; keep the ratio of the medians and the bandwidth."""

    def run(target: Callable[[], Any], *, ours: Callable[[], Any], rounds: int, bytes_moved: int | None = None) -> None:
        times: list[float] = []

        clock = benchmark._timer  # what --benchmark-timer names

        def setup() -> None:
            start = clock()
            ours()
            times.append(clock() - start)

        benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=max(2, rounds // 10))
        if benchmark.disabled:  # each ran once, to show that it does
            return
        kept = times[-rounds:]
        info = benchmark.extra_info
        info["ours"] = median(kept)
        info["ratio"] = benchmark.stats.stats.median / median(kept)
        info["threads"] = torch.get_num_threads()
        if bytes_moved is not None:
            info["gigabytes_per_second"] = bytes_moved / benchmark.stats.stats.median / 1e9

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("ratios to ours, medians in alternation")
    terminalreporter.write_line(f"{'group':<28}{'contender':<34}{'ms':>10}{'ours ms':>10}{'ratio':>8}{'GB/s':>8}")
    for b in rows:
        info = b.extra_info
        name = b.params.get("contender", b.name) if b.params else b.name
        bandwidth = f"{info['gigabytes_per_second']:8.1f}" if "gigabytes_per_second" in info else ""
        terminalreporter.write_line(
            f"{b.group or '':<28}{name:<34}{info.get('theirs', b.stats.median) * 1e3:10.4f}{info['ours'] * 1e3:10.4f}"
            f"{info['ratio']:8.2f}{bandwidth}"
        )
    threads = {b.extra_info["threads"] for b in rows}
    terminalreporter.write_line(f"threads: {', '.join(map(str, sorted(threads)))}; ratio = contender / ours")
