"""The host's own time of a step on a GPU: everything but the kernels, which do nothing here. No GPU is needed.

Tensors are the CPU's, served by the backends of a GPU up to each launch. The peer is torch's fused SGD, its kernel
taken out as well; "C++ reads the lists" is the part of a step that no optimizer could leave out.
Target: SGD at >= 1 of ours, so that a step costs the host no more than SGD's. Not met: 0.40 for 34 tensors, 0.35 for
200; the op itself is at 1.1 and 1.2. docs/decisions.md says what takes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from svag_fast import _C, SVAG
from svag_fast.ops import backends, step, svag_step_, weight_grad_and_sq_norms
from svag_fast.ops.step import SVAG_STEP
from svag_fast.ops.step_call import tensor_reader


def _first(_: torch.device) -> tuple[int, int]:
    return 0, 0


def _workspace(_: Any, replicas: int) -> int:
    return replicas


def _nothing(*_: Any, **__: Any) -> None:  # not a mock, which takes its time
    pass


@pytest.fixture(scope="module")
def kernels_that_do_nothing() -> Iterator[None]:
    """Backend "cuda" on CPU tensors, up to the call of ``_C.cuda_step``; torch's fused SGD up to its op."""
    with ExitStack() as stack:
        for patch in (
            mock.patch.dict(backends.BACKENDS, cuda=backends.Backend("cuda", ("cpu",), lambda: None)),
            mock.patch.object(step, "device_and_stream", _first),
            mock.patch.object(_C, "cuda_step_workspace", _workspace, create=True),
            mock.patch.object(_C, "cuda_step", _nothing, create=True),
            mock.patch.object(torch, "_fused_sgd_", _nothing),
        ):
            stack.enter_context(patch)
        yield


class Lists:
    """So many small parameters with two gradients, and the ways to take a step on them."""

    def __init__(self, count: int) -> None:
        self.params = [nn.Parameter(torch.randn(64)) for _ in range(count)]
        self.raw = [p.detach() for p in self.params]
        self.grads1, self.grads2 = ([torch.randn(64) for _ in range(count)] for _ in range(2))
        self.svag = SVAG(self.params, lr=1e-6, l=4, backend="cuda")
        self.capturable = SVAG(self.params, lr=1e-6, l=4, capturable=True, backend="cuda")
        self.sgd = torch.optim.SGD(self.params, lr=1e-6, fused=True)

        self.first = dict(zip(self.params, self.grads1, strict=True))
        for p, g in zip(self.params, self.grads2, strict=True):
            p.grad = g

    def hold_and_step(self, optimizer: SVAG) -> None:
        """What a step costs behind the backward pass of pair_pass."""
        optimizer.hold_pair(self.first)
        optimizer.step()

    def step(self) -> None:
        self.hold_and_step(self.svag)

    def capturable_step(self) -> None:
        self.hold_and_step(self.capturable)

    def op(self) -> None:
        svag_step_(self.raw, self.grads1, self.grads2, lr=1e-6, l=4, backend="cuda")

    def read(self) -> None:
        reader = tensor_reader()
        assert reader is not None
        reader.read(SVAG_STEP.code, self.raw, self.grads1, self.grads2, None, None)

    def fused_sgd(self) -> None:
        self.sgd.step()


CONTENDERS: dict[str, Callable[[Lists], None]] = {
    "SVAG.step()": Lists.step,
    "SVAG.step(), capturable": Lists.capturable_step,
    "svag_step_": Lists.op,
    "floor: C++ reads the lists": Lists.read,
    "SGD(fused=True)": Lists.fused_sgd,
}


@pytest.mark.usefixtures("kernels_that_do_nothing")
@pytest.mark.parametrize("count", [34, 200])
@pytest.mark.parametrize("contender", CONTENDERS)
def test_step(count: int, contender: str, benchmark: Any, contest: Any) -> None:
    benchmark.group = f"host, {count} tensors"
    lists = Lists(count)
    contest(lambda: CONTENDERS[contender](lists), ours=lists.step, rounds=400)


@pytest.mark.parametrize("contender", ["weight_grad_and_sq_norms", "torch's convolution_backward"])
def test_weight_gradient(contender: str, benchmark: Any, contest: Any) -> None:
    """Triton's launch path, with a driver that launches nothing; torch's op with its CPU kernel, on a tiny layer."""
    pytest.importorskip("triton", reason="triton is not installed")
    from ptx.driver import driver_without_launches

    benchmark.group = "host, weight gradient"
    x, b, shape = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 1, 1), (1, 1, 3, 3)
    weight = torch.randn(shape)

    def ours() -> None:
        weight_grad_and_sq_norms(x, b, shape, backend="triton")

    def torchs() -> None:
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
        torch.ops.aten.convolution_backward(b, x, weight, None, *options)

    with driver_without_launches():
        contest(ours if contender.startswith("weight") else torchs, ours=ours, rounds=200)
