"""NGD has SGD's mean and covariance, GD is torch's; both resume to the bit, and refuse what has no full gradient."""

from __future__ import annotations

import csv
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast import Task
from svag_fast.analysis.prediction import from_runs
from svag_fast.analysis.report import make_report
from svag_fast.analysis.runs import load_runs
from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.full_batch import FullBatchTraining
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.training import make_engine, train

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(5, 3, generator=GENERATOR).double(), torch.tensor([0, 1, 1, 0, 1])


def linear(*middle):
    return nn.Sequential(*middle, nn.Linear(3, 2, bias=False)).double()


def make(**changes):
    parts = {"model": linear, "train": (X, Y), "test": (X, Y), "loss": nn.CrossEntropyLoss(reduction="none")}
    return Task(**(parts | {"name": "tiny"} | changes))


def config(**changes):
    settings = {"batch_size": 2, "lr": 0.3, "l": 1, "seed": 0, "effective_steps": 6, "rows": 3, "weight_decay": 0.02}
    return RunConfig(**(settings | {"task": "<tiny>", "train_size": 5, "process": "ngd"} | changes))


def own_gradients(run):
    """[n, d] of each sample."""
    return torch.stack([torch.autograd.grad(F.cross_entropy(run.model(X[i : i + 1]), Y[i : i + 1]), run.params)[0]
                        .flatten() for i in range(5)])  # fmt: skip


@pytest.mark.parametrize("l", [1, 4])
@pytest.mark.parametrize("sampling", ["replacement", "distinct"])
def test_the_noise_has_the_covariance_of_every_batch_that_sgd_may_draw(sampling, l):
    """Σ by enumeration of the batches; NGD's, which is linear in ξ, from what it makes of each ξ_i = 1."""
    run = FullBatchTraining(config(sampling=sampling, l=l), make())
    rows, B = own_gradients(run), 2
    draws = itertools.product(range(5), repeat=B) if sampling == "replacement" else itertools.combinations(range(5), B)
    batches = torch.stack([rows[list(draw)].mean(0) for draw in draws])
    Sigma = torch.cov(batches.T, correction=0)
    run.gradient(torch.ones(5))
    full = run.params[0].grad.flatten().clone()
    assert full == pytest.approx(rows.mean(0))
    response = []
    for i in range(5):
        xi = torch.eye(5, dtype=torch.float64)[i]
        run.gradient(1 + run.spread * (xi - xi.mean()))
        response.append(run.params[0].grad.flatten() - full)
    A = torch.stack(response)
    assert pytest.approx(l * Sigma, abs=1e-14) == A.T @ A
    noise = run.full_noise()
    assert float(noise.noise_trace) == pytest.approx(float(Sigma.trace()))
    assert float(noise.grad_sq_norm) == pytest.approx(float(full.square().sum()))


def test_the_weights_are_drawn_afresh_with_mean_one_and_the_variance_they_should_have():
    run = FullBatchTraining(config(), make())
    draws = torch.stack([run.sample_weights() for _ in range(4000)])
    assert draws.mean(1) == pytest.approx(torch.ones(4000, dtype=torch.float64))
    # Var w_i = (n/B)(1 - 1/n); the z-score of 20,000 normal numbers' variance.
    expected = 5 / 2 * (1 - 1 / 5)
    variance = float((draws - 1).square().mean())
    assert abs(variance / expected - 1) < 4 * math.sqrt(2 / (4000 * 4))
    assert abs(float((draws[1:, 0] * draws[:-1, 0]).mean()) - 1) < 4 * (1 + expected) / math.sqrt(4000)


