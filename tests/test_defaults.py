"""The default device and dtype are the user's: nothing in the package makes a tensor of its own by them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_calls import CALLS
from torch import Tensor, nn

import svag_fast
from svag_fast.experiments.data import draw_batch
from svag_fast.noise.estimators import BatchMoments
from svag_fast.ops import svag_step_
from svag_fast.sde import processes
from svag_fast.sde.draws import Draws
from svag_fast.sde.laws import Gaussian
from svag_fast.sde.problems.affine import AffineProblem
from svag_fast.sde.simulate import simulate

PACKAGE = Path(svag_fast.__file__).parent


@pytest.fixture(params=["meta", "float64", "bfloat16"])
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Yield what sets a foreign default: a device where nothing has values, or a dtype."""

    def use() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield use
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def _data() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model, [torch.randn(6, 1, 6, 6, generator=generator) for _ in range(6)]


def _train(make: Callable[[Any], Any]) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    def train(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
        optimizer, noise, found = make(model.parameters()), svag_fast.RunningNoise(), []
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            optimizer.zero_grad()
            model(first).square().mean().backward()
            optimizer.hold_gradient()
            model(second).square().mean().backward()
            stats = optimizer.step()
            noise.update(stats)
            found += [stats.raw, stats.nsr]
        return [*found, *(p.detach() for p in model.parameters())]

    return train


def _norms(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with svag_fast.per_sample_sq_norms(model) as norms:
        model(batches[0]).square().mean().backward()
    return [norms.total, *(p.grad for p in model.parameters() if p.grad is not None)]


def _accumulate(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    moments = BatchMoments()
    for x in batches:
        moments.add(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
    found = moments.estimate(batch_size=6)
    return [found.grad_sq_norm, found.noise_trace]


def _simulate(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    problem, x0 = AffineProblem(1.0, 0.5, 0.2, 1.0, law=Gaussian()), batches[0].flatten()[0]
    return [
        simulate(process, problem, start, 0.2, trajectories=n)
        for process in (processes.SVAGProcess(0.2, l=4), processes.OneBatchSVAG(0.2, l=4), processes.SDE2(0.2, h=0.05))
        for n in (None, 70)
        for start in (x0, x0.double())
    ]


def _draws(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    draws, out = Draws(1), torch.empty_like
    like, indices = batches[0], torch.Generator("cpu").manual_seed(0)
    return [
        draws.normal_(out(like)),
        draws.normal_(out(like.mT)),
        draws.gamma_(out(like), 2.0),
        draws.poisson_(out(like), 2.0),
        draws.indices(9, (5,)),
        draws.subsets(9, 3, 4),
        draws.subsets(9, 1, 4),
        *(draw_batch(20, 5, replacement=r, generator=indices) for r in (True, False)),
    ]


USES: dict[str, Callable[[nn.Module, list[Tensor]], list[Tensor]]] = {
    "SVAG": _train(lambda p: svag_fast.SVAG(p, lr=0.1, l=4, weight_decay=0.1)),
    "SVAG compensated": _train(lambda p: svag_fast.SVAG(p, lr=0.1, l=4, compensated=True)),
    "SVAG reference": _train(lambda p: svag_fast.SVAG(p, lr=0.1, l=4, backend="reference")),
    "SVAGAdam": _train(lambda p: svag_fast.SVAGAdam(p, lr=0.1, l=4)),
    "SVAGRMSprop": _train(lambda p: svag_fast.SVAGRMSprop(p, lr=0.1, l=4, initial_square_avg=1.0)),
    "per-sample norms": _norms,
    "estimators": _accumulate,
    "simulate": _simulate,
    "draws": _draws,
}


@pytest.mark.parametrize("name", USES)
def test_a_use_gives_the_same_under_any_default(name: str, default: Callable[[], None]) -> None:
    expected = USES[name](*_data())
    model, batches = _data()
    default()
    _equal(USES[name](model, batches), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_an_op_gives_the_same_under_any_default(op: str, backend: str, default: Callable[[], None]) -> None:
    call = CALLS[op]
    expected = call.results(call.make(torch.float32), backend)
    tensors = call.make(torch.float32)
    default()
    _equal(call.results(tensors, backend), expected)


def _equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_empty_step_has_its_statistics_on_the_cpu(default: Callable[[], None]) -> None:
    default()
    raw = svag_step_([], [], [], lr=0.1, l=4).raw
    assert (raw.device.type, raw.dtype) == ("cpu", torch.float64)


# Functions that make a tensor of the default dtype or on the default device where none is named.
MAKERS = {"empty", "zeros", "ones", "full", "tensor", "eye", "linspace", "rand", "randn", "scalar_tensor"}
BY_ARGUMENT = {"arange", "empty_strided", "randint", "randperm"}  # of integers here: int64 is no default
OWN_MODELS = "models"  # the folder; its nets follow the default device, as torch.nn's layers do


def test_every_new_tensor_names_its_device_and_dtype() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "kernels").glob("*.py")]
    unnamed = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called, of = node.func.attr, node.func.value
            if not (isinstance(of, ast.Name) and of.id == "torch" and called in MAKERS | BY_ARGUMENT):
                continue
            named = {keyword.arg for keyword in node.keywords}
            needed = {"device", "dtype"} if called in MAKERS else {"device"}
            if not needed <= named and path.parent.name != OWN_MODELS:
                unnamed.append(f"{path.name}:{node.lineno}: torch.{called} without {sorted(needed - named)}")
    assert not unnamed, "\n".join(unnamed)


def test_steps_under_a_foreign_default_device_from_the_start() -> None:
    """The example at the top of the README, with the default device set before everything, as in a script."""
    code = (
        "import torch; torch.set_default_device('meta'); import svag_fast\n"
        "p = torch.nn.Parameter(torch.ones(5, device='cpu')); p.grad = torch.ones(5, device='cpu')\n"
        "stats = svag_fast.SVAG([p], lr=0.5).step()\n"
        "print(p.tolist(), float(stats.sq_norm1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "[0.5, 0.5, 0.5, 0.5, 0.5] 5.0"
