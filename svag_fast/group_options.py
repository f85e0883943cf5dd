"""A param group's numbers: its options as they are checked, and the clocks that count its steps."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from svag_fast.ops.checks import check_nonnegative

CLOCKS = ("steps", "effective_steps", "effective_steps_lost", "time", "time_lost")


def check_number(name: str, value: Any) -> None:
    """Refuse what is neither a real number nor a tensor of one element, as a string from a configuration file."""
    if type(value) in (float, int) or isinstance(value, numbers.Real):
        return
    if isinstance(value, Tensor) and value.numel() == 1:
        return
    raise TypeError(f"Invalid {name}: {value!r} (expected a number, not {type(value).__name__})")


def learning_rate(group: dict[str, Any], *, read: bool = False) -> float | None:
    """Return the group's learning rate; None where only a captured step's kernel reads it, unless ``read``."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but its shape is {list(lr.shape)}")
        if group.get("capturable") and lr.device.type != "cpu" and not read:
            return None
    check_number("learning rate", lr)
    value = float(lr)
    check_nonnegative("learning rate", value)
    return value


def start_clocks(group: dict[str, Any]) -> None:
    """Give the group the clocks that it lacks; ``_lost`` is what rounding the sums has lost (Kahan)."""
    for name in ("steps", "time"):
        group.setdefault(name, 0 if name == "steps" else 0.0)
    group.setdefault("effective_steps", group["steps"] / group["l"])  # before it was summed
    for name in ("effective_steps_lost", "time_lost"):
        group.setdefault(name, 0.0)
    if group.get("capturable"):  # a replayed graph reads lr and counts on
        device = group["params"][0].device
        for name in ("lr", *CLOCKS):
            if not isinstance(group[name], Tensor):
                group[name] = torch.tensor(float(group[name]), dtype=torch.float64, device=device)


def count(group: dict[str, Any], taken: Any, time: Any) -> None:
    """Add a step to the clocks, the sums compensated (Kahan): exact to about an ulp after any number of steps.

    Args:
        group: the param group.
        taken: 1, or a 0-d float64 tensor that is 0 where the step was skipped.
        time: the step's own.
    """
    new = {"steps": group["steps"] + taken}
    for name, lost, term in (
        ("effective_steps", "effective_steps_lost", taken / group["l"]),
        ("time", "time_lost", taken * time),
    ):
        term = term + group[lost]
        new[name] = group[name] + term
        new[lost] = term - (new[name] - group[name])
    if not group.get("capturable"):
        group.update(new)
        return
    for name, value in new.items():
        group[name].copy_(value)
