"""Is a loss scale-invariant in a net's trained parameters, and if not, which of them break it?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from svag_fast.nn.replay import Replay, randomised, rewound

TOLERANCE = 1e-3
# How many modules are looked for to blame together, in so many sets, of which so many are tried.
MOST_MODULES, MOST_SETS, MOST_TRIES = 3, 2_000_000, 8
POINTS = 4  # weights at which the gradients are looked at: the model's own, and moved ones
CANCELLED = 1e-2  # what is left of radial gradients that cancel, in units of the largest: rounding, and a norm's eps

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class BreakingParameter(NamedTuple):
    """A parameter that keeps a loss from being scale-invariant.

    Attributes:
        name: its name in the model.
        loss_change: |L(x, this one scaled by c) - L(x)| / |L(x)|.
        radial_gradient: <its gradient, itself> / (|grad L(x)| |x|), with its sign.
    """

    name: str
    loss_change: float
    radial_gradient: float


@dataclass(frozen=True)
class ScaleInvarianceReport:
    """How far a net's loss is from scale-invariant; each figure is relative, and rounding alone leaves some 1e-6.

    Attributes:
        loss_change: |L(c x) - L(x)| / |L(x)|.
        radial_gradient: |<grad L(x), x>| / (|grad L(x)| |x|).
        gradient_change: |c grad L(c x) - grad L(x)| / |grad L(x)|.
        breaking: empty where all three are within 1e-3. Else the parameters of the fewest modules, three at most, such
            that the loss does not change when all other parameters are scaled and these stay as they are; the first in
            the model where several would do. Where no three modules are enough: the parameters of every module whose
            scaling alone changes the loss.
    """

    loss_change: float
    radial_gradient: float
    gradient_change: float
    breaking: tuple[BreakingParameter, ...] = ()

    def holds(self, tolerance: float = TOLERANCE) -> bool:
        """Whether all three are within `tolerance` (False where one is not a number)."""
        return max(self.loss_change, self.radial_gradient) <= tolerance and self.gradient_change <= tolerance

    def __str__(self) -> str:
        figures = (
            f"loss change {self.loss_change:.2g}, radial gradient {self.radial_gradient:.2g}, "
            f"gradient change {self.gradient_change:.2g}"
        )
        if self.holds():
            return f"scale-invariant: {figures}"
        lines = [
            f"  {p.name}: loss change {p.loss_change:.2g} when scaled alone, radial gradient {p.radial_gradient:+.2g}"
            for p in self.breaking
        ]
        return "\n".join([f"not scale-invariant: {figures}; broken by", *lines])


def scale_invariance_report(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, loss: Loss = nn.functional.cross_entropy, scale: float = 3.0
) -> ScaleInvarianceReport:
    """Measure L(c x) = L(x), <grad L(x), x> = 0 and grad L(c x) = grad L(x) / c on one batch, and say what breaks it.

    Args:
        model: its trained parameters are x. It is copied, not changed, and runs in the mode that it is in; random
            layers draw the same numbers each time.
        inputs: [B, ...] one batch.
        targets: what the loss compares the outputs with.
        loss: of the model's outputs and the targets; the mean of what it returns is L. Cross-entropy of logits [B, C]
            and class indices [B] by default.
        scale: c > 0, other than 1.

    Raises:
        ValueError: scale is not positive, or the model has no trained parameter.
    """
    return report_of(model, lambda m: loss(m(inputs), targets), scale=scale)


def report_of(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], *, scale: float = 3.0) -> ScaleInvarianceReport:
    """As :func:`scale_invariance_report`, for any loss of the model itself; the mean of what it returns is L."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    model = copy.deepcopy(model)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("the model must be one with a trained parameter to scale, got none")
    with rewound(model) as replay:
        look = _Look(model, weights, loss_of, replay, scale)
        loss, gradient = look.loss_and_gradient()
        flat = torch.cat([w.detach().flatten() for w in weights.values()]).double()
        with look.scaled(weights):
            scaled_loss, scaled_gradient = look.loss_and_gradient()
        report = ScaleInvarianceReport(
            loss_change=_ratio((scaled_loss - loss).abs(), loss.abs()),
            radial_gradient=_ratio((gradient @ flat).abs(), gradient.norm() * flat.norm()),
            gradient_change=_ratio((scale * scaled_gradient - gradient).norm(), gradient.norm()),
        )
        if report.holds():
            return report
        radial, loss = look.radial(), loss.detach()
        breaking = tuple(
            BreakingParameter(name, look.change_alone(name, loss), float(radial[name]))
            for name in look.breaking(radial)
        )
    return ScaleInvarianceReport(report.loss_change, report.radial_gradient, report.gradient_change, breaking)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if bool(part != 0) else 0.0


