"""SGD, SVAG and the SDEs as processes on one interface, with problems whose expectations are known in closed form."""

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
    SGD,
    SVAG,
    EulerMaruyama,
    GradientFlow,
    OneBatchSVAG,
    Process,
)
from svag_fast.sde.simulate import controlled_mean, expectation, mean_and_error, simulate
from svag_fast.sde.weights import svag_weights, vanishing_third_moment_l

__all__ = [
    "GD",
    "NGD",
    "SDE2",
    "SGD",
    "SVAG",
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
