"""Formulas that need no random numbers: momentum's two rules, the scaling rules, and the noise of finite data sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from svag_fast.ops.step_options import MomentumRule
from svag_fast.optim.svag import SVAG
from svag_fast.sde import AffineProblem, Draws, Gamma, LinearRegression, NetworkProblem, SGDProcess, sde_moments
from svag_fast.sde.weights import svag_weights
from svag_fast.theory.scaling_rules import linear_scaling_rule, square_root_scaling_rule
from svag_fast.verify.check import Check, Outcome, SuiteSettings, exact_check, log_log_slope, one_thread

TOLERANCE = 1e-11
LR, MU, TIME = 0.05, 0.9, 20  # of the heavy ball on x²/2 with noise of variance 1, from x = 1
MOMENTUM = "Wang et al."


@one_thread()
def momentum(settings: SuiteSettings) -> Outcome:
    """Exact mean and variance of x after 20 effective steps of `SVAG.step` with momentum: slope -1 to each rule's SDE.

    "time" goes to dx = -η v dt, dv = (x - (1-μ) v) dt + dW; "fixed" to the SDE of SGD at η/(1-μ).
    """
    outcome = Outcome()
    ls = [float(2**k) for k in range(2, 7)]
    flow = np.array([[0.0, -LR], [1.0, MU - 1]])
    noise = np.array([[0.0, 0.0], [0.0, 1.0]])
    # Van Loan's block exponential: the flow and the integral of its noise at once.
    block = scipy.linalg.expm(TIME * np.block([[-flow, noise], [np.zeros((2, 2)), flow.T]]))
    ends = block[2:, 2:].T
    rate = LR / (1 - MU)
    limits: dict[MomentumRule, dict[str, float]] = {
        "time": {"mean": float(ends[0, 0]), "variance": float((ends @ block[:2, 2:])[0, 0])},
        "fixed": {"variance": rate / 2 * -math.expm1(-2 * rate * TIME)},
    }
    for rule, limit in limits.items():
        found = [_heavy_ball(rule, l) for l in ls]
        for moment, value in limit.items():
            slope = log_log_slope(ls, [row[moment] - value for row in found])
            outcome.checks.append(
                Check(
                    MOMENTUM,
                    f"SVAG.step, momentum {MU} by the {rule} rule: {moment} of x, slope in l of the distance",
                    f"{slope.value:+.4f} ± {slope.half_width:.1g}, last {found[-1][moment]:.4f} of {value:.4f}",
                    "-1",
                    slope.covers(-1) and slope.half_width < 0.5,
                )
            )
    return outcome


def _heavy_ball(rule: MomentumRule, l: float) -> dict[str, float]:
    """The mean by a path without noise; the variance by the response to one step's gradient, of which each has l."""
    p = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu"))
    kick = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    optimizer = SVAG([p], lr=LR, l=l, momentum=MU, momentum_rule=rule)
    response = []
    for k in range(round(TIME * l)):
        # The step is linear in the gradients, so the response to one kick is each later step's as well.
        gradient = p.detach() + kick if k == 0 else p.detach().clone()
        p.grad = gradient
        optimizer.hold_gradient()
        p.grad = gradient * (1 + 1e-15)  # the same gradient twice would be taken for one batch
        optimizer.step()
        response.append(float(p.detach()[1]))
    return {"mean": float(p.detach()[0]), "variance": l * float(np.square(response).sum())}


