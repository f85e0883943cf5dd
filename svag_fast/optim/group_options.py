"""A param group's learning rate on a device, and the clocks that count its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLOCKS = ("steps", "effective_steps", "effective_steps_lost", "time", "time_lost")


def on_device(group: dict[str, Any]) -> bool:
    """Whether only a captured step's kernel reads the group's learning rate."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and lr.device.type != "cpu" and bool(group.get("capturable"))


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
