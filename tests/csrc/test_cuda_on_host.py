"""The harness that runs CUDA kernels on the host catches every planted fault, and lets sound kernels pass."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_host.backend import KERNEL_SOURCES
from cuda_on_host.build import HERE, CudaOnHostError, HostKernels, asan_environment, build
from torch import Tensor

THREADS = 96
ORDERS = ["forward", "reversed", "shuffled"]

# Planted fault: what the report must say.
FAULTS = {
    "missing_block_barrier": "race on shared memory",
    "missing_warp_barrier": "race on shared memory",
    "write_after_read": "race on shared memory",
    "divergent_barrier": "threads 40-95 have ended",
    "divergent_shuffle": "divergence",
    "unwritten_shared": "shared memory read before it is written",
    "racing_blocks": "race on global memory",
    "misaligned": "misaligned access: 16 bytes",
}
OUT_OF_BOUNDS = {"off_by_one": "heap-buffer-overflow", "shared_off_by_one": "index 96 out of bounds"}


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.cache.mkdir("cuda_on_host"))


@pytest.fixture(scope="module")
def kernels(cache: Path) -> HostKernels:
    return HostKernels(build([HERE / "faults.cu"], "race", cache))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def run(kernels: HostKernels, name: str, *, fault: bool) -> Tensor:
    inputs, out = torch.arange(2.0 * THREADS), torch.zeros(2 * THREADS)
    assert kernels.run("run_fault", name.encode(), int(fault), address(inputs), address(out)) == 0
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "says"), FAULTS.items(), ids=FAULTS)
def test_a_planted_fault_is_reported_with_its_place(kernels: HostKernels, name: str, says: str, order: str) -> None:
    kernels.set_order(order, seed=3)
    with pytest.raises(CudaOnHostError, match=says) as caught:
        run(kernels, name, fault=True)
    assert "tests/cuda_on_host/faults.cu:" in str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*FAULTS, *OUT_OF_BOUNDS])
def test_the_sound_form_of_a_planted_fault_passes(kernels: HostKernels, name: str, order: str) -> None:
    kernels.set_order(order, seed=3)
    run(kernels, name, fault=False)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_add_up_a_warp(kernels: HostKernels, order: str) -> None:
    kernels.set_order(order, seed=3)
    sums = torch.arange(float(THREADS)).view(3, 32).sum(1).repeat_interleave(32)
    assert torch.equal(run(kernels, "warp_sums", fault=False), torch.cat([sums, sums]))


def test_barriers_make_the_result_the_same_in_every_order(kernels: HostKernels) -> None:
    expected = torch.arange(float(THREADS)).roll(-32)
    for order in ORDERS:
        kernels.set_order(order, seed=5)
        assert torch.equal(run(kernels, "missing_block_barrier", fault=False)[:THREADS], expected)


OUT_OF_BOUNDS_PROGRAM = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
inputs, out = (ctypes.c_void_p(libc.malloc(ctypes.c_size_t(96 * 4))) for _ in range(2))
print("status", library.run_fault(sys.argv[2].encode(), int(sys.argv[3]), inputs, out))
"""


THROWING = """
extern "C" int caught() {
    try { throw 1; } catch (int value) { return value; }
}
"""


def test_a_library_may_throw_under_the_sanitizer_in_a_process_that_began_without_cpp(tmp_path: Path) -> None:
    """As Triton does where the CUDA build of torch imports it."""
    (tmp_path / "throwing.cpp").write_text(THROWING)
    library = tmp_path / "throwing.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "throwing.cpp", "-o", library], check=True)
    command = [sys.executable, "-S", "-c", "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).caught())", str(library)]
    result = subprocess.run(command, env=os.environ | asan_environment(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize(("name", "says"), OUT_OF_BOUNDS.items(), ids=OUT_OF_BOUNDS)
def test_address_sanitizer_sees_an_access_out_of_bounds(cache: Path, name: str, says: str, fault: bool) -> None:
    library = build([HERE / "faults.cu"], "address", cache)
    command = [sys.executable, "-S", "-c", OUT_OF_BOUNDS_PROGRAM, str(library), name, str(int(fault))]
    result = subprocess.run(command, env=os.environ | asan_environment(), capture_output=True, text=True, check=False)
    if fault:
        assert result.returncode != 0
        assert says in result.stderr
    else:
        assert (result.returncode, result.stdout) == (0, "status 0\n"), result.stderr


def test_conversions_of_16_bit_types_are_torchs_own(kernels: HostKernels) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    half, bfloat = torch.empty(65536), torch.empty(65536)
    kernels.library.convert_to_float(address(bits), address(half), address(bfloat), 65536)
    assert torch.equal(half.nan_to_num(7e7), bits.view(torch.float16).float().nan_to_num(7e7))
    assert torch.equal(bfloat.nan_to_num(7e7), bits.view(torch.bfloat16).float().nan_to_num(7e7))

    # Every float16, the midpoints between neighbours, and what is just beside them.
    finite = half[half.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    nearby = [middles.nextafter(torch.tensor(s)) for s in (-torch.inf, torch.inf)]
    values = torch.cat([finite, middles, *nearby, bfloat[bfloat.isfinite()], torch.randn(10_000) * 1e5])
    halves, bfloats = (torch.empty(len(values), dtype=torch.int16).view(torch.uint16) for _ in range(2))
    kernels.library.convert_from_float(address(values), address(halves), address(bfloats), len(values))
    assert torch.equal(halves.view(torch.int16), values.half().view(torch.int16))
    assert torch.equal(bfloats.view(torch.int16), values.bfloat16().view(torch.int16))


# Without the tests that touch the memory that others touch, with other values in it or in another order.
OTHER_VALUES = "not order_of_blocks and not one_ulp and not schedule and not beyond_float32 and not never_reaches"


@pytest.mark.kernels("step_kernel", "finish_kernel", "per_sample_step_kernel", "finish_norms_kernel", ran="host")
@pytest.mark.timeout(900)  # half a minute alone, but much more where other work shares the cores
def test_no_kernel_accesses_out_of_bounds(cache: Path) -> None:
    """The kernels' own tests once more, in a process where AddressSanitizer watches every access."""
    build(KERNEL_SOURCES, "address", cache)  # not under the sanitizer
    files = sorted(Path(__file__).parent.glob("test_cuda_step*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", OTHER_VALUES, *map(str, files)]
    environment = os.environ | asan_environment() | {"SVAG_TEST_CUDA": "address"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
