"""Small models for the tests of replicas, each with inputs: [B, ...] of one replica, drawn by a generator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svag_fast.experiments.models import digits_net

B = 3


class Residual(nn.Module):
    """What a user's own forward does with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(1, 4, 6))
        self.mix = nn.Parameter(torch.randn(6, 5))
        self.register_buffer("offset", torch.randn(()))

    def forward(self, x):
        y = x + self.inner(x) * self.scale
        y = self.shift - y / (self.scale * torch.ones_like(y) + 3)
        return (torch.tanh(y) + self.offset) @ self.mix


class Tied(nn.Module):
    """A table of embeddings that is the output layer's weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, index):
        return self.out(torch.tanh(self.table(index)))


class Attends(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        ignored = torch.zeros(x.shape[:2], dtype=torch.bool)
        ignored[:, -1] = True
        out, shares = self.attention(
            x, x.cos(), x.sin(), attn_mask=mask, key_padding_mask=ignored, need_weights=self.need_weights
        )
        return out if shares is None else (out, {"shares": shares})


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Replaces(nn.Module):
    """A buffer that the forward pass sets again, as no stacked form can."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x):
        self.seen = self.seen * 0.9 + x.detach().mean(0)
        return self.lin(x) - self.seen


class Centred(nn.Module):
    """A user's own coupling of samples."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        y = self.lin(x)
        return y - y.mean(0)


class WholeLoss(nn.Module):
    """An output without samples."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 2)

    def forward(self, x):
        return self.lin(x).square().mean()


class Net(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    high: int | None = None

    def inputs(self, *lead: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.high is not None:
            return torch.randint(self.high, (*lead, *self.shape), generator=generator)
        return torch.randn(*lead, *self.shape, generator=generator, dtype=torch.float64)

    def model(self) -> nn.Module:
        """With every parameter drawn by the default generator, those of normalisations too."""
        model = self.build().double()
        with torch.no_grad():
            for module in model.modules():
                for p in module.parameters(recurse=False):
                    if p.dim() < 2:
                        p.add_(torch.randn_like(p) * 0.3)
        return model


def seq(*parts: Any) -> Callable[[], nn.Module]:
    """A Sequential of modules and of functions that make them."""
    return lambda: nn.Sequential(*(part() for part in parts))


f = functools.partial
NETS: dict[str, Net] = {
    "mlp": Net(seq(f(nn.Linear, 6, 5), f(nn.LayerNorm, 5), nn.GELU, f(nn.Linear, 5, 3, bias=False)), (6,)),
    "linear of rows": Net(seq(f(nn.Linear, 6, 4), f(nn.RMSNorm, 4), f(nn.PReLU, 1)), (5, 6)),
    "norm without bias": Net(seq(f(nn.LayerNorm, [2, 6], bias=False), f(nn.Linear, 6, 2)), (2, 6)),
    "conv2d": Net(
        seq(f(nn.Conv2d, 2, 4, 3, stride=2, padding=1), f(nn.GroupNorm, 2, 4), nn.ReLU,
            f(nn.Conv2d, 4, 6, (1, 3), groups=2, dilation=(1, 2), padding="same", bias=False), f(nn.MaxPool2d, 2),
            nn.Flatten, f(nn.Linear, 24, 3)), (2, 8, 7)),
    "conv1d": Net(
        seq(f(nn.Conv1d, 2, 4, 3, padding=1, padding_mode="circular"), f(nn.BatchNorm1d, 4), f(nn.PReLU, 4),
            f(nn.ConvTranspose1d, 4, 2, 3, stride=2, output_padding=1)), (2, 5)),
    "conv3d": Net(seq(f(nn.Conv3d, 1, 2, 2), f(nn.BatchNorm3d, 2, affine=False), nn.Tanh), (1, 3, 3, 3)),
    "batch norm": Net(seq(f(nn.Linear, 6, 5, bias=False), f(nn.BatchNorm1d, 5), nn.ReLU, f(nn.Linear, 5, 2)), (6,)),
    "cumulative batch norm": Net(seq(f(nn.BatchNorm1d, 6, momentum=None), f(nn.Linear, 6, 2)), (6,)),
    "untracked batch norm": Net(
        seq(f(nn.Conv2d, 1, 3, 3), f(nn.BatchNorm2d, 3, track_running_stats=False), nn.ReLU), (1, 5, 5)),
    "digits net": Net(lambda: digits_net(generator=torch.Generator().manual_seed(torch.initial_seed())), (1, 8, 8)),
    "own parameters": Net(Residual, (4, 6)),
    "tied": Net(Tied, (5,), 7),
    "attention": Net(f(Attends, False), (4, 8)),
    "attention weights": Net(f(Attends, True), (4, 8)),
    "transformer": Net(
        f(nn.TransformerEncoderLayer, 8, 2, 12, dropout=0.0, batch_first=True), (4, 8)),
    "frozen": Net(lambda: nn.Sequential(nn.Linear(6, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 2)), (6,)),
    "checkpointed": Net(lambda: Checkpointed(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)), (6,)),
}  # fmt: skip
"""Served by the stacked engine."""

VMAP_ONLY: dict[str, tuple[Net, str]] = {
    "no form": (
        Net(f(nn.InstanceNorm1d, 2, affine=True), (2, 5)),
        r"instance_norm\(bias, weight\) has no stacked form",
    ),
    "no form inside": (
        Net(seq(f(nn.Linear, 6, 6), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), (6,)),
        r"1\.parametrizations\.weight\.original",
    ),
    "coupled samples": (Net(Centred, (6,)), "its own forward couples samples"),
    "batch norm without tensors": (
        Net(seq(f(nn.Linear, 6, 6), f(nn.BatchNorm1d, 6, affine=False, track_running_stats=False)), (6,)),
        "1 is a BatchNorm1d without",
    ),
    "replaced buffer": (Net(Replaces, (6,)), "seen"),
    "no samples in the output": (Net(WholeLoss, (6,)), "no batch of 3 replicas|outputs"),
}
