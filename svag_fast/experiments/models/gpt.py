"""A small decoder of tokens, in GPT-2's form and in one that is scale-invariant."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.experiments.models.layers import NORM_EPS

HEADS = 4
PLAIN_STD = 0.02  # GPT-2's


def _norm(width: int, plain: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-5 if plain else NORM_EPS, elementwise_affine=plain)


class CausalAttention(nn.Module):
    """Each position looks at itself and those before it.

    In the scale-invariant form queries and keys are normalised, since a softmax of products that grow with the weights
    is not invariant. What is attended to is normalised before the last layer, so that the branch grows as the weights
    do, like the stream that it is added to.
    """

    def __init__(self, width: int, plain: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=plain)
        self.qk_norm = nn.Identity() if plain else _norm(width // HEADS, plain)
        self.norm = nn.Identity() if plain else _norm(width, plain)
        self.out = nn.Linear(width, width, bias=plain)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        attended = F.scaled_dot_product_attention(self.qk_norm(q), self.qk_norm(k), v, is_causal=True)
        out: Tensor = self.out(self.norm(attended.transpose(1, 2).flatten(2)))
        return out


class Block(nn.Module):
    """Attention and a layer four times as wide, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, plain: bool) -> None:
        super().__init__()
        self.norm1 = _norm(width, plain)
        self.attention = CausalAttention(width, plain)
        self.norm2 = _norm(width, plain)
        self.up = nn.Linear(width, 4 * width, bias=plain)
        # GELU is not homogeneous, so that its input must not grow with the weights.
        self.up_norm = nn.Identity() if plain else _norm(4 * width, plain)
        self.down = nn.Linear(4 * width, width, bias=plain)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up_norm(self.up(self.norm2(x)))))
        return out


class GPT(nn.Module):
    """See :func:`gpt`."""

    head: Tensor | nn.Linear

    def __init__(self, layers: int, width: int, vocabulary: int, context: int, plain: bool, tied: bool) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, plain) for _ in range(layers)))
        self.norm = _norm(width, plain)
        if plain:
            self.head = nn.Linear(width, vocabulary, bias=False)
            if tied:
                self.head.weight = self.token.weight
        else:
            self.register_buffer("head", torch.empty(vocabulary, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T], int64."""
        if tokens.dim() != 2 or tokens.shape[1] > self.context:
            raise ValueError(f"tokens must be [B, T] with T at most {self.context}, got {list(tokens.shape)}")
        # A row for each sample, made of the samples: pair_pass takes both batches at once.
        positions = torch.ones_like(tokens).cumsum(1) - 1
        x = self.norm(self.blocks(self.token(tokens) + self.position(positions)))
        logits: Tensor = F.linear(x, self.head) if isinstance(self.head, Tensor) else self.head(x)
        return logits


def gpt(
    layers: int = 2,
    width: int = 32,
    *,
    plain: bool = False,
    tied: bool = False,
    vocabulary: int,
    context: int,
    generator: torch.Generator,
) -> nn.Module:
    """A decoder: embeddings of tokens and positions, blocks of causal attention with 4 heads, LayerNorm, a head.

    The plain form has GPT-2's layers, biases and initial weights: N(0, 0.02²), those that end a branch divided by
    sqrt(2 layers). Its head has no bias. In the scale-invariant form the head is fixed, N(0, 2 / width), as are the
    linear layers at first; embeddings are N(0, 1).

    Args:
        layers: blocks.
        width: features of a token, a multiple of 4, at least 12.
        plain: the form.
        tied: whether the head is the embedding of the tokens; of the plain form alone, since it is trained.
        vocabulary: number of tokens.
        context: the longest sequence.
        generator: draws the initial weights.

    Raises:
        ValueError: a width or a number that it can't have, or tied without plain.
    """
    if width < 3 * HEADS or width % HEADS:
        raise ValueError(f"width must be a multiple of {HEADS}, at least {3 * HEADS}, for GPT, got {width}")
    for name, value in (("layers", layers), ("vocabulary", vocabulary), ("context", context)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if tied and not plain:
        raise ValueError("tied must be of the plain form, got the scale-invariant one, whose head is not trained")
    model = GPT(layers, width, vocabulary, context, plain, tied)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    ends = {id(module) for block in blocks for module in (block.attention.out, block.down)}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=PLAIN_STD if plain else 1.0, generator=generator)
        elif isinstance(module, nn.Linear) and module.weight is not model.token.weight:
            shrunk = 1 / math.sqrt(2 * layers) if id(module) in ends else 1.0
            std = PLAIN_STD * shrunk if plain else math.sqrt(2 / module.in_features)
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(model.head, Tensor):
        nn.init.normal_(model.head, std=math.sqrt(2 / width), generator=generator)
    return model
