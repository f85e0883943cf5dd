"""A replica's step in the fused kernel, beside one net's step: the trainer's, plain PyTorch's, and its products alone.

Run: `python -m pytest bench/test_fused_replicas.py --benchmark-only --benchmark-timer=time.process_time`. All on one
thread each, both batches, l = 4, nothing measured by ours (the trainer takes its per-sample norms); "ms" is one step
of the contender, "ours ms" one replica-step, ratio = contender / ours. Two cores run two threads of ours or two
processes of the trainer, so the ratio is theirs too. "sgemm" is the library's matrix product on the sizes of the
step's products, unfolded before the clock starts, ten steps' in a row (which is what "ms" is there): its ratio is the
part of the library's rate that ours reaches with all else included.
Targets: trainer >= 20 at B = 2, >= 8 at B = 8, >= 2 at B = 128; sgemm >= 0.5 at B >= 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replica_steps import LR, NETS, L, fused, net, trainer
from torch import Tensor
from torch.nn import functional as F

from svag_fast import SVAG
from svag_fast.experiments.data import load_dataset
from svag_fast.replicas.chain import Chain, chain_of
from svag_fast.replicas.fused_layers import fused_layers

IN_A_ROW = 10


def plain(name: str, batch: int) -> Callable[[], Any]:
    model, data = net(name), load_dataset("digits")
    optimizer = SVAG([p for p in model.parameters() if p.requires_grad], LR, l=L)

    def step() -> None:
        for which in range(2):
            some = torch.randint(len(data.train_labels), (batch,))
            F.cross_entropy(model(data.train_images[some]), data.train_labels[some]).backward()
            if which == 0:
                optimizer.hold_gradient()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(chain: Chain, shape: tuple[int, ...], samples: int) -> list[tuple[Tensor, Tensor]]:
    """What a step multiplies: the output, the weight's gradient and the input's of every affine layer, as matrices."""
    layers = fused_layers(chain, shape)
    trained = {
        layer.weight: layer.weight is not None and chain.parameter(layer.weight).trained for layer in chain.layers
    }
    pairs, first = [], True
    for layer in (layer for layer in chain.layers if layer.kind in ("linear", "conv")):
        depth = layer.sizes[0] * (layer.sizes[2] ** 2 if layer.kind == "conv" else 1)
        row = next(
            f for f in layers.fields if f[14] == chain.parameter(str(layer.weight)).offset and f[1] == layer.sizes[0]
        )
        x, w = torch.randn(samples * math.prod(row[5:7]), depth), torch.randn(depth, layer.sizes[1])
        dy = torch.randn(len(x), layer.sizes[1])
        pairs += [(x, w)] + ([(x.t(), dy)] if trained[layer.weight] else []) + ([] if first else [(dy, w.t())])
        first = False
    return pairs


def sgemm(name: str, batch: int) -> Callable[[], Any]:
    pairs = products(chain_of(net(name)), (1, 8, 8), 2 * batch)
    outs = [a @ b for a, b in pairs]

    def multiply() -> None:
        for _ in range(IN_A_ROW):
            for (a, b), out in zip(pairs, outs, strict=True):
                torch.mm(a, b, out=out)

    return multiply


CONTENDERS = {"trainer": trainer, "plain": plain, "sgemm": sgemm}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("replicas", [1, 16, 64])
@pytest.mark.parametrize("batch", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("name", NETS)
def test_step(benchmark: Any, contest: Any, name: str, batch: int, replicas: int, contender: str) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"{name}, B = {batch}, S = {replicas}"
    ours, count = fused(name, replicas, batch, threads=1)
    theirs = CONTENDERS[contender](name, batch)
    contest(theirs, ours=ours, rounds=30)
    if not benchmark.disabled:
        info = benchmark.extra_info
        info["ratio"] *= count / (IN_A_ROW if contender == "sgemm" else 1)
        info["ours"] /= count
