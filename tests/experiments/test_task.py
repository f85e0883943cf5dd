"""A task of one's own: refused by name where it is wrong, else trained like any net, and resumed to the bit."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast import Task
from svag_fast.analysis.report import make_report
from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.experiment_folder import check_experiment, with_size
from svag_fast.experiments.gradients import pair_gradients
from svag_fast.experiments.measured_run import own_seed
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.run_folder import columns_of
from svag_fast.experiments.task import builtin_task
from svag_fast.experiments.task_error import TaskError
from svag_fast.experiments.task_file import load_task
from svag_fast.experiments.training import Training, train

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=GENERATOR), torch.randint(3, (64,), generator=GENERATOR)
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


def mlp(*middle):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *middle, nn.Linear(16, 3))


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def make(**changes):
    parts = {"model": mlp, "train": (X, Y), "test": (X[:20], Y[:20]), "loss": CROSS_ENTROPY}
    return Task(**(parts | {"metrics": {"accuracy": accuracy}, "name": "toy"} | changes))


def config(**changes):
    settings = {"batch_size": 4, "lr": 0.1, "l": 2, "seed": 0, "effective_steps": 12, "rows": 6, "weight_decay": 0.01}
    return RunConfig(**(settings | {"task": "<toy>", "train_size": 64} | changes))


class Numbers(torch.utils.data.Dataset):
    """Items with noise from Python's and NumPy's generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + random.random() + float(np.random.standard_normal()), Y[i]


