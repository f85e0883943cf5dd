"""The weight gradient of Linear and Conv2d with every sample's squared norm, in Triton (an implicit product).

A program owns one tile of the weight gradient of one group, and one chunk of the samples. It forms a sample's tile
b_iᵀ a_i over shifted windows of the input, without an unfolded copy, squares it into the sample's norm, and adds it,
weighted, to the sum of the sample's segment. With a single chunk the tile ends there: the gradient is stored, or the
SVAG step is applied and no gradient reaches memory; otherwise a second launch adds the chunks in order first. That
launch also adds the tiles' shares of the norms and of the statistics.
Two batches side by side are two PARTS: no chunk has samples of both, and each part has a gradient of its own.
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

# Warps wanted at least, 2 or 3 for each scheduler of a GPU's some 108 to 148 multiprocessors; a constant, so that the
# chunks, and with them the bits, do not depend on the device.
_WARPS = 1024
_TILE_END = 1024  # elements of the gradient a program ends, where there are several chunks
_FINISH = 256  # programs' shares of the statistics, and tiles' and samples' of the norms, that are loaded at once
_TILES, _SAMPLES = 64, 16
# Tensor cores are fed by loads that run ahead (Triton's default, 3 stages). Full float32 products have no room for
# those: with them they need 128 registers and more, and spill by some versions of Triton; without them 80.
STAGES, EXACT_STAGES = 3, 1
# Older ones have no tuples (3.2), or send an operand of several products through shared memory once more (3.8).
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_ROW_TAPS = _TRITON >= (3, 9)


# A program's sums are BLOCKS tensors: a tuple, or a tensor alone, since not every Triton has tuples. The first FIRSTS
# have FIRST_N columns, the others N.
@triton.jit
def _zeros(BLOCKS: tl.constexpr, FIRSTS: tl.constexpr, M: tl.constexpr, FIRST_N: tl.constexpr, N: tl.constexpr):
    if BLOCKS == 1:
        return tl.zeros((M, FIRST_N), dtype=tl.float32)
    else:
        blocks = ()
        for k in tl.static_range(BLOCKS):
            blocks = blocks + (tl.zeros((M, FIRST_N if k < FIRSTS else N), dtype=tl.float32),)  # type: ignore[assignment]
        return blocks


@triton.jit
def _get(blocks, k: tl.constexpr, BLOCKS: tl.constexpr):
    if BLOCKS == 1:
        return blocks
    else:
        return blocks[k]


@triton.jit
def _put(blocks, k: tl.constexpr, block, BLOCKS: tl.constexpr):
    """Return ``blocks`` with another k-th."""
    if BLOCKS == 1:
        return block
    else:
        return blocks[:k] + (block,) + blocks[k + 1 :]


@triton.jit
def _add(total, product, weight, BLOCKS: tl.constexpr):
    for k in tl.static_range(BLOCKS):
        total = _put(total, k, _get(total, k, BLOCKS) + weight * _get(product, k, BLOCKS), BLOCKS)
    return total


@triton.jit
def _inner(x, y, BLOCKS: tl.constexpr, FIRSTS: tl.constexpr):
    cells = _get(x, 0, BLOCKS) * _get(y, 0, BLOCKS)
    for k in tl.static_range(1, FIRSTS):
        cells += _get(x, k, BLOCKS) * _get(y, k, BLOCKS)
    result = tl.sum(cells)
    if FIRSTS < BLOCKS:
        cells = _get(x, FIRSTS, BLOCKS) * _get(y, FIRSTS, BLOCKS)
        for k in tl.static_range(FIRSTS + 1, BLOCKS):
            cells += _get(x, k, BLOCKS) * _get(y, k, BLOCKS)
        result += tl.sum(cells)
    return result


@triton.jit
def _end_cells(total1, total2, offsets, inside, target, coefficients, SEGMENTS: tl.constexpr, STEP: tl.constexpr):
    """Store the gradient, or take the step on the weight; return the weight's squares, and 0 or nan."""
    weight_squares = tl.zeros((), dtype=tl.float32)
    poison = tl.sum(total1 * 0.0)
    if SEGMENTS == 2:
        poison += tl.sum(total2 * 0.0)
    if STEP:
        rate = (tl.load(coefficients) / tl.load(coefficients + 1)).to(tl.float32)
        c1 = tl.load(coefficients + 2).to(tl.float32)
        c2 = tl.load(coefficients + 3).to(tl.float32)
        weight_decay = tl.load(coefficients + 4).to(tl.float32)
        x = tl.load(target + offsets, mask=inside, other=0.0).to(tl.float32)
        weight_squares = tl.sum(x * x)
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
    return weight_squares, poison


