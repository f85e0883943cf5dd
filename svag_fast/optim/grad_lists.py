"""Lists of gradients beside their parameters: what a step makes of them before a kernel takes them."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from svag_fast.optim.held_gradient import GroupGrads

Grads = list[Tensor]


def gradients(
    params: list[Tensor], first: GroupGrads, second: GroupGrads | None
) -> Iterable[tuple[list[Tensor], Grads, Grads | None]]:
    """Yield a group's ``(params, grads1, grads2)`` of those that have any, one triple for each device."""
    devices: dict[torch.device, tuple[list[Tensor], Grads, Grads]] = {}
    for i, p in enumerate(params):
        pair = [first[i]] if second is None else [first[i], second[i]]
        if any(g is not None and g.is_sparse for g in pair):
            raise RuntimeError(f"sparse gradients are not supported (a parameter of shape {list(p.shape)} has one)")
        if any(g is not None for g in pair):
            lists = devices.setdefault(p.device, ([], [], []))
            lists[0].append(p)
            for grads, g in zip(lists[1:], pair, strict=False):
                grads.append(torch.zeros_like(p) if g is None else g)
    for listed, grads1, grads2 in devices.values():
        yield listed, grads1, None if second is None else grads2


def divide(grads: list[Tensor], scale: Tensor) -> None:
    """Divide each of them once, in place."""
    factor = scale.double().reciprocal()
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in {id(g): g for g in grads}.values():
        alike.setdefault((g.device, g.dtype), []).append(g)
    with torch.no_grad():
        for (device, dtype), listed in alike.items():
            # A whole list takes one launch where the factor has its dtype. Not a half-precision one, where the factor
            # of a large scale would be 0.
            held = dtype if dtype in (torch.float32, torch.float64) else torch.float64
            torch._foreach_mul_(listed, factor.to(device, held))


def carriers(grads: list[Tensor]) -> list[Tensor]:
    """Return tensors that have these as ``.grad``, for what looks there."""
    carriers = [g.detach() for g in grads]
    for carrier, g in zip(carriers, grads, strict=True):
        carrier.grad = g
    return carriers


def sharded(p: Tensor) -> str | None:
    """Name the kind of a parameter of which this rank has a shard."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if isinstance(p, dtensor):
        return "DTensor"
    return "FullyShardedDataParallel shard" if getattr(p, "_fsdp_flattened", False) else None
