"""Ensembles of trajectories, in blocks that stay in the cache, a thread a block; with Gaussian noise in registers.

The numbers depend on the seed alone, not on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from svag_fast.numeric import integer
from svag_fast.ops.affine_walk import AffineStep, affine_walk_
from svag_fast.ops.philox_normal import GROUP
from svag_fast.sde.checks import check_state
from svag_fast.sde.draws import Draws
from svag_fast.sde.laws import Gaussian
from svag_fast.sde.problems.affine import AffineProblem
from svag_fast.sde.problems.base import Problem
from svag_fast.sde.processes import NGD, SDE2, EulerMaruyama, Process, SGDProcess, SVAGProcess

BLOCK_ELEMENTS = 1 << 14
"""Numbers in a block: its state and noise stay in the first two levels of cache, and torch keeps it on one thread."""


def simulate(
    process: Process,
    problem: Problem,
    x0: Tensor,
    time: float,
    *,
    trajectories: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Tensor:
    """The states of independent trajectories at `time`, all started at `x0`.

    Args:
        process: what to simulate; `time` must be a whole number of its steps.
        problem: where.
        x0: one state; its dtype and device are the ensemble's.
        trajectories: n, or None to run the single state `x0` itself (a neural net).
        time: continuous time; one SGD step is lr.
        seed: of all random numbers. The result depends on it and on n, not on `threads`.
        threads: blocks run at once; default ``torch.get_num_threads()``.

    Returns:
        Tensor [n, *x0.shape], or of x0's shape when `trajectories` is None. `x0` is not changed.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it.
    """
    check_state(x0, problem)
    seed = integer("seed", seed, least=0)
    if threads is not None:
        threads = integer("threads", threads, least=1)
    steps = process.steps(time)
    if trajectories is None:
        state, draws = x0.detach().clone(), Draws(seed, 0, x0.device)
        for _ in range(steps):
            process.step_(problem, state, draws)
        return state
    trajectories = integer("trajectories", trajectories, least=1)
    states = x0.detach().repeat(trajectories, *[1] * x0.dim())
    process.check_dtype(x0.dtype)
    # Affine steps need no memory between them: the kernel walks each trajectory in registers.
    step = affine_step(process, problem)
    if step and x0.dim() == 0 and x0.device.type == "cpu" and x0.dtype in (torch.float32, torch.float64):
        return affine_walk_(states, step, steps, key=Draws(seed).key, threads=threads)
    # A multiple of the generator's group, so that a block begins where a counter does.
    rows = max(1, BLOCK_ELEMENTS // max(1, x0.numel()) // GROUP) * GROUP
    blocks = torch.split(states, rows)

    @torch.no_grad()
    def run(number: int) -> None:
        draws = Draws(seed, 0, x0.device, first=number * rows * x0.numel())
        for _ in range(steps):
            process.step_(problem, blocks[number], draws)

    before = torch.get_num_threads()
    try:
        # A new thread would start OpenMP threads of its own for torch's small operations, at ten times their cost.
        with ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, range(len(blocks))))
    finally:
        torch.set_num_threads(before)
    return states


def affine_step(process: Process, problem: Problem) -> AffineStep | None:
    """One step as a map that is affine in x and in Gaussian noise, where it is that; None where it isn't."""
    # By `type`, since a subclass may do something else in its step.
    if type(process) not in (SGDProcess, SVAGProcess, NGD, EulerMaruyama, SDE2) or type(problem) is not AffineProblem:
        return None
    (estimate,) = process.estimates
    if estimate.weights and not isinstance(problem.law, Gaussian):
        return None
    h, mean_weight = process.step_size, sum(estimate.weights) if estimate.weights else 1.0
    boost = 1 + process.hessian_weight * (problem.curvature + process.weight_decay)
    return AffineStep(
        keep=1 - h * boost * (mean_weight * problem.curvature + process.weight_decay),
        shift=h * boost * mean_weight * problem.offset,
        slope=-h * problem.noise_slope,
        spread=-h * problem.noise_offset,
        weights=estimate.weights or (estimate.noise_scale,),
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent `values` [n], n >= 2, and its standard error."""
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"values must be of shape [n] with n at least 2, got {list(values.shape)}")
    # The sum of a million float32 numbers has lost digits that the error still counts.
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(values.numel())


def controlled_mean(values: Tensor, controls: Tensor, expectations: Sequence[float]) -> tuple[float, float]:
    """The mean of `values` [n] with control variates `controls` [n, c] of known `expectations` [c].

    The part of the values that is linear in the controls is replaced by its exact mean. Returns the estimate and its
    standard error (Owen, "Monte Carlo theory, methods and examples", section 8.9). The bias from fitting the
    coefficients on the same sample is O(1/n).
    """
    count, known = len(values), len(expectations)
    if values.dim() != 1 or controls.shape != (count, known) or count < known + 2:
        raise ValueError(
            "controls must be [n, c] for values [n] and c expectations, n at least c + 2, got shape "
            f"{list(controls.shape)} for values {list(values.shape)} and {known} expectations"
        )
    design = np.column_stack([np.ones(len(values)), controls.double().numpy() - np.asarray(expectations)])
    target = values.double().numpy()
    coefficients, *_ = np.linalg.lstsq(design, target, rcond=None)
    residual = target - design @ coefficients
    # One for the mean, and one for each coefficient.
    freedom = max(1, len(target) - design.shape[1])
    # The fitted constant's own standard error: the ordinary least-squares one.
    cover = np.linalg.inv(design.T @ design)[0, 0]
    return float(coefficients[0]), math.sqrt(float(residual @ residual) / freedom * float(cover))


def expectation(
    process: Process,
    problem: Problem,
    x0: Tensor,
    time: float,
    function: Callable[[Tensor], Tensor],
    *,
    trajectories: int,
    seed: int = 0,
) -> tuple[float, float]:
    """Monte Carlo ``E g(x)`` at `time` with its standard error; `function` maps states [n, ...] to [n].

    Raises:
        TypeError, ValueError: as `simulate`; fewer than two trajectories; values of another shape than [n].
    """
    trajectories = integer("trajectories", trajectories, least=2)
    values = function(simulate(process, problem, x0, time, trajectories=trajectories, seed=seed))
    if not isinstance(values, Tensor) or values.shape != (trajectories,):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(f"function's result must be a value a trajectory, [{trajectories}], got {found}")
    return mean_and_error(values)
