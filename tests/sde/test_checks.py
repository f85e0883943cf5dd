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
    "x0 an integer tensor": (lambda: simulate(x0=torch.tensor(1)), "x0: a Tensor of torch.int64, expected a floating"),
    "x0 a complex tensor": (lambda: simulate(x0=torch.tensor(1j)), "x0: a Tensor of torch.complex64"),
    "x0 a number": (lambda: simulate(x0=1.0), r"x0: 1\.0, expected a floating-point Tensor"),
    "x0 of too few dimensions": (lambda: simulate(sde.CircleToy((1.0, -1.0))), r"x0: shape \[\], expected at least 1"),
    "states of another size": (lambda: simulate(sde.ScaleInvariantToy(3), torch.ones(4)), r"expected \[n, 3\]"),
    "states of another size, circle": (lambda: simulate(sde.CircleToy((1.0,)), torch.ones(3)), r"expected \[n, 2\]"),
    "a net's state": (lambda: simulate(NET, torch.ones(7), trajectories=None), r"state: shape \[7\], expected \[3\]"),
    "time nan": (lambda: simulate(time=math.nan), "time: nan .expected a finite number >= 0"),
    "time inf": (lambda: simulate(time=math.inf), "time: inf"),
    "time a text": (lambda: simulate(time="0.2"), "time: '0.2' .expected a number"),
    "time negative": (lambda: simulate(time=-0.2), "time: -0.2"),
    "seed -1": (lambda: simulate(seed=-1), "seed: -1 .expected an integer >= 0"),
    "seed a fraction": (lambda: simulate(seed=0.5), r"seed: 0\.5 .expected an integer"),
    "seed None": (lambda: simulate(seed=None), "seed: None .expected an integer"),
    "trajectories 0": (lambda: simulate(trajectories=0), "trajectories: 0 .expected an integer >= 1"),
    "trajectories a fraction": (lambda: simulate(trajectories=2.5), "trajectories: 2.5 .expected an integer"),
    "trajectories True": (lambda: simulate(trajectories=True), "trajectories: True"),
    "threads 0": (lambda: simulate(threads=0), "threads: 0 .expected an integer >= 1"),
    "draws": (lambda: sde.Draws(-1), "seed: -1"),
    "a function of one value": (
        lambda: sde.expectation(sde.SGDProcess(0.1), P, X0, 0.2, torch.mean, trajectories=4),
        r"function: it returned shape \[\], expected a value a trajectory, \[4\]",
    ),
    "one trajectory": (
        lambda: sde.expectation(sde.SGDProcess(0.1), P, X0, 0.2, torch.abs, trajectories=1),
        "trajectories: 1",
    ),
    "one value": (lambda: sde.mean_and_error(torch.ones(1)), "values: shape"),
    "a matrix of values": (lambda: sde.mean_and_error(torch.ones(3, 2)), "values: shape"),
    "controls that would be broadcast": (
        lambda: sde.controlled_mean(torch.rand(9), torch.rand(9, 1), [0.5, 0.5, 0.5]),
        r"controls: shape \[9, 1\] for values \[9\] and 3 expectations",
    ),
    "lr a text": (lambda: sde.SGDProcess("0.1"), "lr: '0.1' .expected a number"),
    "lr nan": (lambda: sde.EulerMaruyama(math.nan, h=0.1), "lr: nan"),
    "h not given": (lambda: sde.EulerMaruyama(0.1), "step_size: 0.0 .expected a finite number > 0"),
    "l a text": (lambda: sde.SVAGProcess(0.1, l="2"), "l: '2' .expected a number"),
    "l nan": (lambda: sde.svag_weights(math.nan), "l: nan"),
    "batches a fraction": (lambda: sde.svag_weights(2.0, 2.5), "batches: 2.5"),
    "batches 1": (lambda: sde.vanishing_third_moment_l(1), "batches: 1 .expected an integer >= 2"),
    "curvature nan": (lambda: sde.AffineProblem(math.nan), "curvature: nan"),
    "batch size inf": (lambda: P.at_batch_size(math.inf), "batch_size: inf"),
    "shape inf": (lambda: sde.Gamma(math.inf), "shape: inf"),
    "rate 0": (lambda: sde.Poisson(0), "rate: 0"),
    "Poisson gradients": (lambda: sde.constant_poisson_gradient(0.0), "batch_size: 0.0"),
    "slopes": (lambda: sde.CircleToy((1.0, math.inf)), "slopes: inf"),
    "moments from a tensor": (
        lambda: sde.process_moments(sde.SGDProcess(0.1), P, torch.ones(2), [0.1]),
        r"x0: tensor\(\[1., 1.\]\)",
    ),
    "moments back in time": (lambda: sde.sde_moments(P, 1.0, [-1.0], lr=0.1), "times: -1.0"),
    "moments with lr nan": (lambda: sde.sde_moments(P, 1.0, [1.0], lr=math.nan), "lr: nan"),
    "regression x0": (lambda: REGRESSION.sde_second_moment(torch.ones(2), [1.0], lr=0.1), r"x0: .*\[2\].*\[3\]"),
    "regression back in time": (lambda: REGRESSION.sde_second_moment(torch.ones(3), [-1.0], lr=0.1), "times: -1.0"),
    "regression dtypes": (lambda: sde.LinearRegression(torch.eye(3).int(), torch.ones(3), batch_size=1), "features"),
    "regression batch size": (lambda: sde.LinearRegression(torch.eye(3), torch.ones(3), batch_size=1.5), "batch_size"),
    "circle x0": (lambda: sde.CircleToy((1.0,)).process_mean(sde.SGDProcess(0.1), torch.ones(3), 0.1), r"x0: .*\[3\]"),
    "circle time": (lambda: sde.CircleToy((1.0,)).sde_mean(torch.ones(2), -1.0, lr=0.1, weight_decay=0.0), "time: -1"),
    "toy's dim": (lambda: sde.ScaleInvariantToy(2.5), "dim: 2.5"),
    "toy's time": (lambda: sde.ScaleInvariantToy(3).sde_weight_sq_norm(1.0, -1, lr=0.1, weight_decay=0.1), "time: -1"),
}


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=f"Invalid .*{message}"):
        call()


def test_numpy_s_numbers_are_numbers():
    import numpy as np

    expected = simulate()
    found = simulate(
        process=sde.SGDProcess(np.float64(0.1)), time=np.float64(0.2), trajectories=np.int64(2), seed=np.int32(0)
    )
    assert torch.equal(found, expected)
