"""The paper's definitions and theorems of closeness as functions of measured R, G and N, with standard errors.

Source: Li, Malladi, Arora, "On the Validity of Modeling SGD with Stochastic Differential Equations (SDEs)", NeurIPS
2021 (arXiv 2102.12470); equation and theorem numbers are its own. The square-root scaling rule is that of Malladi, Lyu,
Panigrahi, Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022 (arXiv 2205.10287).

R = E|x|² is ``weight_sq_norm``, G = E|∇L|² is ``grad_sq_norm``, N = E Tr Σ is ``noise_trace``, with Σ the covariance
of the gradient of one batch. Each may be given as a plain number (taken as exact) or as an :class:`Estimate`. Standard
errors are propagated by the delta method, that is, to first order in the errors: they hold where errors are small
beside values. Unless a ``covariance`` is given, the errors of different quantities count as independent.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from svag_fast.numeric import number, real
from svag_fast.stats.estimate import (
    Estimate,
    Number,
    as_estimate,
    delta_method,
    fieller_interval,
    require_whole,
)
from svag_fast.stats.sampling import noise_factor

SQRT2 = math.sqrt(2.0)  # the paper's C in all its experiments
KappaForm: TypeAlias = Literal["exact", "approximate", "tightened"]
CertificateAnswer: TypeAlias = Literal["fails", "silent", "undecided"]


@dataclass(frozen=True)
class Norms:
    """R, G and N of one process at equilibrium; ``noise_trace`` is Tr Σ of a batch gradient for SGD and SDE alike."""

    weight_sq_norm: Number
    grad_sq_norm: Number
    noise_trace: Number


@dataclass(frozen=True)
class Certificate:
    """What a theorem says of measured G and N: that a property fails, or nothing (it never says that it holds).

    ``nsr`` = N/G is compared with ``threshold``; ``margin`` = threshold - nsr, positive where the property fails.
    """

    nsr: Estimate
    threshold: float
    margin: Estimate

    @property
    def fails(self) -> bool:
        """Whether the point estimates meet the theorem's condition for failure."""
        return self.margin.value > 0

    def verdict(self, confidence: float = 0.95) -> CertificateAnswer:
        """Return "fails" or "silent" where the margin's interval leaves 0 out, "undecided" where it does not."""
        low, high = self.margin.interval(confidence)
        if low > 0:
            return "fails"
        return "silent" if high <= 0 else "undecided"


@dataclass(frozen=True)
class Closeness:
    """Ratios of R, G and N between two processes, and ``constant``, the least C for which all are in [1/C, C]."""

    weight_sq_norm: Estimate
    grad_sq_norm: Estimate
    noise_trace: Estimate

    @property
    def constant(self) -> Estimate:
        """The least C, with the standard error of the ratio that decides it (that of the largest |log ratio|).

        Being the largest of three noisy numbers it is biased upward; :meth:`constant_interval` allows for that.
        """
        worst = max(self._ratios(), key=lambda ratio: abs(math.log(ratio.value)))
        if worst.value >= 1:
            return worst
        return replace(worst, value=1 / worst.value, standard_error=worst.standard_error / worst.value**2)

    def constant_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return an interval that holds the least C with at least ``confidence``, although it is a maximum.

        The ends are the largest of the three lower and of the three upper ends of |log ratio|. The upper one can only
        be too low if the deciding ratio's own is; the lower ones must all hold at once (Bonferroni's correction).
        """
        tail = (1 - confidence) / 2
        low = max(max(abs(log) - half, 0.0) for log, half in self._logs(1 - 2 * tail / 3))
        high = max(abs(log) + half for log, half in self._logs(confidence))
        return math.exp(low), math.exp(high)

    def verdict(self, C: float = SQRT2, confidence: float = 0.95) -> Literal["holds", "fails", "undecided"]:
        """Compare each ratio's interval, on a log scale, with [1/C, C].

        "holds": all three are inside; "fails": one is wholly outside; "undecided" otherwise.
        """
        # The definition's <= is not to be decided by the rounding of a ratio that is C itself.
        limit = math.log(_squared(C)) / 2 + 4 * sys.float_info.epsilon
        inside = True
        for log, half in self._logs(confidence):
            if abs(log) - half > limit:
                return "fails"
            inside = inside and abs(log) + half <= limit
        return "holds" if inside else "undecided"

    def _logs(self, confidence: float) -> list[tuple[float, float]]:
        """Each ratio's logarithm and half the width of its interval."""
        return [(math.log(r.value), r.half_width(confidence) / r.value) for r in self._ratios()]

    def _ratios(self) -> tuple[Estimate, Estimate, Estimate]:
        return self.weight_sq_norm, self.grad_sq_norm, self.noise_trace


