"""The nets and batches that the tests of the context of per-sample norms share, and what a model looks like."""

import torch
from torch import nn


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def image_batch(size=4):
    return randn(size, 2, 6, 6), torch.arange(size) % 3


class Block(nn.Module):
    """A transformer block with tied in- and output embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1 = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2 = nn.RMSNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.mlp(self.norm2(x)))


def block():
    torch.manual_seed(0)
    return Block()


def mlp():
    return nn.Sequential(nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def modes(model):
    return [(dict(m.__dict__), dict(m._parameters), dict(m._forward_hooks)) for m in model.modules()]


def same_modes(before, after):
    for (d1, p1, h1), (d2, p2, h2) in zip(before, after, strict=True):
        assert d1.keys() == d2.keys()
        assert all(p1[k] is p2[k] for k in p1)
        assert h1 == h2
