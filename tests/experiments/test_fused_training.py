"""Runs side by side in the fused kernel: plain PyTorch's rows, the bits of a run alone, resumed at any moment."""

import csv
import dataclasses
import math
import shutil

import pytest
import torch
from torch.nn import functional as F

from svag_fast.analysis.runs import load_run
from svag_fast.experiments.checkpoint import CheckpointError
from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.experiment_folder import ExperimentError, check_experiment, prepare_folder
from svag_fast.experiments.fused_training import FusedTraining
from svag_fast.experiments.grid import _groups
from svag_fast.experiments.measured_run import initial_model, own_seed
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.run_output import RunBusyError, alone_in
from svag_fast.experiments.training import make_engine, train, train_together
from svag_fast.ops.step import svag_coefficients
from svag_fast.replicas.sampling import batch_indices

DIGITS = load_dataset("digits", label_noise=0.2)
BASE = RunConfig(
    batch_size=4, lr=0.4, l=2, seed=0, effective_steps=60, rows=6, evaluations=3, engine="fused", stat_every=3
)


def runs_of(count=3, **changes):
    return [dataclasses.replace(BASE, seed=seed, **changes) for seed in range(count)]


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in csv.DictReader(file)]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"]


def assert_same_runs(configs, ours, theirs):
    for config in configs:
        assert rows(ours / config.name) == rows(theirs / config.name)
        first, second = weights(ours / config.name), weights(theirs / config.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)


def together(configs, folder, **options):
    return train_together(configs, [folder / config.name for config in configs], **options)


@pytest.mark.parametrize(
    ("l", "model"),
    [(1, "digits-mlp"), (2, "digits-mlp"), (2.5, "digits-net"), (2, "mlp48x24-gn-plain"), (2, "mlp16-none-plain")],
)
def test_rows_are_those_of_a_plain_pytorch_loop_on_the_same_samples(tmp_path, l, model):
    configs = runs_of(2, l=l, model=model, effective_steps=20, rows=4, evaluations=2)
    assert together(configs, tmp_path)
    config = configs[1]
    net, seed, (c1, c2) = initial_model(config, DIGITS), own_seed(config, "batches"), svag_coefficients(l)
    params = list(net.parameters())
    ours = iter(rows(tmp_path / config.name)[1:])
    time, losses, measured = 0.0, [], []
    for step in range(config.steps):
        lr = config.lr_at(step)
        x = torch.cat([p.detach().double().flatten() for p in params])
        values, grads = [], []
        for batch in (1, 2):
            chosen = batch_indices(seed, step, batch, 4, len(DIGITS.train_labels))
            loss = F.cross_entropy(net(DIGITS.train_images[chosen]), DIGITS.train_labels[chosen])
            grads.append(torch.autograd.grad(loss, params))
            values.append(loss.item())
        losses.append(c1 * values[0] + c2 * values[1])
        if step % 3 == 0:
            g1, g2 = (torch.cat([g.double().flatten() for g in gs]) for gs in grads)
            G = float(g1 @ g2)
            measured.append((G, float(g1.square().sum() + g2.square().sum()) / 2 - G, float(x.square().sum())))
        with torch.no_grad():
            for p, a, b in zip(params, *grads, strict=True):
                p -= lr / l * (c1 * a + c2 * b + config.weight_decay * p)
        time += lr / l
        if step + 1 in config.row_steps:
            row = next(ours)
            expected = {"step": step + 1, "effective_step": (step + 1) / l, "time": time, "lr": lr}
            expected["amplified_loss"] = sum(losses) / len(losses)
            if measured:
                G, N, R = (sum(column) / len(measured) for column in zip(*measured, strict=True))
                expected |= {"grad_sq_norm": G, "noise_trace": N, "weight_sq_norm": R, "nsr": N / G}
            else:
                assert row["grad_sq_norm"] == row["noise_trace"] == row["weight_sq_norm"] == ""
            if step + 1 in config.evaluation_steps:
                with torch.no_grad():
                    logits = net(DIGITS.test_images)
                loss = F.cross_entropy(logits, DIGITS.test_labels)
                accuracy = (logits.argmax(1) == DIGITS.test_labels).double().mean()
                expected |= {"test_loss": float(loss), "test_accuracy": float(accuracy)}
            else:
                assert row["test_loss"] == ""
            assert (row["train_loss"] != "") == (step + 1 in config.train_evaluation_steps)
            assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=2e-3)
            assert row["noise_source"] == "two_batches"
            losses, measured = [], []
    assert next(ours, None) is None


