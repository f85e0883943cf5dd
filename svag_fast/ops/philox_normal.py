r"""Standard normals by counter: number (key, element, draw) is the same whoever asks for it, in whatever order.

The counter of Philox4x32-10 is ``(16 group + lane, draw mod 2^32, draw div 2^32, 0)``; its four words make four float32
or two float64 normals, elements ``16 j + lane`` of the group (which so holds 64 or 32 elements). Words (r, a) make

    sqrt(-2 log u) cos(phi),    sqrt(-2 log u) sin(phi),    phi = (pi/2) (q + t),

with u in (0, 1] from the upper 31 bits of r (float64: 52), q the upper two bits of a and t in [-1/2, 1/2] its others.
|z| is at most 6.66 (float64: 8.49), which a true normal exceeds with probability 3e-11 (2e-17).

Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box, Muller, "A note on the
generation of random normal deviates", Annals of Mathematical Statistics 29 (1958).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import integer, integers, tensor
from svag_fast.ops.memory import address, has_memory, mark_written

Key = tuple[int, int]

GROUP = 64
"""Blocks of elements must start at a multiple of this."""

_LANES = 16
_LOW = 0xFFFFFFFF
_LAST_ELEMENT = 2**33  # the counter's first word is full there, in float64


def philox_normal_(out: Tensor, *, key: Key, first: int = 0, draw: int = 0, backend: str = "auto") -> Tensor:
    """Fill `out` with the normals of elements ``first, first + 1, ...`` in draw `draw` of the stream `key`.

    Args:
        out: float32 or float64, contiguous, any shape; its elements count in memory order. A meta or fake tensor has
            no values, and none are made.
        key: two integers in [0, 2^32).
        first: a multiple of 64.
        draw: in [0, 2^64); different draws are independent.
        backend: a row of the table of backends.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: an argument is none of these.
        BackendError: the backend can't serve the call.
    """
    key, draw = check_stream(out, "out", key=key, draw=draw)
    first = integer("first", first)
    if first < 0 or first % GROUP or first + out.numel() > _LAST_ELEMENT:
        raise ValueError(
            f"first must be a multiple of {GROUP}, the last of {out.numel()} elements below 2^33, got {first}"
        )
    fill = select("philox_normal_", backend, [out])
    if has_memory(out):
        fill(out, key, first, draw)
        mark_written([out])
    return out


def check_stream(out: Tensor, name: str, *, key: Key, draw: int) -> tuple[Key, int]:
    """Return key and draw as integers; refuse those out of range, and what no stream of normals can be written to."""
    tensor(name, out, written=True)
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {out.dtype}")
    if out.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {out.layout}")
    if not out.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(out.stride())}")
    words, draw = integers("key", key), integer("draw", draw)
    if len(words) != 2 or not all(0 <= word < 2**32 for word in words):
        raise ValueError(f"key must be two integers in [0, 2^32), got {key}")
    if not 0 <= draw < 2**64:
        raise ValueError(f"draw must be an integer in [0, 2^64), got {draw}")
    return (words[0], words[1]), draw


def philox(counter: Tensor, key: Key) -> Tensor:
    """Philox4x32-10 of counters, int64 [..., 4] of words below 2^32: int64 of the same shape.

    >>> words = philox(torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]), (0xA4093822, 0x299F31D0))
    >>> [f"{w:08x}" for w in words.tolist()]
    ['d16cfe09', '94fdcceb', '5001e420', '24126ea1']
    """
    a, b, c, d = counter.unbind(-1)
    for r in range(10):
        p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57  # mod 2^64
        a, b, c, d = (
            (p1 >> 32) & _LOW ^ b ^ (key[0] + r * 0x9E3779B9) & _LOW,
            p1 & _LOW,
            (p0 >> 32) & _LOW ^ d ^ (key[1] + r * 0xBB67AE85) & _LOW,
            p0 & _LOW,
        )
    return torch.stack([a, b, c, d], dim=-1)


@implements("philox_normal_", "reference")
def _reference(out: Tensor, key: Key, first: int, draw: int) -> None:
    per_counter = 4 if out.dtype == torch.float32 else 2
    groups = -(-out.numel() // (_LANES * per_counter))
    index = first // per_counter + torch.arange(groups * _LANES, dtype=torch.int64, device=out.device)
    rest = torch.tensor([draw & _LOW, draw >> 32, 0], dtype=torch.int64, device=out.device)
    words = philox(torch.cat([index[:, None], rest.expand(len(index), 3)], dim=1), key)
    if out.dtype == torch.float32:
        radius, angle = words[:, 0::2], words[:, 1::2]
        u = (radius >> 1).float() * 2**-31 + 2**-32
        quadrant = angle >> 30
        low = (angle << 2) & _LOW
        t = (low - 2**32 * (low >> 31)).float() * 2**-32
    else:
        radius, angle = (words[:, k : k + 1] | words[:, k + 1 : k + 2] << 32 for k in (0, 2))
        u = 1 - ((radius >> 12) & (2**52 - 1)).double() * 2**-52
        quadrant = (angle >> 62) & 3
        t = (((angle << 2) >> 12) & (2**52 - 1)).double() * 2**-52 - 0.5
    length = (-2 * u.double().log()).sqrt()
    phi = math.pi / 2 * (quadrant + t.double())
    pairs = torch.stack([length * phi.cos(), length * phi.sin()], dim=-1)  # [counters, pairs, 2]
    by_group = pairs.reshape(groups, _LANES, per_counter).transpose(1, 2)
    out.copy_(by_group.reshape(-1)[: out.numel()].view(out.shape))


@implements("philox_normal_", "cpu")
def _cpu(out: Tensor, key: Key, first: int, draw: int) -> None:
    from svag_fast import _C

    _C.philox_normal(address(out, "out"), out.dtype == torch.float64, out.numel(), first, key, draw)
