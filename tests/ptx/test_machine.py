"""The simulator itself: threads that part and meet, what it must refuse, and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.arithmetic import bfloat16_bits, compare, convert, extract_bits, matrix_product, shift
from ptx.machine import Machine
from ptx.memory import FaultError, GlobalMemory
from ptx.parser import UnsupportedError, parse
from torch import Tensor

HEAD = """
.visible .entry kernel(.param .u64 .ptr kernel_param_0) .reqntid 64
{{
    .reg .b32 %r<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r3, %r1, 2;
    {body}
    ret;
}}
"""


def run(body: str, out: Tensor, blocks: int = 1, written: np.ndarray | None = None) -> Tensor:
    memory = GlobalMemory(blocks)
    memory.add("out", out, written)
    places = [(i, 0, 0) for i in range(blocks)]
    Machine(parse(HEAD.format(body=body)), [out.data_ptr()], (blocks, 1, 1), places, 0, memory, 256).run()
    return out


def ints() -> Tensor:
    return torch.zeros(64, dtype=torch.int32)


def test_threads_part_and_meet_again_before_a_barrier() -> None:
    """Each loops as often as its number says; the thread before it is read after all are done."""
    body = """
        mov.u32 %r4, 0;
    $again:
        setp.ge.u32 %p1, %r4, %r1;
        @%p1 bra $done;
        add.s32 %r4, %r4, 1;
        bra.uni $again;
    $done:
        st.shared.b32 [%r3], %r4;
        bar.sync 0;
        xor.b32 %r5, %r3, 4;
        ld.shared.b32 %r6, [%r5];
        st.global.b32 [%rd3], %r6;
    """
    assert run(body, ints()).tolist() == [i ^ 1 for i in range(64)]


BY_TABLE = """
        rem.u32 %r4, %r1, {numbers};
    $table:
        .branchtargets
            $first,
            $second;
        brx.idx %r4, $table;
    $first:
        mov.u32 %r5, 5;
        bra.uni $end;
    $second:
        mov.u32 %r5, 6;
    $end:
        st.global.b32 [%rd3], %r5;
    """


def test_an_indexed_branch_parts_threads_by_their_numbers() -> None:
    assert run(BY_TABLE.format(numbers=2), ints()).tolist() == [5, 6] * 32
    with pytest.raises(FaultError, match="index 2 of 2 labels"):
        run(BY_TABLE.format(numbers=3), ints())


def test_half_of_the_threads_may_end_before_a_barrier() -> None:
    body = """
        setp.ge.u32 %p1, %r1, 32;
        @%p1 bra $other;
        bar.sync 0;
        st.global.b32 [%rd3], 7;
        ret;
    $other:
    """
    assert run(body, ints()).tolist() == [7] * 32 + [0] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];", "race: read"),
        ("ld.shared.b32 %r5, [%r3];", "where nothing wrote it"),
        ("st.shared.b32 [%r3+4], %r1;", "outside the 256 bytes of shared memory"),
        ("st.shared.b32 [2], %r1;", "not aligned"),
        ("st.shared.b32 [0], %r1;", "two warps write different values"),
        ("st.global.b32 [%rd3+4], %r1;", "outside every live tensor, 256 of 256 bytes of out"),
        ("st.global.b32 [%rd1], %r2;", "two blocks write the same byte of out"),
        ("ld.global.b32 %r5, [%rd3];", "out is read where nothing wrote it"),
        ("add.s32 %r5, %r6, 1;", "%r6 is read before it is written"),
        ("cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group;", "out is read where"),
    ],
)
def test_what_a_kernel_must_not_do(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        run(body, ints(), blocks=2, written=np.zeros(256, bool))


@pytest.mark.parametrize(
    ("wait", "message"), [("1", "while a copy to it is under way"), ("0", ""), (None, "while a copy")]
)
def test_a_copy_lands_when_it_is_waited_for(wait: str | None, message: str) -> None:
    body = "cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group;"
    body += f"cp.async.wait_group {wait};" if wait else ""
    body += "ld.shared.b32 %r5, [%r3]; add.s32 %r5, %r5, 1; st.global.b32 [%rd3], %r5;"
    if message:
        with pytest.raises(FaultError, match=message):
            run(body, ints())
    else:
        assert run(body, ints()).tolist() == [1] * 64


def test_a_block_sees_anothers_writes_after_an_atomic_alone() -> None:
    """The block that comes second reads what the first wrote."""
    body = """
        mul.wide.u32 %rd4, %r2, 256;
        add.s64 %rd5, %rd3, %rd4;
        st.global.b32 [%rd5+4], 5;
        bar.sync 0;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 atom.global.gpu.{order}.add.u32 %r4, [%rd1], 1;
        @%p1 st.shared.b32 [0], %r4;
        bar.sync 0;
        ld.shared.b32 %r4, [0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra $done;
        xor.b32 %r5, %r2, 1;
        mul.wide.u32 %rd4, %r5, 256;
        add.s64 %rd5, %rd3, %rd4;
        ld.global.b32 %r6, [%rd5+4];
    $done:
    """
    out = torch.zeros(129, dtype=torch.int32)
    assert run(body.format(order="acq_rel"), out, blocks=2).tolist() == [2] + [5] * 128
    with pytest.raises(FaultError, match="unordered"):
        run(body.format(order="relaxed"), torch.zeros(129, dtype=torch.int32), blocks=2)


def test_what_it_does_not_know_it_refuses() -> None:
    with pytest.raises(UnsupportedError, match=r"popc\.b32"):
        run("popc.b32 %r4, %r1;", ints())


def test_conversions_are_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 10000, dtype=np.uint32)
    x = bits.view(np.float32)
    ours, theirs = torch.from_numpy(bfloat16_bits(x).view(np.int16)), torch.from_numpy(x).bfloat16()
    assert torch.equal(ours[~theirs.isnan()], theirs.view(torch.int16)[~theirs.isnan()])
    assert bool(ours.view(torch.bfloat16)[theirs.isnan()].isnan().all())
    edge = np.array([2.9, -2.9, np.nan, 1e20, -1e20], np.float32)
    assert convert(edge, "f32", "s32", ("rzi",)).tolist() == [2, -2, 0, 2**31 - 1, -(2**31)]


def test_integers_and_comparisons() -> None:
    x, nan = np.array([-8, 7], np.int32), np.array([np.nan, 1.0], np.float32)
    assert shift(x, np.uint32(1), left=False).tolist() == [-4, 3]
    assert shift(x.view(np.uint32), np.uint32(40), left=True).tolist() == [0, 0]
    assert extract_bits(np.array([0b1100], np.int32), 2, 2).tolist() == [-1]
    assert extract_bits(np.array([0b1100], np.uint32), 2, 2).tolist() == [3]
    assert compare(nan, nan, "eq", "f32").tolist() == [False, True]
    assert compare(nan, nan, "neu", "f32").tolist() == [True, False]
    assert compare(nan, nan, "num", "f32").tolist() == [False, True]


def test_a_tf32_product_reads_19_bits_and_cuts_its_sums_off() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8), np.float32), rng.standard_normal((8, 8), np.float32)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4

    def bits(*parts: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(p).view(np.uint32)[None] for p in parts]

    registers_a = bits(a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4])
    registers_b = bits(b[t, g], b[t + 4, g])
    zero = [np.zeros((1, 32), np.uint32)] * 4
    found = matrix_product(registers_a, registers_b, zero, "tf32")
    cut = [(x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for x in (a, b)]
    exact = cut[0] @ cut[1]
    for k, (down, along) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        here = exact[g + down, 2 * t + along]
        assert np.all(np.abs(found[k][0]) <= np.abs(here))
        assert np.allclose(found[k][0], here, rtol=2.0**-23, atol=0)
