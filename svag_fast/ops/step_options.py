"""The scalars of an SVAG step: checked once, where they are set, and as the kernels read them."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from svag_fast.kernels.device_cache import DeviceCache
from svag_fast.ops.checks import check_decay, check_held, check_l, check_momentum, check_step_scalars

MomentumRule: TypeAlias = Literal["time", "fixed"]


def svag_coefficients(l: float) -> tuple[float, float]:
    """Return SVAG's ``(c1, c2) = (1 ± sqrt(2l - 1)) / 2``: they sum to 1, and their squares to ``l``.

    Source: Li, Malladi, Arora (NeurIPS 2021), equation 5.

    Raises:
        TypeError: ``l`` is not a number.
        ValueError: ``l`` is not a finite number >= 1, or above 2^1022.

    >>> svag_coefficients(1)
    (1.0, 0.0)
    >>> svag_coefficients(5)
    (2.0, -1.0)
    """
    root = math.sqrt(2 * check_l(l) - 1)
    return (1 + root) / 2, (1 - root) / 2


class StepOptions(NamedTuple):
    """A step's options, checked."""

    lr: float
    l: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    momentum_rule: str = "time"
    maximize: bool = False

    @classmethod
    def checked(
        cls,
        lr: float,
        l: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        momentum_rule: str = "time",
        maximize: bool = False,
    ) -> StepOptions:
        """Refuse what is no number or out of range; see :func:`svag_fast.ops.svag_step_`."""
        lr, l, weight_decay = check_step_scalars(lr, l, weight_decay)
        momentum = check_momentum(momentum, momentum_rule, l)
        return cls(lr, l, weight_decay, momentum, momentum_rule, bool(maximize))

    def check_held(self, params: Sequence[Tensor]) -> None:
        """Refuse options that the params' arithmetic can't hold."""
        check_held(self.lr, self.l, self.weight_decay, params)
        if self.momentum != 0 and self.momentum_rule == "time":
            check_decay("momentum", self.momentum, self.l, params)


class StepScalars(NamedTuple):
    """A step's scalars as the kernels read them, in this order; the step is ``lr / divisor`` of the direction."""

    lr: float
    divisor: float
    c1: float
    c2: float
    weight_decay: float
    momentum64: float
    """μ_l for float64 params."""
    momentum32: float
    """μ_l for all others, from the float32 that is nearest μ; not rounded itself: near 1 that changes 1 - μ_l."""


HostScalars: TypeAlias = tuple[float, float, float, float, float, float]


def step_scalars(
    lr: float,
    l: float,
    weight_decay: float,
    momentum: float = 0.0,
    momentum_rule: str = "time",
    maximize: bool = False,
) -> StepScalars:
    """Return the scalars of a step with these options; they must have been checked."""
    c1, c2 = svag_coefficients(l)
    if maximize:
        c1, c2 = -c1, -c2
    if momentum == 0:
        return StepScalars(lr, l, c1, c2, weight_decay, 0.0, 0.0)
    momentum32 = ctypes.c_float(momentum).value
    if momentum_rule == "fixed" or l == 1:
        return StepScalars(lr, l, c1, c2, weight_decay, momentum, momentum32)
    return StepScalars(lr, l * l, c1, c2, weight_decay, 1 - (1 - momentum) / l, 1 - (1 - momentum32) / l)


def step_coefficients(
    lr: float,
    l: float,
    weight_decay: float,
    device: torch.device,
    *,
    momentum: float = 0.0,
    momentum_rule: MomentumRule = "time",
    maximize: bool = False,
) -> Tensor:
    """Return :func:`step_scalars`, float64 on ``device``, for ``svag_step_(coefficients=...)``."""
    scalars = step_scalars(lr, l, weight_decay, momentum, momentum_rule, maximize)
    return torch.tensor(scalars, dtype=torch.float64, device=device)


def check_coefficients(coefficients: Tensor, device: torch.device) -> None:
    """Refuse what :func:`step_coefficients` doesn't return for params on the device."""
    if coefficients.dtype != torch.float64 or coefficients.shape != (7,) or not coefficients.is_contiguous():
        raise ValueError(
            "coefficients must be what step_coefficients returns, got a tensor of "
            f"{coefficients.dtype} and shape {list(coefficients.shape)}"
        )
    if coefficients.device != device:
        raise ValueError(f"coefficients must be on {device}, as params[0] is, got one on {coefficients.device}")


def host_scalars(scalars: StepScalars) -> HostScalars:
    """Return ``rate, c1, c2, weight_decay, momentum64, momentum32``."""
    return scalars.lr / scalars.divisor, *scalars[2:]


@functools.lru_cache(64)
def options_scalars(options: StepOptions) -> HostScalars:
    """Return the options as :func:`host_scalars` does; kept, as a schedule sets each rate many steps long."""
    return host_scalars(step_scalars(*options))


_COEFFICIENTS: DeviceCache[Tensor] = DeviceCache(64)


def constant_coefficients(scalars: StepScalars | tuple[StepScalars, ...], device: torch.device) -> Tensor:
    """Return scalars as a tensor, a row for each of several; kept on the device, as a schedule sets each rate long."""

    def make() -> Tensor:
        return torch.tensor(scalars, dtype=torch.float64, device=device)

    kept: Tensor = _COEFFICIENTS.get(device, scalars, make, "coefficients")
    return kept
