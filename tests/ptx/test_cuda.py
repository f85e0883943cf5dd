"""The CUDA kernels by the PTX that nvcc makes of them, in the simulator: values, races, bounds, unwritten memory.

What calls them is nvcc's own host code. Faults planted in source and PTX are seen, or it is said why they are none:

| planted and not seen                                 | why it is no fault here                      |
| ---------------------------------------------------- | -------------------------------------------- |
| step, squares overflow: barrier before the wide sums | the first of those sums does its work        |
| step, squares overflow: the last of those sums       | each thread reads what it wrote itself       |
| per sample, float32: a group's last, of either batch | that of the test for overflow, if none does  |
| SELDOM below                                         | lists of 2, no such dtypes, 768 partial sums |
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from cuda_on_host.backend import DEVICE, STREAM
from cuda_on_host.build import HERE
from gpu_checks import Check, checks, outcome
from ptx import cuda
from ptx.cuda import PtxKernels, running
from ptx.faults import planted, why_harmless
from ptx.memory import FaultError
from ptx.parser import Instruction, Program
from ptx.simulator import Simulator
from torch import Tensor

CHECKS = {f"{c.op} {c.case}": c for c in checks() if c.backend == "cuda"}
SHORT = [name for name, check in CHECKS.items() if check.small]
TOO_MANY = ("svag_step_ 9 million",)  # for a GPU


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    if reason := cuda.why_unavailable():
        pytest.skip(f"{reason}: no PTX of the CUDA kernels")
    return Path(pytestconfig.cache.mkdir("ptx"))


@pytest.fixture(scope="module")
def kernels(cache: Path) -> PtxKernels:
    return cuda.load(cache)


def run(kernels: PtxKernels, check: Check, seed: int = 0) -> Simulator:
    simulator = Simulator(seed)
    kernels.launches.clear()
    with running(kernels, simulator):
        row = outcome(check, torch.device("cpu"), None)
    assert row["status"] == "ok", row["why"]
    assert simulator.launches.keys() <= set(check.kernels)
    assert {(device, stream, threads) for device, stream, _, threads in kernels.launches} == {(DEVICE, STREAM, 256)}
    return simulator


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.kernels(*CHECKS[n].kernels, ran="simulator")) for n in SHORT]
)
def test_a_check_by_nvccs_ptx(kernels: PtxKernels, name: str) -> None:
    run(kernels, CHECKS[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in (*SHORT, *TOO_MANY)])
def test_every_check_by_nvccs_ptx(kernels: PtxKernels, name: str) -> None:
    run(kernels, CHECKS[name], seed=1)


THREADS = 96
FAULTS = {
    "missing_block_barrier": "race: read of what another thread wrote",
    "missing_warp_barrier": "race: read of what another thread wrote",
    "write_after_read": "race: write over what another thread reads",
    "off_by_one": "outside every live tensor, 384 of 384 bytes of out",
    "shared_off_by_one": "outside the 384 bytes of shared memory",
    "divergent_barrier": "a barrier that only threads 0 to 39 of a block reach",
    "divergent_shuffle": "wait for others of their warp that never come",
    "unwritten_shared": "shared memory read where nothing wrote it",
    "racing_blocks": "two blocks write the same byte of out",
    "misaligned": "global access of 16 bytes that is not aligned",
}


@pytest.fixture(scope="module")
def faulty(cache: Path) -> PtxKernels:
    return PtxKernels([HERE / "faults.cu"], cache)


def rotate(faulty: PtxKernels, name: str, *, fault: bool, seed: int = 0) -> Tensor:
    inputs, out = torch.arange(2.0 * THREADS), torch.zeros(2 * THREADS)
    used = 2 * THREADS if name in ("write_after_read", "warp_sums") else THREADS
    faulty.simulator = Simulator(seed)
    faulty.spans = [("in", inputs.data_ptr(), inputs.nbytes, None), ("out", out.data_ptr(), 4 * used, None)]
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (inputs, out))
    assert faulty.call("run_fault", name.encode(), int(fault), *addresses) == 0
    return out


@pytest.mark.parametrize(("name", "says"), FAULTS.items(), ids=FAULTS)
def test_a_fault_in_the_source_is_seen_in_what_nvcc_makes_of_it(faulty: PtxKernels, name: str, says: str) -> None:
    rotate(faulty, name, fault=False)
    with pytest.raises(FaultError, match=says):
        rotate(faulty, name, fault=True)


def test_shuffles_add_up_a_warp(faulty: PtxKernels) -> None:
    sums = torch.arange(float(THREADS)).view(3, 32).sum(1).repeat_interleave(32)
    assert torch.equal(rotate(faulty, "warp_sums", fault=False), torch.cat([sums, sums]))


def unseen(kernels: PtxKernels, names: tuple[str, ...], kind: str) -> tuple[list[Instruction], int]:
    """Plant faults in what the first check executes; return those that none of them sees, and how many in all."""
    missed: dict[tuple[str, int], Instruction] = {}
    count = 0
    for name in names:
        programs: dict[str, Program] = {}
        before = Simulator(0, lambda p, found=programs: found.setdefault(p.name, p))  # type: ignore[misc]
        with running(kernels, before):
            assert outcome(CHECKS[name], torch.device("cpu"), None)["status"] == "ok"
        for program in programs.values():
            for fault in planted(program, (kind,)):
                place = program.name, fault.place
                if place not in before.executed or (name != names[0] and place not in missed):
                    continue
                changed = Simulator(
                    0,
                    lambda p, f=fault: f.program if p.name == f.program.name else p,  # type: ignore[misc]
                    most=4 * before.counts["instructions"],
                )
                with running(kernels, changed):
                    row = outcome(CHECKS[name], torch.device("cpu"), None)
                count += name == names[0]
                if row["status"] != "ok" or why_harmless(program, fault.place):
                    missed.pop(place, None)
                else:
                    missed[place] = program.code[fault.place]
    return list(missed.values()), count


@pytest.mark.parametrize(
    ("name", "allowed", "least"),
    [
        ("svag_step_ float32, l = 4", 0, 4),
        *(
            pytest.param(name, allowed, least, marks=pytest.mark.nightly)
            for name, allowed, least in (
                ("svag_step_ squares beyond float32", 2, 6),
                ("svag_replicas_step_ float32", 0, 8),
                ("svag_step_ under a scaler, float32", 0, 4),
                ("svag_step_per_sample_ float32, 5 and 33 samples, l = 4", 2, 6),
                ("svag_step_per_sample_ float64, 5 and 33 samples, l = 4", 0, 6),
            )
        ),
    ],
)
def test_every_barrier_is_needed(kernels: PtxKernels, name: str, allowed: int, least: int) -> None:
    missed, count = unseen(kernels, (name,), "barrier")
    assert len(missed) == allowed, missed
    assert count >= least


SELDOM = {"2", "7", "11", "768"}


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_bound_off_by_one_is_seen(kernels: PtxKernels, dtype: str) -> None:
    names = f"svag_step_ {dtype}, l = 4", "svag_step_ 500 tensors, mixed and unaligned"
    missed, count = unseen(kernels, names, "bound")
    assert {i.operands[-1] for i in missed} <= SELDOM, missed
    assert count >= 12
