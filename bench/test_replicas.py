"""A replica's step by each engine on two cores, against two processes; and its passes against those of one net.

`test_replica_step`: both batches at l = 4 and the step. All times are a replica-step's: of the fused kernel ("ours"),
of `Replicas` with `SVAG(replicas=S)`, and of two processes of the trainer with a thread each ("processes"), which take
a step of two replicas at once. On two idle cores take the clock: ours has two threads. On a shared machine take
`--benchmark-timer=time.process_time`, which counts CPU seconds, the processes' too: then all have one thread, as
threads that wait for each other spin.

`test_replicas`: forward and backward pass. A time is that of all S replicas, and "alone" that of one net: its ratio is
S such passes over ours, the stacked engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import replica_steps
import torch
import torch.nn.functional as F
from replica_steps import TrainerProcesses
from torch import nn

from svag_fast import Replicas
from svag_fast.experiments.models import digits_net


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64, bias=False),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def conv() -> nn.Module:
    return digits_net(generator=torch.Generator().manual_seed(torch.initial_seed()))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "digits-net": conv}


def replicas_pass(net: str, S: int, B: int, engine: Any) -> Callable[[], None]:
    replicas = Replicas(NETS[net], range(S), engine=engine)
    x, y = torch.randn(S, B, 1, 8, 8), torch.randint(10, (S, B))

    def run() -> None:
        F.cross_entropy(replicas(x).flatten(0, 1), y.flatten(), reduction="sum").div(B).backward()

    return run


def one_pass(net: str, B: int) -> Callable[[], None]:
    model, x, y = NETS[net](), torch.randn(B, 1, 8, 8), torch.randint(10, (B,))
    return lambda: F.cross_entropy(model(x), y).backward()


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[str, int], TrainerProcesses]]:
    """The last pair of processes asked for, kept while the same is wanted."""
    kept: dict[tuple[str, int], TrainerProcesses] = {}

    def close() -> None:
        for pair in kept.values():
            pair.close()
        kept.clear()

    def of(net: str, B: int) -> TrainerProcesses:
        if (net, B) not in kept:
            close()
            kept[net, B] = TrainerProcesses(net, B, steps=10 if B <= 8 else 3)
        return kept[net, B]

    yield of
    close()


@pytest.mark.parametrize("contender", ["processes", "stacked", "vmap"])
@pytest.mark.parametrize("S", [1, 4, 16, 64])
@pytest.mark.parametrize("B", [2, 8, 128])
@pytest.mark.parametrize("net", replica_steps.NETS)
def test_replica_step(benchmark: Any, contest: Any, processes: Any, net: str, B: int, S: int, contender: str) -> None:
    benchmark.group = f"{net}, B = {B}, S = {S}"
    shared = not benchmark.disabled and benchmark._timer is time.process_time
    threads = 1 if shared else 2
    torch.set_num_threads(threads)
    ours, count = replica_steps.fused(net, S, B, threads=threads)
    if contender == "processes":
        theirs = processes(net, B)
        theirs_count = 2 * theirs.steps
    else:
        theirs, theirs_count = replica_steps.stacked(net, S, B, contender)
    rounds = 10 if S * B <= 1024 else 4
    contest(theirs, ours=ours, rounds=rounds)
    if "ratio" in benchmark.extra_info:
        info = benchmark.extra_info
        theirs_seconds = benchmark.stats.stats.median
        if contender == "processes" and shared:  # whose clock counts this process alone
            theirs_seconds = median(theirs.cpu_seconds[-rounds:])
        info["ours"] /= count
        info["theirs"] = theirs_seconds / theirs_count
        info["ratio"] = info["theirs"] / info["ours"]


@pytest.mark.parametrize("B", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("S", [1, 4, 16, 64])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("contender", ["alone", "vmap"])
def test_replicas(benchmark: Any, contest: Any, net: str, S: int, B: int, contender: str) -> None:
    benchmark.group = f"{net}, S = {S}, B = {B}"
    torch.set_num_threads(1)
    target = one_pass(net, B) if contender == "alone" else replicas_pass(net, S, B, contender)
    ours = replicas_pass(net, S, B, "stacked")
    contest(target, ours=ours, rounds=40 if S * B <= 512 else 8)
    if contender == "alone" and "ratio" in benchmark.extra_info:
        benchmark.extra_info["ratio"] *= S
