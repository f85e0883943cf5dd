"""The fused SVAG step in Triton: a list of tensors in one launch, and a small second one that ends the sums.

Addresses, sizes and dtypes come from a table on the device, one row a tensor; a program owns ``ROUNDS`` blocks of
``BLOCK`` elements of one tensor. Its partial sums are added in a fixed order, so the bits do not depend on the
schedule. No multiply and add are fused: the params get the reference's bits.

Of stacked replicas each is a segment of the programs: all its tensors' blocks, then the next replica's. So its sums are
added as those of its step alone, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache

BLOCK = 1024
ROUNDS = 8
_FINISH = 512

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_TABLES: DeviceCache[tuple[Tensor, Tensor]] = DeviceCache(64)


@triton.jit
def _pointer(address, shift, CODE: tl.constexpr, ALIGNED: tl.constexpr, REPLICAS: tl.constexpr):
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif CODE == 2:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if REPLICAS:
        pointer += shift
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, offsets, mask, A: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0.0).to(A)
    else:
        return tl.load(pointer + offsets).to(A)


@triton.jit
def _store(pointer, offsets, values, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, values, mask=mask)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def _block(
    x_ptr, g1_ptr, g2_ptr, e_ptr, v_ptr, offsets, mask, rate, c1, c2, weight_decay, mu, mu_rest, unscale,
    s1, s2, s12, sx, poison,
    A: tl.constexpr, GRAD2: tl.constexpr, COMPENSATED: tl.constexpr, MOMENTUM: tl.constexpr, UPDATE: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update one block where asked, and add its elements to the sums; ``poison`` becomes nan by an inf or a nan."""
    x = _load(x_ptr, offsets, mask, A, MASKED)
    g1 = _load(g1_ptr, offsets, mask, A, MASKED)
    if SCALED:
        g1 = g1 * unscale
        if UPDATE and not GRAD2:
            _store(g1_ptr, offsets, g1.to(g1_ptr.dtype.element_ty), mask, MASKED)
    s1 += g1 * g1
    sx += x * x
    poison += g1 * 0.0
    combined = c1 * g1
    if GRAD2:
        g2 = _load(g2_ptr, offsets, mask, A, MASKED)
        if SCALED:
            g2 = g2 * unscale
            if UPDATE:
                _store(g2_ptr, offsets, g2.to(g2_ptr.dtype.element_ty), mask, MASKED)
        s2 += g2 * g2
        s12 += g1 * g2
        poison += g2 * 0.0
        # At l = 1 the second gradient has no weight, and 0 times an inf in it would be nan.
        combined = tl.where(c2 == 0.0, combined, combined + c2 * g2)
    if UPDATE:
        value = x
        if COMPENSATED:
            e = _load(e_ptr, offsets, mask, A, MASKED)
            value = x + e
        direction = combined + weight_decay * value
        if MOMENTUM:
            v = _load(v_ptr, offsets, mask, A, MASKED)
            # What rounding to float32 takes off mu is a part of 1 - mu that counts when mu is near 1.
            direction = mu * v + (direction + mu_rest * v)
            _store(v_ptr, offsets, direction, mask, MASKED)
        if COMPENSATED:
            step = e - rate * direction
            total = x + step
            # Knuth's two-sum: `error` is what the addition has lost.
            part = total - x
            error = (x - (total - part)) + (step - part)
            rounded = total.to(x_ptr.dtype.element_ty)
            _store(x_ptr, offsets, rounded, mask, MASKED)
            _store(e_ptr, offsets, (total - rounded.to(A)) + error, mask, MASKED)
        else:
            updated = x - rate * direction
            _store(x_ptr, offsets, updated.to(x_ptr.dtype.element_ty), mask, MASKED)
    return s1, s2, s12, sx, poison


