"""A replica's forward and backward pass by each engine of `Replicas`, against one net alone.

A time is that of all S replicas, and "alone" that of one net: its ratio is S such passes over ours, the stacked
engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