def test_a_run_has_the_same_bits_alone_and_beside_others(tmp_path):
    configs = runs_of()
    assert together(configs, tmp_path / "together")
    for config in configs:
        assert train(config, tmp_path / "alone" / config.name)
    assert_same_runs(configs, tmp_path / "together", tmp_path / "alone")
    assert (
        len({tuple(weights(tmp_path / "alone" / c.name)["features.1.weight"].flatten().tolist()) for c in configs}) == 3
    )


def test_stopped_killed_and_resumed_it_is_the_same_to_the_bit(tmp_path):
    """Stops at every pause; at some, one run's files are put back, as a kill between two saves leaves them."""
    configs = runs_of(effective_steps=90, l=4)  # rows 60 steps apart: pauses fall between them
    assert together(configs, tmp_path / "whole")
    out, old = tmp_path / "x", tmp_path / "old"
    torn = 0
    for round_ in range(100):
        if together(configs, out, should_stop=lambda: True):
            break
        if round_ % 3 == 1:
            victim = configs[torn % 3].name
            shutil.rmtree(out / victim)
            shutil.copytree(old / victim, out / victim)
            torn += 1
        shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(out, old)
    assert torn > 2
    assert_same_runs(configs, tmp_path / "whole", out)


def test_a_run_that_diverges_stops_alone_at_the_row_that_shows_it(tmp_path):
    configs = runs_of(rows=60)
    training = FusedTraining(configs, DIGITS)
    while not all(run.ended for run in training.runs):
        training.advance()
        for run in training.runs:
            if run.step in run.config.row_steps and run.rows[-1]["step"] != run.step:
                if run.step == 40 and run.replica == 1:
                    training.fused.weights[1].fill_(math.nan)
                run.end_row()
    bad = training.runs[1]
    assert bad.diverged
    assert bad.rows[-1]["effective_step"] == 21
    assert not any(run.diverged for run in (training.runs[0], training.runs[2]))
    assert together(configs, tmp_path)
    for run in (training.runs[0], training.runs[2]):
        theirs = rows(tmp_path / run.config.name)
        assert [row["amplified_loss"] for row in theirs[1:]] == [str(row["amplified_loss"]) for row in run.rows[1:]]