class Couples(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Endless(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return X[i], Y[i]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs, targets):
        return self.scale * CROSS_ENTROPY(outputs, targets)


SAME = mlp()
BACKBONE = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False)
WRONG_PARTS = {
    "a module for a function": ({"model": mlp()}, r"model must be a function that returns .*, got a Sequential"),
    "a mean, as torch's default": ({"loss": nn.CrossEntropyLoss()}, r"loss must be of reduction=.*, got .*mean"),
    "no loss": ({"loss": "ce"}, "loss must be a function of"),
    "arrays": ({"train": (X.numpy(), Y.numpy())}, "train must be a tensor, a tuple of tensors or"),
    "rows that don't fit": ({"test": (X, Y[:3])}, "test must be tensors with one row a sample each, got 64 and 3 rows"),
    "no samples": ({"test": (X[:0], Y[:0])}, "test must be data with a sample or more, got none"),
    "metrics without names": ({"metrics": [accuracy]}, "metrics must be a dict of functions by name"),
    "a metric named loss": ({"metrics": {"loss": accuracy}}, "a metric's name must be"),
    "a metric that is no function": ({"metrics": {"f1": 0.5}}, "metric f1 must be a function"),
    "a collate for tensors": ({"collate": list}, "collate must be None where the data are tensors"),
    "a Dataset without a length": ({"test": Endless()}, "test must be a Dataset with a length, got Endless"),
    "a loss with weights of its own": (
        {"loss": Scaled()},
        "loss must be without trained parameters, which no run trains: make them the model's, got 1 of Scaled",
    ),
    "a stream": (
        {"train": torch.utils.data.ChainDataset([])},
        "train must be .*, got an IterableDataset",
    ),
}  # fmt: skip
WRONG_TOGETHER = {
    "no module": ({"model": lambda: F.relu}, "model must be a function that returns a torch.nn.Module, got function"),
    "nothing to train": ({"model": nn.Flatten}, "model must be one with a trained parameter, got none"),
    "the same model twice": ({"model": lambda: SAME}, "model must be a function that makes new weights at each call"),
    "outputs of another shape": (
        {"model": lambda: nn.Sequential(nn.Linear(8, 3), nn.Flatten(0))},
        r"model must be one that returns a row a sample, \[8, \.\.\.\], got \[24\]",
    ),
    "a loss that is a mean": (
        {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets)},
        r"loss must be one value a sample, \[8\] \(reduction=\"none\"\), got one number",
    ),
    "a loss a pixel": (
        {"loss": lambda outputs, targets: (outputs - targets[:, None]) ** 2},
        r"loss must be one value a sample, \[8\]: take each sample's mean over the rest, got \[8, 3\]",
    ),
    "a label out of range": (
        {"train": (X, torch.where(torch.arange(64) == 63, 3, Y))},
        "train's targets must be labels from 0 to 2, as the model has 3 outputs, got 3",
    ),
    "a test label out of range": (
        {"test": (X[:2], torch.tensor([0, -1]))},
        "test's targets must be labels from 0 to 2, as the model has 3 outputs, got -1",
    ),
    "fewer samples than a batch": (
        {"train": (X[:3], Y[:3])},
        "batch_size must be at most 3, the number of the task's training samples, got 4",
    ),
    "labels that are no integers": (
        {"train": (X, Y.float())},
        r"train's targets must be int64 labels \[8\], or probabilities \[8, 3\] for .*, got float32 \[8\]",
    ),
    "labels of bytes in the test data": (
        {"test": (X, Y.to(torch.int32))},
        r"test's targets must be int64 labels \[8\], or .*, got int32 \[8\]",
    ),
    "labels in a column": ({"train": (X, Y[:, None])}, r"train's targets must be int64 .*, got int64 \[8, 1\]"),
    "targets that broadcast against outputs": (
        {
            "model": lambda: nn.Linear(8, 1),
            "train": (X, X[:, 0]),
            "loss": lambda outputs, targets: (outputs - targets).square().mean(1),
            "metrics": {},
        },
        r"loss must be one value a sample, of that sample alone, got values that depend on other samples",
    ),
    "running statistics that all models share": (
        {"model": lambda: nn.Sequential(BACKBONE, nn.Linear(8, 3))},
        r"model must be a function that makes new running statistics at each call, got 0.1 \(BatchNorm1d\) twice",
    ),
    "a metric that is no number": ({"metrics": {"top": lambda o, t: "high"}}, "metric top must be a number, got"),
    "a metric a sample": ({"metrics": {"top": lambda o, t: o.argmax(1)}}, "metric top must be a number, got tensor"),
    "an accuracy in percent": (
        {"metrics": {"accuracy": lambda o, t: 57}},
        "metric accuracy must be a fraction from 0 to 1, got 57",
    ),
    "samples that are coupled": (
        {"model": lambda: mlp(Couples())},
        r"model must be one whose samples are independent, but for BatchNorm, got one where .*2 \(Couples\)",
    ),
    "one tensor for a loss of two": ({"train": X, "test": X}, r"a batch must be a pair \(inputs, targets\)"),
    "an augmentation that drops rows": ({"augment": lambda x, g: x[1:]}, "augment must be a function that keeps the 8"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_part_that_is_wrong_is_refused_when_the_task_is_made(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make(**changes)


@pytest.mark.parametrize(("changes", "message"), WRONG_TOGETHER.values(), ids=WRONG_TOGETHER)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(changes, message):
    task = make(**changes)
    grid = ExperimentConfig(task="<toy>", batch_size=(4,), lr=(0.1,), seeds=1, effective_steps=2)
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_experiment(with_size(grid, task), task)


def read_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("samples_per_second", "noise_cost")}
            for row in csv.DictReader(file)
        ]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"]


def assert_same(one, other):
    assert read_rows(one) == read_rows(other)
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(one).items())


