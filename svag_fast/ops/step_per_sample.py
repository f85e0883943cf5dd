"""The fused SVAG step for users who hold per-sample gradients (torch.func's ``vmap(grad)``): each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svag_fast.ops.backends import device_and_stream, implements, select
from svag_fast.ops.checks import check_params, check_step_scalars, tensors
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import address, addresses, check_apart, mark_written, resolved, spans
from svag_fast.ops.step import svag_step_
from svag_fast.ops.step_call import DTYPE_CODES
from svag_fast.ops.step_options import svag_coefficients
from svag_fast.ops.step_stats import StepStats, rounding


class PerSampleStep(NamedTuple):
    """What :func:`svag_step_per_sample_` returns.

    Attributes:
        sq_norms1: [B1] float64, each sample's squared gradient norm over the whole list.
        sq_norms2: [B2] float64, or None without a second batch.
        stats: the step's statistics, of the two batch means.
    """

    sq_norms1: Tensor
    sq_norms2: Tensor | None
    stats: StepStats


def svag_step_per_sample_(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    *,
    lr: float,
    l: float,
    weight_decay: float = 0.0,
    backend: str = "auto",
) -> PerSampleStep:
    """Take one SVAG step in place from per-sample gradients, and return every sample's squared norm.

    With g1, g2 the means of ``grads1`` and ``grads2`` over their samples,
    ``x -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*x)`` (paper, equation 5). Each gradient is read once; the same bits
    come out for any number of threads.

    Args:
        params: tensors on one device, dense in memory, not overlapping; updated in place. The "cpu" backend serves
            float32 and float64, the reference half precision too.
        grads1: each sample's own gradients on the first batch: [B1, *param's shape], of the param's dtype, the same
            B1 >= 1 for all.
        grads2: those on the second batch, [B2, *param's shape]; None only at ``l = 1``.
        lr, l, weight_decay: as in :func:`svag_fast.ops.svag_step_`.
        backend: "auto", "cuda", "cpu" or "reference".

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend can't serve the call.
    """
    params = tensors("params", params, written=True)
    grads1 = tensors("grads1", grads1)
    grads2 = None if grads2 is None else tensors("grads2", grads2)
    lr, l, weight_decay = check_step_scalars(lr, l, weight_decay, params)
    if grads2 is None and l != 1:
        raise ValueError(f"grads2 must be the second batch's gradients at l = {l}, got None")
    if not params:
        raise ValueError("params is empty: the number of samples is not known without a gradient")
    with torch.no_grad():
        sq_norms, raw = _op(params, grads1, grads2, lr, l, weight_decay, backend)
    samples1 = grads1[0].shape[0]
    stats = StepStats(raw, grads2 is not None, rounding=rounding(params))
    return PerSampleStep(sq_norms[:samples1], None if grads2 is None else sq_norms[samples1:], stats)


def _check(params: Sequence[Tensor], grads1: Sequence[Tensor], grads2: Sequence[Tensor] | None) -> None:
    _check_grads("grads1", grads1, params)
    if grads2 is not None:
        _check_grads("grads2", grads2, params)
    check_params(params)
    # A sample is not the param's own element: the means are taken first.
    check_apart(spans(params, "params"), spans(grads1, "grads1"), spans(grads2 or [], "grads2"), elementwise=False)


def _check_grads(name: str, grads: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(grads) != len(params):
        raise ValueError(f"{name} has {len(grads)} tensors, but params has {len(params)}")
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g.layout != torch.strided:
            raise TypeError(f"{name}[{i}] is {g.layout}: expected a dense (strided) tensor")
        if g.dtype != p.dtype:
            raise TypeError(f"{name}[{i}] is {g.dtype}, but params[{i}] is {p.dtype}")
        if g.device != p.device:
            raise ValueError(f"{name}[{i}] is on {g.device}, but params[{i}] on {p.device}")
        if g.dim() == 0 or g.shape[1:] != p.shape:
            raise ValueError(f"{name}[{i}] has shape {list(g.shape)}: expected [B, {', '.join(map(str, p.shape))}]")
        if g.shape[0] != grads[0].shape[0] or g.shape[0] == 0:
            raise ValueError(
                f"{name}[{i}] has {g.shape[0]} samples and {name}[0] {grads[0].shape[0]}: expected the same, at least 1"
            )


def _run(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    lr: float,
    l: float,
    weight_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(params, grads1, grads2)
    step = select("svag_step_per_sample_", backend, params)
    sq_norms, raw = step(params, grads1, grads2, lr, l, weight_decay)
    mark_written(params)
    return sq_norms, raw


def _fake(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, *rest: object
) -> tuple[Tensor, Tensor]:
    _check(params, grads1, grads2)
    samples = grads1[0].shape[0] + (0 if grads2 is None else grads2[0].shape[0])
    return params[0].new_empty(samples, dtype=torch.float64), params[0].new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_step_per_sample_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, float lr, float l, "
    "float weight_decay, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


@implements("svag_step_per_sample_", "reference")
def _reference(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    lr: float,
    l: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    def sq_norms(grads: list[Tensor]) -> Tensor:
        return torch.stack(
            [g.double().square().reshape(len(g), p.numel()).sum(1) for g, p in zip(grads, params, strict=True)]
        ).sum(0)

    def means(grads: list[Tensor]) -> list[Tensor]:
        return [g.mean(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32) for g in grads]

    norms = [sq_norms(grads1)] + ([] if grads2 is None else [sq_norms(grads2)])
    second = None if grads2 is None else means(grads2)
    stats = svag_step_(params, means(grads1), second, lr=lr, l=l, weight_decay=weight_decay, backend="reference")
    raw: Tensor = stats.raw
    return torch.cat(norms), raw


def _not_single_or_double(params: Sequence[Tensor]) -> str | None:
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            return f"params[{i}] is {p.dtype}: it serves float32 and float64"
    return None


@implements("svag_step_per_sample_", "cpu", why_not=_not_single_or_double)
def _cpu(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    lr: float,
    l: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    from svag_fast import _C

    lists = [_samples_like(grads, params) for grads in (grads1, grads2 or [])]
    samples = [len(grads[0]) if grads else 0 for grads in lists]
    sq_norms = torch.empty(sum(samples), dtype=torch.float64, device="cpu")
    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    _C.step_per_sample(
        addresses(params, "params"),
        addresses(lists[0], "grads1"),
        addresses(lists[1], "grads2"),
        [p.numel() for p in params],
        [p.dtype == torch.float64 for p in params],
        samples[0],
        samples[1],
        lr / l,
        *svag_coefficients(l),
        weight_decay,
        torch.get_num_threads(),
        address(sq_norms, "sq_norms"),
        address(raw, "raw"),
    )
    return sq_norms, raw


@implements("svag_step_per_sample_", "cuda")
def _cuda(
    params: list[Tensor],
    grads1: list[Tensor],
    grads2: list[Tensor] | None,
    lr: float,
    l: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    from svag_fast import _C

    lists = [_samples_like(grads, params) for grads in (grads1, grads2 or [])]
    samples = [len(grads[0]) if grads else 0 for grads in lists]
    sizes, codes = [p.numel() for p in params], [DTYPE_CODES[p.dtype] for p in params]
    floats = _C.cuda_step_per_sample_workspace(sizes, codes, sum(samples))
    sq_norms, raw, workspace = (params[0].new_empty(n, dtype=torch.float64) for n in (sum(samples), 5, floats))
    _C.cuda_step_per_sample(
        addresses(params, "params"),
        addresses(lists[0], "grads1"),
        addresses(lists[1], "grads2"),
        sizes,
        codes,
        samples[0],
        samples[1],
        lr / l,
        *svag_coefficients(l),
        weight_decay,
        *device_and_stream(params[0].device),
        address(workspace, "workspace"),
        address(sq_norms, "sq_norms"),
        address(raw, "raw"),
    )
    return sq_norms, raw


def _samples_like(grads: list[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Each sample's gradient in its param's memory order: the tensor itself where it is, else a copy."""
    return [
        resolved(g.permute(0, *(1 + d for d in sorted(range(p.dim()), key=p.stride, reverse=True))).contiguous())
        for g, p in zip(grads, params, strict=False)
    ]
