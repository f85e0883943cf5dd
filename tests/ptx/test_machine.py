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
    program = parse(HEAD.format(body=body))
    memory = GlobalMemory(blocks, program.unit("global"))
    memory.add("out", out.data_ptr(), out.nbytes, written)
    places, parameters = [(i, 0, 0) for i in range(blocks)], [out.data_ptr().to_bytes(8, "little")]
    Machine(program, parameters, (blocks, 1, 1), places, 0, memory, 256).run()
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


# Lane 3 of each warp comes later, from code behind all other; until then the rest of its warp waits.
OUT_OF_LINE = """
        and.b32 %r4, %r1, 31;
        setp.eq.u32 %p1, %r4, 3;
        mov.b32 %r5, 1;
        @%p1 bra $far;
    $back:
        {together}
        st.global.b32 [%rd3], %r6;
        ret;
    $far:
        mov.b32 %r5, 2;
        bra.uni {to};
    $end:
    """


def test_a_warps_threads_wait_for_those_that_a_shuffle_names() -> None:
    body = OUT_OF_LINE.format(together="shfl.sync.idx.b32 %r6, %r5, 3, 31, {mask};", to="{to}")
    assert run(body.format(mask=-1, to="$back"), ints()).tolist() == [2] * 64
    with pytest.raises(FaultError, match=r"shfl.*: threads 0 to 63 wait for others of their warp that never come"):
        run(body.format(mask=-1, to="$end"), ints())
    with pytest.raises(FaultError, match="not in its own mask"):
        run(body.format(mask=0xF, to="$back"), ints())


def test_a_shuffle_of_some_threads_leaves_the_others_alone() -> None:
    body = """
        and.b32 %r4, %r1, 31;
        setp.eq.u32 %p1, %r4, 8;
        @%p1 bra $done;
        shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xfffffeff;
        st.global.b32 [%rd3], %r5;
    $done:
    """
    with pytest.raises(FaultError, match="from a thread that is not there"):  # thread 9 from thread 8
        run(body, ints())
    found = run(body.replace("bfly.b32 %r5, %r1, 1", "down.b32 %r5, %r1, 0"), ints()).tolist()
    assert found == [0 if i % 32 == 8 else i for i in range(64)]


DIVERGENT = {
    "half of a block": ("32", "bar.sync 0;", "", "threads 0 to 31 of a block reach"),
    "half of a warp": ("48", "bar.sync 0;", "", "threads 0 to 47 of a block reach"),
    "some have ended": ("32", "bar.sync 0;", "ret;", "threads 0 to 31 of a block reach"),
    "two barriers": ("32", "bar.sync 0;", "bar.sync 0;", "wait at different barriers"),
    "the warp's": ("48", "bar.warp.sync -1;", "", "threads 32 to 47 wait for others of their warp"),
}


@pytest.mark.parametrize(("first", "here", "there", "message"), DIVERGENT.values(), ids=DIVERGENT)
def test_a_barrier_that_not_all_reach_is_a_fault(first: str, here: str, there: str, message: str) -> None:
    body = f"""
        setp.ge.u32 %p1, %r1, {first};
        @%p1 bra $other;
        {here}
        bra.uni $end;
    $other:
        {there}
    $end:
        st.global.b32 [%rd3], 7;
    """
    with pytest.raises(FaultError, match=message):
        run(body, ints())


@pytest.mark.parametrize(
    ("barrier", "message"), [("bar.warp.sync -1;", ""), ("", "race: read of"), ("bar.sync 0;", "")]
)
def test_threads_of_a_warp_need_its_barrier_between_them(barrier: str, message: str) -> None:
    """They need not run in step; a shuffle orders no memory."""
    body = f"""
        st.shared.b32 [%r3], %r1;
        shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;
        {barrier}
        xor.b32 %r4, %r3, 4;
        ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd3], %r5;
        {barrier}
        st.shared.b32 [%r3], 5;
    """
    if message:
        with pytest.raises(FaultError, match=message):
            run(body, ints())
    else:
        assert run(body, ints()).tolist() == [i ^ 1 for i in range(64)]
        with pytest.raises(FaultError, match="race: write over what another thread reads"):
            run("".join(body.rsplit(barrier, 1)), ints())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];", "race: read"),
        ("ld.shared.b32 %r5, [%r3];", "where nothing wrote it"),
        ("st.shared.b32 [%r3+4], %r1;", "outside the 256 bytes of shared memory"),
        ("st.shared.b32 [2], %r1;", "not aligned"),
        ("st.shared.b32 [0], %r1;", "two threads write different values"),
        ("st.global.b32 [%rd3+4], %r1;", "outside every live tensor, 256 of 256 bytes of out"),
        ("st.global.b32 [%rd1], %r2;", "two blocks write the same byte of out"),
        (
            "mul.wide.u32 %rd4, %r2, 4; add.s64 %rd5, %rd1, %rd4; st.global.b32 [%rd5], %r1;",
            "two threads write different values to out",
        ),
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


STRUCT = """
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .align 8 .b8 kernel_param_1[{size}]
)
.maxntid 64, 1, 1
{{
    .shared .align 8 .b8 kept[256];
    ld.param.u64 %rd1, [kernel_param_0];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    mov.b64 %rd3, kernel_param_1;
    add.s64 %rd3, %rd3, %rd2;
    ld.param.u32 %r2, [%rd3+8];
    ld.param.v2.u32 {{%r3, %r4}}, [kernel_param_1];
    add.s32 %r2, %r2, %r4;
    mov.u32 %r5, kept;
    shl.b32 %r6, %r1, 2;
    add.s32 %r5, %r5, %r6;
    st.shared.u32 [%r5], %r2;
    ld.shared.u32 %r2, [%r5];
    add.s64 %rd4, %rd1, %rd2;
    st.global.u32 [%rd4], %r2;
    ret;
}}
"""


def test_a_parameter_may_be_a_struct_that_each_thread_reads_at_its_own_place() -> None:
    out = ints()

    def run(size: int) -> list[int]:
        memory = GlobalMemory(1)
        memory.add("out", out.data_ptr(), out.nbytes)
        parameters = [out.data_ptr().to_bytes(8, "little"), np.arange(size // 4, dtype=np.int32).tobytes()]
        program = parse(STRUCT.format(size=8) + STRUCT.format(size=size).replace("kernel", "other"), "other")
        Machine(program, parameters, (1, 1, 1), [(0, 0, 0)], 0, memory, 0).run()
        return out.tolist()

    assert run(4 * 66) == [2 + i + 1 for i in range(64)]
    with pytest.raises(FaultError, match="not within one parameter"):
        run(4 * 65)
