"""The fused step against what a user would write, on the same work: the update and the four statistics.

``test_step_of_replicas``: 16 replicas' step in one pass, statistics of each, against the plain step on the same memory
(target: at most 1.1 times it for the two large groups), and against the 16 steps that it replaces; and the optimizer's
own step, from both gradients on, over 16 optimizers'.

Floors: torch's fused SGD on one gradient (no statistics), and a triad (addcmul_: three streams read, one written).
Targets on 2 cores: the triad at >= 0.95 of ours for the two large groups, eager at >= 10 and foreach at >= 5 times
ours for vgg16, ``SVAG.step()`` at <= 1.5 times the kernel for preresnet32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import plain_steps
import pytest
import torch
from cases import preresnet32_shapes, vgg16_shapes
from torch import Tensor, nn

from svag_fast import SVAG
from svag_fast.ops.step import SVAG_STEP
from svag_fast.ops.step_call import StepCall, StepLists
from svag_fast.ops.step_options import StepOptions
from svag_fast.ops.step_replicas import SVAG_REPLICAS_STEP, ReplicaOptions

LR, L, WEIGHT_DECAY, MOMENTUM = 1e-6, 4, 5e-4, 0.9
OPTIONS = {"lr": LR, "l": L, "weight_decay": WEIGHT_DECAY}


GROUPS = {"preresnet32": preresnet32_shapes(), "vgg16": vgg16_shapes(), "flat60M": [(60_000_000,)]}
ROUNDS = {"preresnet32": 400, "vgg16": 40, "flat60M": 12}


class Lists:
    """A group's params and two gradients, and the ways to take a step on them."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params, self.grads1, self.grads2 = (
            [torch.randn(s, generator=generator, device=device) for s in shapes] for _ in range(3)
        )
        self.bytes_moved = 16 * sum(p.numel() for p in self.params)
        self.step = self.call(StepOptions.checked(**OPTIONS))
        self.leaves = [nn.Parameter(p) for p in self.params]
        self.sgd = torch.optim.SGD(self.leaves, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
        self.svag = SVAG(self.leaves, lr=LR, l=L, weight_decay=WEIGHT_DECAY)
        self.compiled = torch.compile(self.eager)
        self.flat = [torch.cat([t.flatten() for t in ts]) for ts in (self.params, self.grads1, self.grads2)]

    def call(self, options: StepOptions, buffers: list[Tensor] | None = None) -> StepCall | None:
        lists = StepLists(self.params, self.grads1, self.grads2, None, buffers)
        return StepCall.by_reader(SVAG_STEP, lists, options, backend="auto")

    def kernel(self) -> Tensor:
        assert self.step is not None
        return self.step(skip_nonfinite=False)

    def optimizer_step(self) -> Any:
        return self._step_with_held(self.svag)

    def _step_with_held(self, optimizer: SVAG) -> Any:
        pair = optimizer._pair
        pair.grads, pair._allowed, pair._params = [list(self.grads1)], [[0] * len(self.leaves)], [self.leaves]
        return optimizer.step()

    def give_gradients(self) -> None:
        for p, g in zip(self.leaves, self.grads2, strict=True):
            p.grad = g

    def eager(self) -> list[Tensor]:
        return plain_steps.eager(self.params, self.grads1, self.grads2, **OPTIONS)

    def foreach(self) -> list[Tensor]:
        return plain_steps.foreach(self.params, self.grads1, self.grads2, **OPTIONS)

    @cached_property
    def momentum_step(self) -> StepCall | None:
        options = StepOptions.checked(**OPTIONS, momentum=MOMENTUM)
        return self.call(options, [torch.zeros_like(p) for p in self.params])

    @cached_property
    def momentum_svag(self) -> SVAG:
        return SVAG(self.leaves, lr=LR, l=L, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)

    @cached_property
    def momentum_sgd(self) -> dict[str, torch.optim.SGD]:
        options = {"lr": LR / L**2, "weight_decay": WEIGHT_DECAY, "momentum": 1 - (1 - MOMENTUM) / L}
        return {way: torch.optim.SGD(self.leaves, **{way: True}, **options) for way in ("fused", "foreach")}

    def momentum_kernel(self) -> Tensor:
        assert self.momentum_step is not None
        return self.momentum_step(skip_nonfinite=False)

    def momentum_optimizer_step(self) -> Any:
        return self._step_with_held(self.momentum_svag)

    def momentum_by_sgd(self, way: str) -> list[Tensor]:
        """The same work: the statistics, the combined gradient, and torch's step with momentum on it."""
        sums = plain_steps.foreach_statistics(self.params, self.grads1, self.grads2)
        for p, g in zip(self.leaves, plain_steps.foreach_combined(self.grads1, self.grads2, L), strict=True):
            p.grad = g
        self.momentum_sgd[way].step()
        return sums

    def fused_sgd(self) -> None:
        self.sgd.step()

    def triad(self) -> None:
        """x += 1e-9 y z: three streams read and one written, the step's memory traffic and nothing else."""
        x, y, z = self.flat
        x.addcmul_(y, z, value=1e-9)


@pytest.fixture(scope="module", params=GROUPS)
def group(request: pytest.FixtureRequest) -> tuple[str, Lists]:
    return request.param, Lists(GROUPS[request.param])


CONTENDERS: dict[str, Callable[[Lists], Any]] = {
    "ours": Lists.kernel,
    "floor: triad": Lists.triad,
    "floor: SGD(fused=True), one gradient": Lists.fused_sgd,
    "SVAG.step()": Lists.optimizer_step,
    "torch._foreach": Lists.foreach,
    "eager PyTorch": Lists.eager,
    "torch.compile": lambda lists: lists.compiled(),
}
WITH_MOMENTUM: dict[str, Callable[[Lists], Any]] = {
    "ours": Lists.momentum_kernel,
    "SVAG.step()": Lists.momentum_optimizer_step,
    "torch._foreach, SGD(fused=True)": partial(Lists.momentum_by_sgd, way="fused"),
    "torch._foreach, SGD(foreach=True)": partial(Lists.momentum_by_sgd, way="foreach"),
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_step(group: tuple[str, Lists], contender: str, benchmark: Any, contest: Any) -> None:
    name, lists = group
    benchmark.group = name
    lists.give_gradients()
    with torch.no_grad():
        contest(
            lambda: CONTENDERS[contender](lists), ours=lists.kernel, rounds=ROUNDS[name], bytes_moved=lists.bytes_moved
        )


@pytest.mark.parametrize("contender", WITH_MOMENTUM)
def test_step_with_momentum(group: tuple[str, Lists], contender: str, benchmark: Any, contest: Any) -> None:
    name, lists = group
    benchmark.group = f"{name}, momentum"
    lists.give_gradients()
    floor = 24 * sum(p.numel() for p in lists.params)
    with torch.no_grad():
        contest(
            lambda: WITH_MOMENTUM[contender](lists),
            ours=lists.momentum_kernel,
            rounds=ROUNDS[name],
            bytes_moved=floor,
        )


class Replicas:
    """Nets of a group's shapes, stacked, and the ways to step all of them."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        stacked = [(REPLICAS, *shape) for shape in shapes]
        generator = torch.Generator().manual_seed(0)
        lists = [[torch.randn(s, generator=generator) for s in stacked] for _ in range(3)]
        self.bytes_moved = 16 * sum(p.numel() for p in lists[0])
        options = ReplicaOptions.checked(REPLICAS, **OPTIONS)
        call = StepCall.by_reader(SVAG_REPLICAS_STEP, StepLists(*lists), options, extra=REPLICAS, backend="auto")
        one = StepOptions.checked(**OPTIONS)
        plain = StepCall.by_reader(SVAG_STEP, StepLists(*lists), one, backend="auto")
        rows = [StepLists(*([t[s] for t in listed] for listed in lists)) for s in range(REPLICAS)]
        alone = [StepCall.by_reader(SVAG_STEP, row, one, backend="auto") for row in rows]
        assert call is not None
        assert plain is not None
        self.ours, self.plain = partial(call, False), partial(plain, False)
        self.each = lambda: [one(False) for one in alone if one is not None]
        self.optimizer = self._whole_step(lists, replicas=REPLICAS)
        steps = [self._whole_step([[t[s].clone() for t in listed] for listed in lists]) for s in range(REPLICAS)]
        self.optimizers = lambda: [step() for step in steps]

    def _whole_step(self, lists: list[list[Tensor]], **options: Any) -> Callable[[], Any]:
        leaves = [nn.Parameter(p.clone()) for p in lists[0]]
        optimizer = SVAG(leaves, **OPTIONS, **options)

        def step() -> None:
            for p, g in zip(leaves, lists[2], strict=True):
                p.grad = g
            optimizer.hold_pair(dict(zip(leaves, lists[1], strict=True)))
            optimizer.step()

        return step


REPLICAS = 16
STACKED = {
    "MLP 64-64-10": [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)],
    "preresnet32": preresnet32_shapes(),
    "flat1M": [(1_000_000,)],
}
STACKED_ROUNDS = {"MLP 64-64-10": 400, "preresnet32": 40, "flat1M": 20}
OF_REPLICAS: dict[str, Callable[[Replicas], Any]] = {
    "ours": lambda r: r.ours(),
    "plain step, statistics of all": lambda r: r.plain(),
    "a step of each": lambda r: r.each(),
    "SVAG(replicas=16)": lambda r: r.optimizer(),
    "16 SVAG": lambda r: r.optimizers(),
}


@pytest.fixture(scope="module", params=STACKED)
def stacked(request: pytest.FixtureRequest) -> tuple[str, Replicas]:
    return request.param, Replicas(STACKED[request.param])


@pytest.mark.parametrize("contender", OF_REPLICAS)
def test_step_of_replicas(stacked: tuple[str, Replicas], contender: str, benchmark: Any, contest: Any) -> None:
    name, replicas = stacked
    benchmark.group = f"{name}, {REPLICAS} replicas"
    contest(
        lambda: OF_REPLICAS[contender](replicas),
        ours=replicas.ours,
        rounds=STACKED_ROUNDS[name],
        bytes_moved=replicas.bytes_moved,
    )