def scaling_rules(settings: SuiteSettings) -> Outcome:
    """Linear scaling keeps the SDE's moments; the square-root rule the numbers of the adaptive SDE; weights of K."""
    outcome = Outcome()
    problem, times = AffineProblem(1.0, 0.2, 0.3, 0.4, Gamma()), [0.5, 2.0]
    base = sde_moments(problem, 1.0, times, lr=0.1, weight_decay=0.2)
    for kappa in (0.25, 7.0, 64.0):
        rule = linear_scaling_rule(kappa, batch_size=1, lr=0.1)
        scaled = sde_moments(problem.at_batch_size(rule.batch_size), 1.0, times, lr=rule.lr, weight_decay=0.2)
        off = float(np.abs(scaled / base - 1).max())
        outcome.checks.append(exact_check("Def. 2.1", f"κ = {kappa:g}: the SDE's moments stay", off, TOLERANCE))
        kept = []
        for k in (1.0, kappa):
            adaptive = square_root_scaling_rule(k, batch_size=3, lr=1e-3, beta1=0.999, beta2=0.9999, eps=1e-6)
            assert adaptive.beta1 is not None
            noise = 1 / math.sqrt(adaptive.batch_size)  # a batch gradient's standard deviation
            time = adaptive.lr**2  # of one step, in the SDE
            kept.append(
                [
                    adaptive.lr * noise,
                    (1 - adaptive.beta1) / time,
                    (1 - adaptive.beta2) / time,
                    adaptive.eps / noise,
                    adaptive.batch_size / k,
                ]
            )
        off = float(np.abs(np.array(kept[1]) / np.array(kept[0]) - 1).max())
        name = f"κ = {kappa:g}: the square-root rule keeps ησ, (1-β)/η², ε/σ and B/κ"
        outcome.checks.append(exact_check("Malladi et al.", name, off, TOLERANCE))
    for batches, l in itertools.product((2, 3, 5, 8), (1.0, 2.5, 16.0)):
        weights = np.array(svag_weights(l, batches))
        off = max(abs(weights.sum() - 1), abs((weights**2).sum() / l - 1), abs(len(weights) - batches))
        name = f"weights of {batches} batches, l = {l:g}: sum 1, squares l"
        outcome.checks.append(exact_check("eq. 5", name, float(off), TOLERANCE))
    return outcome


class _OneNormal(Draws):
    """In place of normals, 1 at one place and 0 elsewhere: noise linear in them is then a column of its factor."""

    def __init__(self, place: int) -> None:
        super().__init__(0)
        self._place = place

    def normal_(self, out: Tensor) -> Tensor:
        out.zero_()[..., self._place] = 1
        return out


@one_thread()
def noise_covariance(settings: SuiteSettings) -> Outcome:
    """NGD's noise on a net has the batch gradient's covariance, entry by entry; a regression's over all batches."""
    outcome = Outcome()
    n, batch_size = 6, 2
    generator = torch.Generator().manual_seed(settings.seed)
    inputs, targets = (
        torch.randn(n, d, dtype=torch.float64, generator=generator, device="cpu").squeeze(1) for d in (3, 1)
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator, device="cpu"))
    for replacement in (True, False):
        how = "with replacement" if replacement else "distinct samples"
        problem = NetworkProblem(
            model, nn.MSELoss(reduction="none"), inputs, targets, batch_size=batch_size, replacement=replacement
        )
        x = problem.state()
        grads = torch.stack([problem.sample_grad(x, i) for i in range(n)])
        draws = itertools.product if replacement else itertools.permutations
        batches = [range(n)] * batch_size if replacement else [range(n), batch_size]
        means = torch.stack([grads[list(batch)].mean(0) for batch in draws(*batches)])
        centred = means - grads.mean(0)
        # One basis vector at a time: the noise is linear in its normals, and its covariance is the columns' product.
        columns = torch.stack([problem.mean_grad_and_noise(x, _OneNormal(i))[1] for i in range(n)])
        off = columns.T @ columns - centred.T @ centred / len(centred)
        scale = float((centred**2).mean(0).max())
        outcome.checks.append(
            exact_check(
                "Section 3", f"NGD's noise on a net, {how}: its covariance", float(off.abs().max()) / scale, 1e-9
            )
        )
        outcome.checks.append(_regression(inputs, targets, batch_size, replacement, how))
    return outcome


def _regression(features: Tensor, targets: Tensor, batch_size: int, replacement: bool, how: str) -> Check:
    """E (x, 1)(x, 1)ᵀ after one step of SGD, by enumerating all batches."""
    lr, decay, x = 0.3, 0.1, torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device="cpu")
    regression = LinearRegression(features, targets, batch_size=batch_size, replacement=replacement)
    rows = range(len(features))
    chosen = itertools.product(rows, repeat=batch_size) if replacement else itertools.permutations(rows, batch_size)
    moments = []
    for batch in map(list, chosen):
        a = features[batch]
        grad = a.T @ (a @ x - targets[batch]) / batch_size
        z = torch.cat([x - lr * (grad + decay * x), torch.ones(1, dtype=torch.float64, device="cpu")])
        moments.append(torch.outer(z, z))
    expected = torch.stack(moments).mean(0)
    found = regression.process_second_moment(SGDProcess(lr, decay), x, [lr])[0]
    off = float((found - expected).abs().max() / expected.abs().max())
    return exact_check("Section 3", f"regression, {how}: second moments after a step, over all batches", off, 1e-12)
