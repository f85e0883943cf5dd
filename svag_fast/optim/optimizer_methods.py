"""How torch.optim wraps an optimizer's methods, for hooks, profilers and torch.compile, at less cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

_Method = TypeVar("_Method", bound=Callable[..., Any])


def plain(method: Any) -> Any:
    """The optimizer's method without what keeps torch.compile out of it: that imports the compiler, 2.4 s of CPU."""
    return getattr(method, "__wrapped__", method)


def outside_compiler(method: _Method) -> _Method:
    """Keep torch.compile out of the method: what it sets on the optimizer would be lost.

    torch's own decorator imports the compiler (2.4 s of CPU), so it is entered only where there is one already.
    """
    uncompiled = torch._disable_dynamo(method)  # type: ignore[attr-defined]

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return uncompiled(*args, **kwargs) if torch.compiler.is_compiling() else method(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def as_torch_wraps(step: _Method) -> _Method:
    """Return ``step`` with what torch.optim wraps around it: hooks and profilers see it, torch.compile leaves it alone.

    To be entered only where someone watches (:meth:`TwoBatchOptimizer.step`): it costs half a small net's step.
    """
    return outside_compiler(Optimizer.profile_hook_step(step))  # type: ignore[return-value]
