"""svag_fast.study: the grid, its files and its report from Python."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console

import svag_fast
from svag_fast.analysis.margins import Margin
from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.experiment_folder import ExperimentError, prepare_folder, with_size
from svag_fast.experiments.grid import ExperimentInterruptedError
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.signals import STOPPING, stop_requests
from svag_fast.experiments.task_error import TaskError
from svag_fast.experiments.training import Training, train

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 4, generator=GENERATOR)
Y = X @ torch.ones(4, 1) + 0.3 * torch.randn(64, 1, generator=GENERATOR)
GRID = {"l": (1, 2), "batch_size": (4, 8), "lr": 0.02, "seeds": 2, "effective_steps": 20, "rows": 4, "progress": False}


def regression(**changes):
    parts = {"model": lambda: torch.nn.Linear(4, 1), "train": (X, Y), "test": (X[:9], Y[:9]), "name": "line"}
    return svag_fast.Task(**(parts | {"loss": lambda outputs, targets: (outputs - targets).square().mean(1)} | changes))


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_regression_is_compared_by_its_loss_alone_and_may_be_continued(tmp_path):
    threads = torch.get_num_threads()
    report = svag_fast.study(regression(), out=tmp_path / "x", **GRID)
    assert [list(verdict.cells) for verdict in report.verdicts] == [["test_loss"]] * 2
    assert {run.name for run in report.runs} == {
        f"{b}-l{l}-seed{seed}" for b in ("b4-lr0.02", "b8-lr0.04") for l in (1, 2) for seed in (0, 1)
    }
    assert all(run.finished for run in report.runs)
    assert torch.get_num_threads() == threads
    report.print(console := Console(record=True, width=80, quiet=False, file=(tmp_path / "printed").open("w")))
    assert "final test" in console.export_text()
    assert (tmp_path / "x" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    before = files(tmp_path / "x")
    for path in (tmp_path / "x" / "b4-lr0.02-l1-seed1").iterdir():
        path.unlink()
    again = svag_fast.study(regression(), out=tmp_path / "x", resume=True, **GRID)
    assert again.as_dict()["batch_sizes"]["4"]["metrics"] == report.as_dict()["batch_sizes"]["4"]["metrics"]
    complete = [path for path in before if path.name == "metrics.csv" and "l1-seed1" not in str(path)]
    assert {path: path.read_bytes() for path in complete} == {path: before[path] for path in complete}


def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path):
    for changes, message in (
        ({"batch_sizes": 4}, "unknown setting 'batch_sizes'"),
        ({"batch_size": (65,)}, "batch_size must be at most 64"),
        ({"metrics": ["test_accuracy"]}, "metric must be a column of metrics.csv, got 'test_accuracy'"),
        ({"margins": {"test_top": Margin(0.1)}}, "margins must be for metrics .*, test_loss, got test_top"),
        ({"replicas": 2}, "task must be left out, or replicas off"),
        ({"checkpoint_seconds": "5"}, "checkpoint_seconds must be a finite number of at least 0, got '5'"),
        ({"jobs": "2"}, "jobs must be an integer from 1"),
        ({"metrics": "test_accuracy"}, "metric must be a column of metrics.csv, got 'test_accuracy'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            svag_fast.study(regression(), out=tmp_path / "x", **(GRID | changes))
    with pytest.raises(TypeError, match=r"^task must be a svag_fast.Task or a target such as 'my_task.py', got None"):
        svag_fast.study(None)
    with pytest.raises(ConfigError, match=r"^TARGET must be a file that is there"):
        svag_fast.study("my_task.py", out=tmp_path / "x")
    with pytest.raises(ConfigError, match=r"^out must be the experiment's folder, with resume=True, got None"):
        svag_fast.study(regression(), resume=True, **GRID)
    assert not (tmp_path / "x").exists()


def test_a_folder_is_continued_by_a_task_of_the_same_name_alone(tmp_path):
    grid = GRID | {"batch_size": 4, "l": 1, "seeds": 1}
    svag_fast.study(regression(), out=tmp_path, resume=True, **grid)
    with pytest.raises(ExperimentError, match="task is '<line>' there and '<other>' here"):
        svag_fast.study(regression(name="other"), out=tmp_path, resume=True, **grid)


def net(activation=torch.nn.ReLU, dropout=0.1, gain=1.0):
    def model():
        made = torch.nn.Sequential(
            torch.nn.Linear(4, 8), activation(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)
        )
        with torch.no_grad():
            made[0].weight.mul_(gain)
        return made

    return model


def mean_error(outputs, targets):
    return (outputs - targets).abs().mean()


CHANGES = {
    "a training target": ({"train": (X, torch.where(torch.arange(64)[:, None] == 63, 0, Y))}, "training data: .*SHA"),
    "the test data": ({"test": (X[1:10], Y[1:10])}, "test data: "),
    "the loss": ({"loss": lambda o, t: torch.nn.functional.huber_loss(o, t, reduction="none").mean(1)}, "losses: "),
    "the activation": ({"model": net(torch.nn.Tanh)}, "losses: "),
    "the dropout": ({"model": net(dropout=0.2)}, "losses: "),
    "the initial weights": ({"model": net(gain=1.01)}, "initial weights: "),
    "the metric": ({"metrics": {"error": lambda o, t: 2 * mean_error(o, t)}}, "metrics: "),
    "the augmentation": ({"augment": lambda x, generator: x + torch.randn(x.shape, generator=generator)}, "batches: "),
    "a layer": ({"model": lambda: net()().append(torch.nn.Linear(1, 1))}, "initial weights: "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_task_that_changed_is_refused_by_what_changed(name, tmp_path):
    changes, said = CHANGES[name]
    parts = {"model": net(), "metrics": {"error": mean_error}}
    prepare(tmp_path, regression(**parts))
    before = files(tmp_path)
    with pytest.raises(ExperimentError, match=rf"was begun with another task of this name(.|\n)*{said}"):
        prepare(tmp_path, regression(**(parts | changes)))
    assert files(tmp_path) == before


def prepare(folder, task, **options):
    config = with_size(ExperimentConfig.from_dict({"task": f"<{task.name}>", "seeds": 1}), task)
    prepare_folder(folder, config, task, resume=True, **options)


def test_a_changed_task_continues_by_force_and_is_the_experiment_s_from_then_on(tmp_path):
    one, other = (regression(model=net(), metrics={"error": mean_error}, test=(X[n:9], Y[n:9])) for n in (0, 1))
    prepare(tmp_path, one)
    prepare(tmp_path, other, force=True)
    prepare(tmp_path, other)
    with pytest.raises(ExperimentError, match=r"test data: (.|\n)*--force continues with the new task"):
        prepare(tmp_path, one)
    (tmp_path / "task_facts.json").unlink()  # as an older version's
    prepare(tmp_path, one)
    with pytest.raises(ExperimentError, match="test data: "):
        prepare(tmp_path, other)
    (tmp_path / "experiment.json").unlink()  # as where a process ended before it was written
    assert [path.name for path in tmp_path.iterdir()] == ["task_facts.json"]
    prepare(tmp_path, one)
    for damage in ("{", "[1]", '{"losses": 3}'):
        (tmp_path / "task_facts.json").write_text(damage)
        with pytest.raises(ExperimentError, match=r"task_facts.json: no facts of a task in it"):
            prepare(tmp_path, one)


def test_what_is_never_the_same_twice_is_not_compared(tmp_path):
    def entropy(x, generator):
        return x + int.from_bytes(os.urandom(4), "big") / 2**32

    for _ in range(2):
        prepare(tmp_path, regression(augment=entropy))
    facts = json.loads((tmp_path / "task_facts.json").read_text())
    assert facts.keys() >= {"initial weights", "training data"}
    assert not facts.keys() & {"batches", "losses"}


def sends(number, at):
    """An augmentation that sends this process a signal at its call number `at` with gradients, as a user might."""

    def augment(x, generator):
        if next(calls) == at:
            signal.raise_signal(number)
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    calls = iter(range(100_000))
    return augment


def states(folder):
    found = {}
    for path in sorted(folder.glob("*/checkpoint.pt")):
        state = torch.load(path, weights_only=True)["state"]
        rows = [
            {k: v for k, v in row.items() if k not in ("samples_per_second", "noise_cost")} for row in state["rows"]
        ]
        found[path.parent.name] = state["step"], {k: v.tolist() for k, v in state["model"].items()}, rows
    return found


@pytest.fixture
def _signals():
    """As in a terminal: a shell's background job ignores Ctrl-C, and then so does a study."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in STOPPING[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, ExperimentInterruptedError)]
)
def test_a_signal_ends_the_step_saves_the_run_and_says_how_to_go_on(tmp_path, number, kind):
    grid = GRID | {"batch_size": 4, "seeds": 1, "checkpoint_seconds": 1e6, "metrics": ["test_loss"]}
    handlers = [signal.getsignal(n) for n in STOPPING]
    out = tmp_path / "a folder"
    with pytest.raises(kind) as stop:
        svag_fast.study(regression(augment=sends(number, 45)), out=out, **grid)
    said = f"stopped: 1 of 2 runs are complete. Continue with: svag_fast.study(..., out={str(out)!r}, resume=True)"
    assert str(stop.value) == said
    assert isinstance(stop.value, KeyboardInterrupt) == (number == signal.SIGINT)
    assert [signal.getsignal(n) for n in STOPPING] == handlers
    half = states(out)
    assert [step for step, *_ in half.values()] == [20, pytest.approx(20, abs=19)]
    for run in ExperimentConfig.from_dict({"task": "<line>"} | grid_settings(grid)).runs():
        task = regression(augment=sends(0, -1))
        train(dataclasses.replace(run, train_size=64), out / run.name, task=task)
        train(dataclasses.replace(run, train_size=64), tmp_path / "whole" / run.name, task=task)
    assert states(out) == states(tmp_path / "whole") != half


