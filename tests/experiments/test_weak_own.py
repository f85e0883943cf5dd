"""`svag-fast weak` on a task of one's own: each run is a plain PyTorch loop on its own batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast import Task, svag_coefficients
from svag_fast.cli.main import main
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.weak import WeakSettings, _seed, measure
from svag_fast.experiments.weak_own import OwnTask
from svag_fast.replicas import NotReplicable

B, SETTINGS = 3, WeakSettings(
    task="mine.py:task", batch_size=3, lr=0.3, weight_decay=0.01, l=(1, 2, 3, 4), effective_steps=(2, 5), replicas=(8,),
    threads=1,
)  # fmt: skip


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def task(**changes: Any) -> Task:
    parts: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        "train": data(40, 0),
        "test": data(20, 1),
        "loss": nn.CrossEntropyLoss(reduction="none"),
        "metrics": {"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
        "augment": shifted,
    }
    return Task(**parts | changes)


@pytest.mark.parametrize("l", [1, 3])
def test_a_run_is_a_plain_loop_on_its_own_batches(l: float) -> None:
    own, number = OwnTask(task(), SETTINGS), 5
    model, (x, y), (test_x, test_y) = copy.deepcopy(own.model), data(40, 0), data(20, 1)
    generator, (c1, c2) = torch.Generator().manual_seed(_seed(0, l, number)), svag_coefficients(l)

    def gradient() -> list[Tensor]:
        drawn = torch.randint(40, (B,), generator=generator)
        loss = F.cross_entropy(model.train()(shifted(x[drawn], generator)), y[drawn])
        return list(torch.autograd.grad(loss, list(model.parameters())))

    want, step = [], 0
    for time in SETTINGS.effective_steps:
        while True:
            measured = step == time * l
            if measured:
                model.eval()
                logits, train = model(test_x).detach(), F.cross_entropy(model(x), y).item()
                loss = F.cross_entropy(logits, test_y, reduction="none")
                right = (logits.argmax(1) == test_y).double().mean()
                sq_norm = sum(float(p.detach().square().sum()) for p in model.parameters())
            g1 = gradient()
            g2 = gradient() if measured or l > 1 else g1
            with torch.no_grad():
                for p, a, b in zip(model.parameters(), g1, g2, strict=True):
                    p -= 0.3 / l * (c1 * a + c2 * b + 0.01 * p)
            step += 1
            if measured:
                G = sum(float((a * b).sum()) for a, b in zip(g1, g2, strict=True))
                N = sum(float((a - b).square().sum()) for a, b in zip(g1, g2, strict=True)) / 2
                want.append([float(loss.mean()), float(right), train, sq_norm, G, N, *loss[:3].tolist()])
                break
    found = measure(own, SETTINGS, l, range(4, 7))[..., 1]
    assert found.shape == (2, len(own.functions))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_runs_of_other_numbers_and_levels_draw_apart_from_one_start() -> None:
    own = OwnTask(task(), SETTINGS)
    found = [measure(own, SETTINGS, l, range(3)) for l in (2, 4)]
    assert len(np.unique(np.stack(found)[:, :, 0].round(9))) == 2 * 2 * 3
    start = own.start(SETTINGS, 2, [7, 8])
    first = start.test_functions()
    at_start = [i for i, name in enumerate(own.functions) if name not in ("G", "N")]
    assert torch.equal(first[at_start, 0], first[at_start, 1])


def of_the_whole(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a loss of the model": ({"loss": of_the_whole}, ConfigError, "loss must be a function of .outputs, targets."),
    "random layers": (
        {"model": lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))},
        NotReplicable,
        "1 is a Dropout that draws random numbers",
    ),
    "a random loss": (
        {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") * torch.rand(1)},
        ConfigError,
        "data and loss must be without random numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replicated_is_refused_by_name(case: str) -> None:
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        OwnTask(task(**changes), SETTINGS)


FILE = """
import torch
import svag_fast

x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
task = svag_fast.Task(
    model=lambda: torch.nn.Linear(4, 1),
    train=(x, x[:, :1]),
    test=(x, x[:, :1]),
    loss=lambda outputs, targets: (outputs - targets).square().mean(1),
)
"""


def test_the_command_writes_continues_and_refuses_a_changed_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)

    def run(*more: str) -> Any:
        options = ["--l", "1,2,3,4", "--effective-steps", "1", "--batch-size", "2", "--threads", "1"]
        return CliRunner().invoke(
            main, ["weak", str(tmp_path / "mine.py"), *options, "--out", str(tmp_path / "out"), *more]
        )

    assert "--lr must be given" in run("--replicas", "8").output.replace("\n", "")
    for replicas in (8, 9):
        result = run("--replicas", str(replicas), "--lr", "0.1")
        assert result.exit_code == 0, result.output
        with np.load(tmp_path / "out" / "values.npz") as file:
            assert file["4"].shape == (1, 8, replicas)
    (tmp_path / "mine.py").write_text(FILE + "\n")
    assert "must be of these settings" in run("--replicas", "9", "--lr", "0.1").output.replace("\n", "")
    assert "--model must be left out" in run("--model", "digits-net").output.replace("\n", "")
    assert "TARGET must be" in CliRunner().invoke(main, ["weak", "digits", "--out", str(tmp_path / "x")]).output