def nsr(grad_sq_norm: Number, noise_trace: Number, *, covariance: float = 0.0) -> Estimate:
    """Return the noise-to-signal ratio N/G (section 5 of the paper).

    ``covariance`` is that of the two estimates. Raises ValueError for G <= 0 or N < 0.

    >>> nsr(2.0, Estimate(3.0, 0.2))
    Estimate(value=1.5, standard_error=0.1)
    """
    G, N = _grad_and_noise(grad_sq_norm, noise_trace)
    ratio = N.value / G.value
    return delta_method(ratio, (-ratio / G.value, 1 / G.value), _covariance_2(G, N, covariance), of=(G, N))


def c_closeness(sgd: Norms, sde: Norms) -> Closeness:
    """Return how C-close SGD and its SDE are (Definition 5.1): the ratios R/R̄, G/Ḡ, ηN/N̄ and the least C.

    ``sde.noise_trace`` is Tr Σ along the SDE's path; the paper's N̄ is lr times it, so that ηN/N̄ is the
    ratio of the two. The two processes' errors count as independent.

    >>> found = c_closeness(Norms(2.0, 1.0, 3.0), Norms(1.6, 1.0, 3.0))
    >>> found.constant, found.verdict(C=2**0.5)
    (Estimate(value=1.25, standard_error=0.0), 'holds')
    """
    return Closeness(*_ratios(sgd, sde, "sgd", "sde", 1.0))


def linear_scaling_invariance(base: Norms, scaled: Norms, *, kappa: float) -> Closeness:
    """Return how (C, κ)-linear-scaling-invariant SGD is (Definition 5.4), ``scaled`` measured at (κB, κη).

    The ratios, base over scaled, are those of R, G and N/κ: N^{B,η}/(κ N^{κB,κη}).

    >>> linear_scaling_invariance(Norms(2.0, 1.0, 4.0), Norms(2.0, 1.0, 0.5), kappa=4).constant.value
    2.0
    """
    return Closeness(*_ratios(base, scaled, "base", "scaled", number("kappa", kappa, above=1)))


def sde_fails_certificate(
    grad_sq_norm: Number, noise_trace: Number, *, C: float = SQRT2, lr: float | None = None, covariance: float = 0.0
) -> Certificate:
    """Apply Theorem 5.2: SGD and its SDE are not C-close if N/G < 1/(C²-1).

    Without ``lr``: G and N are SGD's (the theorem's second form). With ``lr``: they are the SDE's Ḡ and N̄, where N̄
    is the trace of the SDE's own diffusion Σ̄ = ηΣ (the first form, η > (N̄/Ḡ)(C²-1)); then ``nsr`` is N̄/(ηḠ).

    >>> sde_fails_certificate(1.0, Estimate(0.3, 0.05)).verdict()
    'fails'
    >>> sde_fails_certificate(1.0, 0.08, lr=0.1).fails
    True
    """
    threshold = 1 / (_squared(C) - 1)
    ratio = nsr(grad_sq_norm, noise_trace, covariance=covariance)
    if lr is not None:
        lr = number("lr", lr, above=0)
        ratio = ratio.affine(1 / lr)
    return _certificate(ratio, threshold)


def lsi_fails_certificate(
    grad_sq_norm: Number, noise_trace: Number, *, kappa: float, C: float = SQRT2, covariance: float = 0.0
) -> Certificate:
    """Apply Theorem 5.5: (C, κ)-LSI fails if N/G < (1 - 1/κ)/(C²-1) - 1/κ, both measured at (κB, κη).

    Raises ValueError unless 1 < C < √κ (the paper's range, and at C <= 1 no ratio is in [1/C, C]).

    >>> round(lsi_fails_certificate(1.0, 0.2, kappa=16).threshold, 12)
    0.875
    """
    kappa, C = number("kappa", kappa, above=1), real("C", C)
    if not 1 < C < math.sqrt(kappa):
        raise ValueError(f"C must be in (1, sqrt(kappa)) = (1, {math.sqrt(kappa):.6g}), got {C}")
    threshold = (1 - 1 / kappa) / (_squared(C) - 1) - 1 / kappa
    return _certificate(nsr(grad_sq_norm, noise_trace, covariance=covariance), threshold)


def critical_kappa(
    grad_sq_norm: Number,
    noise_trace: Number,
    *,
    C: float = SQRT2,
    form: KappaForm = "exact",
    covariance: float = 0.0,
) -> Estimate:
    """Return κ*: by Theorem 5.6 (C, κ)-LSI fails for every κ > κ*, from G and N at the base (B, η) alone.

    ``form`` "exact" is C²(1 + N/G). "approximate" is C² N/G, for N ≫ G. "tightened" is C² + (C²-1) N/G. The theorem's
    own assumptions give it when N at (κB, κη) is bounded below by N/(κC) instead of by 0 (docs/theory.md).

    >>> critical_kappa(1.0, Estimate(1.1, 0.1))
    Estimate(value=4.2, standard_error=0.2)
    >>> critical_kappa(1.0, 1.1, form="approximate").value, critical_kappa(1.0, 1.1, form="tightened").value
    (2.2, 3.1)
    """
    constant, slope = _kappa_form(C, form)
    return nsr(grad_sq_norm, noise_trace, covariance=covariance).affine(slope, constant)


