"""What is no number, count or state is refused by name, by every public function of the package."""

import math

import pytest
import torch

from svag_fast import sde

P = sde.AffineProblem(1.0, noise_offset=1.0)
X0 = torch.tensor(1.0)
REGRESSION = sde.LinearRegression(torch.eye(3), torch.ones(3), batch_size=2)
NET = sde.NetworkProblem(
    torch.nn.Linear(2, 1), lambda y, t: (y[:, 0] - t) ** 2, torch.ones(4, 2), torch.ones(4), batch_size=2
)


def simulate(problem=P, x0=X0, time=0.2, trajectories=2, process=sde.SGDProcess(0.1), **options):  # noqa: B008
    return sde.simulate(process, problem, x0, time, trajectories=trajectories, **options)


CASES = {
    "x0 an integer tensor": (
        lambda: simulate(x0=torch.tensor(1)),
        r"x0 must be a floating-point Tensor, such as x0\.double\(\), got one of",
    ),
    "x0 a complex tensor": (
        lambda: simulate(x0=torch.tensor(1j)),
        r"x0 must be a floating-point Tensor, such as x0\.double\(\), got one of",
    ),
    "x0 a number": (
        lambda: simulate(x0=1.0),
        r"x0 must be a floating-point Tensor, such as torch\.tensor\(1\.0\), got 1\.0",
    ),
    "x0 of too few dimensions": (
        lambda: simulate(sde.CircleToy((1.0, -1.0))),
        r"x0 must be of at least 1 dimension for CircleToy, got shape \[\]",
    ),
    "states of another size": (
        lambda: simulate(sde.ScaleInvariantToy(3), torch.ones(4)),
        r"states must be of shape \[n, 3\], got \[2, 4\]",
    ),
    "states of another size, circle": (
        lambda: simulate(sde.CircleToy((1.0,)), torch.ones(3)),
        r"states must be of shape \[n, 2\], got \[2, 3\]",
    ),
    "a net's state": (
        lambda: simulate(NET, torch.ones(7), trajectories=None),
        r"state must be of shape \[3\], the model's parameters, got \[7\]",
    ),
    "time nan": (lambda: simulate(time=math.nan), "time must be a finite number >= 0, got nan"),
    "time inf": (lambda: simulate(time=math.inf), "time must be a finite number >= 0, got inf"),
    "time a text": (lambda: simulate(time="0.2"), r"time must be a number, got '0\.2' \(str\)"),
    "time negative": (lambda: simulate(time=-0.2), r"time must be a finite number >= 0, got -0\.2"),
    "seed -1": (lambda: simulate(seed=-1), "seed must be an integer >= 0, got -1"),
    "seed a fraction": (lambda: simulate(seed=0.5), r"seed must be an integer, got 0\.5 \(float\)"),
    "seed None": (lambda: simulate(seed=None), r"seed must be an integer, got None \(NoneType\)"),
    "trajectories 0": (lambda: simulate(trajectories=0), "trajectories must be an integer >= 1, got 0"),
    "trajectories a fraction": (
        lambda: simulate(trajectories=2.5),
        r"trajectories must be an integer, got 2\.5 \(float\)",
    ),
    "trajectories True": (lambda: simulate(trajectories=True), r"trajectories must be an integer, got True \(bool\)"),
    "threads 0": (lambda: simulate(threads=0), "threads must be an integer >= 1, got 0"),
    "draws": (lambda: sde.Draws(-1), "seed must be an integer >= 0, got -1"),
    "a function of one value": (
        lambda: sde.expectation(sde.SGDProcess(0.1), P, X0, 0.2, torch.mean, trajectories=4),
        r"function's result must be a value a trajectory, \[4\], got shape \[\]",
    ),
    "one trajectory": (
        lambda: sde.expectation(sde.SGDProcess(0.1), P, X0, 0.2, torch.abs, trajectories=1),
        "trajectories must be an integer >= 2, got 1",
    ),
    "one value": (
        lambda: sde.mean_and_error(torch.ones(1)),
        r"values must be of shape \[n\] with n at least 2, got \[",
    ),
    "a matrix of values": (
        lambda: sde.mean_and_error(torch.ones(3, 2)),
        r"values must be of shape \[n\] with n at least 2, got \[",
    ),
    "controls that would be broadcast": (
        lambda: sde.controlled_mean(torch.rand(9), torch.rand(9, 1), [0.5, 0.5, 0.5]),
        r"controls must be \[n, c\] for values \[n\] and c expectations, n at least c \+",
    ),
    "lr a text": (lambda: sde.SGDProcess("0.1"), r"lr must be a number, got '0\.1' \(str\)"),
    "lr nan": (lambda: sde.EulerMaruyama(math.nan, h=0.1), "lr must be a finite number > 0, got nan"),
    "h not given": (lambda: sde.EulerMaruyama(0.1), r"step_size must be a finite number > 0, got 0\.0"),
    "l a text": (lambda: sde.SVAGProcess(0.1, l="2"), r"l must be a number, got '2' \(str\)"),
    "l nan": (lambda: sde.svag_weights(math.nan), "l must be a finite number >= 1, got nan"),
    "batches a fraction": (lambda: sde.svag_weights(2.0, 2.5), r"batches must be an integer, got 2\.5 \(float\)"),
    "batches 1": (lambda: sde.vanishing_third_moment_l(1), "batches must be an integer >= 2, got 1"),
    "curvature nan": (lambda: sde.AffineProblem(math.nan), "curvature must be a finite number, got nan"),
    "batch size inf": (lambda: P.at_batch_size(math.inf), "batch_size must be a finite number > 0, got inf"),
    "shape inf": (lambda: sde.Gamma(math.inf), "shape must be a finite number > 0, got inf"),
    "rate 0": (lambda: sde.Poisson(0), "rate must be a finite number > 0, got 0"),
    "Poisson gradients": (
        lambda: sde.constant_poisson_gradient(0.0),
        r"batch_size must be a finite number > 0, got 0\.0",
    ),
    "slopes": (lambda: sde.CircleToy((1.0, math.inf)), "slopes must be a finite number, got inf"),
    "moments from a tensor": (
        lambda: sde.process_moments(sde.SGDProcess(0.1), P, torch.ones(2), [0.1]),
        r"x0 must be a number, got tensor\(\[1\., 1\.\]\) \(Tensor\)",
    ),
    "moments back in time": (
        lambda: sde.sde_moments(P, 1.0, [-1.0], lr=0.1),
        r"times must be a finite number >= 0, got -1\.0",
    ),
    "moments with lr nan": (
        lambda: sde.sde_moments(P, 1.0, [1.0], lr=math.nan),
        "lr must be a finite number > 0, got nan",
    ),
    "regression x0": (
        lambda: REGRESSION.sde_second_moment(torch.ones(2), [1.0], lr=0.1),
        r"x0 must be a real Tensor \[3\], got torch\.float32 of shape \[2\]",
    ),
    "regression back in time": (
        lambda: REGRESSION.sde_second_moment(torch.ones(3), [-1.0], lr=0.1),
        r"times must be a finite number >= 0, got -1\.0",
    ),
    "regression dtypes": (
        lambda: sde.LinearRegression(torch.eye(3).int(), torch.ones(3), batch_size=1),
        r"features and targets must be of one real dtype, got torch\.int32, torch\.float32",
    ),
    "regression batch size": (
        lambda: sde.LinearRegression(torch.eye(3), torch.ones(3), batch_size=1.5),
        r"batch_size must be an integer, got 1\.5 \(float\)",
    ),
    "circle x0": (
        lambda: sde.CircleToy((1.0,)).process_mean(sde.SGDProcess(0.1), torch.ones(3), 0.1),
        r"x0 must be a real Tensor \[2\], got torch\.float32 of shape \[3\]",
    ),
    "circle time": (
        lambda: sde.CircleToy((1.0,)).sde_mean(torch.ones(2), -1.0, lr=0.1, weight_decay=0.0),
        "time must be a finite number >= 0, got -1",
    ),
    "toy's dim": (lambda: sde.ScaleInvariantToy(2.5), r"dim must be an integer, got 2\.5 \(float\)"),
    "toy's time": (
        lambda: sde.ScaleInvariantToy(3).sde_weight_sq_norm(1.0, -1, lr=0.1, weight_decay=0.1),
        "time must be a finite number >= 0, got -1",
    ),
}


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_numpy_s_numbers_are_numbers():
    import numpy as np

    expected = simulate()
    found = simulate(
        process=sde.SGDProcess(np.float64(0.1)), time=np.float64(0.2), trajectories=np.int64(2), seed=np.int32(0)
    )
    assert torch.equal(found, expected)
