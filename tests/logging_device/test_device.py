"""The device computes what the CPU does, logs what a GPU would launch and wait for, and runs backward in its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from logging_device.device import Device
from torch import Tensor, nn

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("do", "launches", "synchronisations"),
    [
        (lambda x: x * 2, 1, 0),
        (lambda x: x.add_(1), 1, 0),
        (lambda x: x.T[1:], 0, 0),
        (lambda x: x.clone(), 1, 0),
        (lambda x: torch.zeros_like(x), 1, 0),
        (lambda x: torch.empty_like(x).zero_(), 1, 0),
        (lambda x: x.sum(), 1, 0),
        (lambda x: x.sum().item(), 1, 1),
        (lambda x: x.cpu(), 0, 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 0, 1),
        (lambda x: X.to(x.device, non_blocking=True), 1, 0),
        (lambda x: x[[0, 2]], 1, 1),
        (lambda x: x[x > 0], 3, 1),
        (lambda x: bool((x == x).all()), 2, 1),
        (lambda x: torch.equal(x, x + 0), 2, 1),
        (lambda x: torch._foreach_mul_([x, x.clone()], 2.0), 2, 0),
        (lambda x: torch._foreach_mul_([x, x.clone()], torch.ones((), device=x.device, dtype=x.dtype)), 3, 0),
        # CUDA's fast way is for a factor of the list's dtype.
        (lambda x: torch._foreach_mul_([x, x.clone()], torch.ones((), device=x.device, dtype=torch.float64)), 4, 0),
        (lambda x: nn.functional.group_norm(x[..., None], 1), 1, 0),
        (lambda x: nn.functional.conv1d(x[None], x[None, :, :1]), 1, 0),
    ],
)
def test_an_op_is_logged_as_a_gpu_would_see_it(
    device: Device, do: Callable[[Tensor], Any], launches: int, synchronisations: int
) -> None:
    x = X.to("logged")
    with device.log() as log:
        result = do(x)
    assert (log.launches, log.synchronisations) == (launches, synchronisations), log.summary()
    if isinstance(result, Tensor):
        assert torch.equal(result.cpu(), do(X.clone()).cpu())


def test_gradients_are_the_cpus_and_are_made_in_the_devices_thread(device: Device) -> None:
    threads: dict[str, int] = {}
    grads = []
    for name in ("cpu", "logged"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        torch.manual_seed(0)
        for p in net.parameters():
            nn.init.normal_(p)
        net.to(name)
        loss = net(X.flatten()[:8].repeat(4).view(2, 1, 4, 4).to(name)).square().sum()
        loss.register_hook(lambda _, name=name: threads.update({name: threading.get_ident()}))
        loss.backward()
        grads.append([p.grad.cpu() for p in net.parameters() if p.grad is not None])
    for g, h in zip(*grads, strict=True):
        torch.testing.assert_close(g, h)
    assert threads["cpu"] == threading.get_ident() != threads["logged"]


def test_a_tensor_stays_on_its_device(device: Device) -> None:
    x = X.to("logged:1")
    assert (x + x).sum().device == torch.zeros((), device="logged:1").device == torch.device("logged", 1)
    assert x.to("logged:0").device.index == 0