@pytest.mark.parametrize("process", ["gd", "ngd"])
def test_steps_are_torch_s_on_the_weighted_loss_and_rows_say_what_they_did(process):
    run, twin = (FullBatchTraining(config(process=process, l=2, schedule="constant"), make()) for _ in range(2))
    model, sums = linear(), {"weight_sq_norm": 0.0, "amplified_loss": 0.0}
    model.load_state_dict(run.model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.3 / 2, weight_decay=0.02)
    for _ in range(4):
        weights = twin.sample_weights()
        assert process == "ngd" or weights.equal(torch.ones_like(weights))
        loss = (F.cross_entropy(model(X), Y, reduction="none") * weights).mean()
        sgd.zero_grad()
        loss.backward()
        sums["weight_sq_norm"] += float(model[0].weight.detach().square().sum()) / 4
        sums["amplified_loss"] += loss.item() / 4
        sgd.step()
        run.advance()
    run.end_row()
    torch.testing.assert_close(run.params[0], model[0].weight, rtol=1e-12, atol=0)
    row = run.rows[-1]
    assert {name: row[name] for name in sums} == pytest.approx(sums)
    assert row["time"] == pytest.approx(4 * 0.15)
    assert row["effective_step"] == 2
    assert row["noise_source"] == "full_gradient"
    rows = own_gradients(run)
    assert row["grad_sq_norm"] == pytest.approx(float(rows.mean(0).square().sum()))
    assert row["noise_trace"] == pytest.approx(float((rows - rows.mean(0)).square().sum() / 5 / 2))


def test_the_mean_of_a_step_by_chunks_is_that_of_all_samples(monkeypatch):
    whole = FullBatchTraining(config(), make())
    weights = whole.sample_weights()
    loss = whole.gradient(weights)
    expected = whole.params[0].grad.clone()
    monkeypatch.setattr("svag_fast.experiments.full_batch.CHUNK", 2)
    chunks = FullBatchTraining(config(), make())
    assert float(chunks.gradient(weights)) == pytest.approx(float(loss))
    assert chunks.params[0].grad == pytest.approx(expected)
    assert tuple(map(float, chunks.full_noise()[:2])) == pytest.approx(tuple(map(float, whole.full_noise()[:2])))


def test_an_interrupted_run_resumes_to_the_bit(tmp_path):
    settings = config(task="", train_size=0, dataset="digits", model="digits-mlp", label_noise=0.2, batch_size=32,
                      effective_steps=8, rows=4, evaluations=2)  # fmt: skip
    assert train(settings, tmp_path / "whole")
    for stop_after in (3, 6, None):
        count = itertools.count(1)
        done = train(settings, tmp_path / "broken", should_stop=lambda n=stop_after, count=count: next(count) == n)
    assert done
    rows = []
    for name in ("whole", "broken"):
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]
        with (tmp_path / name / "metrics.csv").open() as file:
            rows.append([{k: v for k, v in row.items() if k != "samples_per_second"} for row in csv.DictReader(file)])
        rows[-1].append({k: v.tolist() for k, v in state["model"].items()})
    assert rows[0] == rows[1]
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["process"] == "ngd"


class Drops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


REFUSED = {
    "BatchNorm": ({"model": lambda: linear(nn.BatchNorm1d(3))}, "model must be one without BatchNorm.*got 0, a Batch"),
    "random numbers": ({"model": lambda: linear(Drops())}, "model must be one that draws no random numbers"),
    "an augmentation": ({"augment": lambda x, generator: x + 1}, "augment must be None where process is ngd"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_full_gradient_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        FullBatchTraining(config(), make(**changes))


def test_a_built_in_net_with_batch_norm_is_refused_as_well():
    settings = config(task="", train_size=0, dataset="digits", model="preresnet8-bn")
    with pytest.raises(ValueError, match="model must be one without BatchNorm"):
        make_engine([settings], load_dataset("digits"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": "sde"}, "process must be one of svag, ngd, gd, got 'sde'"),
        ({"process": "ngd", "replicas": 4}, "process must be svag, or replicas off"),
        ({"process": "gd", "backend": "eager"}, "backend must be auto where process is ngd or gd"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(batch_size=(4,), **changes)


def test_runs_of_the_full_gradient_are_read_and_not_judged_as_sgd_s(tmp_path):
    """GD's seeds may be equal in every number, and old files without a process are SVAG's."""
    experiment = ExperimentConfig(process="gd", batch_size=(32,), seeds=2, effective_steps=4, init="shared", rows=2)
    assert experiment.levels == ((1,),)
    for run in experiment.runs():
        train(run, tmp_path / run.name)
    runs = load_runs(tmp_path)
    assert [run.process for run in runs] == ["gd", "gd"]
    for judge in (make_report, from_runs):
        with pytest.raises(ValueError, match="process must be svag"):
            judge(tmp_path)
    path = tmp_path / runs[0].name / "config.json"
    said = json.loads(path.read_text())
    del said["process"]
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"has process 'svag' and .* 'gd'"):
        load_runs(tmp_path)
