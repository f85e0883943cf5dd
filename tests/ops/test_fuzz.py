"""Every op on seeded random shapes, dtypes, layouts and options against its formula in float64, written out here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops import (
    svag_adaptive_step_,
    svag_step_,
    svag_step_per_sample_,
    svag_weight_step_,
    weight_grad_and_sq_norms,
)

ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROUNDS = 24


class Dice:
    """One round's choices."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.random.choice((0, 1, 1, 2, 3, 5, 17, 130)) for _ in range(self.random.randrange(4)))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def read(self, t: Tensor) -> Tensor:
        """The same values, placed in memory in some other way."""
        way = self.random.randrange(8)
        if way == 0 and t.dtype in (torch.float32, torch.float64):
            return torch.complex(torch.zeros_like(t), -t).conj().imag
        if way == 1:
            return torch._neg_view(-t)
        if way == 2:
            return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        if way == 3 and t.dim() >= 2:
            return t.mT.contiguous().mT
        if way == 4 and t.dim() and t.shape[0] > 1:
            t[:] = t[:1].clone()
            return t[:1].expand(t.shape)
        if way == 5:
            return torch.cat([t.flatten()[:1], t.flatten()])[min(1, t.numel()) :].view(t.shape)
        if way == 6:
            return t.clone().requires_grad_()
        return t

    def written(self, t: Tensor) -> Tensor:
        """The same values, dense in memory."""
        way = self.random.randrange(4)
        if way == 0 and t.dim() >= 2:
            return t.mT.contiguous().mT
        if way == 1:
            return torch.cat([t.flatten()[:1], t.flatten()])[min(1, t.numel()) :].view(t.shape)
        return t


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = ROUNDING[dtype] * scale
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)


