"""The paper's definitions and theorems as functions of measured R, G and N."""

from svag_fast.stats.estimate import Estimate
from svag_fast.theory.closeness import (
    SQRT2,
    Certificate,
    Closeness,
    KappaForm,
    Norms,
    c_closeness,
    critical_batch_size,
    critical_kappa,
    critical_kappa_interval,
    linear_scaling_invariance,
    lsi_fails_certificate,
    nsr,
    sde_fails_certificate,
    simple_noise_scale,
)
from svag_fast.theory.equilibrium_equation import EquilibriumResidual, equilibrium_residual, equilibrium_sides
from svag_fast.theory.scaling_rules import AdaptiveRates, SGDRates, linear_scaling_rule, square_root_scaling_rule

__all__ = [
    "SQRT2",
    "AdaptiveRates",
    "Certificate",
    "Closeness",
    "EquilibriumResidual",
    "Estimate",
    "KappaForm",
    "Norms",
    "SGDRates",
    "c_closeness",
    "critical_batch_size",
    "critical_kappa",
    "critical_kappa_interval",
    "equilibrium_residual",
    "equilibrium_sides",
    "linear_scaling_invariance",
    "linear_scaling_rule",
    "lsi_fails_certificate",
    "nsr",
    "sde_fails_certificate",
    "simple_noise_scale",
    "square_root_scaling_rule",
]