def test_a_run_is_a_plain_pytorch_loop_on_the_task(tmp_path):
    """SVAG's steps, the loss and the metric redone by hand; every sample's gradient norm was measured on the way."""
    assert train(config(), tmp_path, task=make())
    torch.manual_seed(own_seed(config(), "initial weights"))
    model = mlp()
    streams = [torch.Generator().manual_seed(own_seed(config(), f"stream {i}")) for i in range(2)]
    c1, c2 = (1 + math.sqrt(3)) / 2, (1 - math.sqrt(3)) / 2
    for step in range(24):
        batches = [torch.randint(64, (4,), generator=stream) for stream in streams]
        losses = [F.cross_entropy(model(X[i]), Y[i]) for i in batches]
        grads = torch.autograd.grad(c1 * losses[0] + c2 * losses[1], list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= config().lr_at(step) / 2 * (g + 0.01 * p)
    for ours, p in zip(weights(tmp_path).values(), model.parameters(), strict=True):
        assert torch.allclose(ours, p, rtol=1e-4, atol=1e-6)
    last = read_rows(tmp_path)[-1]
    with torch.no_grad():
        outputs = model(X[:20])
    assert float(last["test_loss"]) == pytest.approx(float(F.cross_entropy(outputs, Y[:20])), rel=1e-4)
    assert float(last["test_accuracy"]) == float(accuracy(outputs, Y[:20]))
    assert last["noise_source"] == "per_sample"


def test_the_built_in_net_as_a_task_of_ones_own_has_the_same_rows(tmp_path):
    digits = load_dataset("digits")
    built_in = RunConfig(
        model="digits-net", label_noise=0, batch_size=4, lr=0.1, l=2, seed=0, effective_steps=3, rows=3
    )  # fmt: skip
    train(built_in, tmp_path / "built-in")
    parts = builtin_task(built_in, digits)
    own = Task(
        model=lambda: parts.model().to(memory_format=torch.channels_last),
        **{name: getattr(parts, name) for name in ("train", "test", "loss", "metrics")},
    )
    train(config(effective_steps=3, rows=3, weight_decay=built_in.weight_decay), tmp_path / "own", task=own)
    assert_same(tmp_path / "built-in", tmp_path / "own")


def noisy(**changes):
    return make(
        model=lambda: mlp(nn.Dropout()),
        augment=lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator),
        **changes,
    )


@pytest.mark.parametrize("data", ["tensors", "a Dataset"])
def test_dropout_and_augmentation_continue_to_the_bit(tmp_path, data):
    parts = {} if data == "tensors" else {"train": Numbers(), "collate": torch.utils.data.default_collate}
    assert train(config(), tmp_path / "whole", task=noisy(**parts))
    for stop in (7, 3, 100):
        torch.manual_seed(stop)  # whatever the process has drawn before
        random.seed(stop)
        count = iter(range(1, 1000))
        train(
            config(), tmp_path / "stopped", task=noisy(**parts), should_stop=lambda: next(count) == stop,  # noqa: B023
        )  # fmt: skip
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_the_processs_own_random_numbers_are_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.standard_normal()
    torch.manual_seed(3)
    np.random.seed(3)
    run = Training(config(), make(model=lambda: mlp(nn.Dropout()), train=Numbers()))
    run.advance()
    assert torch.equal(torch.rand(2), expected[0])
    assert np.random.standard_normal() == expected[1]


def test_initial_weights_are_each_runs_own_unless_they_are_shared():
    own, other = (next(Training(config(seed=seed), make()).model.parameters()) for seed in (0, 1))
    assert not torch.equal(own, other)
    own, other = (next(Training(config(seed=seed, init="shared"), make()).model.parameters()) for seed in (0, 1))
    assert torch.equal(own, other)


def test_batch_norm_goes_through_the_pair_pass_and_its_noise_comes_from_two_batches():
    run = Training(config(), make(model=lambda: mlp(nn.BatchNorm1d(16))))
    run.advance()
    assert run.noise_source == "two_batches"
    assert int(run.model[2].num_batches_tracked) == 2  # what was tried before left no trace


