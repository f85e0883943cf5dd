"""What every test runs under: one thread, new memory full of NaN, and no GPU test where there is no GPU."""

from __future__ import annotations

import os

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
    "test_experiments.py", "test_battery.py", "test_selftest.py", "test_cuda_step.py", "test_triton_interpreter.py",
    "test_triton_compile.py", "test_cuda_compile.py", "test_wheel.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # tests/gpu/conftest.py: the tests themselves are tried
    tried = os.environ.get("SVAG_TEST_DEVICE") == "cpu" and "device" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not tried and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
