"""What one call asks of a GPU: no copy from the host, which a CUDA graph forbids, and one launch for a whole list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from logging_device.device import Device
from torch import Tensor, nn

from svag_fast import SVAG
from svag_fast.ops import svag_replicas_step_, svag_weight_step_, weight_grad_and_sq_norms

SEGMENTS = [0, 1, 1, 0]


def layer() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 5, 5), (4, 6, 3, 3), (6, 3, 3, 3)
    inputs, output_grads, weight = (torch.randn(shape, generator=generator).to("logged") for shape in shapes)
    return inputs, output_grads, weight


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_a_weight_gradient_waits_for_nothing(gpu: Device, segments: list[int] | None) -> None:
    inputs, output_grads, weight = layer()

    def call() -> Any:
        return weight_grad_and_sq_norms(inputs, output_grads, weight.shape, segments=segments)

    call()  # a list of segments is kept on the device
    with gpu.log() as log:
        result = call()
    assert log.synchronisations == 0, log.summary()
    on_cpu = weight_grad_and_sq_norms(inputs.cpu(), output_grads.cpu(), weight.shape, segments=segments)
    for ours, theirs in zip(result, on_cpu, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_layer_s_step_reads_its_segments_back_once_and_a_list_never(gpu: Device, as_tensor: bool) -> None:
    inputs, output_grads, weight = layer()
    segments: Any = torch.tensor(SEGMENTS).to("logged") if as_tensor else SEGMENTS

    def call() -> Any:
        return svag_weight_step_(weight, inputs, output_grads, segments=segments, lr=0.1, l=4)

    call()
    with gpu.log() as log:
        call()
    assert log.synchronisations == as_tensor, log.summary()


def two_gradients(params: list[Tensor], scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    first, second = ([torch.randn(p.shape, generator=generator) * scale for p in params] for _ in range(2))
    return first, second


def step(params: list[nn.Parameter], optimizer: SVAG, scaler: torch.amp.GradScaler | None = None) -> None:
    scale = 1.0 if scaler is None else scaler.get_scale()
    first, second = two_gradients(params, scale)  # type: ignore[arg-type]
    for p, g in zip(params, first, strict=True):
        p.grad = g.to(p.device)
    optimizer.hold_gradient()
    for p, g in zip(params, second, strict=True):
        p.grad = g.to(p.device)


def test_a_step_under_a_scaler_has_no_pass_over_the_gradients_but_the_scaler_s_and_its_own(gpu: Device) -> None:
    params = [nn.Parameter(torch.ones(5, device="logged")) for _ in range(34)]
    optimizer = SVAG(params, lr=0.1, l=4)
    scaler = torch.amp.GradScaler("logged", init_scale=2.0**10)
    for _ in range(2):
        scaler.scale(torch.ones((), device="logged"))
        step(params, optimizer, scaler)
        with gpu.log() as log:
            scaler.step(optimizer)
            scaler.update()
    assert (log.launches, log.synchronisations) == (25, 0), log.summary()
    passes = [entry.name for entry in log if "foreach" in entry.name or "step_kernel" in entry.name]
    assert passes == ["aten::_amp_foreach_non_finite_check_and_unscale_", "cuda step_kernel", "cuda step_kernel"]
    plain = [nn.Parameter(torch.ones(5)) for _ in params]
    expected = SVAG(plain, lr=0.1, l=4)
    for _ in range(2):
        step(plain, expected)
        expected.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())


def test_a_step_of_many_replicas_asks_for_no_more_than_one_of_one(gpu: Device) -> None:
    launches = []
    for replicas, lr in ((1, 0.1), (16, [0.1 + s for s in range(16)])):
        params, grads1, grads2 = ([torch.ones(replicas, 5, device="logged") for _ in range(34)] for _ in range(3))
        for _ in range(2):  # the first brings addresses and rates to the device
            with gpu.log() as log:
                svag_replicas_step_(params, grads1, grads2, replicas=replicas, lr=lr, l=4)
        assert log.synchronisations == 0, log.summary()
        launches.append(log.launches)
    assert launches == [2, 2]


@pytest.mark.parametrize("scaled", [False, True])
def test_parameters_on_two_devices_take_one_step_with_the_statistics_of_both(gpu: Device, scaled: bool) -> None:
    stats, values = [], []
    for devices in (["cpu", "cpu"], ["logged:0", "logged:1"]):
        params = [nn.Parameter(torch.ones(5, device=devices[i % 2])) for i in range(4)]
        optimizer = SVAG(params, lr=0.1, l=4, weight_decay=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("logged", init_scale=2.0**10) if scaled and devices[0] != "cpu" else None
        for _ in range(2):
            if scaler is not None:
                scaler.scale(torch.ones((), device="logged:0"))
            step(params, optimizer, scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        assert optimizer.stats is not None
        stats.append(optimizer.stats.raw.cpu())
        values.append([p.detach().cpu() for p in params])
        assert optimizer.time == pytest.approx(2 * 0.1 / 4)
    torch.testing.assert_close(*stats)
    torch.testing.assert_close(*values)
