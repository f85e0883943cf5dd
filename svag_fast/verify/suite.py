"""All groups of checks: the product's own steps and measurements, then the theory in the order of the paper."""

from __future__ import annotations

from collections.abc import Callable

from svag_fast.verify import (
    adaptive,
    answers,
    certificates,
    convergence,
    extremes,
    formulas,
    invariance,
    lemmas,
    measurements,
    rules,
    spread,
    steps,
    tails,
)
from svag_fast.verify import equilibrium as norms
from svag_fast.verify.check import Group, Outcome, SuiteSettings

GROUPS: dict[str, Group] = {
    "steps-4.7": Group("Lemma 4.7 through SVAG.step and the ops, on every backend here", steps.lemma_4_7, 2),
    "steps-4.3": Group("Theorem 4.3 through SVAG.step", steps.theorem_4_3, 2),
    "steps-adaptive": Group("SVAGAdam and SVAGRMSprop: steps, start, convergence", adaptive.checks, 9),
    "steps-momentum": Group("SVAG with momentum, both rules", formulas.momentum, 1),
    "scaling-rules": Group("Linear and square-root scaling", formulas.scaling_rules, 1),
    "noise-covariance": Group("Gaussian noise of a net and of a regression", formulas.noise_covariance, 1),
    "estimators": Group("Estimators of G and N over all batches of a data set", measurements.estimators, 1),
    "sample-norms": Group("Per-sample norms against a loop", measurements.norms, 1),
    "lemma-4.7": Group("Lemma 4.7: one SVAG step", lemmas.lemma_4_7, 2),
    "lemma-4.6": Group("Lemma 4.6: one SDE step", lemmas.lemma_4_6, 1),
    "theorem-4.3-exact": Group("Theorem 4.3 in closed form", convergence.exact, 1),
    "theorem-4.3-simulated": Group("Theorem 4.3 by simulation", convergence.simulated, 12),
    "contrast": Group("SGD at scaled batch, where (iii) fails", convergence.contrast, 2),
    "decomposition": Group("Equation 4: discretisation and non-Gaussianity", convergence.decomposition, 2),
    "norms-toy": Group("Norm dynamics (9), (10) on the toy", norms.toy_dynamics, 3),
    "equilibrium-toy": Group("Equilibrium (11), (12) on the toy", norms.toy_equilibrium, 6),
    "norms-network": Group("Norm dynamics and equilibrium of a net", norms.network, 8),
    "prediction": Group("Predictions from made runs of known N/G", answers.prediction, 2),
    "verdict": Group("Verdicts on made curves of known limit", answers.verdict, 1),
    "rules": Group("The formulas behind predictions and verdicts", rules.checks, 1),
    "certificates": Group("Theorems 5.2, 5.5, 5.6 over batch sizes", certificates.grid, 4),
    "certificates-attained": Group("Theorems 5.2, 5.5, 5.6 where they are attained", extremes.attained, 1),
    "order-2": Group("The order-2 SDE over learning rates", certificates.order_two, 6),
    "tail-known": Group("Tail index of known laws", tails.known_laws, 3),
    "tail-network": Group("Tail index of a net's gradient noise", tails.network, 3),
    "scale-invariance": Group("Scale invariance of the shipped nets", invariance.nets, 4),
    "z-scores": Group("The battery's own errors, over seeds", spread.z_scores, 6),
}


def run(
    settings: SuiteSettings,
    names: list[str] | None = None,
    *,
    started: Callable[[Group], None] = lambda group: None,
    finished: Callable[[Group], None] = lambda group: None,
) -> dict[str, Outcome]:
    """Run the groups `names` (default all) one after the other; the callbacks are for a progress bar.

    Raises:
        ValueError: a name that no group has.
    """
    for name in names or ():
        if name not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {name!r}")
    outcomes = {}
    for name in names or GROUPS:
        started(GROUPS[name])
        outcomes[name] = GROUPS[name].run(settings)
        finished(GROUPS[name])
    return outcomes