def grid_settings(grid):
    return {name: value for name, value in grid.items() if name not in ("progress", "checkpoint_seconds", "metrics")}


@pytest.mark.usefixtures("_signals")
def test_a_second_ctrl_c_stops_at_once():
    line = RunConfig(task="<line>", train_size=64, batch_size=4, lr=0.02, l=1, seed=0, effective_steps=100)
    run = Training(line, regression(augment=impatient))
    ARMED.append(True)
    with stop_requests() as asked:
        with pytest.raises(KeyboardInterrupt):
            run.advance()
        assert asked.number == signal.SIGINT
    assert run.step == 0


ARMED = []


def impatient(x, generator):
    for _ in ARMED:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    return x


def test_in_a_thread_signals_are_the_caller_s(tmp_path):
    grid = GRID | {"batch_size": 4, "l": 1, "seeds": 1, "effective_steps": 2, "rows": 1}
    with ThreadPoolExecutor() as pool:
        report = pool.submit(svag_fast.study, regression(), out=tmp_path / "x", **grid).result()
    assert [run.finished for run in report.runs] == [True]


def test_the_tasks_own_error_names_the_runs_folder(tmp_path):
    def breaks(x, generator):
        if x.requires_grad or next(calls) > 4:
            raise LookupError("gone")
        return x

    calls = iter(range(100))
    with pytest.raises(TaskError, match=r"run b4-lr0.02-l1-seed0 failed \(in .*b4-lr0.02-l1-seed0\)(.|\n)*gone"):
        svag_fast.study(regression(augment=breaks), out=tmp_path, **GRID)
