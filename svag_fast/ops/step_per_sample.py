"""The fused SVAG step for users who hold per-sample gradients (torch.func's ``vmap(grad)``): each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svag_fast.ops.backends import device_and_stream, implements, select
from svag_fast.ops.checks import check_like, check_params
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import address, addresses, check_apart, mark_written, resolved
from svag_fast.ops.step import SVAG_STEP, svag_step_
from svag_fast.ops.step_call import DTYPE_CODES, StepLists
from svag_fast.ops.step_options import StepOptions, options_scalars
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
    options = StepOptions.checked(lr, l, weight_decay)
    if grads2 is None and options.l != 1:
        raise ValueError(f"grads2 must be the second batch's gradients at l = {l}, got None")
    lists = SVAG_STEP.named(StepLists(params, grads1, grads2))  # type: ignore[arg-type]
    if not lists.params:
        raise ValueError("params must be one tensor or more, since a gradient tells the number of samples, got none")
    options.check_held(lists.params)
    with torch.no_grad():
        sq_norms, raw = _op(*lists[:3], *options[:3], backend)
    samples1 = len(lists.grads1[0])
    stats = StepStats(raw, grads2 is not None, rounding=rounding(lists.params))
    return PerSampleStep(sq_norms[:samples1], None if grads2 is None else sq_norms[samples1:], stats)


def _check(lists: StepLists) -> None:
    check_params(lists.params)
    for name, grads in (("grads1", lists.grads1), ("grads2", lists.grads2)):
        if grads is not None:
            check_like(name, grads, lists.params, "same", per_sample=True)
    # A sample is not the param's own element: the means are taken first.
    check_apart(*SVAG_STEP.spans(lists), elementwise=False)


def _run(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *scalars, backend = rest
    lists = StepLists(params, grads1, grads2)
    _check(lists)
    step = select("svag_step_per_sample_", backend, params)
    sq_norms, raw = step(lists, StepOptions(*scalars))
    mark_written(params)
    return sq_norms, raw


def _fake(
    params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None, *rest: object
) -> tuple[Tensor, Tensor]:
    _check(StepLists(params, grads1, grads2))
    samples = len(grads1[0]) + (0 if grads2 is None else len(grads2[0]))
    return params[0].new_empty(samples, dtype=torch.float64), params[0].new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_step_per_sample_(Tensor(a!)[] params, Tensor[] grads1, Tensor[]? grads2, float lr, float l, "
    "float weight_decay, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


@implements("svag_step_per_sample_", "reference")
def _reference(lists: StepLists, options: StepOptions) -> tuple[Tensor, Tensor]:
    params, grads1, grads2, *_ = lists

    def sq_norms(grads: list[Tensor]) -> Tensor:
        return torch.stack(
            [g.double().square().reshape(len(g), p.numel()).sum(1) for g, p in zip(grads, params, strict=True)]
        ).sum(0)

    def means(grads: list[Tensor]) -> list[Tensor]:
        return [g.mean(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32) for g in grads]

    norms = [sq_norms(grads1)] + ([] if grads2 is None else [sq_norms(grads2)])
    second = None if grads2 is None else means(grads2)
    raw: Tensor = svag_step_(params, means(grads1), second, **options._asdict(), backend="reference").raw
    return torch.cat(norms), raw


def _not_single_or_double(params: Sequence[Tensor]) -> str | None:
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            return f"params[{i}] is {p.dtype}: it serves float32 and float64"
    return None


@implements("svag_step_per_sample_", "cpu", why_not=_not_single_or_double)
def _cpu(lists: StepLists, options: StepOptions) -> tuple[Tensor, Tensor]:
    from svag_fast import _C

    params, grads, samples = _laid_out(lists)
    sq_norms = torch.empty(sum(samples), dtype=torch.float64, device="cpu")
    raw = torch.empty(5, dtype=torch.float64, device="cpu")
    _C.step_per_sample(
        addresses(params, "params"),
        addresses(grads[0], "grads1"),
        addresses(grads[1], "grads2"),
        [p.numel() for p in params],
        [p.dtype == torch.float64 for p in params],
        *samples,
        *options_scalars(options)[:4],
        torch.get_num_threads(),
        address(sq_norms, "sq_norms"),
        address(raw, "raw"),
    )
    return sq_norms, raw


@implements("svag_step_per_sample_", "cuda")
def _cuda(lists: StepLists, options: StepOptions) -> tuple[Tensor, Tensor]:
    from svag_fast import _C

    params, grads, samples = _laid_out(lists)
    sizes, codes = [p.numel() for p in params], [DTYPE_CODES[p.dtype] for p in params]
    floats = _C.cuda_step_per_sample_workspace(sizes, codes, sum(samples))
    sq_norms, raw, workspace = (params[0].new_empty(n, dtype=torch.float64) for n in (sum(samples), 5, floats))
    _C.cuda_step_per_sample(
        addresses(params, "params"),
        addresses(grads[0], "grads1"),
        addresses(grads[1], "grads2"),
        sizes,
        codes,
        *samples,
        *options_scalars(options)[:4],
        *device_and_stream(params[0].device),
        address(workspace, "workspace"),
        address(sq_norms, "sq_norms"),
        address(raw, "raw"),
    )
    return sq_norms, raw


def _laid_out(lists: StepLists) -> tuple[list[Tensor], list[list[Tensor]], tuple[int, int]]:
    """Return the params, both batches' gradients in the params' memory order (copies if need be), and B1, B2."""
    params, *batches = lists[:3]
    grads = [
        [
            resolved(g.permute(0, *(1 + d for d in sorted(range(p.dim()), key=p.stride, reverse=True))).contiguous())
            for g, p in zip(batch or [], params, strict=False)
        ]
        for batch in batches
    ]
    samples1, samples2 = (len(batch[0]) if batch else 0 for batch in grads)
    return params, grads, (samples1, samples2)
