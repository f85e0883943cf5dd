"""How torch.optim wraps an optimizer's methods, for hooks, profilers and torch.compile, at less cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer, optimizer

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


def seen_by_hooks_and_profilers(step: _Method) -> _Method:
    """Wrap ``step`` as torch.optim would, entered only where someone watches: it costs half a small net's step."""
    watched = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        ):
            return watched(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # Optimizer looks for it
    return wrapper  # type: ignore[return-value]
