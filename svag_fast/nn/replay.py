"""A model run again from the same state: buffers and random numbers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Replay:
    """What a forward pass changes in a model and in torch's generators, to be put back.

    Modules' attributes are put back too (a counter, a kept state). Not seen are what a forward changes inside of them,
    tensors' own values excepted, and random numbers from elsewhere than torch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (
                module,
                dict(module._buffers),
                {k: b.detach().clone() for k, b in module._buffers.items() if b is not None},
            )
            for module in model.modules()
            if module._buffers
        ]
        self._attributes = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
        kept = [x for _, before in self._attributes for x in before.values() if isinstance(x, Tensor)]
        self._kept = [(x, x._version, x.detach().clone()) for x in kept]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def rewind(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for module, own, values in self._buffers:
                module._buffers.clear()
                module._buffers.update(own)
                for name, value in values.items():
                    buffer = own[name]
                    assert buffer is not None
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for x, version, value in self._kept:
                if x._version != version:
                    x.copy_(value)
        for attributes, before in self._attributes:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def rewound(model: nn.Module) -> Iterator[Replay]:
    """Context whose end puts a model's buffers and the generators back, whatever happens inside."""
    replay = Replay(model)
    try:
        yield replay
    finally:
        replay.rewind()


@contextmanager
def randomised(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Context in which a model's parameters are moved by half of their size: a dependence may hide behind zeros, such
    as a residual branch's that starts with weight 0. Each seed moves them to another place."""
    generator = torch.Generator("cpu").manual_seed(seed)
    before = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    try:
        for p, data in before:
            fan_in = max(1, data.numel() // max(1, len(data) if data.dim() else 1))
            spread = max(float(data.abs().mean().nan_to_num()) if data.numel() else 0.0, fan_in**-0.5) / 2
            draw = torch.randn(data.shape, generator=generator, dtype=torch.float64, device="cpu")
            p.data = data + spread * draw.to(data)
        torch.clear_autocast_cache()  # keeps what it has cast of the same parameter
        yield
    finally:
        for p, data in before:
            p.data = data
        torch.clear_autocast_cache()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors with a first dimension in what a module takes or returns."""
    if isinstance(value, Tensor):
        return [value] if value.dim() > 0 else []
    return [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.dim() > 0]


def differ(a: Tensor, b: Tensor, noise: float = 0.0) -> bool:
    """Whether any entry differs by more than rounding, nan being equal to nan."""
    if a.numel() == 0:
        return False
    apart = (a != b) & ~((a != a) & (b != b))
    if noise > 0:
        apart &= ~((a - b).abs() <= noise)
    return bool(apart.any())