def test_what_the_model_keeps_in_evaluation_mode_stays_there_and_one_that_is_there_as_a_whole_is_trained():
    def model():
        return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval(), mlp())

    run = Training(config(), make(model=model))
    before = run.model[0][1].running_mean.clone()
    run.advance()
    run.end_row()
    run.advance()
    assert [module.training for module in run.model.modules()][:4] == [True, False, False, False]
    assert torch.equal(run.model[0][1].running_mean, before)
    assert run.noise_source == "per_sample"  # BatchNorm couples samples in training mode alone
    assert Training(config(), make(model=lambda: mlp(nn.Dropout()).eval())).model[2].training


@pytest.mark.parametrize("where", ["test", "first step"])
def test_a_loss_that_is_nan_ends_its_run_by_name_and_others_continue(tmp_path, where):
    def loss(outputs, targets):
        bad = broken[0] and (where == "test" or torch.is_grad_enabled())
        return CROSS_ENTROPY(outputs, targets) * (math.nan if bad else 1.0)

    broken = [True]
    runs = [config(seed=seed, l=l) for l in (1, 2) for seed in (0, 1, 2)]
    for run in runs:
        broken[0] = run.seed == 0
        assert train(run, tmp_path / run.name, task=make(loss=loss))
    assert len(read_rows(tmp_path / runs[0].name)) == (1 if where == "test" else 2)
    found = make_report(tmp_path).as_dict()["batch_sizes"]["4"]
    assert found["runs"] == {"total": 6, "finished": 4, "diverged": 2}
    assert "diverged, at effective step" in " ".join(found["sentences"])


@pytest.mark.parametrize("kind", ["tensors", "a Dataset"])
def test_a_model_that_works_in_place_leaves_the_data_alone(tmp_path, kind):
    """Evaluation takes parts of the data in order, which are views of it."""
    x = X.clone()
    data = (x, Y) if kind == "tensors" else torch.utils.data.TensorDataset(x, Y)
    model = lambda: nn.Sequential(nn.ReLU(inplace=True), mlp())  # noqa: E731
    train(config(), tmp_path / "in place", task=make(model=model, train=data, test=data))
    assert torch.equal(x, X)
    elsewhere = make(model=lambda: nn.Sequential(nn.ReLU(), mlp()), train=data, test=data)
    train(config(), tmp_path / "elsewhere", task=elsewhere)
    assert read_rows(tmp_path / "in place") == read_rows(tmp_path / "elsewhere")


