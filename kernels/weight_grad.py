"""The weight gradient of Linear and Conv2d with every sample's squared norm, in Triton (an implicit product).

A program owns one tile of the weight gradient of one group, and one chunk of the samples. It forms a sample's tile
b_iᵀ a_i over shifted windows of the input, without an unfolded copy, squares it into the sample's norm, and adds it,
weighted, to the sum of the sample's segment. With a single chunk the tile ends there: the gradient is stored, or the
SVAG step is applied and no gradient reaches memory; otherwise a second launch adds the chunks in order first.
A tile's squares are added in float32: a sample's norm beyond 1e19 comes out as inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from svag_fast.kernels.interpreter import interpreting
from svag_fast.kernels.step import _FINISH, _finish_kernel

# Programs wanted at least, to fill a GPU of some 108 to 148 multiprocessors; a constant, so that the chunks, and
# with them the bits, do not depend on the device.
_PROGRAMS = 256
_TILE_END = 1024
WARPS = 8
# Tensor cores are fed by loads that run ahead (Triton's default, 3 stages). Full float32 products have no room for
# those: with them they need 128 registers and more, and spill by some versions of Triton; without them 80.
STAGES, EXACT_STAGES = 3, 1


@triton.jit
def _end_tile(
    total1, total2, offsets, inside, target, coefficients, partials, program, programs,
    SEGMENTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the gradient, or take the step on the weight; write the tile's share of the five statistics."""
    s2 = tl.zeros((), dtype=tl.float32)
    s12 = tl.zeros((), dtype=tl.float32)
    sx = tl.zeros((), dtype=tl.float32)
    poison = tl.sum(total1 * 0.0)
    if SEGMENTS == 2:
        s2 = tl.sum(total2 * total2)
        s12 = tl.sum(total1 * total2)
        poison += tl.sum(total2 * 0.0)
    if STEP:
        rate = (tl.load(coefficients) / tl.load(coefficients + 1)).to(tl.float32)
        c1 = tl.load(coefficients + 2).to(tl.float32)
        c2 = tl.load(coefficients + 3).to(tl.float32)
        weight_decay = tl.load(coefficients + 4).to(tl.float32)
        x = tl.load(target + offsets, mask=inside, other=0.0).to(tl.float32)
        sx = tl.sum(x * x)
        combined = c1 * total1
        if SEGMENTS == 2:
            combined = tl.where(c2 == 0.0, combined, combined + c2 * total2)
        updated = x - rate * (combined + weight_decay * x)
        tl.store(target + offsets, updated.to(target.dtype.element_ty), mask=inside)
    else:
        total = total1
        if SEGMENTS == 2:
            total += total2
        tl.store(target + offsets, total, mask=inside)
    tl.store(partials + program, tl.sum(total1 * total1).to(tl.float64))
    tl.store(partials + programs + program, s2.to(tl.float64))
    tl.store(partials + 2 * programs + program, s12.to(tl.float64))
    tl.store(partials + 3 * programs + program, sx.to(tl.float64))
    tl.store(partials + 4 * programs + program, tl.where(poison == 0.0, 1.0, 0.0).to(tl.float64))


