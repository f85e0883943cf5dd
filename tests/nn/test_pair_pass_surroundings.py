"""`pair_pass` under what people train with: loss scaling, autocast, checkpoints, the compiler, several processes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import SVAG, pair_pass

B = 4
WAYS = pytest.mark.parametrize("way", ["joint", "halves"])


class Net(nn.Module):
    """Convolution, BatchNorm and a linear layer, the first two recomputed in the backward pass where asked."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(64, 3)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            x = self.stem(x)
        else:
            x = checkpoint(self.stem, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return self.last(x.flatten(1))


def net(*args, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(*args).to(dtype)


def batches(dtype=torch.float64):
    return torch.randn(2 * B, 2, 6, 6, dtype=dtype), torch.arange(2 * B) % 3


def losses(out, y):
    return F.cross_entropy(out, y, reduction="none")


def two_passes(model, optimizer, x, y, scale=lambda loss: loss, **autocast):
    optimizer.zero_grad()
    for half in (slice(None, B), slice(B, None)):
        with torch.autocast("cpu", **(autocast or {"enabled": False})):
            loss = F.cross_entropy(model(x[half]), y[half])
        scale(loss).backward()
        if half.start is None:
            optimizer.hold_gradient()


def assert_same(model, expected, rtol=1e-9, atol=1e-12):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=rtol, atol=atol, msg=name)


@WAYS
@pytest.mark.parametrize("l", [1, 3])
def test_a_grad_scaler_scales_both_and_skips_where_either_overflows(way, l):
    model, expected = net(), net()
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=l) for m in (model, expected))
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100) for _ in range(2))
    if l == 1:
        expected.stem[1].track_running_stats = False  # compared without them
    for step in range(5):
        x, y = batches()
        weight = torch.ones(2 * B, dtype=torch.float64)
        if step in (2, 3):
            weight[B if step == 3 else 0] = torch.inf  # in the first batch, then in the second
        with pair_pass(model, optimizer, way=way) as pair:
            pair.backward(scaler.scale(losses(model(x), y) * weight))
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        for half in (slice(None, B), slice(B, None)):
            other.scale((losses(expected(x[half]), y[half]) * weight[half]).mean()).backward()
            if half.start is None:
                reference.hold_gradient()
        other.step(reference)
        other.update()
        assert scaler.get_scale() == other.get_scale()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert scaler.get_scale() == 2.0


@WAYS
def test_unscaling_both_before_clipping(way):
    model, expected = net(), net()
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2))
    x, y = batches()
    with pair_pass(model, optimizer, way=way) as pair:
        pair.backward(scaler.scale(losses(model(x), y)))
    two_passes(expected, reference, x, y, other.scale)
    for o, s in ((optimizer, scaler), (reference, other)):
        o.unscale_(s)
    torch.testing.assert_close(optimizer.clip_grad_norm_(0.1), reference.clip_grad_norm_(0.1))
    scaler.step(optimizer)
    other.step(reference)
    assert_same(model, expected)


@WAYS
def test_autocast(way):
    model, expected = net(dtype=torch.float32), net(dtype=torch.float32)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    for _ in range(2):
        x, y = batches(torch.float32)
        with pair_pass(model, optimizer, way=way) as pair:
            with torch.autocast("cpu", torch.bfloat16):
                out = losses(model(x), y)
            pair.backward(out)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        two_passes(expected, reference, x, y, dtype=torch.bfloat16)
        stats, known = optimizer.step(), reference.step()
        torch.testing.assert_close(stats.raw, known.raw, rtol=5e-2, atol=1e-3)
        assert_same(model, expected, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_autocast_of_every_convolution(dims):
    """The weight stays float32 where the layer's rows are bfloat16."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 3, 2), nn.Tanh(), conv(3, 2, 2), nn.Flatten())
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    x = torch.randn(2 * B, 2, *(4,) * dims)
    expected = []
    for half in x.split(B):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(half)
        loss = out.float().square().mean(1).mean()
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
    for _ in range(2):  # the first pass is looked at, and goes another way
        with pair_pass(model, optimizer, way="joint") as pair:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            pair.backward(out.float().square().mean(1))
        got = optimizer._pair.first(), [p.grad for p in model.parameters()]
        for ours, plain in zip(got, expected, strict=True):
            for a, b in zip(ours, plain, strict=True):
                assert (a - b).norm() <= 0.03 * b.norm()
        optimizer.discard_gradient()


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(way, dtype):
    model = net(dtype=dtype)
    x, y = batches(dtype)
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    with pair_pass(model, optimizer, way=way) as pair:
        pair.backward(losses(model(x), y))
    exact = net()
    reference = SVAG(exact.parameters(), lr=0.1, l=2)
    two_passes(exact, reference, x.double(), y)
    torch.testing.assert_close(optimizer.step().raw[:3], reference.step().raw[:3], rtol=0.1, atol=1e-2)


@pytest.mark.parametrize(("way", "reentrant"), [("joint", False), ("halves", False), ("halves", True)])
@pytest.mark.parametrize("l", [1, 3])
def test_checkpoints_give_the_same_and_count_no_batch_twice(way, reentrant, l):
    model, expected = net(reentrant), net()
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=l) for m in (model, expected))
    for _ in range(2):
        x, y = batches()
        with pair_pass(model, optimizer, way=way) as pair:
            pair.backward(losses(model(x.clone()), y))
        if l == 1:
            before = {k: v.clone() for k, v in expected.named_buffers()}
            expected(x[:B])
            counted = {k: v.clone() for k, v in expected.named_buffers()}
            for k, v in before.items():
                expected.get_buffer(k).copy_(v)
        two_passes(expected, reference, x, y)
        if l == 1:
            for k, v in counted.items():
                expected.get_buffer(k).copy_(v)
        torch.testing.assert_close(optimizer.step().raw, reference.step().raw, rtol=1e-9, atol=1e-12)
        assert_same(model, expected)


@WAYS
def test_channels_last(way):
    model, expected = net().to(memory_format=torch.channels_last), net()
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2, momentum=0.9) for m in (model, expected))
    for _ in range(2):
        x, y = batches()
        with pair_pass(model, optimizer, way=way) as pair:
            pair.backward(losses(model(x.contiguous(memory_format=torch.channels_last)), y))
        two_passes(expected, reference, x, y)
        torch.testing.assert_close(optimizer.step().raw, reference.step().raw, rtol=1e-9, atol=1e-12)
        assert_same(model, expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_models_go_by_halves_and_stay_compiled(how):
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    model, expected = net(), net()
    whole = model
    if how == "wrapped":
        whole = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model.stem = torch.compile(model.stem, backend=backend)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    for k in range(2):
        x, y = batches()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pair_pass(whole, optimizer) as pair:
                pair.backward(losses(whole(x), y))
        assert pair.way == "halves"
        assert sum("is compiled" in str(w.message) for w in caught) == (k == 0)
        two_passes(expected, reference, x, y)
        torch.testing.assert_close(optimizer.step().raw, reference.step().raw)
        for p, q in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q)
    assert len(calls) == 4
    torch.compiler.reset()


def test_two_processes_of_distributed_data_parallel():
    """Each with half of either batch: the step is that of one process with all of both."""
    script = Path(__file__).with_name("pair_pass_in_two_processes.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same") == 2
