"""The torch.library namespace ``torch.ops.svag_fast``: how an op of this package is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("svag_fast", "DEF")  # type: ignore[no-untyped-call]


def register_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``svag_fast::<schema>`` and return the callable op.

    ``Library.define`` and ``impl`` rather than ``custom_op``: the call costs a seventh.

    Args:
        schema: name, arguments and result; mutated tensors are marked as in ``Tensor(a!)[] params``.
        run: the implementation for every device; it selects a backend.
        fake: returns empty results of the right shape, for torch.compile; it may not look at data.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"svag_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.svag_fast, name).default


def is_watched() -> bool:
    """Whether PyTorch must see an op's call: it traces, profiles, or is in a dispatch mode or a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )
