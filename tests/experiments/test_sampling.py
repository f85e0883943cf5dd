"""How batches are drawn: pairs are independent in either mode, and its noise factor is in every estimate, exactly."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from make_runs import write_run
from scipy import stats

import svag_fast
from svag_fast.analysis.prediction import from_csv, from_runs
from svag_fast.analysis.report import make_report
from svag_fast.analysis.runs import load_run
from svag_fast.analysis.verdict_text import shared_limit_sentence
from svag_fast.cli.main import main
from svag_fast.experiments.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from svag_fast.experiments.config import SAMPLINGS, UNSAID, ExperimentConfig, RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.experiment_folder import read_experiment
from svag_fast.experiments.training import Training
from svag_fast.noise import estimators as noise
from svag_fast.plots.prediction import figure
from svag_fast.stats.sampling import noise_factor
from svag_fast.theory.closeness import simple_noise_scale

N, B = 4, 2  # small enough to count every pair of batches
DRAWS = {
    "replacement": list(itertools.product(range(N), repeat=B)),
    "distinct": list(itertools.permutations(range(N), B)),
}


def population(sampling, n=N):
    return n if sampling == "distinct" else None


def test_images_are_drawn_with_replacement_unless_asked_otherwise():
    assert ExperimentConfig().sampling == "replacement"
    assert {run.sampling for run in ExperimentConfig().runs()} == {"replacement"}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_over_all_pairs_of_batches_g_and_n_of_a_real_step_are_those_of_the_data(sampling):
    """E⟨g1, g2⟩ = |∇L|² and E|g1 - g2|²/2 = noise_factor Tr Σ₁/B through `SVAG.step`; B_simple has no factor left."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(N, 3, dtype=torch.float64, generator=generator) + 1
    means = [data[list(batch)].mean(0) for batch in DRAWS[sampling]]
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = svag_fast.SVAG([x], lr=0.0)  # at l = 1: the same batch twice, one of all pairs, is no fault
    running = svag_fast.RunningNoise()
    for g1, g2 in itertools.product(means, repeat=2):
        x.grad = g1.clone()
        optimizer.hold_gradient()
        x.grad = g2.clone()
        running.update(optimizer.step())
    sample = float((data - data.mean(0)).square().sum(1).mean())
    G, batch = float(data.mean(0).square().sum()), noise_factor(B, population(sampling)) * sample / B
    assert running.grad_sq_norm.mean == pytest.approx(G, rel=1e-14)
    assert running.noise_trace.mean == pytest.approx(batch, rel=1e-14)
    assert batch == pytest.approx(sample / B * (1 if sampling == "replacement" else (N - B) / (N - 1)), rel=1e-15)
    found = running.noise_scale(B, population=population(sampling))
    assert found.mean == pytest.approx(sample / G, rel=1e-13)
    assert found.standard_error / found.mean == pytest.approx(running.nsr.standard_error / running.nsr.mean)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_trainers_two_batches_are_independent_and_uniform(sampling):
    """Every ordered pair of batches comes equally often: Pearson's χ² over all 256 or 144 cells, at 1 in 10⁴."""
    digits = load_dataset("digits")
    tiny = dataclasses.replace(digits, train_images=digits.train_images[:N], train_labels=torch.arange(N))
    config = RunConfig(batch_size=B, lr=0.1, l=2, seed=0, effective_steps=1, sampling=sampling)
    training = Training(config, tiny)
    cells = len(DRAWS[sampling]) ** 2
    pairs = Counter(tuple(training._two_batches()[1].tolist()) for _ in range(20 * cells))
    assert set(pairs) == {a + b for a, b in itertools.product(DRAWS[sampling], repeat=2)}
    chi2 = sum((count - 20) ** 2 / 20 for count in pairs.values())
    assert 1e-4 < stats.chi2.sf(chi2, cells - 1) < 1 - 1e-4


def test_the_factor_is_the_one_of_sampling_theory_and_bad_sizes_are_refused():
    assert noise_factor(8, None) == noise_factor(1, 10) == 1
    assert noise_factor(128, 1437) == (1437 - 128) / 1436
    assert noise_factor(np.int64(10), 10) == 0
    for wrong in ((0, None), (11, 10), (1, 1)):
        with pytest.raises(ValueError, match="must be at least"):
            noise_factor(*wrong)
    with pytest.raises(TypeError, match="population must be an int, got float"):
        noise_factor(2, 10.0)
    with pytest.raises(ValueError, match="no noise"):
        simple_noise_scale(1.0, 0.0, 10, population=10)
    with pytest.raises(ValueError, match=r"batch_size must be a whole number, got 2\.5"):
        simple_noise_scale(1.0, 1.0, 2.5, population=10)
    with pytest.raises(ValueError, match="no noise"):
        svag_fast.RunningNoise().noise_scale(10, population=10)


def write_log(path, *, batch_size, n):
    """A log at G = 2 and Tr Σ₁ = 40, of batches of distinct samples of n."""
    rng = np.random.default_rng(0)
    N_B = 40 / batch_size * noise_factor(batch_size, n)
    rows = [f"{i},{2 + 0.01 * rng.normal()},{N_B * (1 + 0.01 * rng.normal())}" for i in range(60)]
    path.write_text("step,G,N\n" + "\n".join(rows) + "\n")


def test_one_noise_scale_comes_out_of_every_batch_size_and_either_draw(tmp_path):
    """B_simple = Tr Σ₁/G = 20; B* takes N as it was drawn, since the theorem is about the batches that there were."""
    for batch_size, n in ((8, None), (8, 100), (64, 100)):
        write_log(tmp_path / "log.csv", batch_size=batch_size, n=n)
        found = from_csv(tmp_path / "log.csv", batch_size=batch_size, lr=0.1, population=n)
        assert found.noise_scale.value == pytest.approx(20, rel=0.01)
        drawn = 20 / batch_size * noise_factor(batch_size, n)
        assert found.batch_size().value == pytest.approx(2 * batch_size * (1 + drawn), rel=0.01)
        assert (f"B·N/G·(n-1)/(n-B), n = {n}, is" in found.headline()) == (n is not None)
        (axes,) = figure([found]).axes
        (line,) = (line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 50)
        at, drawn = line.get_xdata()[-1], line.get_ydata()[-1]
        law = 1.0 if n is None else (n - at) / (n - 1)
        assert drawn == pytest.approx(at / law / 20, rel=0.01)
    assert "B* is more than the 100 samples" in " ".join(found.sentences())


def test_predict_takes_the_population_of_another_trainers_log(tmp_path):
    write_log(tmp_path / "log.csv", batch_size=64, n=100)
    command = ["predict", str(tmp_path / "log.csv"), "--batch-size", "64", "--lr", "0.1"]
    said = " ".join(CliRunner().invoke(main, [*command, "--population", "100"]).output.split())
    assert "B_simple = B·N/G·(n-1)/(n-B), n = 100, is 20" in said
    refused = CliRunner().invoke(main, [*command, "--population", "50"])
    assert refused.exit_code == 1
    assert "population must be at least 2 and at least the 64 samples drawn, got 50" in " ".join(refused.output.split())


def write_grid(folder, *, seeds=2, **settings):
    for batch_size in (8, 128):
        for l in (1, 4, 8):
            for seed in range(seeds):
                write_run(folder, batch_size=batch_size, l=l, seed=seed, **settings)


@pytest.mark.parametrize("said", [{"sampling": "distinct"}, {}, {"sampling": "replacement"}], ids=str)
def test_report_says_where_batch_sizes_differ_in_their_noise_factor(tmp_path, said):
    """Folders of older versions that name no sampling had distinct images."""
    write_grid(tmp_path, **said)
    report = make_report(tmp_path)
    distinct = said.get("sampling") != "replacement"
    n = 1437 if distinct else None
    assert load_run(tmp_path / "B8-l1-seed0").population == n
    summary = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    for size in ("8", "128"):
        found = summary["batch_sizes"][size]
        assert found["sampling"] == ("distinct" if distinct else "replacement")
        assert found["noise_factor"] == noise_factor(int(size), n)
    ratio = summary["shared_limit"]["batch_sizes"]["128"]["noise_ratio"]
    assert ratio == pytest.approx((1437 - 128) / (1437 - 8) if distinct else 1)
    words = shared_limit_sentence(report.shared[0])
    assert ("N at B = 128 is 8.4 % below what 1/B makes of B = 8's" in words) == distinct
    nsr = from_runs(tmp_path).baseline.equilibrium.nsr.value
    assert summary["prediction"]["noise_scale"]["value"] == pytest.approx(8 * nsr / noise_factor(8, n))
    assert ("its N is 8.4 % below 1/B's law" in " ".join(summary["prediction"]["verdict"])) == distinct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "shuffled"}, "sampling must be one of replacement, distinct, got 'shuffled'"),
        ({"sampling": ["distinct"]}, "sampling must be one of replacement, distinct, got a list"),
        ({"sampling": "distinct", "batch_size": 1500}, "batch_size must be at most 1437 where images are distinct"),
    ],
    ids=str,
)
def test_a_draw_that_can_not_be_is_refused(tmp_path, change, message):
    run = write_run(tmp_path, **{k: v for k, v in change.items() if k != "batch_size"})
    config = json.loads((run / "config.json").read_text()) | change
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_run(run)


