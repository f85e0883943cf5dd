"""Who calls ``step()``, where its arguments don't say it and much depends on it: read from the Python stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor

_STATE_DICTS = "torch.distributed.checkpoint.state_dict"


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


def only_makes_state() -> bool:
    """Whether torch.distributed.checkpoint steps, to have the state made before it is saved or loaded.

    It does so with ``lr`` 0 and gradients of zeros, as a training step may well be.
    """
    return _STATE_DICTS in sys.modules and any(f.f_globals.get("__name__") == _STATE_DICTS for f in _frames())


def tell_scaler(finite: Tensor) -> None:
    """Tell the GradScaler whose step this is that the held gradient overflowed: it looks at ``.grad`` alone.

    Without synchronising. A GradScaler hands its optimizer nothing by which it could be told.

    Args:
        finite: 0-d, 0 where a gradient had an inf or nan, else 1.
    """
    for frame in _frames():
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler, optimizer = frame.f_locals["self"], frame.f_locals["optimizer"]
            for found in scaler._found_inf_per_device(optimizer).values():
                found += (1 - finite).to(found.device, non_blocking=True)
            return
