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


@triton.jit
def _end_tile(
    total1, total2, offsets, inside, target, coefficients, partials, program, programs,
    SEGMENTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the gradient, or take the step on the weight; write the tile's share of the statistics, if any."""
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
    if SEGMENTS == 2 or STEP:
        tl.store(partials + program, tl.sum(total1 * total1).to(tl.float64))
        tl.store(partials + programs + program, s2.to(tl.float64))
        tl.store(partials + 2 * programs + program, s12.to(tl.float64))
        tl.store(partials + 3 * programs + program, sx.to(tl.float64))
        tl.store(partials + 4 * programs + program, tl.where(poison == 0.0, 1.0, 0.0).to(tl.float64))


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
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_FIT: tl.constexpr,
):  # fmt: skip
    """One tile of one group over one chunk of samples: M output channels and N = taps x channels of a group.

    A turn of the inner loop takes ROWS x COLUMNS output positions; ROWS_FIT: OUT_H is a multiple of ROWS.
    """
    N: tl.constexpr = TAPS * CHANNELS
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ACROSS: tl.constexpr = (OUT_W + COLUMNS - 1) // COLUMNS
    tile, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = (tile // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    # A tap's channels are side by side in a tile, so that loads are wide where memory has them so.
    channel, tap = n % CHANNELS, n // CHANNELS
    t = tl.arange(0, ROWS * COLUMNS)
    row, column = t // COLUMNS, t % COLUMNS
    y = (row * STRIDE_H - PAD_H)[:, None] + ((tap // K_W) * DILATION_H)[None, :]
    x = (column * STRIDE_W - PAD_W)[:, None] + ((tap % K_W) * DILATION_W)[None, :]
    a_offsets = ((group * CHANNELS + channel) * A_CHANNEL)[None, :] + y * A_ROW + x * A_COLUMN
    b_offsets = ((group * M + m) * B_CHANNEL)[:, None] + (row * B_ROW + column * B_COLUMN)[None, :]

    total1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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
    turns = tl.maximum(tl.cdiv(OUT_H, ROWS) * ACROSS, 1)
    a_next = a_sample - tl.cdiv(OUT_H, ROWS).to(tl.int64) * (ROWS * STRIDE_H * A_ROW)
    b_next = b_sample - tl.cdiv(OUT_H, ROWS).to(tl.int64) * (ROWS * B_ROW)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    turn = tl.zeros((), dtype=tl.int32)
    down = tl.zeros((), dtype=tl.int32)
    right = tl.zeros((), dtype=tl.int32)
    # One loop for all samples' turns: the loads run ahead from one sample to the next.
    for _ in range(0, tl.minimum(CHUNK, end - i).to(tl.int32) * turns):
        b_seen = (m < M)[:, None]
        # As unsigned numbers those below 0 are large.
        a_seen = (n < N)[None, :]
        if PAD_H > 0:
            a_seen &= (y + down * STRIDE_H).to(tl.uint32, bitcast=True) < H.to(tl.uint32)
        if PAD_W > 0:
            a_seen &= (x + right * STRIDE_W).to(tl.uint32, bitcast=True) < W
        if not ROWS_FIT:
            a_seen &= (row + down < OUT_H)[:, None]
            b_seen &= (row + down < OUT_H)[None, :]
        if OUT_W % COLUMNS != 0:
            a_seen &= (column + right < OUT_W)[:, None]
            b_seen &= (column + right < OUT_W)[None, :]
        b_tile = tl.load(b_here + b_offsets, mask=b_seen, other=0.0)
        a_tile = tl.load(a_here + a_offsets, mask=a_seen, other=0.0)
        if INTERPRETED:  # it takes a bfloat16 for its bits
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        if PRECISION == "tf32":
            a_tile, b_tile = _to_tf32(a_tile, INTERPRETED), _to_tf32(b_tile, INTERPRETED)
        product = tl.dot(b_tile, a_tile, product, input_precision=PRECISION)
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
            tl.store(sq_norms + row_of_norms + i, tl.sum(product * product))
            weight = tl.load(weights + i)
            # A whole product goes to one segment: 0 times an inf would be nan in the other.
            if SEGMENTS == 2:
                if tl.load(segments + i) == 1:
                    total2 += weight * product
                else:
                    total1 += weight * product
            else:
                total1 += weight * product
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            i += 1

    inside = (m < M)[:, None] & (n < N)[None, :]
    place = n if CHANNELS_FASTEST else channel * TAPS + tap
    offsets = (group * M + m).to(tl.int64)[:, None] * N + place[None, :]
    if ONE_CHUNK:
        program = group * tl.num_programs(0) + tile
        _end_tile(
            total1, total2, offsets, inside, target, coefficients, partials, program, programs, SEGMENTS, STEP,
        )  # fmt: skip
    else:
        if SEGMENTS == 2 or STEP:
            # The next launch counts its programs there.
            tl.store(partials + 5 * programs, 0.0, mask=(tile == 0) & (group == 0) & (chunk == 0))
        size = (tl.num_programs(1) * M).to(tl.int64) * N
        tl.store(sums + chunk * SEGMENTS * size + offsets, total1, mask=inside)
        if SEGMENTS == 2:
            tl.store(sums + (chunk * 2 + 1) * size + offsets, total2, mask=inside)


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
            _end_tile(
                total1, total2, offsets, inside, target, coefficients, partials, program, programs, SEGMENTS, STEP,
            )  # fmt: skip
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
    tile = tile_of(
        M, N, (OUT_H, OUT_W), exact=inputs.dtype == torch.float32 and precision == "ieee", wide=a_strides[1] == 1
    )
    tiles = groups * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
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
    ROWS: int
    COLUMNS: int
    ROWS_FIT: bool
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's own."""
        return {name: value for name, value in vars(self).items() if name.isupper()}


def tile_of(M: int, N: int, positions: tuple[int, int], *, exact: bool, wide: bool) -> Tile:
    """Choose the tile for products of [M, T] and [T, N], where the T positions are an image's.

    Args:
        M: output channels of a group.
        N: its input channels times the taps.
        positions: rows and columns of the image.
        exact: in full float32. They keep their operands in registers: a smaller tile, or they spill.
        wide: whether channels are side by side in memory, so that loads are wide; else a thread has many addresses to
            hold, and room for fewer sums.
    """
    most_m, most_n, most_t = (32, 64, 16) if exact else (64, 64, 64 if wide and M <= 16 else 32)
    block_m, block_n, block_t = (
        min(most, max(16, triton.next_power_of_2(n)))
        for n, most in ((M, most_m), (N, most_n), (math.prod(positions), most_t))
    )
    rows, columns = _positions(*positions, block_t)
    warps = 2 if wide and block_m < 64 and not exact else 4
    stages = EXACT_STAGES if exact else STAGES
    return Tile(block_m, block_n, rows, columns, positions[0] % rows == 0 and positions[0] > 0, warps, stages)


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
