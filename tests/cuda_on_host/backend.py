"""Serve backend ``cuda`` on CPU tensors, by the kernels' own sources run on the host."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from cuda_on_host.build import CSRC, HostKernels, build

from svag_fast import _C
from svag_fast.ops import backends, step, step_per_sample

KERNEL_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

# What a launch must use: neither is what it would get by default.
DEVICE, STREAM = 1, 7


class _StepTensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad1", "grad2", "compensation", "momentum")),
        ("size", ctypes.c_int64),
        ("param_dtype", ctypes.c_int),
        ("grad_dtype", ctypes.c_int),
    ]


class _StepOptions(ctypes.Structure):
    _fields_ = [
        ("coefficients_and_momentum", ctypes.c_double * 6),
        ("device_coefficients", ctypes.c_void_p),
        ("skip_nonfinite", ctypes.c_bool),
        ("scale", ctypes.c_void_p),
        ("found_inf", ctypes.c_void_p),
        ("replicas", ctypes.c_int64),
        ("device", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("stream", "workspace", "stats")),
    ]


class _PerSampleOptions(ctypes.Structure):
    _fields_ = [
        ("coefficients", ctypes.c_double * 4),
        ("samples1", ctypes.c_int64),
        ("samples2", ctypes.c_int64),
        ("device", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("stream", "workspace", "sq_norms", "stats")),
    ]


class HostModule:
    """What ``svag_fast._C`` offers for CUDA, with the same signatures."""

    def __init__(self, kernels: HostKernels) -> None:
        self.kernels = kernels

    def cuda_step_workspace(self, tensors: _C.StepTensors, replicas: int) -> int:
        function = self.kernels.library.svag_step_cuda_workspace
        function.restype = ctypes.c_int64
        sizes = [size // replicas for size in tensors.columns()[5]]
        return replicas * int(function((ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_int64(len(sizes))))

    def cuda_step(self, tensors: _C.StepTensors, *options: float) -> None:
        replicas = int(options[10])
        none = [None] * len(tensors.columns()[0])
        *addresses, sizes, param_dtypes, grad_dtypes = (column or none for column in tensors.columns())
        of_one = [size // max(1, replicas) for size in sizes]
        described = (_StepTensor * len(none))(*zip(*addresses, of_one, param_dtypes, grad_dtypes, strict=True))
        packed = _StepOptions((ctypes.c_double * 6)(*options[:6]), *options[6:])
        status = self.kernels.run("svag_step_cuda", described, ctypes.c_int64(len(none)), ctypes.byref(packed))
        if status:
            raise RuntimeError(f"svag_step_cuda returned {status}")

    def cuda_step_per_sample_workspace(self, sizes: list[int], dtypes: list[int], samples: int) -> int:
        function = self.kernels.library.svag_step_per_sample_cuda_workspace
        function.restype = ctypes.c_int64
        count = len(sizes)
        return int(
            function(
                (ctypes.c_int64 * count)(*sizes),
                (ctypes.c_int * count)(*dtypes),
                ctypes.c_int64(count),
                ctypes.c_int64(samples),
            )
        )

    def cuda_step_per_sample(
        self,
        params: list[int],
        grads1: list[int],
        grads2: list[int],
        sizes: list[int],
        dtypes: list[int],
        samples1: int,
        samples2: int,
        *options: float,
    ) -> None:
        none = [None] * len(params)
        columns = (params, grads1, grads2 or none, none, none, sizes, dtypes, dtypes)
        tensors = (_StepTensor * len(params))(*zip(*columns, strict=True))
        packed = _PerSampleOptions((ctypes.c_double * 4)(*options[:4]), samples1, samples2, *options[4:])
        status = self.kernels.run(
            "svag_step_per_sample_cuda", tensors, ctypes.c_int64(len(params)), ctypes.byref(packed)
        )
        if status:
            raise RuntimeError(f"svag_step_per_sample_cuda returned {status}")


def load(mode: str, cache: Path) -> HostKernels:
    """Build every CUDA kernel of the project for the host."""
    return HostKernels(build(KERNEL_SOURCES, mode, cache))


@contextlib.contextmanager
def cuda_on_host(kernels: HostKernels) -> Iterator[None]:
    """Let backend "cuda" take CPU tensors while the block runs, as if they were on CUDA device 1, stream 7."""
    module = HostModule(kernels)
    names = [name for name in vars(HostModule) if name.startswith("cuda_")]
    before = {name: getattr(_C, name, None) for name in names}
    row, device_and_stream = backends.BACKENDS["cuda"], backends.device_and_stream
    backends.BACKENDS["cuda"] = backends.Backend("cuda", ("cpu",), lambda: None)
    for op in (step, step_per_sample):
        op.device_and_stream = lambda device: (DEVICE, STREAM)
    for name in names:
        setattr(_C, name, getattr(module, name))
    try:
        yield
    finally:
        backends.BACKENDS["cuda"] = row
        for op in (step, step_per_sample):
            op.device_and_stream = device_and_stream
        for name, function in before.items():
            if function is None:
                delattr(_C, name)
            else:
                setattr(_C, name, function)
