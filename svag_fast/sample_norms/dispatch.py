"""Whose forward runs: a class's own, or the one that serves one module of it for a while.

The class's `forward` is replaced while any of its modules is served; it looks the module up by identity, and everything
else goes the class's own way.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

_LOCK = threading.RLock()


def _compiler_is_loaded() -> object:
    return sys.modules.get("torch._dynamo")


# Not None where torch.compile looks at what runs; by an older PyTorch, where it may.
_compiler: Callable[[], object] = getattr(eval_frame, "get_eval_frame_callback", _compiler_is_loaded)


_transforms: Callable[[], object] = torch._C._functorch.peek_interpreter_stack  # not None inside of one
_running_plainly = threading.local()


@contextmanager
def run_plainly() -> Iterator[None]:
    """In which served modules run their classes' own forward under torch.func's transforms, as a rule needs it."""
    before = getattr(_running_plainly, "now", False)
    _running_plainly.now = True
    try:
        yield
    finally:
        _running_plainly.now = before


def _in_transform(module: nn.Module) -> bool:
    """Whether a served module is to run plainly under a transform; raises where that would leave its norms out."""
    if getattr(_running_plainly, "now", False) or not torch.is_grad_enabled():
        return True
    raise RuntimeError(
        f"{type(module).__name__} was called under a transform of torch.func (grad, vmap, jvp, jacrev, ...) or "
        "forward-mode differentiation inside per_sample_sq_norms, which measures plain backward passes: call it "
        "outside of the context, on a copy.deepcopy of the model, or, for values alone, under torch.no_grad()"
    )


class Dispatch:
    """A class's replaced forward, and the modules that are served."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind
        self.plain = plain = plain_forward(kind)
        self.own = kind.__dict__.get("forward")  # None: inherited
        self.served: dict[int, Callable[..., Any]] = {}
        # In the closure, as the function below gets another module's globals.
        served, compiler, uncompiled = self.served, _compiler, _uncompiled
        transforms, dual, in_transform = _transforms, forward_ad, _in_transform

        # Nothing is put onto a module, so whatever copies one (deepcopy, pickle, torch.save, a copied `__dict__`, a
        # traced graph) gets a plain module.
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            serve = served.get(id(self))
            if serve is None:
                return plain(self, *args, **kwargs)
            if compiler() is not None:
                return uncompiled()(serve, args, kwargs)
            if (transforms() is not None or dual._current_level >= 0) and in_transform(self):
                return plain(self, *args, **kwargs)
            return serve(*args, **kwargs)

        # With the plain function's globals: who reads the class's forward as source (TorchScript, torch.fx) finds the
        # plain one's through __wrapped__, and its names here.
        names = getattr(plain, "__globals__", globals())
        self.forward = types.FunctionType(forward.__code__, names, plain.__name__, None, forward.__closure__)
        self.forward.__qualname__, self.forward.__doc__ = plain.__qualname__, plain.__doc__
        self.forward.__wrapped__ = plain  # type: ignore[attr-defined]


Function: TypeAlias = Callable[..., Any]
Served: TypeAlias = tuple[Dispatch, int]  # a module, by its identity

_DISPATCHES: dict[type[nn.Module], Dispatch] = {}
_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {}  # each replaced forward -> the plain one


def plain_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class as it is where nothing is served."""
    forward: Callable[..., Any] = kind.forward
    return _PLAIN.get(forward, forward)


def is_idle() -> bool:
    """Whether nothing is served at all."""
    return not _DISPATCHES


def is_served(module: nn.Module) -> bool:
    """Whether some context serves this very module."""
    if not _DISPATCHES:
        return False
    return any(id(module) in dispatch.served for dispatch in list(_DISPATCHES.values()))


def serve_all(functions: list[tuple[nn.Module, Function]], before: dict[type[nn.Module], Dispatch]) -> list[Served]:
    """Have `function(*inputs)` run in place of each module's forward; returns what `take_back` takes.

    The caller keeps the modules alive until then. `before` keeps what serves a class, to be used again.
    """
    out = []
    with _LOCK:
        for module, function in functions:
            kind = type(module)
            dispatch = _DISPATCHES.get(kind)
            if dispatch is None:
                # An earlier one serves again, unless somebody has given the class another forward since.
                dispatch, plain = before.get(kind), kind.forward
                if (
                    dispatch is None
                    or _PLAIN.get(plain, plain) is not dispatch.plain
                    or kind.__dict__.get("forward") is not dispatch.own
                ):
                    dispatch = before[kind] = Dispatch(kind)
                _DISPATCHES[kind] = dispatch
                _PLAIN[dispatch.forward] = dispatch.plain
                kind.forward = dispatch.forward
            dispatch.served[id(module)] = function
            out.append((dispatch, id(module)))
    return out


def take_back(served: list[Served]) -> None:
    """End what `serve_all` began."""
    with _LOCK:
        for dispatch, key in served:
            dispatch.served.pop(key, None)
            kind = dispatch.kind
            if dispatch.served or _DISPATCHES.get(kind) is not dispatch:
                continue
            del _DISPATCHES[kind]
            if kind.__dict__.get("forward") is not dispatch.forward:
                continue  # somebody else's patch is on top; without served modules ours does nothing
            if dispatch.own is None:
                del kind.forward
            else:
                kind.forward = dispatch.own
            del _PLAIN[dispatch.forward]


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    """Runs a function where torch.compile neither traces it nor what it calls."""
    disabled: Callable[..., Any] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
    return disabled


_stances: list[AbstractContextManager[Any]] = []
_contexts_with_stance = 0


def run_compiled_code_eagerly() -> Callable[[], None] | None:
    """Code compiled before would go past the served forwards: until the returned function is called it runs eagerly.
    None where nothing has been compiled."""
    global _contexts_with_stance
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or not any(getattr(compiler, "cached_backends", {0: True}).values()):
        return None
    with _LOCK:
        if _contexts_with_stance == 0:
            try:
                _stances.append(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:
                raise RuntimeError(
                    "per_sample_sq_norms was entered within a function that torch.compile runs, where compiled code "
                    "can't be kept from going past the model's layers: enter it outside of that function, or mark the "
                    "function that enters it with @torch.compiler.disable"
                ) from error
        _contexts_with_stance += 1
    return _let_compiled_code_run


def _let_compiled_code_run() -> None:
    global _contexts_with_stance
    with _LOCK:
        _contexts_with_stance -= 1
        if _contexts_with_stance == 0:
            _stances.pop().__exit__(None, None, None)
