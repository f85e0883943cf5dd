"""Lets Triton believe that an A100 is there: its own JIT compiles, and each launch is handed over.

Triton's launch path runs as it would on a GPU: specialisation, compilation to PTX and cubin, the launch itself. What
happens at the launch is the caller's choice: run the PTX in the simulator, or only keep what was compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch as Triton makes it: ``arguments`` by name, without the constants."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Tensor | int | float]
    ptx: str
    cubin: bytes
    shared: int
    warps: int


class _Utils:
    """The part of Triton's driver that loads a binary: nothing is loaded, all is said to fit an A100."""

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        return None, 1, 32, 0, 1024  # no module to unload; function, registers, spills, most threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 166912, "multiprocessor_count": 108, "max_num_regs": 65536, "warpSize": 32}


class _Driver:
    utils = _Utils()

    def __init__(self, launched: Callable[[Launch], None], architecture: int = 80) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        self._target = GPUTarget("cuda", architecture, 32)
        self.launched = launched

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source, self.metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
                arguments = rest[6:]  # stream, function, two of metadata, two hooks
                caches = self.source.fn.device_caches.values()
                kernel = next(k for c in caches for k in c[0].values() if k.metadata is self.metadata)
                names = [n for n, kind in self.source.signature.items() if kind != "constexpr"]
                kinds = self.source.signature.values()
                values = [v for v, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
                # Triton keeps a compiled kernel and its launcher for good: the launch is for who listens now.
                driver.active.launched(
                    Launch(
                        self.source.fn.__name__,
                        (x, y, z),
                        dict(zip(names, values, strict=True)),
                        kernel.asm["ptx"],
                        kernel.asm["cubin"],
                        kernel.metadata.shared,
                        kernel.metadata.num_warps,
                    )
                )

        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def is_active(self) -> bool:
        return True


class _NoLaunch:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


def driver_without_launches() -> contextlib.AbstractContextManager[None]:
    """Let every Triton launch of the block end where the GPU's would begin, at no cost: for the time of the rest."""
    driver = _Driver(lambda launch: None)
    driver.launcher_cls = _NoLaunch  # type: ignore[assignment,misc]
    return _active(driver)


def as_a_gpu(launched: Callable[[Launch], None], architecture: int = 80) -> contextlib.AbstractContextManager[None]:
    """Hand every Triton launch of the block to ``launched``; CPU tensors are the GPU's."""
    return _active(_Driver(launched, architecture))


@contextlib.contextmanager
def _active(pretended: _Driver) -> Iterator[None]:
    from triton.runtime import driver

    from svag_fast.ops import backends

    triton = backends.Backend("triton", ("cpu",), lambda: None)
    with (
        mock.patch.object(driver, "_active", pretended),
        mock.patch.dict(backends.BACKENDS, triton=triton),
    ):
        yield
