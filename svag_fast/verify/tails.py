"""The tail index of Appendix B.3: what the estimator says of variables whose tails are known, and of a net's noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svag_fast.sde import Draws
from svag_fast.theory.tail_index import gaussian_tail_index, tail_index
from svag_fast.verify.check import Check, Outcome, SuiteSettings, one_thread, z_check
from svag_fast.verify.equilibrium import digits_problem

BLOCKS = (10, 100, 1000)
SOURCE = "App. B.3"


@one_thread()
def known_laws(settings: SuiteSettings) -> Outcome:
    """I.i.d. Gaussian: 2; Cauchy: 1; Gaussians of log-normal variances: the formula. 1/alpha over repetitions."""
    outcome = Outcome(data={"bars": []})
    size, repeats = settings.choose(50_000, 1_000_000), 16
    draws = Draws(settings.seed, 3)

    def normals() -> Tensor:
        return draws.normal_(torch.empty(size, dtype=torch.float64, device="cpu"))

    for block in BLOCKS:
        samples: dict[str, list[tuple[float, float]]] = {"Gaussian": [], "Cauchy": [], "unequal": []}
        for _ in range(repeats):
            z = normals()
            samples["Gaussian"].append((1 / tail_index(z, block), 0.5))
            samples["Cauchy"].append((1 / tail_index(z / normals(), block), 1.0))
            variances = normals().mul_(2).exp_()
            samples["unequal"].append(
                (1 / tail_index(normals() * variances.sqrt(), block), 1 / gaussian_tail_index(variances, block))
            )
        for name, pairs in samples.items():
            values = torch.tensor(pairs, dtype=torch.float64, device="cpu")
            off = values[:, 0] - values[:, 1]
            expected = values[:, 1].mean().item()
            error = off.std().item() / math.sqrt(repeats)
            label = "Gaussians of unequal variances" if name == "unequal" else f"i.i.d. {name}"
            outcome.checks.append(
                z_check(SOURCE, f"{label}, blocks of {block}: 1/α", expected + off.mean().item(), error, expected)
            )
            alpha = 1 / values[:, 0].mean().item()
            outcome.data["bars"].append({"name": label, "block": block, "alpha": alpha, "expected": 1 / expected})
    return outcome


def network(settings: SuiteSettings) -> Outcome:
    """The digits net's gradient noise beside Gaussian noise of the same covariance: one "tail index", below 2."""
    outcome = Outcome(data={"bars": []})
    repeats, block = settings.choose(24, 200), 10
    with one_thread():
        problem = digits_problem(settings, batch_size=128)
        x, draws = problem.state(), Draws(settings.seed, 4)
        grad = problem.mean_grad(x)
        kinds: dict[str, Callable[[], Tensor]] = {
            "SGD's noise": lambda: problem.batch_grad(x, (1.0,), draws) - grad,
            "Gaussian noise, same covariance": lambda: problem.gaussian_grad(x, 1.0, draws) - grad,
        }
        values = {
            name: torch.tensor(
                [1 / tail_index(noise(), block) for _ in range(repeats)], dtype=torch.float64, device="cpu"
            )
            for name, noise in kinds.items()
        }
    found = {name: (v.mean().item(), v.std().item() / math.sqrt(repeats)) for name, v in values.items()}
    for name, (inverse, _) in found.items():
        outcome.data["bars"].append({"name": f"digits net: {name}", "block": block, "alpha": 1 / inverse})
    (sgd, sgd_error), (gaussian, gaussian_error) = found.values()
    error = math.hypot(sgd_error, gaussian_error)
    outcome.checks += [
        Check(
            SOURCE,
            "digits net: Gaussian noise of SGD's covariance looks heavy-tailed to the estimator",
            f"α = {1 / gaussian:.3f}, 1/α = {gaussian:.4f} ± {gaussian_error:.1g}",
            "α < 2 beyond 5 standard errors",
            gaussian - 5 * gaussian_error > 0.5,
        ),
        Check(
            SOURCE,
            "digits net: SGD's own noise has the same index",
            f"α = {1 / sgd:.3f} against {1 / gaussian:.3f}, 1/α off by {sgd - gaussian:+.4f} ± {error:.1g}",
            "1/α equal to 0.02 and 5 standard errors",
            abs(sgd - gaussian) < 0.02 + 5 * error,
        ),
    ]
    return outcome