@triton.jit
def _store_shares(
    total1, total2, weight_squares, poison, partials, program, programs,
    BLOCKS: tl.constexpr, FIRSTS: tl.constexpr, SEGMENTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the program's share of the statistics, if any."""
    if SEGMENTS == 2 or STEP:
        s2 = tl.zeros((), dtype=tl.float32)
        s12 = tl.zeros((), dtype=tl.float32)
        if SEGMENTS == 2:
            s2 = _inner(total2, total2, BLOCKS, FIRSTS)
            s12 = _inner(total1, total2, BLOCKS, FIRSTS)
        tl.store(partials + program, _inner(total1, total1, BLOCKS, FIRSTS).to(tl.float64))
        tl.store(partials + programs + program, s2.to(tl.float64))
        tl.store(partials + 2 * programs + program, s12.to(tl.float64))
        tl.store(partials + 3 * programs + program, weight_squares.to(tl.float64))
        tl.store(partials + 4 * programs + program, tl.where(poison == 0.0, 1.0, 0.0).to(tl.float64))


@triton.jit
def _columns(j: tl.constexpr, FIRST_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the columns of a tile's j-th block."""
    if j == 0:
        return tl.arange(0, FIRST_N)
    else:
        return FIRST_N + (j - 1) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _to_tf32(x, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest of tf32's 11 bits, halves away from 0: the tensor cores only cut the others off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)  # inf and nan stay
    else:
        # cvt.rna.tf32 takes two instructions an element on sm_80, this one and a half.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred %none;
            setp.num.f32 %none, $2, $3;
            mov.b32 $0, $2;
            mov.b32 $1, $3;
            @%none add.u32 $0, $2, 4096;
            @%none add.u32 $1, $3, 4096;
            }""",
            "=&r,=&r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip


# What a batch's size or an image's height changes is an argument, all else a constant: a layer is compiled once, and
# the inner loop's addresses are a pointer and constants.
@triton.jit(do_not_specialize=["B", "CHUNK", "programs", "H", "OUT_H"])
def _weight_grad_kernel(
    a, b, weights, segments, target, target2, coefficients, sums, sq_norms, partials,
    B, CHUNK, programs, H, OUT_H, a_sample, b_sample,
    M: tl.constexpr, CHANNELS: tl.constexpr, W: tl.constexpr, OUT_W: tl.constexpr,
    A_CHANNEL: tl.constexpr, A_ROW: tl.constexpr, A_COLUMN: tl.constexpr,
    B_CHANNEL: tl.constexpr, B_ROW: tl.constexpr, B_COLUMN: tl.constexpr,
    K_W: tl.constexpr, TAPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, CHANNELS_FASTEST: tl.constexpr,
    SEGMENTS: tl.constexpr, PARTS: tl.constexpr, ONE_CHUNK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_TAPS: tl.constexpr,
    N_BLOCKS: tl.constexpr, FIRST_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_FIT: tl.constexpr,
):  # fmt: skip
    """One tile of one group over one chunk of samples: M output channels and N = taps x channels of a group.

    A turn of the inner loop takes ROWS x COLUMNS positions; ROWS_FIT: the height is a multiple of ROWS. With ROW_TAPS
    of 1 these are output positions. Else they are the input's, ROW_TAPS the kernel's height (its vertical stride and
    dilation are 1), and N the taps of one of its rows x channels. Each input row then meets ROW_TAPS output rows, and
    each operand that is loaded and rounded enters so many products, or N_BLOCKS.
    """
    N: tl.constexpr = TAPS // ROW_TAPS * CHANNELS
    WIDTH: tl.constexpr = FIRST_N + (N_BLOCKS - 1) * BLOCK_N
    TILES_N: tl.constexpr = (N + WIDTH - 1) // WIDTH
    BLOCKS: tl.constexpr = ROW_TAPS * N_BLOCKS
    BELOW: tl.constexpr = 0 if ROW_TAPS == 1 else PAD_H  # output rows that the first row of positions meets
    ABOVE: tl.constexpr = PAD_H - BELOW
    ACROSS: tl.constexpr = (OUT_W + COLUMNS - 1) // COLUMNS
    tile, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = (tile // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.arange(0, ROWS * COLUMNS)
    row, column = t // COLUMNS, t % COLUMNS
    b_offsets = ((group * M + m) * B_CHANNEL)[:, None] + ((row + BELOW) * B_ROW + column * B_COLUMN)[None, :]

    total1 = _zeros(BLOCKS, ROW_TAPS, BLOCK_M, FIRST_N, BLOCK_N)
    total2 = _zeros(BLOCKS, ROW_TAPS, BLOCK_M, FIRST_N, BLOCK_N)
    height = OUT_H if ROW_TAPS == 1 else H
    i = chunk.to(tl.int64) * CHUNK
    end = B
    if PARTS == 2:
        chunks = tl.num_programs(2) // 2
        if chunk < chunks:
            end = B // 2
        else:
            i = B // 2 + (chunk - chunks).to(tl.int64) * CHUNK
            target = target2
    a_here, b_here = a + i * a_sample, b + i * b_sample
    row_of_norms = (group * tl.num_programs(0) + tile).to(tl.int64) * B
    # From a sample's last turn to the next sample's first.
    turns = tl.maximum(tl.cdiv(height, ROWS) * ACROSS, 1)
    a_next = a_sample - tl.cdiv(height, ROWS).to(tl.int64) * (ROWS * STRIDE_H * A_ROW)
    b_next = b_sample - tl.cdiv(height, ROWS).to(tl.int64) * (ROWS * B_ROW)
    product = _zeros(BLOCKS, ROW_TAPS, BLOCK_M, FIRST_N, BLOCK_N)
    turn = tl.zeros((), dtype=tl.int32)
    down = tl.zeros((), dtype=tl.int32)
    right = tl.zeros((), dtype=tl.int32)
    # One loop for all samples' turns: the loads run ahead from one sample to the next.
    for _ in range(0, tl.minimum(CHUNK, end - i).to(tl.int32) * turns):
        b_tiles = _zeros(ROW_TAPS, 0, BLOCK_M, ROWS * COLUMNS, ROWS * COLUMNS)
        for k in tl.static_range(ROW_TAPS):
            b_seen = (m < M)[:, None]
            # As unsigned numbers those below 0 are large.
            if ROW_TAPS > 1:
                b_seen &= (row + down + (BELOW - k)).to(tl.uint32, bitcast=True)[None, :] < OUT_H.to(tl.uint32)
            elif not ROWS_FIT:
                b_seen &= (row + down < OUT_H)[None, :]
            if OUT_W % COLUMNS != 0:
                b_seen &= (column + right < OUT_W)[None, :]
            b_tile = tl.load(b_here + (b_offsets - k * B_ROW), mask=b_seen, other=0.0)
            if INTERPRETED:  # it takes a bfloat16 for its bits
                b_tile = b_tile.to(tl.float32)
            if PRECISION == "tf32":
                b_tile = _to_tf32(b_tile, INTERPRETED)
            b_tiles = _put(b_tiles, k, b_tile, ROW_TAPS)
        for j in tl.static_range(N_BLOCKS):
            # A tap's channels are side by side in a tile, so that loads are wide where memory has them so.
            n = tile % TILES_N * WIDTH + _columns(j, FIRST_N, BLOCK_N)
            channel, tap = n % CHANNELS, n // CHANNELS
            y = (row * STRIDE_H - ABOVE)[:, None] + ((tap // K_W) * DILATION_H)[None, :]
            x = (column * STRIDE_W - PAD_W)[:, None] + ((tap % K_W) * DILATION_W)[None, :]
            a_offsets = ((group * CHANNELS + channel) * A_CHANNEL)[None, :] + y * A_ROW + x * A_COLUMN
            a_seen = (n < N)[None, :]
            if ABOVE > 0:
                a_seen &= (y + down * STRIDE_H).to(tl.uint32, bitcast=True) < H.to(tl.uint32)
            if PAD_W > 0:
                a_seen &= (x + right * STRIDE_W).to(tl.uint32, bitcast=True) < W
            if not ROWS_FIT:
                a_seen &= (row + down < height)[:, None]
            if OUT_W % COLUMNS != 0:
                a_seen &= (column + right < OUT_W)[:, None]
            a_tile = tl.load(a_here + a_offsets, mask=a_seen, other=0.0)
            if INTERPRETED:
                a_tile = a_tile.to(tl.float32)
            if PRECISION == "tf32":
                a_tile = _to_tf32(a_tile, INTERPRETED)
            for k in tl.static_range(ROW_TAPS):
                before = _get(product, j * ROW_TAPS + k, BLOCKS)
                formed = tl.dot(_get(b_tiles, k, ROW_TAPS), a_tile, before, input_precision=PRECISION)
                product = _put(product, j * ROW_TAPS + k, formed, BLOCKS)
        if ACROSS == 1:
            down += ROWS
            a_here += ROWS * STRIDE_H * A_ROW
            b_here += ROWS * B_ROW
        else:
            right += COLUMNS
            row_ends = right >= OUT_W
            back: tl.constexpr = ACROSS * COLUMNS
            down = tl.where(row_ends, down + ROWS, down)
            right = tl.where(row_ends, 0, right)
            a_here += COLUMNS * STRIDE_W * A_COLUMN
            b_here += COLUMNS * B_COLUMN
            a_here += tl.where(row_ends, ROWS * STRIDE_H * A_ROW - back * STRIDE_W * A_COLUMN, 0)
            b_here += tl.where(row_ends, ROWS * B_ROW - back * B_COLUMN, 0)
        turn += 1
        sample_ends = turn == turns
        a_here += tl.where(sample_ends, a_next, 0)
        b_here += tl.where(sample_ends, b_next, 0)
        down = tl.where(sample_ends, 0, down)
        turn = tl.where(sample_ends, 0, turn)
        if sample_ends:
            tl.store(sq_norms + row_of_norms + i, _inner(product, product, BLOCKS, ROW_TAPS))
            weight = tl.load(weights + i)
            # A whole product goes to one segment: 0 times an inf would be nan in the other.
            if SEGMENTS == 2:
                if tl.load(segments + i) == 1:
                    total2 = _add(total2, product, weight, BLOCKS)
                else:
                    total1 = _add(total1, product, weight, BLOCKS)
            else:
                total1 = _add(total1, product, weight, BLOCKS)
            product = _zeros(BLOCKS, ROW_TAPS, BLOCK_M, FIRST_N, BLOCK_N)
            i += 1

    weight_squares = tl.zeros((), dtype=tl.float32)
    poison = tl.zeros((), dtype=tl.float32)
    size = (tl.num_programs(1) * M).to(tl.int64) * (TAPS * CHANNELS)
    for j in tl.static_range(N_BLOCKS):
        n = tile % TILES_N * WIDTH + _columns(j, FIRST_N, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        for k in tl.static_range(ROW_TAPS):
            place = k * N + n if CHANNELS_FASTEST else n % CHANNELS * TAPS + k * (TAPS // ROW_TAPS) + n // CHANNELS
            offsets = (group * M + m).to(tl.int64)[:, None] * (TAPS * CHANNELS) + place[None, :]
            first = _get(total1, j * ROW_TAPS + k, BLOCKS)
            second = _get(total2, j * ROW_TAPS + k, BLOCKS)
            if ONE_CHUNK:
                squares, bad = _end_cells(first, second, offsets, inside, target, coefficients, SEGMENTS, STEP)
                weight_squares += squares
                poison += bad
            else:
                tl.store(sums + chunk * SEGMENTS * size + offsets, first, mask=inside)
                if SEGMENTS == 2:
                    tl.store(sums + (chunk * 2 + 1) * size + offsets, second, mask=inside)
    if ONE_CHUNK:
        program = group * tl.num_programs(0) + tile
        _store_shares(
            total1, total2, weight_squares, poison, partials, program, programs, BLOCKS, ROW_TAPS, SEGMENTS, STEP,
        )  # fmt: skip
    elif SEGMENTS == 2 or STEP:
        # The next launch counts its programs there.
        tl.store(partials + 5 * programs, 0.0, mask=(tile == 0) & (group == 0) & (chunk == 0))


@triton.jit(do_not_specialize=["size", "chunks", "programs", "ends", "B", "tiles"])
def _finish_layer_kernel(
    sums, target, target2, coefficients, partials, stats, shares, sq_norms, size, chunks, programs, ends, B, tiles,
    SEGMENTS: tl.constexpr, PARTS: tl.constexpr, ONE_CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    FINISH: tl.constexpr, SAMPLES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The first ``ends`` programs of each part add the chunks' sums in order and end the tile, the others add norms.

    Of the first, the one that comes last adds the statistics: it has seen all others' shares, and their order is fixed.
    """
    program = tl.program_id(0)
    if program < PARTS * ends:
        last = True
        if not ONE_CHUNK:
            block = program.to(tl.int64)
            if PARTS == 2:
                if program >= ends:
                    block -= ends
                    target = target2
                    sums += chunks * size.to(tl.int64)
            offsets = block * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < size
            total1 = tl.zeros((BLOCK,), dtype=tl.float32)
            total2 = tl.zeros((BLOCK,), dtype=tl.float32)
            here = sums + offsets
            for _ in range(chunks):
                total1 += tl.load(here, mask=inside, other=0.0)
                if SEGMENTS == 2:
                    total2 += tl.load(here + size, mask=inside, other=0.0)
                here += SEGMENTS * size
            squares, bad = _end_cells(total1, total2, offsets, inside, target, coefficients, SEGMENTS, STEP)
            _store_shares(total1, total2, squares, bad, partials, program, programs, 1, 1, SEGMENTS, STEP)
            if SEGMENTS == 2 or STEP:
                # All of the program's stores, by whichever warp, before it counts itself done.
                tl.debug_barrier()
                last = tl.atomic_add(partials + 5 * programs, 1.0, sem="acq_rel") == ends - 1
        if SEGMENTS == 2 or STEP:
            if last:
                which, lanes = tl.arange(0, 8), tl.arange(0, FINISH)
                total = tl.zeros((8, FINISH), dtype=tl.float64)
                for first in range(0, programs, FINISH):
                    inside_both = (which < 5)[:, None] & (first + lanes < programs)[None, :]
                    place = which[:, None] * programs + first + lanes[None, :]
                    total += tl.load(partials + place, mask=inside_both, other=0.0)
                statistics = tl.sum(total, axis=1)
                finite = tl.where(statistics == programs, 1.0, 0.0).to(tl.float64)
                tl.store(stats + which, tl.where(which == 4, finite, statistics), mask=which < 5)
    else:
        i = (program - PARTS * ends) * SAMPLES + tl.arange(0, SAMPLES)
        t = tl.arange(0, TILES)
        norms = tl.zeros((TILES, SAMPLES), dtype=tl.float64)
        for first in range(0, tiles, TILES):
            inside = (first + t < tiles)[:, None] & (i < B)[None, :]
            place = (first + t).to(tl.int64)[:, None] * B + i[None, :]
            norms += tl.load(shares + place, mask=inside, other=0.0).to(tl.float64)
        tl.store(sq_norms + i, tl.sum(norms, axis=0), mask=i < B)


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
    target2: Tensor | None = None,
    channels_fastest: bool,
    coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
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
        target2: as ``target``, for the gradient of the second half of the samples (B is even); ``target`` then gets the
            first half's. Only without segments and coefficients.
        coefficients: float64, beginning with lr, its divisor, c1, c2, weight_decay.

    Returns:
        sq_norms [B] float64, and the statistics [5] float64 of the segments' sums: both squared norms, the inner
        product, the weight's squared norm before the step (0 without one), 1 if all is finite. None for a gradient
        without segments.
    """
    if len(weight_shape) == 2:
        # A column of T positions: its height is no constant of the kernel.
        (B, H, CHANNELS), (O, K_H, K_W) = inputs.shape, (weight_shape[0], 1, 1)
        W, OUT_H, OUT_W = 1, H, 1
        a_strides: tuple[int, ...] = (inputs.stride(0), inputs.stride(2), inputs.stride(1), 0)
        b_strides: tuple[int, ...] = (output_grads.stride(0), output_grads.stride(2), output_grads.stride(1), 0)
    else:
        (B, _, H, W), (O, CHANNELS, K_H, K_W) = inputs.shape, weight_shape
        OUT_H, OUT_W = output_grads.shape[2:]
        a_strides, b_strides = inputs.stride(), output_grads.stride()
    device, groups = inputs.device, convolution.groups
    M, N = O // groups, CHANNELS * K_H * K_W
    SEGMENTS = 1 if segments is None else 2
    precision = _precision(inputs, linear=len(weight_shape) == 2)
    exact = inputs.dtype == torch.float32 and precision == "ieee"
    narrow = any(s[1] != 1 and s[2] * inputs.element_size() % 16 != 0 for s in (a_strides, b_strides))
    tile = tile_of((M, CHANNELS, K_H, K_W), (H, OUT_H, OUT_W), convolution, exact=exact, narrow=narrow)
    tiles = groups * tile.count(M, N)
    PARTS = 1 if target2 is None else 2
    CHUNK, chunks = chunks_of(B // PARTS, PARTS * tiles, tile.warps)
    size = O * N
    step = coefficients is not None
    measures = step or SEGMENTS == 2
    ends = triton.cdiv(size, _TILE_END) if chunks > 1 else int(measures)
    programs = tiles if chunks == 1 else ends

    # A grid of no programs can't be launched.
    if size == 0:
        nothing = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
        return torch.zeros(B, dtype=torch.float64, device=device), nothing if measures else None
    sq_norms = torch.empty(B, dtype=torch.float64, device=device)
    stats = torch.empty(5, dtype=torch.float64, device=device) if measures else None
    shares = torch.empty((tiles, B), dtype=torch.float32, device=device)
    partials = torch.empty(5 * programs + 1 if measures else 0, dtype=torch.float64, device=device)
    count = PARTS * chunks * SEGMENTS if chunks > 1 else 0
    sums = torch.empty((count, size), dtype=torch.float32, device=device)
    end = (target, target if target2 is None else target2, partials if coefficients is None else coefficients)
    _weight_grad_kernel[(tiles // groups, groups, PARTS * chunks)](
        inputs, output_grads, weights, weights if segments is None else segments, *end, sums, shares, partials,
        B, CHUNK, programs, H, OUT_H, a_strides[0], b_strides[0], M, CHANNELS, W, OUT_W, *a_strides[1:],
        *b_strides[1:], K_W, K_H * K_W, *convolution.stride, *convolution.padding, *convolution.dilation,
        channels_fastest, SEGMENTS, PARTS, chunks == 1, step, precision, interpreting(),
        **tile.constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _finish_layer_kernel[(PARTS * ends + triton.cdiv(B, _SAMPLES),)](
        sums, *end, partials, partials if stats is None else stats, shares, sq_norms,
        size, chunks, programs, ends, B, tiles,
        SEGMENTS, PARTS, chunks == 1, step, _TILE_END, _FINISH, _SAMPLES, _TILES,
    )  # fmt: skip
    return sq_norms, stats


def chunks_of(samples: int, tiles: int, warps: int) -> tuple[int, int]:
    """Return how many samples of a part a chunk has, and how many chunks a part; ``tiles`` are those of all parts."""
    # Samples are cut up only as far as tiles alone would leave the GPU idle.
    chunk = max(1, math.ceil(samples / max(1, _WARPS // warps // max(1, tiles))))
    return chunk, max(1, math.ceil(samples / chunk))


@dataclass(frozen=True)
class Tile:
    """How a layer's products are cut: the kernel's constants of these names, and how it is launched."""

    BLOCK_M: int
    BLOCK_N: int
    FIRST_N: int
    N_BLOCKS: int
    ROW_TAPS: int
    ROWS: int
    COLUMNS: int
    ROWS_FIT: bool
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's own."""
        return {name: value for name, value in vars(self).items() if name.isupper()}

    def count(self, M: int, N: int) -> int:
        """Return how many tiles a group's gradient has: M output channels, and N input channels times all taps."""
        width = self.FIRST_N + (self.N_BLOCKS - 1) * self.BLOCK_N
        return math.ceil(M / self.BLOCK_M) * math.ceil(N / (self.ROW_TAPS * width))


def tile_of(
    shape: tuple[int, int, int, int],
    image: tuple[int, int, int],
    convolution: Convolution,
    *,
    exact: bool,
    narrow: bool = False,
) -> Tile:
    """Choose the tile of a layer's products.

    Args:
        shape: a group's output channels, its input channels, the kernel's height and width.
        image: the input's height, the output's height and width.
        convolution: its options.
        exact: in full float32. They keep their operands in registers: a smaller tile, or they spill.
        narrow: neither channels nor rows come 16 bytes at a time. Each copy of 4 bytes has an address in a register:
            fewer of them a thread, or they spill.
    """
    M, channels, taps_down, taps_across = shape
    height, *positions = image
    across = taps_across * channels
    # So that each input row meets an output row: an inf in another would make nan of the zeros beside it.
    every_row = (convolution.stride[0], convolution.dilation[0]) == (1, 1)
    # A wider layer has products enough in one block, which Hopper's larger instructions also take.
    if _ROW_TAPS and not exact and taps_down == 3 and every_row and across in (48, 96):
        block_m, block_n, row_taps = 16, 32, 3
        # Triton cuts all products that share operands alike, down or across as the last is longer: 16 x 32, across.
        first_n, n_blocks, warps = (32, 3, 4) if across == 96 else (16, 2, 2)
        positions[0], most_t = height, 32 if narrow else 64
    else:
        most_m, most_n = (32, 64) if exact else (64, 64)
        block_m = min(most_m, max(16, triton.next_power_of_2(M)))
        first_n = block_n = min(most_n, max(16, triton.next_power_of_2(taps_down * across)))
        row_taps, n_blocks, warps = 1, 1, 4 if exact or narrow or block_m * block_n > 2048 else 2
        # More spills: with 3 channels the addresses of columns.
        most_t = 16 if exact else 32 if warps == 4 or (block_m == 64 and channels % 4 != 0) else 64
    block_t = min(most_t, max(16, triton.next_power_of_2(math.prod(positions))))
    rows, columns = _positions(positions[0], positions[1], block_t)
    fit = positions[0] % rows == 0 and positions[0] > 0
    stages = EXACT_STAGES if exact else STAGES
    return Tile(block_m, block_n, first_n, n_blocks, row_taps, rows, columns, fit, warps, stages)


def _positions(height: int, width: int, most: int) -> tuple[int, int]:
    """Return how many rows and columns of a layer's positions a turn takes: as few turns as can be."""
    # Powers of 2, so that a position's place in its row stays from turn to turn and needs no division.
    shapes = [(most // columns, columns) for columns in (1 << k for k in reversed(range(most.bit_length())))]
    return min(shapes, key=lambda shape: math.ceil(height / shape[0]) * math.ceil(width / shape[1]))


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
