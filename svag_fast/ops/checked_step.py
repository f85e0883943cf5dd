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
from svag_fast.ops.memory import Spans, address, mark_written
from svag_fast.ops.step import StepOptions, options_scalars, step_spans


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

    def __init__(self, step: Any, tensors: tuple[Any, Any, Any, Any], options: StepOptions) -> None:
        self._step = step
        self._tensors = tensors
        self._scalars = options_scalars(options)

    @classmethod
    def of(
        cls,
        params: list[Tensor],
        grads1: list[Any],
        grads2: list[Any] | None,
        options: StepOptions,
        *,
        momentum_buffers: list[Tensor] | None = None,
        backend: str,
    ) -> CheckedStep | None:
        """Return the step, or None where :class:`ReadyStep` must take it or say what is wrong."""
        if requested(backend) not in ("auto", "cpu"):
            return None
        if not params or (reader := tensor_reader()) is None:
            return None
        if (options.momentum != 0) != (momentum_buffers is not None):
            return None
        if (step := reader.checked_step(params, grads1, grads2, momentum_buffers)) is None:
            return None
        options.check_held(params)
        return cls(step, (params, grads1, grads2, momentum_buffers), options)

    def spans(self, of: str) -> Spans:
        """Return where the written tensors and each batch's gradients are; ``of`` ends their names."""
        params, grads1, grads2, momentum_buffers = self._tensors
        return step_spans(params, grads1, grads2, None, momentum_buffers, of)

    @staticmethod
    def together(steps: list[Any]) -> bool:
        """Whether all are of this kind, and none shares memory with another that it must not."""
        if not all(type(step) is CheckedStep for step in steps):
            return False
        from svag_fast import _C

        apart: bool = _C.steps_apart([step._step for step in steps])
        return apart

    def __call__(self, skip_nonfinite: bool) -> Tensor:
        """Take the step; return StepStats.raw."""
        params, _, _, momentum_buffers = self._tensors
        raw = torch.empty(5, dtype=torch.float64, device="cpu")
        self._step.take(*self._scalars, skip_nonfinite, torch.get_num_threads(), address(raw, "raw"))
        mark_written([*params, *momentum_buffers] if momentum_buffers else params)
        return raw