@triton.jit
def _sums_in_float64(
    g1_ptr, g2_ptr, start, size, unscale,
    GRAD2: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The sums of finite gradients above 1e19, whose squares overflow float32."""
    s1 = tl.zeros((BLOCK,), dtype=tl.float64)
    s2 = tl.zeros((BLOCK,), dtype=tl.float64)
    s12 = tl.zeros((BLOCK,), dtype=tl.float64)
    for k in range(ROUNDS):
        offsets = start + k * BLOCK + tl.arange(0, BLOCK)
        # Through float32, since no 16-bit type widens to float64 in one step everywhere.
        g1 = tl.load(g1_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
        g1 = (g1 * unscale).to(tl.float64) if SCALED else g1.to(tl.float64)
        s1 += g1 * g1
        if GRAD2:
            g2 = tl.load(g2_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            g2 = (g2 * unscale).to(tl.float64) if SCALED else g2.to(tl.float64)
            s2 += g2 * g2
            s12 += g1 * g2
    return tl.sum(s1), tl.sum(s2), tl.sum(s12)


@triton.jit(do_not_specialize=["programs", "segment"])
def _step_kernel(
    table, owners, coefficients, partials, stats, scale, programs, segment,
    PAIRS: tl.constexpr, GRAD2: tl.constexpr, COMPENSATED: tl.constexpr, MOMENTUM: tl.constexpr, UPDATE: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """One program's share of one tensor; PAIRS has bit 4 * param_code + grad_code set for each pair in the list.

    Where it is SCALED the gradients are divided by the scale, in memory too the last of them, which the user sees.
    """
    # 64 bits from the start: a tensor may have more elements than 32 can count.
    program = tl.program_id(0).to(tl.int64)
    owner = owners + 2 * program
    replica = program
    if REPLICAS:
        replica = program // segment
        owner = owners + 2 * (program - replica * segment)
        coefficients += 7 * replica
        stats += 5 * replica
    row = table + tl.load(owner) * 7
    start = tl.load(owner + 1)
    size, code = tl.load(row + 5), tl.load(row + 6)
    shift = replica * size  # of one replica's elements
    go = True
    if GATED:
        # The second launch of skip_nonfinite: the first has said whether every gradient is finite.
        go = tl.load(stats + 4) != 0.0
    if go:
        # A branch for each pair of dtypes in the list, compiled once for the list: one launch serves mixed lists.
        for pair in tl.static_range(16):
            if (PAIRS >> pair) & 1:
                if code == pair:
                    A: tl.constexpr = tl.float64 if pair // 4 == 1 else tl.float32
                    rate = tl.load(coefficients) / tl.load(coefficients + 1)
                    rate = rate.to(A)
                    c1 = tl.load(coefficients + 2).to(A)
                    c2 = tl.load(coefficients + 3).to(A)
                    weight_decay = tl.load(coefficients + 4).to(A)
                    exact_mu = tl.load(coefficients + (5 if pair // 4 == 1 else 6))
                    mu = exact_mu.to(A)
                    mu_rest = (exact_mu - mu.to(tl.float64)).to(A)
                    unscale = mu
                    if SCALED:
                        unscale = (1.0 / tl.load(scale).to(tl.float64)).to(A)
                    x_ptr = _pointer(tl.load(row), shift, pair // 4, ALIGNED, REPLICAS)
                    g1_ptr = _pointer(tl.load(row + 1), shift, pair % 4, ALIGNED, REPLICAS)
                    g2_ptr = _pointer(tl.load(row + 2), shift, pair % 4, ALIGNED, REPLICAS)
                    e_ptr = _pointer(tl.load(row + 3), shift, 0, ALIGNED, REPLICAS)
                    v_ptr = _pointer(tl.load(row + 4), shift, 1 if pair // 4 == 1 else 0, ALIGNED, REPLICAS)
                    s1 = tl.zeros((BLOCK,), dtype=A)
                    s2 = tl.zeros((BLOCK,), dtype=A)
                    s12 = tl.zeros((BLOCK,), dtype=A)
                    sx = tl.zeros((BLOCK,), dtype=A)
                    poison = tl.zeros((BLOCK,), dtype=A)
                    for k in range(0, tl.minimum(tl.cdiv(size - start, BLOCK), ROUNDS)):
                        first = start + k * BLOCK
                        offsets = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
                        # Whole blocks without masks, whose loads the compiler can widen.
                        if first + BLOCK <= size:
                            s1, s2, s12, sx, poison = _block(
                                x_ptr, g1_ptr, g2_ptr, e_ptr, v_ptr, offsets, offsets < size, rate, c1, c2,
                                weight_decay, mu, mu_rest, unscale, s1, s2, s12, sx, poison, A, GRAD2, COMPENSATED,
                                MOMENTUM, UPDATE, SCALED, False,
                            )  # fmt: skip
                        else:
                            s1, s2, s12, sx, poison = _block(
                                x_ptr, g1_ptr, g2_ptr, e_ptr, v_ptr, offsets, offsets < size, rate, c1, c2,
                                weight_decay, mu, mu_rest, unscale, s1, s2, s12, sx, poison, A, GRAD2, COMPENSATED,
                                MOMENTUM, UPDATE, SCALED, True,
                            )  # fmt: skip
                    if not GATED:
                        total1 = tl.sum(s1).to(tl.float64)
                        total2 = tl.sum(s2).to(tl.float64)
                        total12 = tl.sum(s12).to(tl.float64)
                        finite = tl.sum(poison) == 0.0
                        if A == tl.float32:
                            # Rare, so the tensor's share is read again rather than summed in float64 always.
                            overflow = (total1 + total2 + total12) * 0.0 != 0.0
                            if finite & overflow:
                                total1, total2, total12 = _sums_in_float64(
                                    g1_ptr, g2_ptr, start, size, unscale, GRAD2, SCALED, BLOCK, ROUNDS
                                )
                        tl.store(partials + program, total1)
                        tl.store(partials + programs + program, total2)
                        tl.store(partials + 2 * programs + program, total12)
                        tl.store(partials + 3 * programs + program, tl.sum(sx).to(tl.float64))
                        tl.store(partials + 4 * programs + program, tl.where(finite, 1.0, 0.0).to(tl.float64))


@triton.jit(do_not_specialize=["programs", "segment"])
def _finish_kernel(partials, stats, found_inf, programs, segment, FOUND_INF: tl.constexpr, FINISH: tl.constexpr):
    """Add the programs' partial sums in a fixed order: one program a replica's statistic.

    Not finite is also what a GradScaler has found an inf in.
    """
    replica, which = tl.program_id(0) // 5, tl.program_id(0) % 5
    sums = partials + which * programs + replica * segment
    lanes = tl.arange(0, FINISH)
    total = tl.zeros((FINISH,), dtype=tl.float64)
    least = tl.full((FINISH,), 1.0, dtype=tl.float64)
    # One program a statistic, in the programs' order: bits that don't depend on the schedule.
    for first in range(0, segment, FINISH):
        inside = first + lanes < segment
        value = tl.load(sums + first + lanes, mask=inside, other=0.0)
        total += value
        least = tl.minimum(least, tl.where(inside, value, 1.0))
    if which == 4:
        finite = tl.min(least)
        if FOUND_INF:
            finite = tl.where(tl.load(found_inf) == 0.0, finite, 0.0)
        tl.store(stats + tl.program_id(0), finite)
    else:
        tl.store(stats + tl.program_id(0), tl.sum(total))


def _table(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    compensation: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    replicas: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the device's table of tensors [T, 7] and of one replica's programs [P, 2], both int64.

    A tensor's row has its addresses, one replica's elements and its dtypes; a program's its tensor and first element.
    """
    rows = [
        value
        for i, p in enumerate(params)
        for value in (
            p.data_ptr(),
            grads1[i].data_ptr(),
            grads2[i].data_ptr() if grads2 else 0,
            compensation[i].data_ptr() if compensation else 0,
            momentum_buffers[i].data_ptr() if momentum_buffers else 0,
            p.numel() // replicas,
            4 * _CODES[p.dtype] + _CODES[grads1[i].dtype],
        )
    ]
    device = params[0].device

    def make() -> tuple[Tensor, Tensor]:
        sizes = [p.numel() // replicas for p in params]
        owners = [v for i, size in enumerate(sizes) for start in range(0, size, BLOCK * ROUNDS) for v in (i, start)]
        return (
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(owners, dtype=torch.int64, device=device),
        )

    return _TABLES.get(device, tuple(rows), make, "addresses")


def svag_step(
    params: Sequence[Tensor],
    grads1: Sequence[Tensor],
    grads2: Sequence[Tensor] | None,
    compensation: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    skip_nonfinite: bool,
    found_inf: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    replicas: int = 1,
) -> Tensor:
    """Take the step in place and return the raw statistics, [replicas, 5] float64.

    Args:
        params, grads1, grads2, compensation, momentum_buffers: as :func:`svag_fast.ops.svag_step_` checks them, the
            params not empty; no compensation or momentum: an empty list. Each tensor has the replicas' elements one
            replica after the other.
        coefficients: [replicas, 7] float64 on the device, as :func:`svag_fast.ops.step.step_scalars` names them.
        skip_nonfinite: update in a launch of its own, which does nothing where a replica's gradient is not finite.
        found_inf: a GradScaler's, float32 of one element on the device: where it is not 0 nothing is updated. It and
            ``scale`` only with ``skip_nonfinite``.
        scale: the gradients are divided by it; in memory too the second ones (the first where there are none).
        replicas: how many are stepped, each by itself.
    """
    device = params[0].device
    table, owners = _table(params, grads1, grads2, compensation, momentum_buffers, replicas=replicas)
    segment = owners.numel() // 2
    programs = replicas * segment
    if programs == 0:
        return torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]] * replicas, dtype=torch.float64, device=device)
    # No copy from the host: a capture forbids it.
    stats = torch.empty(replicas, 5, dtype=torch.float64, device=device)
    partials = torch.empty(5 * programs, dtype=torch.float64, device=device)
    everything = [*params, *grads1, *(grads2 or []), *compensation, *momentum_buffers]
    pairs = {4 * _CODES[p.dtype] + _CODES[g.dtype] for p, g in zip(params, grads1, strict=True)}
    options = {
        "PAIRS": sum(1 << pair for pair in pairs),
        "GRAD2": grads2 is not None,
        "COMPENSATED": len(compensation) > 0,
        "MOMENTUM": len(momentum_buffers) > 0,
        "SCALED": scale is not None,
        # A view may begin anywhere, and so may a replica's part; loads of 16 bytes then trap.
        "ALIGNED": all(
            t.data_ptr() % 16 == 0 and (replicas == 1 or t.nbytes % (16 * replicas) == 0) for t in everything
        ),
        "REPLICAS": replicas > 1,
        "BLOCK": BLOCK,
        "ROUNDS": ROUNDS,
        "num_warps": 4,
        # The reference's bits: it rounds after each product.
        "enable_fp_fusion": False,
    }
    scale_or_any = coefficients if scale is None else scale
    arguments = (table, owners, coefficients, partials, stats, scale_or_any, programs, segment)
    _step_kernel[(programs,)](*arguments, UPDATE=not skip_nonfinite, GATED=False, **options)
    found = (stats if found_inf is None else found_inf, programs, segment, found_inf is not None)
    _finish_kernel[(5 * replicas,)](partials, stats, *found, FINISH=_FINISH)
    if skip_nonfinite:
        _step_kernel[(programs,)](*arguments, UPDATE=True, GATED=True, **options)
    return stats
