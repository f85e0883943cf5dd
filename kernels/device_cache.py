"""Small tensors made from host values, kept on their device while the same values recur."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")


class DeviceCache(Generic[_T]):
    """At most ``most`` values by device and key; what a captured CUDA graph reads at its replays is never freed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[tuple[torch.device, Hashable], _T] = {}
        self._captured: dict[tuple[torch.device, Hashable], _T] = {}

    def get(self, device: torch.device, key: Hashable, make: Callable[[], _T], what: str) -> _T:
        """Return the value of ``key``, made where there is none.

        Raises:
            RuntimeError: a graph is being captured, which forbids copies from the host, and the value, ``what`` in
                words, is not on the device yet.
        """
        full_key = device, key
        capturing = is_capturing(device)
        # A graph reads this memory at each replay: it must outlive the cache.
        if capturing and full_key in self._kept:
            self._captured[full_key] = self._kept.pop(full_key)
        if full_key in self._captured:
            return self._captured[full_key]
        if full_key not in self._kept:
            if capturing:
                raise RuntimeError(
                    f"the triton backend can't capture a step on {what} it has not seen: run it once before the "
                    "capture on the same tensors with the same arguments, or use the cuda backend"
                )
            if len(self._kept) >= self.most:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # a stream may still be reading one
                self._kept.clear()
            self._kept[full_key] = make()
        return self._kept[full_key]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())
