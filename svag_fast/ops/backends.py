"""One table of backends: what is available here, what may serve a call, and if not, why.

| name        | runs on                                   |
| ----------- | ----------------------------------------- |
| `cuda`      | CUDA tensors, if built with nvcc          |
| `triton`    | CUDA tensors                              |
| `cpu`       | CPU tensors                               |
| `reference` | any tensor: plain PyTorch, as the formula |

``backend="auto"`` takes the first row that can serve the call. ``with svag_fast.use_backend(name)`` and the variable
``SVAG_FAST_BACKEND`` replace "auto"; a backend that is named and can't serve is an error that says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svag_fast import moved

_log = logging.getLogger("svag_fast")

WhyNot = Callable[[Sequence[Tensor]], str | None]


class BackendError(RuntimeError):
    """The backend asked for is unknown, or can't serve the call; the message names why and what could."""


@dataclass(frozen=True, eq=False)
class Backend:
    """A row of the table: ``why_unavailable()`` is None where the backend can be used at all."""

    name: str
    device_types: tuple[str, ...]
    why_unavailable: Callable[[], str | None]


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    why_not: WhyNot | None


@functools.cache
def _cpu_unavailable() -> str | None:
    try:
        import svag_fast._C  # noqa: F401
    except ImportError as error:
        if str(error).startswith("SVAG_FAST_SIMD="):  # a choice that can't be served: auto must not hide it
            raise BackendError(str(error)) from error
        return f"the compiled module svag_fast._C can't be loaded ({error}); reinstall svag_fast with a C++17 compiler"
    return None


@functools.cache
def _cuda_unavailable() -> str | None:
    if reason := _cpu_unavailable():
        return reason
    from svag_fast import _C

    if not hasattr(_C, "cuda_step"):
        return "svag_fast was built without CUDA; reinstall it where nvcc works (SVAG_CUDA=1 insists, and says why not)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def _triton_unavailable() -> str | None:
    try:
        from svag_fast.kernels.interpreter import interpreting
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if interpreting():
        return None
    return None if torch.cuda.is_available() else "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU)"


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """Return the index of a CUDA device and the handle of its current stream, for a kernel of ``_C``."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


# In the order of preference.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cuda", ("cuda",), _cuda_unavailable),
        Backend("triton", ("cuda", "cpu"), _triton_unavailable),
        Backend("cpu", ("cpu",), _cpu_unavailable),
        Backend("reference", ("*",), lambda: None),
    )
}

_implementations: dict[str, dict[str, _Implementation]] = {}
VARIABLE = "SVAG_FAST_BACKEND"
CHOICE: ContextVar[str | None] = ContextVar("svag_fast_backend", default=None)
"""What the innermost :func:`use_backend` asks for. A backward pass on a GPU is in another thread, which doesn't know:
what calls an op there keeps the forward pass's for :func:`as_chosen`."""


def implements(op: str, name: str, why_not: WhyNot | None = None) -> Callable[[Any], Any]:
    """Decorate ``function`` as backend ``name`` of ``op``; ``why_not(tensors)``, if given, says what it can't serve."""

    def decorate(function: Any) -> Any:
        _implementations.setdefault(op, {})[name] = _Implementation(function, why_not)
        return function

    return decorate


@functools.cache
def _preferred(op: str) -> list[str]:
    """The op's backends in the order of preference."""
    found = _implementations[op]
    return [n for n in BACKENDS if n in found]


def ops_of(name: str) -> list[str]:
    """Return the names of the ops that backend ``name`` implements."""
    return sorted(op for op, backends in _implementations.items() if name in backends)


def check_name(name: str) -> None:
    """Raise :class:`BackendError` where ``name`` is neither "auto" nor a row of the table."""
    if name != "auto" and name not in BACKENDS:
        raise _unknown(name)


def _unknown(name: str, asked: str = "") -> BackendError:
    return BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}{asked}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend ``name`` for every call with ``backend="auto"`` inside the ``with`` block.

    A backward pass goes by the block around it, else by the one around its forward pass. On a GPU PyTorch runs it in
    another thread: there the forward pass's block counts alone.
    """
    check_name(name)
    token = CHOICE.set(name)
    try:
        yield
    finally:
        CHOICE.reset(token)


def as_chosen(name: str | None, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with the forward pass's :data:`CHOICE`, unless a block around the call has its own."""
    if name is None or CHOICE.get() is not None:
        return function(*args)
    with use_backend(name):
        return function(*args)


def wanted() -> str:
    """What ``backend="auto"`` means here: a backend's name, or "auto"."""
    return CHOICE.get() or os.environ.get(VARIABLE, "auto")


def why_not(op: str, name: str, tensors: Sequence[Tensor]) -> str | None:
    """Why backend ``name`` can't serve ``op`` on these tensors (all on one device), or None where it can."""
    row, device_type = BACKENDS[name], tensors[0].device.type if tensors else "cpu"
    if (implementation := _implementations[op].get(name)) is None:
        return f"it has no {op}"
    if "*" not in row.device_types and device_type not in row.device_types:
        return f"it serves {' and '.join(row.device_types)} tensors, not {device_type}"
    if reason := row.why_unavailable():
        return reason
    return None if implementation.why_not is None else implementation.why_not(tensors)


@functools.cache
def _say_once(op: str, device_type: str, name: str) -> None:
    _log.info("%s on %s tensors: backend %r", op, device_type, name)


def select(op: str, name: str, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """Return the function of the backend that serves ``op`` on ``tensors``.

    Args:
        op: the op's name.
        name: a row of the table, or "auto" for what the ``with`` block or the environment asks for.
        tensors: what the backend will read and write, all on one device.

    Raises:
        BackendError: ``name`` is unknown or can't serve the call.
    """
    asked = ""
    if name == "auto" and (name := CHOICE.get() or "") == "":
        name, asked = os.environ.get(VARIABLE, "auto"), f" (of {VARIABLE})"
    if name not in ("auto", *BACKENDS):
        raise _unknown(name, asked)
    if name == "auto":
        device_type = tensors[0].device.type if tensors else "cpu"
        for name in _preferred(op):
            row, implementation = BACKENDS[name], _implementations[op][name]
            if device_type not in row.device_types:
                continue
            if name == "triton" and device_type == "cpu":
                continue  # the interpreter is for tests: it must be asked for
            unfit = implementation.why_not
            if row.why_unavailable() is None and (unfit is None or unfit(tensors) is None):
                break
        else:
            name = "reference"
        _say_once(op, device_type, name)
    elif reason := why_not(op, name, tensors):
        could = [n for n in BACKENDS if why_not(op, n, tensors) is None]
        raise BackendError(f"backend {name!r}{asked} can't serve {op}: {reason}. Could serve it: {', '.join(could)}")
    return _implementations[op][name].function


@functools.lru_cache(256)
def settled(op: str, name: str, device: torch.device, *_: Any) -> Callable[..., Any] | None:
    """Return what :func:`select` does for tensors on a device, looked up once; None where it has to look at them.

    Args:
        op, name, device: as there.
        _: what else it goes by: ``CHOICE.get()``, ``os.environ.get(VARIABLE)`` and the table's rows.
    """
    if any(implementation.why_not is not None for implementation in _implementations[op].values()):
        return None
    return select(op, name, [torch.empty(0, dtype=torch.float32, device=device)])


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"backend": "use_backend"}, name)
