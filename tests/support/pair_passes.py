"""What the tests of `pair_pass` share: a pair, the same as two passes, and how they are compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from svag_fast import pair_pass

B, CLASSES = 4, 3


def seeded(build):
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def images():
    return torch.randn(2 * B, 2, 6, 6, dtype=torch.float64)


def labels():
    return torch.arange(2 * B) % CLASSES


def two_passes(model, optimizer, x, y, *, step=True):
    """README's loop; at l = 1 the second batch only measures and leaves no trace in the buffers."""
    optimizer.zero_grad()
    B = len(x) // 2
    F.cross_entropy(model(x[:B]), y[:B]).backward()
    optimizer.hold_gradient()
    kept = {name: b.clone() for name, b in model.named_buffers()}
    F.cross_entropy(model(x[B:]), y[B:]).backward()
    if optimizer.l == 1:
        for name, value in kept.items():
            model.get_buffer(name).copy_(value)
    return optimizer.step() if step else None


def one_pass(model, optimizer, x, y, **how):
    with pair_pass(model, optimizer, **how) as pair:
        pair.backward(F.cross_entropy(model(x), y, reduction="none"))
    return pair


def assert_same_states(model, expected, atol=1e-12):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=atol, msg=name)


def assert_same_stats(stats, expected):
    torch.testing.assert_close(stats.raw, expected.raw, rtol=1e-9, atol=1e-12)
