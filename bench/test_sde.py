"""Euler-Maruyama of geometric Brownian motion by ours, torchsde and diffrax, and NGD's step on a small net.

    python -m pytest bench/test_sde.py --benchmark-only
    python -m pytest bench/test_sde.py -k alternation          the figures to quote

Each group runs the same work: N trajectories, STEPS steps, the same SDE dX = -X dt + 0.3 X dW, one Gaussian a step and
trajectory, on one thread each (diffrax on those that XLA takes). ``extra_info`` gives nanoseconds a trajectory-step.
Beside them, what the Gaussians alone cost from our counters, from torch and from numpy. The last test prints ratios of
CPU times, medians over rounds in alternation: another process's load does not enter, and a second thread is paid for.
"""

import statistics
import time
from functools import partial

import numpy as np
import pytest
import torch
import torchsde
from torch import nn
from torch.utils.data import DataLoader, Dataset

from svag_fast.experiments.models import digits_net
from svag_fast.sde import NGD, Draws, EulerMaruyama, NetworkProblem, multiplicative_quadratic, simulate

N, STEPS = 100_000, 64
LR, DRIFT, VOLATILITY = 0.25, 1.0, 0.3
DTYPES = {"float32": torch.float32, "float64": torch.float64}
THREADS = 1

PROBLEM = multiplicative_quadratic(DRIFT, VOLATILITY / LR**0.5)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.set_num_threads(before)


def ours(dtype):
    process = EulerMaruyama(LR, h=1 / STEPS)
    start = torch.tensor(1.0, dtype=dtype)
    return lambda: simulate(process, PROBLEM, start, 1.0, trajectories=N, threads=THREADS)


def normals_alone(dtype, source):
    """As many Gaussians, in blocks that stay in the cache, nothing done with them."""
    buffer = torch.empty(1 << 14, dtype=dtype)
    draws, generator = Draws(0), np.random.Generator(np.random.SFC64(0))
    fill = {
        "ours": lambda: draws.normal_(buffer),
        "torch": buffer.normal_,
        "numpy": lambda: generator.standard_normal(dtype=buffer.numpy().dtype, out=buffer.numpy()),
    }[source]

    def run():
        for _ in range(N * STEPS // len(buffer)):
            fill()

    return run


class Geometric(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return -DRIFT * y

    def g(self, t, y):
        return VOLATILITY * y


def by_torchsde(dtype):
    sde, start, times = Geometric(), torch.ones(N, 1, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)

    @torch.no_grad()
    def run():
        return torchsde.sdeint(sde, start, times, dt=1 / STEPS, method="euler")[-1, :, 0]

    return run


def by_diffrax(dtype):
    diffrax = pytest.importorskip("diffrax")
    import jax

    jax.config.update("jax_enable_x64", dtype == torch.float64)
    kind = jax.numpy.float64 if dtype == torch.float64 else jax.numpy.float32
    shape = jax.ShapeDtypeStruct((), kind)

    def one(key):
        path = diffrax.UnsafeBrownianPath(shape, key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -DRIFT * y), diffrax.ControlTerm(lambda t, y, args: VOLATILITY * y, path)
        )
        found = diffrax.diffeqsolve(
            terms,
            diffrax.Euler(),
            0.0,
            1.0,
            1 / STEPS,
            jax.numpy.ones((), kind),
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=STEPS + 1,
        )
        return found.ys[0]

    solve = jax.jit(jax.vmap(one))
    keys = jax.random.split(jax.random.PRNGKey(0), N)
    return lambda: solve(keys).block_until_ready()


MAKERS = {
    "ours": ours,
    "normals alone, our counters": partial(normals_alone, source="ours"),
    "normals alone, torch": partial(normals_alone, source="torch"),
    "normals alone, numpy SFC64": partial(normals_alone, source="numpy"),
    "torchsde": by_torchsde,
    "diffrax": by_diffrax,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_euler_maruyama(benchmark, name, dtype):
    benchmark.group = f"Euler-Maruyama, {N} trajectories, {STEPS} steps, {dtype}"
    run = MAKERS[name](DTYPES[dtype])
    run()
    benchmark.pedantic(run, rounds=3, iterations=1)
    if not benchmark.disabled:
        benchmark.extra_info["ns_per_trajectory_step"] = benchmark.stats.stats.median / (N * STEPS) * 1e9


SAMPLES, BATCH = 1024, 32


def digits_like():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 1, 8, 8, generator=generator), torch.randint(10, (SAMPLES,), generator=generator)


def ngd_ours():
    inputs, targets = digits_like()
    problem = NetworkProblem(
        digits_net(generator=torch.Generator().manual_seed(0)),
        nn.CrossEntropyLoss(reduction="none"),
        inputs,
        targets,
        batch_size=BATCH,
    )
    process, state, draws = NGD(0.1, 0.01), problem.state(), Draws(0)
    return lambda: process.step_(problem, state, draws)


class Weighted(Dataset):
    """A data set whose items carry their sample weight, as the authors' does."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets
        self.draw()

    def draw(self):
        xi = torch.randn(len(self.inputs))
        self.weights = 1 + (len(self.inputs) / BATCH) ** 0.5 * (xi - xi.mean())

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return self.inputs[i], self.targets[i], self.weights[i]


def ngd_by_data_loader(chunk=128):
    """The authors' way: a shuffled loader over items with weights, gradients accumulated, one optimizer step."""
    data = Weighted(*digits_like())
    model = digits_net(generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    loader = DataLoader(data, batch_size=chunk, shuffle=True)

    def run():
        optimizer.zero_grad()
        for inputs, targets, weights in loader:
            ((loss_fn(model(inputs), targets) * weights).sum() / len(data)).backward()
        optimizer.step()
        data.draw()

    return run


def forward_backward():
    """The floor: one unweighted forward and backward pass over the data in ours' chunks."""
    inputs, targets = digits_like()
    model = digits_net(generator=torch.Generator().manual_seed(0))
    loss_fn = nn.CrossEntropyLoss()

    def run():
        model.zero_grad()
        loss_fn(model(inputs), targets).backward()

    return run


STEPPERS = {"ours": ngd_ours, "data loader with weights": ngd_by_data_loader, "floor: one pass": forward_backward}


@pytest.mark.parametrize("name", STEPPERS)
def test_ngd_step(benchmark, name):
    benchmark.group = f"NGD step, digits net, {SAMPLES} samples"
    run = STEPPERS[name]()
    run()
    benchmark.pedantic(run, rounds=5, iterations=1)


@pytest.mark.parametrize("group", ["float32", "float64", "ngd"])
def test_ratios_in_alternation(group, capsys):
    """Medians over five alternating rounds of each peer's CPU time over ours."""
    makers = STEPPERS if group == "ngd" else {name: (lambda m=m: m(DTYPES[group])) for name, m in MAKERS.items()}
    runs = {name: make() for name, make in makers.items()}
    ratios = {name: [] for name in runs}
    own = []
    for run in runs.values():
        run()
    for _ in range(5):
        took = {}
        for name, run in runs.items():
            start = time.process_time()
            run()
            took[name] = time.process_time() - start
        own.append(took["ours"])
        for name in runs:
            ratios[name].append(took[name] / took["ours"])
    unit = 1e3 if group == "ngd" else 1e9 / (N * STEPS)
    with capsys.disabled():
        print(f"\n{group}: ours {statistics.median(own) * unit:.2f} {'ms a step' if group == 'ngd' else 'ns'}")
        for name, values in ratios.items():
            print(f"  {name}: {statistics.median(values):.2f} times ours ({min(values):.2f} to {max(values):.2f})")
