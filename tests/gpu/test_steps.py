"""svag_step_ among streams, devices and captured graphs, by each backend; its values are held by test_checks.py."""

from __future__ import annotations

import pytest
import torch
from draws import clones, same_bits
from torch import Tensor

from svag_fast import SVAG
from svag_fast.ops import svag_step_

pytestmark = pytest.mark.gpu

SHAPES = [(0,), (1,), (), (3,), (17, 5), (1023,), (4097,), (8193,), (8, 3, 3, 3)]
OPTIONS = {"lr": 0.3, "weight_decay": 0.02}


def draw(dtype: torch.dtype, seed: int, device: torch.device, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Two roundings of the same value: to the arithmetic's eps, then to the param's dtype."""
    for a, b in zip(ours, theirs, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=eps, atol=8 * min(eps, torch.finfo(torch.float32).eps))


def test_a_step_waits_for_what_its_stream_holds(device: torch.device, backend: str) -> None:
    """Were it launched on the default stream, it would read the gradients before they are there."""
    if device.type == "cpu":
        pytest.skip("needs streams")
    start, grads1, grads2 = (draw(torch.float32, seed, device, [(5000,)]) for seed in range(3))
    params, expected, late = clones(start), clones(start), [torch.zeros_like(g) for g in grads1]
    svag_step_(params, late, grads2, l=2, backend=backend, **OPTIONS)  # compiled, and its table on the device
    params[0].copy_(start[0])
    svag_step_(expected, grads1, grads2, l=2, backend="reference", **OPTIONS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late[0].copy_(grads1[0])
        svag_step_(params, late, grads2, l=2, backend=backend, **OPTIONS)
    torch.cuda.synchronize()
    assert_close(params, expected)


def test_tensors_on_another_device_than_the_current_one(device: torch.device, backend: str) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    params, grads1, grads2 = (draw(torch.float32, seed, other) for seed in range(3))
    expected = clones(params)
    stats = svag_step_(params, grads1, grads2, l=2, backend=backend, **OPTIONS)
    svag_step_(expected, grads1, grads2, l=2, backend="reference", **OPTIONS)
    assert_close(params, expected)
    assert stats.raw.device == other
    assert torch.cuda.current_device() == 0


def six_steps(device: torch.device, backend: str, *, capturable: bool, replay: bool) -> tuple[list[Tensor], float]:
    """Six steps on fixed gradients, lr halved after each; the last three by replaying a graph where asked."""
    params = [torch.nn.Parameter(p) for p in draw(torch.float32, 0, device)]
    grads1, grads2 = (draw(torch.float32, seed, device) for seed in (1, 2))
    optimizer = SVAG(params, 0.3, l=4, weight_decay=0.02, capturable=capturable, backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step() -> None:
        for p, g in zip(params, grads1, strict=True):
            p.grad = g
        optimizer.hold_gradient()
        for p, g in zip(params, grads2, strict=True):
            p.grad = g
        optimizer.step()

    for _ in range(3):
        step()
        schedule.step()
    take_step = step
    if replay:
        graph = torch.cuda.CUDAGraph()
        before, counts = clones([p.detach() for p in params]), (optimizer.effective_steps, optimizer.time)
        with torch.cuda.graph(graph):
            step()
        assert same_bits(before, params), "capturing runs nothing"
        assert counts == (optimizer.effective_steps, optimizer.time)
        others = [draw(torch.float32, seed, device, [(3,)]) for seed in range(100)]
        for other in others:  # more lists than are remembered: what the graph reads must stay
            svag_step_(other, clones(other), None, l=1, backend=backend, **OPTIONS)
        take_step = graph.replay
    for _ in range(3):
        take_step()
        schedule.step()
    return [p.detach() for p in params], optimizer.effective_steps


def test_a_captured_graph_follows_a_schedule(device: torch.device, backend: str) -> None:
    expected, _ = six_steps(device, backend, capturable=False, replay=False)
    params, effective_steps = six_steps(device, backend, capturable=True, replay=device.type == "cuda")
    assert same_bits(params, expected)
    assert effective_steps == 6 / 4
