"""The range of every number that comes from outside, and the error for a setting that is none of its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from svag_fast.numeric import integer, number, shown


class ConfigError(ValueError):
    """A setting is wrong: the message names it, what it was and what was expected."""


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; `whole` ones are integers. ``value in range`` takes any object."""

    least: float
    most: float
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        try:
            if self.whole:
                return self.least <= integer("value", value) <= self.most
            number("value", value, least=self.least, most=self.most)
        except (TypeError, ValueError):
            return False
        return True

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        least, most = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        if self.most >= 1e300:
            return f"a finite number of at least {least}" if self.least > -1e300 else "a finite number"
        return f"{kind} from {least} to {most}"


# Of every number that comes from outside, by its name: wide, but nothing in them takes for ever or fills a disk alone.
RANGES = {
    "batch_size": Range(1, 1_000_000, whole=True),
    "lr": Range(1e-12, 1e12),
    "weight_decay": Range(0, 1e6),
    "label_noise": Range(0, 1),
    "l": Range(1, 1e6),
    "seed": Range(0, 2**63 - 1, whole=True),
    "seeds": Range(1, 10_000, whole=True),
    "effective_steps": Range(1, 1_000_000_000, whole=True),
    "epochs": Range(1e-6, 1e6),
    "steps": Range(1, 10_000_000_000, whole=True),
    "threads": Range(1, 1024, whole=True),
    "jobs": Range(1, 1024, whole=True),
    "replicas": Range(1, 10_000, whole=True),
    "stat_every": Range(1, 1_000_000_000, whole=True),
    "rows": Range(1, 100_000, whole=True),
    "evaluations": Range(1, 100_000, whole=True),
    "checkpoint_seconds": Range(0, math.inf),
    "depth": Range(1, 2000, whole=True),
    "width": Range(0.1, 100),
}


def check_range(name: str, value: Any) -> Any:
    """Return a value as a plain number; refuse one that is out of its `RANGES`.

    Raises:
        ConfigError: the message names it, what it was and what was expected.
    """
    check(value in RANGES[name], name, value, str(RANGES[name]))
    return value.item() if hasattr(value, "item") else value  # NumPy's and PyTorch's own can't be written as JSON


def check(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise a ConfigError that names the setting unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {shown(value)}")


def settle(asked: Callable[[], object]) -> None:
    """Raise what the call finds wrong as a ConfigError."""
    try:
        asked()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_numbers(name: str, values: Any) -> tuple[Any, ...]:
    """Return a list of numbers, each in its range; but for learning rates none twice."""
    check(isinstance(values, tuple) and len(values) > 0, name, values, "a number or a list of numbers")
    checked = tuple(check_range(name, value) for value in values)
    distinct = {f"{value:g}" if name == "l" else value for value in checked}  # as in the runs' names
    check(name == "lr" or len(distinct) == len(checked), name, values, "a list without repetition")
    return checked
