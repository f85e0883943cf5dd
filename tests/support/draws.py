"""What the tests of the ops draw, and how they compare: dtypes, seeded normals, copies, bits, closeness in scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of params and gradients: every pair that the step serves.
DTYPES = [(F32, F32), (F64, F64), (F64, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]


def normals(dtype: torch.dtype, seed: int, shapes: Iterable[Sequence[int]], scale: float = 1.0) -> list[Tensor]:
    """Normal numbers times ``scale``, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(tuple(s), generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same_bits(*lists: Sequence[Tensor]) -> bool:
    """Whether all the lists hold the same values, tensor by tensor."""
    return all(torch.equal(a, b) for other in lists[1:] for a, b in zip(lists[0], other, strict=True))


def close(ours: Tensor, exact: Tensor, relative: float = 1e-12) -> None:
    """Assert that no element is off by more than ``relative`` times the largest one."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours, exact, rtol=0, atol=relative * scale)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two lists, in float64."""
    return sum(float((s.double() * t.double()).sum()) for s, t in zip(a, b, strict=True))