def test_outputs_that_the_model_writes_over_are_kept_for_metrics():
    class Reuses(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            if torch.is_grad_enabled() or len(x) < 128:
                return outputs
            if not hasattr(self, "kept"):
                self.kept = torch.empty_like(outputs)
            return self.kept.copy_(outputs)

    x, y = X.repeat(6, 1) * torch.arange(384)[:, None], Y.repeat(6)
    run = Training(config(), make(model=lambda: Reuses(8, 3), test=(x, y)))
    with torch.enable_grad():
        expected = float(accuracy(run.model(x), y))
    assert run.rows[0]["test_accuracy"] == pytest.approx(expected)


def test_data_that_asks_for_a_gradient_gets_none():
    x = X.clone().requires_grad_()
    run = Training(config(), make(train=(x, Y)))
    run.advance()
    assert run.noise_source == "per_sample"
    assert x.grad is None


@pytest.mark.parametrize("code", [0, "stop"])
def test_a_task_that_ends_the_process_has_failed(code):
    def model():
        raise SystemExit(code)

    with pytest.raises(TaskError, match=f"SystemExit: {code}"):
        Training(config(), make(model=model))


def test_the_tasks_own_error_has_its_own_traceback(tmp_path):
    steps = iter(range(1000))

    def breaks(x, generator):
        if next(steps) == 5:
            raise KeyError("no such augmentation")
        return x

    with pytest.raises(TaskError, match=r"code of task 'toy' failed") as error:
        train(config(), tmp_path, task=make(augment=breaks))
    first = str(error.value).splitlines()[1]
    assert "test_task.py" in first
    assert first.endswith("in breaks")
    assert "no such augmentation" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_layer_on_another_shape_is_told_from_the_layer_on():
    with pytest.raises(TaskError, match="shapes cannot be multiplied"):
        Training(config(), make(model=lambda: nn.Linear(7, 3)))


def example(name):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_language_models_norms_are_those_of_its_sequences_and_it_learns():
    """Tokens [B, T], a loss a sequence, embeddings that are tied to the head."""
    task = dataclasses.replace(example("language_model").task, metrics={})
    run = Training(config(lr=0.3, effective_steps=50, rows=1, train_size=400), task)
    assert run.columns == columns_of(())
    assert run.noise_source == "per_sample"
    run.model.eval()  # the same function twice: no dropout
    batch = run.train_data.take(torch.arange(8))
    losses = task.losses(run.model, batch)
    grads = [torch.autograd.grad(loss, run.params, retain_graph=True) for loss in losses]
    expected = torch.tensor([sum(float(g.double().square().sum()) for g in gs) for gs in grads], dtype=torch.float64)
    pair = pair_gradients(run.model, run.optimizer, batch, norms=True, losses=task.losses, way=run.way)
    run.optimizer.discard_gradient()
    assert torch.allclose(pair.sq_norms, expected, rtol=1e-4)
    run.model.train()
    while not run.ended:
        run.advance()
        if run.step == run.config.steps:
            run.end_row()
    assert run.rows[-1]["test_loss"] < run.rows[0]["test_loss"] - 0.1


def test_a_regression_of_several_outputs_is_trained_on_dicts_by_a_loss_of_the_model():
    """A Dataset of dicts, a collate, and a model whose loss is its own business."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            return {"x": X[i], "y": X[i, :2]}

    def loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean(1)

    def collate(items):
        return {name: torch.stack([item[name] for item in items]) for name in ("x", "y")}

    task = Task(model=lambda: nn.Linear(8, 2), train=Rows(), test=Rows(), loss=loss, collate=collate)
    run = Training(config(effective_steps=40, rows=1, train_size=32), task)
    while run.step < run.config.steps:
        run.advance()
    run.end_row()
    assert run.rows[-1]["test_loss"] < run.rows[0]["test_loss"] / 2
    assert "test_accuracy" not in run.rows[-1]


def test_the_pages_task_runs(tmp_path):
    page = (EXAMPLES.parent / "docs" / "tasks.md").read_text()
    (tmp_path / "my_task.py").write_text(page.split("```")[1].removeprefix("python"))
    task = load_task(f"{tmp_path / 'my_task.py'}:task")
    assert task.name == "my_task"
    Training(config(train_size=800), task).advance()


def test_a_checkpoint_of_other_metrics_is_refused(tmp_path):
    train(config(), tmp_path, task=make(), should_stop=lambda: True)
    with pytest.raises(RuntimeError, match="rows must be of the columns"):
        train(config(), tmp_path, task=make(metrics={"f1": accuracy}))


def test_a_task_takes_the_place_of_dataset_and_model():
    assert (config().dataset, config().model, config().label_noise) == ("", "", 0)
    for name, value in (("dataset", "fashion-mnist"), ("model", "vgg11-gn"), ("label_noise", 0.5)):
        with pytest.raises(ConfigError, match=f"^{name} must be left out: the task has its own, got"):
            config(**{name: value})
    with pytest.raises(ConfigError, match=r"^batch_size must be at most 3, the size of the task's training set"):
        config(sampling="distinct", train_size=3)
    with pytest.raises(ConfigError, match=r"^task must be left out, or replicas off"):
        ExperimentConfig(task="<toy>", replicas=2)
    assert ExperimentConfig(task="<toy>").engine == "torch"
    lengths = [run.effective_steps for run in ExperimentConfig(task="<toy>", train_size=640, epochs=2, seeds=1).runs()]
    assert lengths[0] == 2 * 640 / 4