@triton.jit
def _weight_grad_kernel(
    a, b, weights, segments, target, coefficients, sums, sq_norms, partials,
    B, M, N, T, OUT_W, H, W, CHANNELS,
    a_sample, a_channel, a_row, a_column, b_sample, b_channel, b_row, b_column,
    K_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNELS_FASTEST: tl.constexpr,
    SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of one group over one chunk of samples: M output channels and N = channels x taps of a group."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    if CHANNELS_FASTEST:
        channel, tap = n % CHANNELS, n // CHANNELS
    else:
        channel, tap = n // TAPS, n % TAPS
    down, right = (tap // K_W) * DILATION_H, (tap % K_W) * DILATION_W
    a_column_of_n = (group * CHANNELS + channel) * a_channel
    b_row_of_m = (group * M + m) * b_channel

    total1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = chunk.to(tl.int64) * CHUNK
    for k in range(0, tl.minimum(CHUNK, B - first)):
        i = first + k
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            row, column = t // OUT_W, t % OUT_W
            b_offsets = b_row_of_m[:, None] + (row * b_row + column * b_column)[None, :]
            b_tile = tl.load(b + i * b_sample + b_offsets, mask=(m < M)[:, None] & (t < T)[None, :], other=0.0)
            y = (row * STRIDE_H - PAD_H)[:, None] + down[None, :]
            x = (column * STRIDE_W - PAD_W)[:, None] + right[None, :]
            seen = (t < T)[:, None] & (n < N)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            a_offsets = a_column_of_n[None, :] + y * a_row + x * a_column
            a_tile = tl.load(a + i * a_sample + a_offsets, mask=seen, other=0.0)
            if WIDEN:
                a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
            product = tl.dot(b_tile, a_tile, product, input_precision=PRECISION)
        row_of_norms = (group * tl.num_programs(0) + tile).to(tl.int64) * B
        tl.store(sq_norms + row_of_norms + i, tl.sum(product * product))
        weight = tl.load(weights + i)
        if SEGMENTS == 2:
            second = tl.load(segments + i) == 1
            # Whole products, not weights: 0 times an inf of the other segment would be nan.
            total1 += tl.where(second, 0.0, weight * product)
            total2 += tl.where(second, weight * product, 0.0)
        else:
            total1 += weight * product

    inside = (m < M)[:, None] & (n < N)[None, :]
    offsets = (group * M + m).to(tl.int64)[:, None] * N + n[None, :]
    if ONE_CHUNK:
        program = group * tl.num_programs(0) + tile
        programs = tl.num_programs(0) * tl.num_programs(1)
        _end_tile(
            total1, total2, offsets, inside, target, coefficients, partials, program, programs, SEGMENTS, STEP,
        )  # fmt: skip
    else:
        size = (tl.num_programs(1) * M).to(tl.int64) * N
        tl.store(sums + chunk * SEGMENTS * size + offsets, total1, mask=inside)
        if SEGMENTS == 2:
            tl.store(sums + (chunk * 2 + 1) * size + offsets, total2, mask=inside)


@triton.jit
def _add_chunks_kernel(
    sums, target, coefficients, partials, size, chunks,
    SEGMENTS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the chunks' sums in order, then end the tile."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total1 = tl.zeros((BLOCK,), dtype=tl.float32)
    total2 = tl.zeros((BLOCK,), dtype=tl.float32)
    here = sums + offsets
    for _ in range(chunks):
        total1 += tl.load(here, mask=inside, other=0.0)
        if SEGMENTS == 2:
            total2 += tl.load(here + size, mask=inside, other=0.0)
        here += SEGMENTS * size
    _end_tile(
        total1, total2, offsets, inside, target, coefficients, partials, program, tl.num_programs(0), SEGMENTS, STEP,
    )  # fmt: skip


@triton.jit
def _add_norms_kernel(sq_norms, out, B, tiles, BLOCK: tl.constexpr):
    """Add the tiles' shares of each sample's squared norm, in order, in float64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    here = sq_norms + i
    for _ in range(tiles):
        total += tl.load(here, mask=i < B, other=0.0).to(tl.float64)
        here += B
    tl.store(out + i, total, mask=i < B)


@dataclass(frozen=True)
class Convolution:
    """A convolution's options, each (vertical, horizontal); Linear is the 1x1 convolution of T positions in a row."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def product_tiles(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: list[int],
    weights: Tensor,
    segments: Tensor | None,
    convolution: Convolution,
    *,
    target: Tensor,
    channels_fastest: bool,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Form the products' sum into ``target``, or take the SVAG step on it where ``coefficients`` are given.

    Args:
        inputs: Linear [B, T, p], Conv2d [B, C, H, W]; any strides; float32, bfloat16 or float16.
        output_grads: [B, T, d]; [B, O, H_out, W_out].
        weight_shape: [d, p]; [O, C / groups, k_h, k_w].
        weights: [B] float32, each sample's weight in its segment's sum.
        segments: [B] int64 of 0 and 1, or None for a single segment.
        convolution: its options; the default for Linear.
        target: the weight's numbers in memory order: [O, C / groups, k_h, k_w], or [O, k_h, k_w, C / groups] where
            ``channels_fastest``. float32 for a gradient, any of the weight's dtypes for a step.
        coefficients: float64, beginning with lr, its divisor, c1, c2, weight_decay.

    Returns:
        sq_norms [B] float64, and the statistics [5] float64 of the segments' sums: both squared norms, the inner
        product, the weight's squared norm before the step (0 without one), 1 if all is finite.
    """
    if len(weight_shape) == 2:
        (B, T, CHANNELS), (O, K_H, K_W) = inputs.shape, (weight_shape[0], 1, 1)
        H, W, OUT_W = 1, T, max(T, 1)
        a_strides: tuple[int, ...] = (inputs.stride(0), inputs.stride(2), 0, inputs.stride(1))
        b_strides: tuple[int, ...] = (output_grads.stride(0), output_grads.stride(2), 0, output_grads.stride(1))
    else:
        (B, _, H, W), (O, CHANNELS, K_H, K_W) = inputs.shape, weight_shape
        T, OUT_W = output_grads.shape[2] * output_grads.shape[3], output_grads.shape[3]
        a_strides, b_strides = inputs.stride(), output_grads.stride()
    device, groups = inputs.device, convolution.groups
    M, N = O // groups, CHANNELS * K_H * K_W
    SEGMENTS = 1 if segments is None else 2
    precision = _precision(inputs, linear=len(weight_shape) == 2)
    # Full float32 products keep their operands in registers: a smaller tile, or they spill.
    exact = inputs.dtype == torch.float32 and precision == "ieee"
    most_m, most_n, most_t = (32, 64, 16) if exact else (64, 64, 32)
    BLOCK_M, BLOCK_N, BLOCK_T = (
        min(most, max(16, triton.next_power_of_2(n))) for n, most in ((M, most_m), (N, most_n), (T, most_t))
    )
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    CHUNK = max(1, math.ceil(B / max(1, _PROGRAMS // max(1, tiles * groups))))
    chunks = max(1, triton.cdiv(B, CHUNK))
    size = O * N
    programs = tiles * groups if chunks == 1 else triton.cdiv(size, _TILE_END)

    if size == 0:
        nothing = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
        return torch.zeros(B, dtype=torch.float64, device=device), nothing
    sq_norms = torch.empty(B, dtype=torch.float64, device=device)
    stats = torch.empty(5, dtype=torch.float64, device=device)
    shares = torch.empty((tiles * groups, B), dtype=torch.float32, device=device)
    partials = torch.empty((5, programs), dtype=torch.float64, device=device)
    sums = torch.empty((chunks * SEGMENTS, size) if chunks > 1 else (1,), dtype=torch.float32, device=device)
    step = coefficients is not None
    # The interpreter takes a bfloat16 for its bits.
    widen = interpreting()
    end = (target, stats if coefficients is None else coefficients)
    _weight_grad_kernel[(tiles, groups, chunks)](
        inputs, output_grads, weights, weights if segments is None else segments, *end, sums, shares, partials,
        B, M, N, T, OUT_W, H, W, CHANNELS, *a_strides, *b_strides,
        K_W, K_H * K_W, *convolution.stride, *convolution.padding, *convolution.dilation, channels_fastest,
        SEGMENTS, CHUNK, chunks == 1, step, precision, widen, BLOCK_M, BLOCK_N, BLOCK_T,
        num_warps=WARPS, num_stages=EXACT_STAGES if exact else STAGES,
    )  # fmt: skip
    if chunks > 1:
        _add_chunks_kernel[(programs,)](sums, *end, partials, size, chunks, SEGMENTS, step, _TILE_END)
    _finish_kernel[(5,)](partials, stats, programs, FINISH=_FINISH)
    if B:
        _add_norms_kernel[(triton.cdiv(B, 128),)](shares, sq_norms, B, tiles * groups, 128)
    return sq_norms, stats


def _precision(inputs: Tensor, linear: bool) -> str:
    """PyTorch's own switches say whether float32 products may use tf32: by default a convolution's may."""
    return "tf32" if inputs.dtype == torch.float32 and tf32_allowed(linear) else "ieee"


def tf32_allowed(linear: bool) -> bool:
    """Whether PyTorch's matrix products (or else its convolutions) may round float32 to tf32."""
    # Since torch 2.9 the older switches raise where the newer ones were set.
    newer = torch.backends.cuda.matmul if linear else getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(newer, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
    return bool((torch.backends.cuda.matmul if linear else torch.backends.cudnn).allow_tf32)
