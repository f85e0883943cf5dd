"""From a tensor to the address of its values: every address that a compiled kernel is given is taken here.

A tensor's address need not hold its values: the negative bit says that they are the opposite of what is there, a
storage may have been freed (FSDP does so between uses), a meta or fake tensor never had one. What is only read is
copied where that helps (:func:`resolved`); the rest is refused, before any kernel runs.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Below are null plus any tensor's offset in its storage, and the heap of few programs.
_SOMEWHERE_LOW = 1 << 40


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor has values at all: a meta or fake one has a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def resolved(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds the values: itself, or a copy of a negated view or a zero tensor."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def address(tensor: Tensor, name: str) -> int:
    """Return where the tensor's values are.

    Raises:
        ValueError: they are nowhere, or what is there is not the values; it names the tensor.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise ValueError(f"{name} must be a tensor with memory, got one on meta or fake, which has no values")
    if tensor.is_conj() or tensor.is_neg():
        check_bits(tensor, name)
    try:
        place = tensor.data_ptr()
    except RuntimeError as error:  # a tensor inside vmap or grad, or another that wraps tensors
        raise ValueError(
            f"{name} must be a tensor with memory of its own, got none ({str(error).splitlines()[0]})"
        ) from error
    if place < _SOMEWHERE_LOW:
        check_allocated(tensor, name)
    return place


def check_allocated(tensor: Tensor, name: str) -> None:
    """Refuse a tensor whose storage was freed, which PyTorch's own operations would read or write out of bounds."""
    if tensor.numel() and has_memory(tensor) and tensor.untyped_storage().data_ptr() == 0:
        raise ValueError(f"{name} must be a tensor with memory, got {tensor.numel()} elements whose storage was freed")


def check_bits(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is the negative of what is in memory, where it can't be copied."""
    if tensor.is_conj():
        raise TypeError(f"{name} must be of real numbers, got a conjugated view of {tensor.dtype}")
    if tensor.is_neg():
        raise ValueError(
            f"{name} must be a tensor with memory of its own, as resolve_neg() makes, got a view of negated values "
            "(is_neg() is True), as the imaginary part of a conjugate is"
        )


def addresses(tensors: Sequence[Tensor], name: str) -> list[int]:
    """Return where each tensor's values are; see :func:`address`."""
    return [address(t, f"{name}[{i}]") for i, t in enumerate(tensors)]


class Span(NamedTuple):
    """The memory that a tensor takes."""

    start: int
    end: int
    name: str
    tensor: Tensor


Spans = tuple[list[Span], list[Span], list[Span]]  # of what a step writes, and of each batch's gradients


def spans(tensors: Iterable[Tensor], name: str, of: str = "") -> list[Span]:
    """Return where each tensor is, of those that have memory, with its name, which ``of`` ends."""
    return [
        Span(start := t.data_ptr(), start + (t.nbytes if t.is_contiguous() else _extent(t)), f"{name}[{i}]{of}", t)
        for i, t in enumerate(tensors)
        if has_memory(t) and t.numel()
    ]


def _extent(t: Tensor) -> int:
    elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return elements * t.element_size()


def check_apart(
    written: Iterable[Span],
    read: Sequence[Span] = (),
    other: Sequence[Span] = (),
    *,
    elementwise: bool = True,
) -> None:
    """Refuse what is written where it shares memory with another tensor, and two batches' gradients that share it.

    Args:
        written: dense tensors.
        read: what the step reads; of a step of two batches the first one's gradients.
        other: the second one's: in the same memory as the first's they would be one batch's.
        elementwise: each element is read before it is written, so a read tensor may be a written one itself (a
            gradient that is its own param).
    """
    listed = list(written)
    written = sorted(listed, key=lambda span: span[:2])
    for first, second in itertools.pairwise(written):
        if second[0] < first[1]:
            one, two = (span.name for span in sorted((first, second), key=listed.index))
            raise ValueError(f"{two} must be in memory of its own, got some of {one}'s")
    starts = [span.start for span in written]
    for start, end, name, _ in itertools.chain(read, other):
        last = bisect.bisect_left(starts, end) - 1  # no other reaches as far
        if last >= 0 and written[last].end > start and not (elementwise and written[last][:2] == (start, end)):
            raise ValueError(
                f"{name} must be apart from {written[last].name}, which the step writes, got shared memory"
            )
    for first, second in _overlapping(read, other):
        # Slices of one tensor may be interleaved in memory without an element in common.
        if np.shares_memory(_Bytes.of(first.tensor), _Bytes.of(second.tensor)):
            raise ValueError(
                f"{second.name} must be in memory of its own, as a second batch's gradient is, got some of "
                f"{first.name}'s"
            )


def _overlapping(first: Sequence[Span], second: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """Yield the pairs of the two lists of which one begins before the other ends."""
    reach = [0, 0]
    for start, end, kind in sorted([*((s[0], s[1], 0) for s in first), *((s[0], s[1], 1) for s in second)]):
        if start < reach[1 - kind]:
            break
        reach[kind] = max(reach[kind], end)
    else:  # as a rule
        return
    reached: tuple[list[Span], list[Span]] = ([], [])  # those that may reach on
    for span, kind in sorted([*((s, 0) for s in first), *((s, 1) for s in second)], key=lambda item: item[0].start):
        for other in reached[1 - kind]:
            if other.end > span.start:
                yield (other, span) if kind else (span, other)
        reached[kind][:] = [s for s in reached[kind] if s.end > span.start]
        reached[kind].append(span)


class _Bytes:
    """A tensor's place in memory, on any device, as NumPy's array interface tells it; nobody looks there."""

    def __init__(self, t: Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(t.shape),
            "strides": tuple(s * size for s in t.stride()),
            "typestr": f"|V{size}",
            "data": (t.data_ptr(), True),
        }

    @staticmethod
    def of(t: Tensor) -> Any:
        return np.asarray(_Bytes(t))


mark_written = torch.autograd.graph.increment_version
"""Let autograd know that a kernel writes these."""
