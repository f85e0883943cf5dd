"""How far from the limit still counts as the same: one margin a metric, in its own units or as a part of its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

METRICS = ("test_accuracy", "test_loss")  # what the verdict is about, unless something else is asked for


@dataclass(frozen=True)
class Margin:
    """A distance that does not matter: ``size`` in the metric's units, or ``size`` times the metric's level.

    >>> Margin.parse("0.02").at(0.9), Margin.parse("10%").at(0.5)
    (0.02, 0.05)
    """

    size: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.size) and self.size > 0):
            raise ValueError(f"a margin must be positive and finite, got {self.size}")

    @classmethod
    def parse(cls, text: str) -> Margin:
        """Read ``0.02`` or ``10%``; raise ValueError where it is neither."""
        number = text.strip().removesuffix("%")
        try:
            size = float(number if number.isascii() and "_" not in number else "")  # float() reads 1_0 as 10
        except ValueError:
            raise ValueError(f"a margin must be a number such as 0.02, or 10%, got {text.strip()!r}") from None
        return cls(size / 100, relative=True) if text.strip().endswith("%") else cls(size)

    def at(self, level: float) -> float:
        """Return the margin in the metric's units where the metric has this ``level``."""
        return self.size * abs(level) if self.relative else self.size

    def __str__(self) -> str:
        return f"{100 * self.size:g} %" if self.relative else f"{self.size:g}"


def choose_margins(metrics: Sequence[str], given: Mapping[str, Margin]) -> dict[str, Margin]:
    """Return each metric's margin: the one given, or 0.02 for an accuracy (two points) and 10 % for anything else.

    Raises:
        ValueError: no metric, or a margin for a metric that is not judged.
    """
    if not metrics:
        raise ValueError("metrics must be one column or more, got none")
    if unknown := sorted(set(given) - set(metrics)):
        raise ValueError(f"margins must be for metrics that are judged, {', '.join(metrics)}, got {', '.join(unknown)}")
    # An accuracy has a scale of its own. A loss may have any level, so its margin is a part of it.
    points, part = Margin(0.02), Margin(0.1, relative=True)
    return {metric: given.get(metric, points if metric.endswith("accuracy") else part) for metric in metrics}