def test_a_run_that_names_neither_its_draw_nor_a_known_data_set_has_no_factor(tmp_path):
    assert load_run(write_run(tmp_path, dataset="mine")).population is None
    assert load_run(write_run(tmp_path, batch_size=2000)).population is None  # of 1,437 images: not distinct ones


def test_settings_that_are_not_those_of_the_folders_name_are_refused(tmp_path):
    """As where batch_size was edited in config.json; a name of another kind says nothing."""
    run = write_run(tmp_path, batch_size=8, l=2, seed=1).rename(tmp_path / "b8-lr0.1-l2-seed1")
    assert load_run(run).batch_size == 8
    config = json.loads((run / "config.json").read_text())
    for change in ({"batch_size": 16}, {"lr": 0.2}, {"l": 2.5}, {"seed": 0}):
        (run / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"its folder is b8-lr0[.]1-l2-seed1: was one of them changed"):
            load_run(run)
    (run / "config.json").write_text(json.dumps(config | {"batch_size": 16}))
    assert load_run(run.rename(tmp_path / "mine")).batch_size == 16


def test_distinct_images_of_a_data_set_of_unknown_size_are_said_to_be_so(tmp_path):
    for batch_size in (8, 16):
        write_run(tmp_path, batch_size=batch_size, dataset="mine", sampling="distinct")
    report = make_report(tmp_path)
    (shared,) = report.shared
    assert shared.noise_ratio is None
    assert "of a data set whose size isn't known" in shared_limit_sentence(shared)
    assert "B_simple lacks its factor" in " ".join(from_runs(tmp_path).sentences())
    known = write_run(tmp_path / "known", sampling="distinct")
    assert not load_run(known).unsized


def test_an_older_folder_goes_on_as_it_began(tmp_path):
    """Where experiment.json and the checkpoint don't name what came later, they mean what was done then."""
    settings = ExperimentConfig(seeds=1).to_dict()
    assert settings["effective_steps"] is None
    for later in ("sampling", "init", "label_noise", "replicas", "stat_every"):
        del settings[later]
    (tmp_path / "experiment.json").write_text(json.dumps(settings))
    found = read_experiment(tmp_path)
    assert (found.sampling, found.init, found.label_noise, found.engine) == ("distinct", "shared", 0, "torch")
    assert found.runs()[0].effective_steps == 1008
    config = dataclasses.asdict(found.runs()[0])
    older = {k: v for k, v in config.items() if k not in UNSAID}
    save_checkpoint(tmp_path / "checkpoint.pt", older, {"step": 1})
    assert load_checkpoint(tmp_path / "checkpoint.pt", config) == {"step": 1}
    with pytest.raises(CheckpointError, match="sampling is 'distinct' there and 'replacement' here"):
        load_checkpoint(tmp_path / "checkpoint.pt", config | {"sampling": "replacement"})


def test_two_halves_of_one_draw_are_no_independent_pair():
    """The counter-example that the tests above would catch: E⟨g1, g2⟩ = |∇L|² - Tr Σ₁/(n - 1)."""
    data = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    G, sample = float(data.mean(0).square().sum()), float((data - data.mean(0)).square().sum(1).mean())
    draws = [data[list(p)] for p in itertools.permutations(range(N))]
    inner = math.fsum(float(d[:B].mean(0) @ d[B:].mean(0)) for d in draws) / len(draws)
    assert inner == pytest.approx(G - sample / (N - 1), rel=1e-13)
    halves = [
        noise.from_two_batches(a @ a, b @ b, a @ b, batch_size=B, population=N, disjoint=True)
        for a, b in ((d[:B].mean(0), d[B:].mean(0)) for d in draws)
    ]
    assert float(torch.stack([e.grad_sq_norm for e in halves]).mean()) == pytest.approx(G, rel=1e-13)
