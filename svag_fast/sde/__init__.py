"""SGD, SVAG and the SDEs as processes on one interface, with problems whose expectations are known in closed form."""

from typing import TYPE_CHECKING, Any

from svag_fast import moved
from svag_fast.sde.draws import Draws
from svag_fast.sde.laws import Gamma, Gaussian, Poisson
from svag_fast.sde.moments import process_moments, sde_moments
from svag_fast.sde.problems.affine import (
    AffineProblem,
    additive_quadratic,
    constant_poisson_gradient,
    multiplicative_quadratic,
)
from svag_fast.sde.problems.base import Problem
from svag_fast.sde.problems.circle import CircleToy
from svag_fast.sde.problems.network import NetworkProblem
from svag_fast.sde.problems.regression import LinearRegression
from svag_fast.sde.problems.scale_invariant import ScaleInvariantToy
from svag_fast.sde.processes import (
    GD,
    NGD,
    SDE2,
    EulerMaruyama,
    GradientFlow,
    OneBatchSVAG,
    Process,
    SGDProcess,
    SVAGProcess,
)
from svag_fast.sde.simulate import controlled_mean, expectation, mean_and_error, simulate
from svag_fast.sde.weights import svag_weights, vanishing_third_moment_l

__all__ = [
    "GD",
    "NGD",
    "SDE2",
    "AffineProblem",
    "CircleToy",
    "Draws",
    "EulerMaruyama",
    "Gamma",
    "Gaussian",
    "GradientFlow",
    "LinearRegression",
    "NetworkProblem",
    "OneBatchSVAG",
    "Poisson",
    "Problem",
    "Process",
    "SGDProcess",
    "SVAGProcess",
    "ScaleInvariantToy",
    "additive_quadratic",
    "constant_poisson_gradient",
    "controlled_mean",
    "expectation",
    "mean_and_error",
    "multiplicative_quadratic",
    "process_moments",
    "sde_moments",
    "simulate",
    "svag_weights",
    "vanishing_third_moment_l",
]


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"SGD": "SGDProcess", "SVAG": "SVAGProcess"}, name)
