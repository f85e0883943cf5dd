"""The CPU's fused step for plain tensors, which C++ reads and checks itself.

Checks in Python cost a small net's step more than its kernel: some 0.1 ms for 34 tensors, where DLPack's exchange
functions take 0.02 (csrc/tensor_reader.h).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from svag_fast.ops.backends import BACKENDS, requested
from svag_fast.ops.checks import check_momentum, check_step_scalars
from svag_fast.ops.memory import address, mark_written
from svag_fast.ops.step import host_scalars, step_scalars
from svag_fast.ops.step_stats import StepStats


@functools.cache
def tensor_reader() -> Any:
    """What reads tensors from C++; None where this PyTorch offers no way to, or another than is known here."""
    exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None or BACKENDS["cpu"].why_unavailable() is not None:
        return None
    from svag_fast import _C

    return _C.TensorReader.of(exchange_api, [Tensor, torch.nn.Parameter], Tensor.is_neg, Tensor.storage_offset)


class CheckedStep:
    """A step of plain tensors on the CPU, with all checks of :func:`svag_step_` made; it holds the tensors."""

    def __init__(self, step: Any, written: list[Tensor], scalars: tuple[float, ...], has_second: bool) -> None:
        self._step = step
        self._written = written
        self._scalars = scalars
        self._has_second = has_second

    @staticmethod
    def of(
        params: list[Tensor],
        grads1: list[Any],
        grads2: list[Any] | None,
        *,
        lr: float,
        l: float,
        weight_decay: float,
        backend: str,
        momentum_buffers: list[Tensor] | None = None,
        momentum: float = 0.0,
        momentum_rule: str = "time",
        maximize: bool = False,
    ) -> CheckedStep | None:
        """Return the step, or None where :func:`svag_step_` must take it or say what is wrong."""
        if requested(backend) not in ("auto", "cpu") or torch.compiler.is_compiling():
            return None
        if not params or (reader := tensor_reader()) is None:
            return None
        if (momentum != 0) != (momentum_buffers is not None):
            return None
        if (step := reader.checked_step(params, grads1, grads2, momentum_buffers)) is None:
            return None
        lr, l, weight_decay = check_step_scalars(lr, l, weight_decay, params)
        check_momentum(momentum, momentum_rule, l, params)
        scalars = host_scalars(step_scalars(lr, l, weight_decay, momentum, momentum_rule, maximize))
        return CheckedStep(step, [*params, *(momentum_buffers or [])], scalars, grads2 is not None)

    def __call__(self, skip_nonfinite: bool) -> StepStats:
        """Take the step."""
        raw = torch.empty(5, dtype=torch.float64, device="cpu")
        self._step.take(*self._scalars, skip_nonfinite, torch.get_num_threads(), address(raw, "raw"))
        mark_written(self._written)
        return StepStats(raw, self._has_second)