def raw_of(x: list[Tensor], g1: list[Tensor], g2: list[Tensor]) -> Tensor:
    def product(a: list[Tensor], b: list[Tensor]) -> float:
        return math.fsum(float((s * t).sum()) for s, t in zip(a, b, strict=True))

    return torch.tensor([product(g1, g1), product(g2, g2), product(g1, g2), product(x, x), 1.0], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_svag_step(backend: str) -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed)
        params, grads1, grads2, before = [], [], [], []
        for _ in range(dice.random.randrange(1, 5)):
            shape, dtype = dice.shape(), dice.random.choice(list(ROUNDING))
            grad_dtype = dice.random.choice((dtype, torch.float32))
            params.append(dice.written(dice.tensor(shape, dtype)))
            grads1.append(dice.read(dice.tensor(shape, grad_dtype)))
            grads2.append(dice.read(dice.tensor(shape, grad_dtype)))
            before.append([t.detach().double().clone() for t in (params[-1], grads1[-1], grads2[-1])])
        l, lr, decay = dice.random.choice((1, 1.5, 4, 64)), dice.random.random(), dice.random.random()
        stats = svag_step_(params, grads1, grads2, lr=lr, l=l, weight_decay=decay, backend=backend)
        root = math.sqrt(2 * l - 1)
        for p, (x, g1, g2) in zip(params, before, strict=True):
            combined = (1 + root) / 2 * g1 + (1 - root) / 2 * g2 + decay * x
            close(p, x - lr / l * combined, p.dtype, 4)
        x, g1, g2 = (list(ts) for ts in zip(*before, strict=True))
        torch.testing.assert_close(stats.raw, raw_of(x, g1, g2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_svag_adaptive_step(backend: str, adam: bool) -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed)
        shape, dtype = dice.shape(), dice.random.choice((torch.float32, torch.float64))
        plain = [dice.tensor(shape, dtype) for _ in range(5)]
        plain[4].square_()
        p = dice.written(plain[0])
        grads = [dice.read(t) for t in plain[1:3]]
        m, v = (torch.empty_like(p).copy_(t) for t in plain[3:])
        x, g1, g2, m0, v0 = (t.detach().double().clone() for t in (p, *grads, m, v))
        l, k = dice.random.choice((1, 2, 16)), dice.random.randrange(1, 9)
        rates = {"lr": 0.1, "l": l, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
        lists = [p], [grads[0]], [grads[1]], [m] if adam else None, [v]
        svag_adaptive_step_(*lists, steps=[k], **rates, backend=backend)
        root = math.sqrt(2 * l - 1)
        g = (1 + root) / 2 * g1 + (1 - root) / 2 * g2 + 0.1 * x
        b1, b2, lr, eps = 1 - 0.1 / l, 1 - 0.01 / l, 0.1 / math.sqrt(l), 1e-3 * math.sqrt(l)
        m1, v1 = b1 * m0 + (1 - b1) * g, b2 * v0 + (1 - b2) * g * g
        close(v, v1, dtype, 4)
        if adam:
            close(m, m1, dtype, 4)
            close(p, x - lr / (1 - b1**k) * m1 / (v1.sqrt() / math.sqrt(1 - b2**k) + eps), dtype, 40)
        else:
            close(p, x - lr * g / (v1.sqrt() + eps), dtype, 40)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_svag_step_per_sample(backend: str) -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed)
        dtype, B1, B2 = dice.random.choice((torch.float32, torch.float64)), *dice.random.choices((1, 2, 5), k=2)
        shapes = [dice.shape() for _ in range(dice.random.randrange(1, 4))]
        params = [dice.written(dice.tensor(s, dtype)) for s in shapes]
        grads = [[dice.read(dice.tensor((B, *s), dtype)) for s in shapes] for B in (B1, B2)]
        x, g1, g2 = ([t.detach().double().clone() for t in ts] for ts in (params, *grads))
        found = svag_step_per_sample_(params, *grads, lr=0.3, l=4, weight_decay=0.2, backend=backend)
        root = math.sqrt(7)
        means1, means2 = ([g.mean(0) for g in gs] for gs in (g1, g2))
        for p, a, b, y in zip(params, means1, means2, x, strict=True):
            close(p, y - 0.3 / 4 * ((1 + root) / 2 * a + (1 - root) / 2 * b + 0.2 * y), dtype, 4)
        for norms, gs in ((found.sq_norms1, g1), (found.sq_norms2, g2)):
            squares = [g.square().reshape(len(g), math.prod(g.shape[1:])).sum(1) for g in gs]
            close(norms, torch.stack(squares).sum(0), torch.float32, 4)
        torch.testing.assert_close(found.stats.raw, raw_of(x, means1, means2), rtol=1e-5, atol=1e-4)


def layer(dice: Dice) -> tuple[tuple[int, ...], Tensor, Tensor, dict[str, object], Callable[[Tensor], Tensor]]:
    """A layer: the weight's shape, inputs, output gradients, options and the map from a weight to the outputs."""
    pick, B = dice.random.choice, dice.random.choice((1, 2, 5, 9))
    dtype = pick((torch.float32, torch.float64))
    if dice.random.random() < 0.5:
        d, p, positions = pick((1, 3, 8, 20)), pick((1, 5, 33)), pick(((), (1,), (3,), (2, 2), (20,)))
        inputs = dice.read(dice.tensor((B, *positions, p), dtype))
        dy = dice.read(dice.tensor((B, *positions, d), dtype))
        x = inputs.detach().double()
        return (d, p), inputs, dy, {}, lambda w: F.linear(x, w)
    groups, kernel = pick((1, 1, 2)), (pick((1, 2, 3)), pick((1, 3)))
    options = {
        "stride": pick((1, 2, (1, 3))), "padding": pick((0, 1, (2, 0), 40)), "dilation": pick((1, 2)), "groups": groups,
    }  # fmt: skip
    shape = (groups * pick((1, 4)), pick((1, 3)), *kernel)
    inputs = dice.read(dice.tensor((B, groups * shape[1], pick((5, 8)), pick((5, 9))), dtype))
    if dice.random.random() < 0.5 and not inputs.is_neg():
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    x = inputs.detach().double()
    out = F.conv2d(x, torch.zeros(shape, dtype=torch.float64), **options)  # type: ignore[arg-type]
    dy = dice.read(dice.tensor(tuple(out.shape), dtype))
    return shape, inputs, dy, options, lambda w: F.conv2d(x, w, **options)  # type: ignore[arg-type]


def sample_grads(shape: tuple[int, ...], dy: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """By autograd, a sample at a time."""
    w = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = forward(w)
    dy = dy.detach().double()
    return torch.stack([torch.autograd.grad(y[i], w, dy[i], retain_graph=True)[0] for i in range(len(dy))])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weight_grad_and_sq_norms(backend: str) -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed)
        shape, inputs, dy, options, forward = layer(dice)
        B = len(inputs)
        weights = dice.read(dice.tensor((B,), torch.float64)) if dice.random.random() < 0.5 else None
        segments = [dice.random.randrange(3) for _ in range(B)] if dice.random.random() < 0.5 else None
        g = sample_grads(shape, dy, forward)
        found = weight_grad_and_sq_norms(
            inputs, dy, shape, weights=weights, segments=segments, backend=backend, **options  # type: ignore[arg-type]
        )  # fmt: skip
        w = torch.ones(B, dtype=torch.float64) if weights is None else weights.detach()
        weighted = g * w.view(-1, *[1] * len(shape))
        scale = 1 + float(g.abs().max())
        close(found.grad, weighted.sum(0), inputs.dtype, 4 * scale)
        norms = g.square().flatten(1).sum(1)
        torch.testing.assert_close(found.sq_norms, norms, rtol=1e-4, atol=1e-4 * float(norms.max()))
        if segments is not None:
            S = max(segments) + 1
            parts = torch.stack([weighted[[s == k for s in segments]].sum(0).flatten() for k in range(S)])
            gram = parts @ parts.T
            assert found.segment_gram is not None
            torch.testing.assert_close(found.segment_gram, gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_svag_weight_step(backend: str) -> None:
    for seed in range(ROUNDS):
        dice = Dice(seed)
        shape, inputs, dy, options, forward = layer(dice)
        if len(inputs) < 2:
            continue
        segments = [0, 1, *(dice.random.randrange(2) for _ in range(len(inputs) - 2))]
        weight = dice.written(dice.tensor(shape, inputs.dtype))
        x, g = weight.double().clone(), sample_grads(shape, dy, forward)
        g1, g2 = (g[[s == k for s in segments]].mean(0) for k in (0, 1))
        norms, stats = svag_weight_step_(
            weight, inputs, dy, segments=segments, lr=0.3, l=4, weight_decay=0.2, backend=backend, **options  # type: ignore[arg-type]
        )  # fmt: skip
        root = math.sqrt(7)
        scale = 1 + float(g.abs().max())
        close(weight, x - 0.3 / 4 * ((1 + root) / 2 * g1 + (1 - root) / 2 * g2 + 0.2 * x), inputs.dtype, 4 * scale)
        expected = g.square().flatten(1).sum(1)
        torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
        raw = raw_of([x], [g1], [g2])
        torch.testing.assert_close(stats.raw, raw, rtol=1e-4, atol=1e-4 * float(raw.abs().max()))