def critical_kappa_interval(
    grad_sq_norm: Estimate,
    noise_trace: Estimate,
    *,
    C: float = SQRT2,
    form: KappaForm = "exact",
    covariance: float = 0.0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of κ* that holds ``confidence``, by Fieller's theorem.

    Unlike the delta method's it is right however noisy G is; G's estimate may even be negative. Where G can't be told
    from 0, neither can κ* from infinity: the upper end is then ``math.inf``.

    >>> critical_kappa_interval(Estimate(0.1, 0.1), Estimate(3.0, 0.1))
    (22.2..., inf)
    """
    constant, slope = _kappa_form(C, form)
    low, high = fieller_interval(noise_trace, grad_sq_norm, covariance, confidence)
    return constant + slope * low, constant + slope * high


def simple_noise_scale(
    grad_sq_norm: Number,
    noise_trace: Number,
    batch_size: float,
    *,
    covariance: float = 0.0,
    population: int | None = None,
) -> Estimate:
    """Return B_simple = Tr Σ_1/|∇L|² = B N/G, the batch size at which noise and gradient are alike.

    With ``population`` N is the noise of batches of B distinct samples of n: (n - B)/(n - 1) of Tr Σ_1/B. B_simple
    is then B N/G (n - 1)/(n - B), the same number as for independent draws. A batch of all n samples can't tell it:
    ValueError.

    Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training" (2018), equation 2.9.

    >>> simple_noise_scale(1.0, 1.1, 8).value
    8.8
    >>> simple_noise_scale(1.0, 1.1 * 992 / 999, 8, population=1000).value
    8.8
    """
    batch_size = number("batch_size", batch_size, above=0)
    factor = 1.0
    if population is not None:
        factor = noise_factor(require_whole("batch_size", batch_size), population)
        if factor == 0:
            raise ValueError(
                f"batch_size must be below population, {population}, since a batch of all samples has no noise, got "
                f"{batch_size:g}"
            )
    return nsr(grad_sq_norm, noise_trace, covariance=covariance).affine(batch_size / factor)


def _kappa_form(C: float, form: KappaForm) -> tuple[float, float]:
    """κ* as constant + slope N/G."""
    square = _squared(C)
    forms = {"exact": (square, square), "approximate": (0.0, square), "tightened": (square, square - 1)}
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    return forms[form]


def critical_batch_size(
    grad_sq_norm: Number,
    noise_trace: Number,
    batch_size: float,
    *,
    C: float = SQRT2,
    form: KappaForm = "exact",
    covariance: float = 0.0,
) -> Estimate:
    """Return B* = κ*B: beyond it linear scaling from ``batch_size`` can't be invariant (Theorem 5.6).

    >>> critical_batch_size(1.0, 1.1, 8).value
    33.6
    """
    batch_size = number("batch_size", batch_size, above=0)
    return critical_kappa(grad_sq_norm, noise_trace, C=C, form=form, covariance=covariance).affine(batch_size)


def _ratios(
    first: Norms, second: Norms, first_name: str, second_name: str, kappa: float
) -> tuple[Estimate, Estimate, Estimate]:
    """Return first/second of R and G, and first/(kappa second) of N."""
    found = []
    for name, factor in (("weight_sq_norm", 1.0), ("grad_sq_norm", 1.0), ("noise_trace", kappa)):
        a = as_estimate(f"{first_name}.{name}", getattr(first, name))
        b = as_estimate(f"{second_name}.{name}", getattr(second, name))
        number(f"{first_name}.{name}", a.value, above=0)
        number(f"{second_name}.{name}", b.value, above=0)
        ratio = a.value / (factor * b.value)
        covariance = _covariance_2(a, b, 0.0)
        found.append(delta_method(ratio, (ratio / a.value, -ratio / b.value), covariance, of=(a, b)))
    return found[0], found[1], found[2]


def _certificate(ratio: Estimate, threshold: float) -> Certificate:
    return Certificate(ratio, threshold, ratio.affine(-1.0, threshold))


def _covariance_2(G: Estimate, N: Estimate, covariance: float) -> list[list[float]]:
    limit = G.standard_error * N.standard_error
    if not abs(covariance) <= limit * (1 + 1e-9):
        raise ValueError(
            f"covariance must be within ± the product of the standard errors, {limit:.6g}, got {covariance}"
        )
    return [[G.standard_error**2, covariance], [covariance, N.standard_error**2]]


def _grad_and_noise(grad_sq_norm: Number, noise_trace: Number) -> tuple[Estimate, Estimate]:
    G, N = as_estimate("grad_sq_norm", grad_sq_norm), as_estimate("noise_trace", noise_trace)
    number("grad_sq_norm", G.value, above=0)
    number("noise_trace", N.value, least=0)
    return G, N


def _squared(C: float) -> float:
    """Return C², exactly 2 for C = √2."""
    C = number("C (ratios are in [1/C, C])", C, above=1, below=1e100)
    return float(round(C**2)) if math.isclose(C**2, round(C**2), rel_tol=1e-15) else C**2
