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
    with torch.no_grad():
        for (device, dtype), listed in _alike(grads):
            # A whole list takes one launch where the factor has its dtype. Not a half-precision one, where the factor
            # of a large scale would be 0.
            held = dtype if dtype in (torch.float32, torch.float64) else torch.float64
            torch._foreach_mul_(listed, factor.to(device, held))


def overflow(grads: list[Tensor], like: Tensor) -> Tensor:
    """Return a number, shaped and on a device as ``like``, that isn't 0 where any of them has an inf or nan."""
    total = torch.zeros_like(like)
    for (device, _), listed in _alike(grads):
        found, one = (torch.full((), x, dtype=torch.float32, device=device) for x in (0.0, 1.0))
        torch._amp_foreach_non_finite_check_and_unscale_(listed, found, one)
        total += found.to(total.device, non_blocking=True)
    return total


def _alike(grads: list[Tensor]) -> Iterable[tuple[tuple[torch.device, torch.dtype], list[Tensor]]]:
    """Yield each gradient once, those of one device and dtype together."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in {id(g): g for g in grads}.values():
        alike.setdefault((g.device, g.dtype), []).append(g)
    return alike.items()


def replica_norms(grads: list[Tensor], replicas: int, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Return each replica's norm over all gradients, [S]; of none, zeros.

    Raises:
        RuntimeError: one is inf or nan, and ``error_if_nonfinite``.
    """
    rows = [torch.linalg.vector_norm(g.reshape(replicas, -1), norm_type, dim=1) for g in grads if g.numel()]
    if not rows:
        return torch.zeros(replicas, dtype=torch.float32, device=grads[0].device if grads else "cpu")
    norms: Tensor = torch.linalg.vector_norm(torch.stack([row.to(rows[0].device) for row in rows]), norm_type, dim=0)
    if error_if_nonfinite and not bool(norms.isfinite().all()):
        wrong = ", ".join(map(str, norms.isfinite().logical_not().nonzero().flatten().tolist()))
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is inf or nan, of replica {wrong}")
    return norms


def clip_replicas(grads: list[Tensor], max_norm: float, norms: Tensor) -> None:
    """Scale each replica's gradients to ``max_norm`` where its norm is larger, as torch.nn.utils does for all."""
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        for g in grads:
            g.mul_(factors.to(g.device, g.dtype).view(-1, *[1] * (g.dim() - 1)))


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
