"""What every test runs under: one thread, new memory full of NaN, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest_plugins = ["kernel_coverage"]

# torch's own sums depend on the number of threads, and with two of them a busy machine makes a small net's step
# ten times slower. A test of threads asks for its own.
torch.set_num_threads(1)

# torch.empty gives NaN (the greatest value for integers), so an output that nobody wrote shows.
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)


# `make test` hands whole files to its workers in this order: what takes longest first, so that they end together.
LONGEST = (
    "test_training.py", "test_suite.py", "test_selftest.py", "test_cuda_step.py", "test_triton_interpreter.py",
    "test_triton_compile.py", "test_cuda_compile.py", "test_logging_device.py", "test_wheel.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # tests/gpu/conftest.py: the tests themselves are tried
    tried = os.environ.get("SVAG_TEST_DEVICE") == "cpu" and "device" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not tried and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