class _Look:
    """A model whose trained parameters may be scaled.

    Args:
        model: which may be changed.
        weights: its trained parameters.
        loss_of: its loss.
        replay: puts its buffers and the random numbers back.
        scale: c.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, nn.Parameter],
        loss_of: Callable[[nn.Module], Tensor],
        replay: Replay,
        scale: float,
    ) -> None:
        self.model, self.weights, self.loss_of, self.replay, self.scale = model, weights, loss_of, replay, scale
        self.modules: dict[str, list[str]] = {}
        for name in weights:
            self.modules.setdefault(name.rpartition(".")[0], []).append(name)

    def loss(self) -> Tensor:
        """L, as it is now."""
        self.replay.rewind()
        return self.loss_of(self.model).mean()

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of each parameter; one that the loss doesn't use has the gradient 0, and is scale-invariant."""
        weights = list(self.weights.values())
        return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L and its whole gradient [P], float64."""
        loss = self.loss()
        return loss.detach().double(), torch.cat([g.flatten() for g in self.gradients(loss)]).double()

    def radial(self) -> dict[str, Tensor]:
        """Each parameter's <gradient, itself> over |grad L| |x|."""
        gradients = [g.double() for g in self.gradients(self.loss())]
        values = [w.detach().double() for w in self.weights.values()]
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients) * sum(float(v.square().sum()) for v in values))
        return {name: (g * v).sum() / (size or 1.0) for name, g, v in zip(self.weights, gradients, values, strict=True)}

    def scaled(self, names: Container[str]) -> _Scaled:
        """A context in which some parameters are c times as large."""
        return _Scaled([w for name, w in self.weights.items() if name in names], self.scale)

    def moved(self, seed: int) -> AbstractContextManager[None]:
        """A context in which the weights are others: the model's own for 0."""
        return randomised(self.model, seed=seed) if seed else nullcontext()

    def change_alone(self, name: str, loss: Tensor) -> float:
        """The relative change of the loss when one parameter alone is scaled."""
        with torch.no_grad(), self.scaled([name]):
            return _ratio((self.loss().double() - loss).abs(), loss.abs())

    def breaking(self, radial: dict[str, Tensor]) -> list[str]:
        """The names for :attr:`ScaleInvarianceReport.breaking`; `radial` is of the model's own weights."""
        points = [radial]
        for seed in range(1, POINTS):
            # L(c x) = L(x) is asked at every x. At the model's own a bias may be zero, and terms may cancel by chance.
            with self.moved(seed):
                points.append(self.radial())
        radial = {name: torch.stack([point[name] for point in points]) for name in self.weights}
        rows = torch.stack([torch.stack([radial[n] for n in names]).sum(0) for names in self.modules.values()])
        # In units of each point's largest: the gradient of a wide net is almost all across x.
        size = rows.abs().amax(0)
        eps = max(torch.finfo(w.dtype).eps for w in self.weights.values())
        # At the others there is nothing but rounding, or what a norm's eps leaves. What is nan tells.
        telling = ~(size <= max(1000 * eps, 1e-3 * float(size.max())))
        if not bool(telling.any()):
            return list(self.weights)
        radial = {name: r[telling] / size[telling] for name, r in radial.items()}
        rows = rows[:, telling] / size[telling]
        total = rows.sum(0)
        # A module on whose scale nothing depends is none to blame; nan is.
        modules = [m for m, r in zip(self.modules, rows, strict=True) if not bool((r.abs() <= TOLERANCE).all())]
        suspects = [name for module in modules for name in self.modules[module]]
        rows = rows[[m in modules for m in self.modules]]
        tries = 0
        for count in range(1, min(MOST_MODULES, len(modules) - 1) + 1):
            if math.comb(len(modules), count) > MOST_SETS:
                break
            sets = torch.combinations(torch.arange(len(modules), device=rows.device), count)
            rest = (total - rows[sets].sum(1)).abs().amax(1)
            for chosen in sets[rest <= CANCELLED].tolist()[: MOST_TRIES - tries]:
                tries += 1
                names = [name for i in chosen for name in self.modules[modules[i]]]
                if self._suffice(names):
                    return self._fewest(names, radial, total)
        return suspects

    def _fewest(self, names: list[str], radial: dict[str, Tensor], total: Tensor) -> list[str]:
        """Without those that may be scaled with all others."""
        for name in list(names):
            others = [other for other in names if other != name]
            rest = total - sum(radial[other] for other in others)
            if others and bool((rest.abs() <= CANCELLED).all()) and self._suffice(others):
                names = others
        return names

    def _suffice(self, names: list[str]) -> bool:
        """Whether the loss stays when all parameters but these are scaled."""
        others = [name for name in self.weights if name not in names]
        for seed in range(2):
            with torch.no_grad(), self.moved(seed):
                loss = self.loss().double()
                with self.scaled(others):
                    if not _ratio((self.loss().double() - loss).abs(), loss.abs()) <= TOLERANCE:
                        return False
        return True


class _Scaled:
    """Context in which parameters are `scale` times as large; their values are put back, not divided."""

    def __init__(self, weights: list[nn.Parameter], scale: float) -> None:
        self._weights, self._scale = weights, scale
        self._before: list[Tensor] = []

    def __enter__(self) -> None:
        self._before = [w.data for w in self._weights]
        for w in self._weights:
            w.data = w.data * self._scale

    def __exit__(self, *_: object) -> None:
        for w, data in zip(self._weights, self._before, strict=True):
            w.data = data
