"""What the runs of `svag-fast weak` say: the order of each test function at each time, and of all together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svag_fast.files import replace_file
from svag_fast.stats.weak_order import WeakOrder, bootstrap_means, common_slope, weak_order

DRAWS = 500


@dataclass(frozen=True)
class WeakReport:
    """Orders by time (in effective steps) and test function.

    Attributes:
        orders: (time, function) -> what its means say.
        common: slope and 95 % interval of all of them together; nan where it can't be told.
        runs: l -> how many.
        diverged: l -> how many diverged; such levels are left out.
    """

    orders: dict[tuple[int, str], WeakOrder]
    common: tuple[float, float, float]
    runs: dict[float, int]
    diverged: dict[float, int]

    @property
    def answer(self) -> str:
        """The answer in one sentence."""
        slope, low, high = self.common
        if math.isnan(slope):
            return (
                "The order of weak convergence cannot be told: too few levels differ from the limit by more than noise."
            )
        end = "has -1 in it" if low <= -1 <= high else "does not have -1 in it"
        return f"All test functions together: slope {slope:.2f}, 95 % interval {low:.2f} to {high:.2f}. It {end}."

    def to_dict(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain values for summary.json; None where a number can't be told."""
        names = ("slope", "low", "high")
        return {
            "settings": dict(settings),
            "answer": self.answer,
            "common": dict(zip(names, map(_plain, self.common), strict=True)),
            "levels": [{"l": l, "runs": n, "diverged": self.diverged[l]} for l, n in self.runs.items()],
            "functions": [
                {
                    "effective_step": time,
                    "function": name,
                    "reason": order.reason,
                    **{key: _plain(getattr(order, key)) for key in ("limit", "limit_error", "a", "a_error")},
                    **{key: _plain(getattr(order, key)) for key in ("b", "b_error", *names)},
                    "levels": [
                        {
                            "l": float(order.ls[i]),
                            "mean": _plain(order.means[i]),
                            "standard_error": _plain(order.errors[i]),
                            "difference": _plain(order.differences[i]),
                            "difference_error": _plain(order.difference_errors[i]),
                            "fitted": bool(order.fitted[i]),
                            "regime": bool(order.regime[i]),
                        }
                        for i in range(len(order.ls))
                    ],
                }
                for (time, name), order in self.orders.items()
            ],
        }

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        with replace_file(path) as file:
            file.write(json.dumps(self.to_dict(settings), indent=1, allow_nan=False).encode() + b"\n")


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def weak_report(
    values: Mapping[float, NDArray[np.float64]], times: Sequence[int], functions: Sequence[str], *, seed: int = 0
) -> WeakReport:
    """Judge runs.

    Args:
        values: l -> [times, functions, runs]; a run that is nan anywhere diverged, and its level is left out: the mean
            of those that stayed would be another one.
        times: effective steps.
        functions: names.
        seed: of the bootstrap.
    """
    diverged = {l: int((~np.isfinite(x)).any(axis=(0, 1)).sum()) for l, x in values.items()}
    used = [l for l in values if not diverged[l]]
    ls = np.array(used, dtype=float)
    orders = {}
    if used:
        data = [values[l] for l in used]
        drawn = bootstrap_means(data, DRAWS, seed)
        means = np.stack([x.mean(-1) for x in data], axis=-1)
        errors = np.stack([x.std(-1, ddof=1) / math.sqrt(x.shape[-1]) for x in data], axis=-1)
        orders = {
            (time, name): weak_order(ls, means[t, f], errors[t, f], drawn[:, t, f])
            for t, time in enumerate(times)
            for f, name in enumerate(functions)
        }
    return WeakReport(
        orders, common_slope(list(orders.values())), {l: x.shape[-1] for l, x in values.items()}, diverged
    )
