"""Figure 2: paths of SGD, SVAG and the SDE in one dimension, from one distribution of starting points.

The problem is the smallest in which a finite learning rate shows: L = x²/2, and a batch gradient x + e, whose noise e
is skewed (a centred exponential, scaled). The SDE's noise is Gaussian, so its distribution stays symmetric; SGD's
doesn't at this learning rate, and SVAG's becomes symmetric as l grows. Nothing here imports torch before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from svag_fast.sde.problems.affine import AffineProblem
    from svag_fast.sde.processes import Process

LR = 0.25
NOISE = 1.0
SHOWN = 25  # paths that are drawn, of many that the distribution is of
SUBSTEPS = 64  # of the SDE's integrator, a learning rate's time
START = (2.0, 0.25)  # mean and standard deviation


@dataclass(frozen=True)
class Paths:
    """Trajectories of one process.

    Attributes:
        name: of the process.
        times: [k], of the drawn points.
        shown: [k, paths], some trajectories.
        end: [n], where all of them are at the last time.
    """

    name: str
    times: NDArray[np.float64]
    shown: NDArray[np.float64]
    end: NDArray[np.float64]


def simulate_paths(*, effective_steps: int, l: float, paths: int, seed: int = 0) -> list[Paths]:
    """Simulate the SDE, SVAG and SGD from the same starting points, a path for each.

    Args:
        effective_steps: length, in SGD's steps.
        l: of SVAG.
        paths: trajectories of each process.
        seed: of the starting points and of the noise, which differs between the processes.
    """
    import torch

    from svag_fast.sde.laws import Gamma
    from svag_fast.sde.problems.affine import AffineProblem
    from svag_fast.sde.processes import EulerMaruyama, SGDProcess, SVAGProcess

    skewed = AffineProblem(1.0, noise_offset=NOISE, law=Gamma(1.0))
    mean, deviation = START
    generator = torch.Generator().manual_seed(seed)
    starts = mean + deviation * torch.randn(paths, generator=generator, dtype=torch.float64, device="cpu")
    processes: dict[str, tuple[Process, AffineProblem]] = {
        "SDE": (EulerMaruyama(LR, h=LR / SUBSTEPS), skewed),
        f"SVAG, l = {l:g}": (SVAGProcess(LR, l=l), skewed),
        "SGD": (SGDProcess(LR), skewed),
    }
    return [
        _simulate(name, *process, starts, effective_steps, seed + number)
        for number, (name, process) in enumerate(processes.items(), 1)
    ]


def _simulate(
    name: str, process: Process, problem: AffineProblem, starts: Tensor, effective_steps: int, seed: int
) -> Paths:
    import torch

    from svag_fast.sde.draws import Draws

    states, draws = starts.clone(), Draws(seed)
    steps = process.steps(effective_steps * LR)
    times, shown = [0.0], [states[:SHOWN].clone()]
    for step in range(1, steps + 1):
        process.step_(problem, states, draws)
        times.append(step * process.step_size)
        shown.append(states[:SHOWN].clone())
    return Paths(name, np.array(times), torch.stack(shown).numpy(), states.numpy())