def test_a_diverged_run_is_told_like_any_other_and_left_alone(tmp_path):
    config = dataclasses.replace(BASE, lr=1e12, weight_decay=1e6)
    assert train(config, tmp_path)
    found = load_run(tmp_path)
    assert found.diverged_at == float(rows(tmp_path)[-1]["effective_step"]) < 60
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(config, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_rows_without_a_measured_step_leave_the_noise_out(tmp_path):
    config = dataclasses.replace(BASE, l=1, stat_every=25)
    assert train(config, tmp_path)
    assert [row["grad_sq_norm"] != "" for row in rows(tmp_path)[1:]] == [True, False, True, False, False, True]
    assert not load_run(tmp_path).diverged_at
    assert float(rows(tmp_path)[0]["noise_cost"]) == 1 / 25


def test_a_folder_that_is_busy_or_of_the_other_engine_is_refused_and_none_is_trained(tmp_path):
    configs = runs_of()
    with alone_in_made(tmp_path / configs[2].name), pytest.raises(RunBusyError, match="seed2"):
        together(configs, tmp_path)
    assert not list(tmp_path.glob("*/checkpoint.pt"))
    assert train(dataclasses.replace(configs[0], engine="torch", stat_every=1), tmp_path / configs[0].name)
    with pytest.raises(CheckpointError, match="engine is 'torch' there and 'fused' here"):
        together(configs, tmp_path)
    assert not (tmp_path / configs[1].name / "checkpoint.pt").exists()


def alone_in_made(folder):
    folder.mkdir()
    return alone_in(folder)


@pytest.mark.parametrize(
    ("change", "message"), [("sums", "sums must be"), ("head", "the head must be"), ("model", "KeyError")]
)
def test_a_checkpoint_with_half_a_state_is_refused(tmp_path, change, message):
    config = dataclasses.replace(BASE, l=1)
    together([config], tmp_path, should_stop=lambda: True)
    path = tmp_path / config.name / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    state = content["state"]
    if change == "sums":
        state["sums"] = torch.zeros(3)
    elif change == "head":
        state["model"]["head"] += 1
    else:
        del state["model"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        train(config, tmp_path / config.name)


def test_an_experiment_is_not_continued_by_the_other_engine(tmp_path):
    prepare_folder(tmp_path, ExperimentConfig(seeds=1), resume=False)
    with pytest.raises(ExperimentError, match="replicas is 'auto' there and 'off' here"):
        prepare_folder(tmp_path, ExperimentConfig(seeds=1, replicas="off"), resume=True)


@pytest.mark.parametrize(("model", "message"), [("preresnet8-gn", "PreActBlock"), ("vgg11-bn", "BatchNorm2d")])
def test_nets_that_the_kernel_does_not_serve_are_refused_by_layer_where_replicas_are_asked_for(model, message):
    config = ExperimentConfig(model=model, replicas=2, seeds=1, batch_size=(2,), l=(1,))
    with pytest.raises(ConfigError, match=f"{message}.*replicas off"):
        check_experiment(config)


def test_groups_are_of_one_kind_and_as_large_as_asked():
    config = ExperimentConfig(seeds=5, replicas=2)
    groups = _groups(config, jobs=2)
    assert sorted(run.name for group in groups for run in group) == sorted(run.name for run in config.runs())
    assert {len(group) for group in groups} == {1, 2}
    assert all(len({(run.batch_size, run.l) for run in group}) == 1 for group in groups)
    assert {len(group) for group in _groups(ExperimentConfig(replicas="off"), jobs=2)} == {1}
    assert {len(group) for group in _groups(ExperimentConfig(), jobs=2)} == {24}
    assert {len(group) for group in _groups(ExperimentConfig(), jobs=64)} == {2}


def test_both_engines_have_one_law(tmp_path):
    """Means over 12 seeds of loss, accuracy, R, G and N differ by less than 4.5 standard errors."""
    columns = ("test_loss", "test_accuracy", "amplified_loss", "weight_sq_norm", "grad_sq_norm", "noise_trace")
    ends = {}
    for engine in ("torch", "fused"):
        configs = runs_of(12, l=1, effective_steps=30, rows=1, engine=engine, stat_every=1)
        groups = [configs] if engine == "fused" else [[config] for config in configs]
        ends[engine] = torch.tensor(
            [[run.rows[-1][column] for column in columns] for group in groups for run in trained(group)]
        )
    torch_, fused = ends["torch"].double(), ends["fused"].double()
    error = ((torch_.var(0) + fused.var(0)) / 12).sqrt()
    assert ((torch_.mean(0) - fused.mean(0)).abs() < 4.5 * error).all()
    assert all(math.isfinite(e) and e > 0 for e in error.tolist())


def trained(group):
    engine = make_engine(group, DIGITS)
    while engine.runs[0].step < group[0].steps:
        engine.advance()
    for run in engine.runs:
        run.end_row()
    return engine.runs
