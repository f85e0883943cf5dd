"""A param group's learning rate on a device, and the clocks that count its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svag_fast.numeric import number

_IMMUTABLE = frozenset({float, int, bool, str, type(None)})
CLOCKS = ("steps", "effective_steps", "effective_steps_lost", "time", "time_lost")


def on_device(group: dict[str, Any]) -> bool:
    """Whether only a captured step's kernel reads the group's learning rate."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and lr.device.type != "cpu" and bool(group.get("capturable"))


def is_immutable(value: Any) -> bool:
    """Whether the same object will always be the same value."""
    return type(value) in _IMMUTABLE or (type(value) is tuple and all(map(is_immutable, value)))


def takes_two_batches(group: dict[str, Any]) -> bool:
    """Whether a step needs a second batch's gradient."""
    l = group["l"]
    return not isinstance(l, int | float) or l != 1


def start_clocks(group: dict[str, Any]) -> None:
    """Give the group the clocks that it lacks; ``_lost`` is what rounding the sums has lost (Kahan)."""
    for name in ("steps", "time"):
        group.setdefault(name, 0 if name == "steps" else 0.0)
    if "effective_steps" not in group:  # before it was summed
        group["effective_steps"] = group["steps"] / group["l"] if group["steps"] else 0.0
    for name in ("effective_steps_lost", "time_lost"):
        group.setdefault(name, 0.0)
    if group.get("capturable"):  # a replayed graph reads lr and counts on
        device = group["params"][0].device
        for name in ("lr", *CLOCKS):
            if not isinstance(group[name], Tensor):
                group[name] = torch.tensor(float(group[name]), dtype=torch.float64, device=device)


def check_clocks(group: dict[str, Any]) -> None:
    """Refuse clocks of a loaded group that are no numbers, or not one of each replica, or out of range."""
    for name in CLOCKS:
        value = group.get(name, 0.0)
        of_each = isinstance(value, Tensor) and value.shape == (group.get("replicas"),)
        for each in value.tolist() if of_each else [value]:
            number(name, each, **({} if name.endswith("_lost") else {"least": 0}))


def as_clock(value: Any) -> Any:
    """Return a number as it is, one of each replica as float64 [S]."""
    return torch.tensor(value, dtype=torch.float64, device="cpu") if isinstance(value, tuple) else value


def read_clock(group: dict[str, Any], name: str) -> float:
    """Return a number of a param group.

    Raises:
        ValueError: the replicas have one of each.
    """
    value = group[name]
    if isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim() and len(value) > 1):
        raise ValueError(f"{name} must be one number for all replicas, got one of each: read param_groups[0][{name!r}]")
    return float(value)
