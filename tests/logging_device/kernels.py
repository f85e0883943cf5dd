"""The package's GPU backends on the device "logged": their own code up to each launch, the CPU's values behind it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from logging_device.device import Device
from torch import Tensor

from svag_fast import _C
from svag_fast.ops import backends, step, step_options
from svag_fast.ops.weight_grad import cpu as weight_grad_cpu
from svag_fast.ops.weight_grad.op import reference
from svag_fast.ops.weight_grad.shapes import Geometry, LayerProduct

_ONE_TABLE = 100
"""As many tensors one launch of csrc/cuda/step.cu takes at least; no net here has more."""


@contextlib.contextmanager
def as_a_gpu(device: Device) -> Iterator[None]:
    """Let the backends ``cuda`` and ``triton`` serve the device while the block runs."""
    from triton.runtime.jit import JITFunction

    from svag_fast.kernels import weight_grad

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        device.note("launch", f"triton {self.fn.__name__}")

    rows = {name: backends.Backend(name, ("logged",), lambda: None) for name in ("cuda", "triton")}
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(backends.BACKENDS, rows),
            mock.patch.object(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "logged")),
            mock.patch.object(torch.cuda, "device_of", _nothing),
            mock.patch.object(step, "device_and_stream", lambda device: (device.index, 0)),
            mock.patch.object(_C, "cuda_step_workspace", lambda tensors, replicas: replicas, create=True),
            mock.patch.object(_C, "cuda_step", functools.partial(_cuda_step, device), create=True),
            mock.patch.object(JITFunction, "run", launched),
            mock.patch.object(
                weight_grad, "product_tiles", functools.partial(_product_tiles, device, weight_grad.product_tiles)
            ),
        ):
            stack.enter_context(patch)
        yield


def _nothing(t: Tensor) -> contextlib.nullcontext[None]:  # not a mock, which would keep the tensor
    return contextlib.nullcontext()


def _cuda_step(device: Device, tensors: _C.StepTensors, *options: Any) -> None:
    """What ``_C.cuda_step`` launches, and the CPU kernel's work on the same addresses."""
    columns, scalars = tensors.columns(), options[:6]
    coefficients, skip_nonfinite, scale, found_inf, replicas, _, _, _, raw = options[6:]
    of, rows = "replicas_" if replicas > 1 else "", [scalars] * replicas
    assert len(columns[0]) <= _ONE_TABLE
    for _ in range(2 if skip_nonfinite else 1):  # where it may skip, a pass over the gradients alone goes before
        device.note("launch", f"cuda {of}step_kernel")
        device.note("launch", f"cuda {of}finish_kernel")
    if coefficients:
        read = (ctypes.c_double * 7 * replicas).from_address(coefficients)
        rows = [step_options.host_scalars(step_options.StepScalars(*row)) for row in read]
    if scale:
        _unscale(columns, ctypes.c_float.from_address(scale).value)
    # Else it would write the statistics alone.
    assert not found_inf or ctypes.c_float.from_address(found_inf).value == 0
    tensors.replicas_step(rows, skip_nonfinite, 1, raw)


def _unscale(columns: Any, scale: float) -> None:
    """Divide the gradients where they are; they are float32 here."""
    _, first, second, _, _, sizes, _, dtypes = columns
    assert not any(dtypes)
    for addresses in (first, second):
        for address, size in zip(addresses, sizes, strict=bool(addresses)):
            numbers = np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
            numbers *= np.float32(1 / scale)


def _product_tiles(
    device: Device,
    launches: Any,
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: list[int],
    weights: Tensor,
    segments: Tensor | None,
    convolution: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The kernels' launches, and the reference's values in what they would have written."""
    sq_norms, stats = launches(inputs, output_grads, weight_shape, weights, segments, convolution, **options)
    target, target2, coefficients = options["target"], options.get("target2"), options.get("coefficients")
    with device.unlogged(), torch.no_grad():
        geometry = Geometry(convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        count = 0 if segments is None else 2
        host = [t if t is None else t.cpu() for t in (inputs, output_grads, weights, segments)]
        product = LayerProduct(host[0], host[1], list(weight_shape), host[2], host[3], count, geometry)
        if coefficients is not None:
            lr, divisor, *combination = coefficients[:5].tolist()
            moved = target.cpu()
            norms, gram, stats[3] = weight_grad_cpu.direct_step(product, moved, [lr / divisor, *combination])
            target.copy_(moved)
        else:
            serve = weight_grad_cpu.serve if inputs.numel() and output_grads.numel() else reference
            grad, norms, gram = serve(product)
            if target2 is not None:
                half = len(inputs) // 2
                grad, _, _ = serve(product._replace(inputs=host[0][:half], output_grads=host[1][:half], weights=None))
                second, _, _ = serve(product._replace(inputs=host[0][half:], output_grads=host[1][half:], weights=None))
                target2.copy_(second.to(target2.dtype))
            target.copy_(grad.to(target.dtype))
        sq_norms.copy_(norms)
        if count:
            stats[:3].copy_(torch.stack([gram[0, 0], gram[1, 1], gram[0, 1]]))
        if stats is not None:
            stats[4] = 1.0
    return sq_norms, stats
