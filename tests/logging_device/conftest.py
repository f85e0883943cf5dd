"""These tests need the device, for good: tests/test_logging_device.py runs them in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from logging_device.device import LIBRARY, Device
from logging_device.kernels import as_a_gpu

collect_ignore_glob = [] if LIBRARY else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> Device:
    # What tests/conftest.py asks for makes PyTorch fill new memory and choose other ops.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    return Device(Path(LIBRARY))


@pytest.fixture
def gpu(device: Device) -> Iterator[Device]:
    """The device, served by the package's GPU backends."""
    pytest.importorskip("triton", reason="triton is not installed")
    with as_a_gpu(device):
        yield device
