"""How batches are drawn: which pairs are independent, and each mode's noise factor in every estimate, exactly."""

import dataclasses
import functools
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
from svag_fast.experiments.config import UNSAID, ExperimentConfig, RunConfig
from svag_fast.experiments.data import draw_batch, load_dataset
from svag_fast.experiments.data.sampling import MODES, is_disjoint, make_streams
from svag_fast.experiments.experiment_folder import read_experiment
from svag_fast.experiments.training import Training
from svag_fast.noise import estimators as noise
from svag_fast.ops.step import svag_coefficients
from svag_fast.plots.prediction import figure
from svag_fast.stats.sampling import halves_noise_factor, noise_factor
from svag_fast.theory.closeness import simple_noise_scale

N, B = 4, 2  # small enough to count every pair of batches
SINGLE = {
    "replacement": list(itertools.product(range(N), repeat=B)),
    "distinct": list(itertools.permutations(range(N), B)),
}
SINGLE |= {"shuffle": SINGLE["distinct"], "fixed": SINGLE["distinct"]}
# Every pair of batches that a step may draw at l > 1, each as likely as the others; "shuffle" is one epoch of one step.
PAIRS = {mode: [a + b for a, b in itertools.product(SINGLE[mode], repeat=2)] for mode in ("replacement", "distinct")}
PAIRS |= {mode: list(itertools.permutations(range(N))) for mode in ("halves", "shuffle")}


def population(sampling, n=N):
    return n if sampling != "replacement" else None


def generators(seed=0):
    return [seed, seed + 1]


def test_images_are_drawn_with_replacement_unless_asked_otherwise():
    assert ExperimentConfig().sampling == "replacement"
    assert {run.sampling for run in ExperimentConfig().runs()} == {"replacement"}


def gradients():
    data = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    return data, float(data.mean(0).square().sum()), float((data - data.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("sampling", ["replacement", "distinct"])
def test_over_all_pairs_of_batches_g_and_n_of_a_real_step_are_those_of_the_data(sampling):
    """E⟨g1, g2⟩ = |∇L|² and E|g1 - g2|²/2 = noise_factor Tr Σ₁/B through `SVAG.step`; B_simple has no factor left."""
    data, G, sample = gradients()
    means = [data[list(batch)].mean(0) for batch in SINGLE[sampling]]
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = svag_fast.SVAG([x], lr=0.0)  # at l = 1: the same batch twice, one of all pairs, is no fault
    running = svag_fast.RunningNoise()
    for g1, g2 in itertools.product(means, repeat=2):
        x.grad = g1.clone()
        optimizer.hold_gradient()
        x.grad = g2.clone()
        running.update(optimizer.step())
    batch = noise_factor(B, population(sampling)) * sample / B
    assert running.grad_sq_norm.mean == pytest.approx(G, rel=1e-14)
    assert running.noise_trace.mean == pytest.approx(batch, rel=1e-14)
    assert batch == pytest.approx(sample / B * (1 if sampling == "replacement" else (N - B) / (N - 1)), rel=1e-15)
    found = running.noise_scale(B, population=population(sampling))
    assert found.mean == pytest.approx(sample / G, rel=1e-13)
    assert found.standard_error / found.mean == pytest.approx(running.nsr.standard_error / running.nsr.mean)


@pytest.mark.parametrize("sampling", PAIRS)
@pytest.mark.parametrize("samples", [False, True], ids=["two batches", "sample norms"])
def test_over_all_pairs_of_batches_the_estimates_of_every_mode_are_those_of_the_data(sampling, samples):
    """G, N_B = Tr Cov(g1), and Tr Σ₁, exactly, with the mode's population and disjointness; N_B counted here too."""
    data, G, sample = gradients()
    drawn = {"population": population(sampling), "disjoint": is_disjoint(sampling, 2)}
    found = []
    for pair in PAIRS[sampling]:
        g = data[list(pair)]
        g1, g2 = g[:B].mean(0), g[B:].mean(0)
        norms = g1 @ g1, g2 @ g2, g1 @ g2
        if samples:
            found.append(noise.from_two_batches_of_samples(g.square().sum(1), *norms, **drawn))
        else:
            found.append(noise.from_two_batches(*norms, batch_size=B, **drawn))
    means = torch.stack([torch.stack(list(estimate)) for estimate in found]).mean(0).tolist()
    firsts = torch.stack([data[list(pair[:B])].mean(0) for pair in PAIRS[sampling]])
    counted = float((firsts - data.mean(0)).square().sum(1).mean())
    assert counted == pytest.approx(noise_factor(B, population(sampling)) * sample / B, rel=1e-14)
    assert means == pytest.approx([G, counted, sample], rel=1e-12)


@pytest.mark.parametrize("l", [1, 2, 5.5, 1e6])
@pytest.mark.parametrize("sampling", PAIRS)
def test_the_noise_of_svag_s_step_is_the_factor_s_in_every_mode(sampling, l):
    """Tr Cov(c1 g1 + c2 g2), counted over all pairs, over l Tr Σ₁/B; of halves it tends to n/(n - 1)."""
    data, _, sample = gradients()
    c1, c2 = svag_coefficients(l)
    steps = torch.stack([c1 * data[list(p[:B])].mean(0) + c2 * data[list(p[B:])].mean(0) for p in PAIRS[sampling]])
    counted = float((steps - data.mean(0)).square().sum(1).mean()) / (l * sample / B)
    halves = is_disjoint(sampling, 2)
    factor = halves_noise_factor(B, N, l) if halves else noise_factor(B, population(sampling))
    assert counted == pytest.approx(factor, rel=1e-9)
    assert halves_noise_factor(B, N, math.inf) == N / (N - 1)


def test_the_noise_of_shuffled_halves_stays_over_an_epoch_and_that_of_two_shuffled_streams_is_gone():
    """Why an epoch is halved: over all orders of an epoch of n = 4, B = 1, the noise of its steps' sum, by l Tr Σ₁."""
    data, _, sample = gradients()
    c1, c2 = svag_coefficients(4.0)
    orders = [data[list(p)] for p in itertools.permutations(range(N))]
    halved = torch.stack([c1 * (o[0] + o[2]) + c2 * (o[1] + o[3]) for o in orders])
    spread = float((halved - halved.mean(0)).square().sum(1).mean()) / (2 * 4 * sample)
    assert spread == pytest.approx(N / (N - 1) * (1 - 1 / (2 * 4)), rel=1e-12)  # two steps of it
    streams = torch.stack([c1 * one.sum(0) + c2 * other.sum(0) for one, other in itertools.product(orders, repeat=2)])
    assert float((streams - streams.mean(0)).square().sum(1).max()) < 1e-25


def stream(sampling, *, n=N, size=B, l=2.0, seed=0):
    return make_streams(sampling, n, size, generators(seed), l=l)


def chi2_of(seen, cells, expected):
    """Pearson's p; every one of the cells must be there, and no other."""
    assert set(seen) == set(cells)
    chi2 = sum((seen[cell] - expected) ** 2 / expected for cell in cells)
    return stats.chi2.sf(chi2, len(cells) - 1)


@pytest.mark.parametrize("sampling", PAIRS)
def test_the_trainers_two_batches_are_all_pairs_equally_often(sampling):
    """Pearson's χ² over all 256, 144 or 24 pairs, at 1 in 10⁴: independent in two modes, halves of one draw in two."""
    digits = load_dataset("digits")
    tiny = dataclasses.replace(digits, train_images=digits.train_images[:N], train_labels=torch.arange(N))
    config = RunConfig(batch_size=B, lr=0.1, l=2, seed=0, effective_steps=1, sampling=sampling)
    training = Training(config, tiny)
    seen = Counter(tuple(training._two_batches()[1].tolist()) for _ in range(20 * len(PAIRS[sampling])))
    assert 1e-4 < chi2_of(seen, PAIRS[sampling], 20) < 1 - 1e-4


@pytest.mark.parametrize("sampling", ["shuffle", "fixed"])
def test_sgd_s_second_batch_is_independent_of_its_first_and_of_where_the_epoch_stands(sampling):
    """Over runs, 3 steps into an epoch of 4 batches of 1: all 16 pairs equally often."""
    seen = Counter()
    for seed in range(20 * 16):
        one = stream(sampling, size=1, l=1.0, seed=2 * seed)
        for _ in range(3):
            pair = one.next_indices()
        seen[tuple(pair.tolist())] += 1
    assert 1e-4 < chi2_of(seen, list(itertools.product(range(N), repeat=2)), 20) < 1 - 1e-4


@pytest.mark.parametrize(("sampling", "l", "taken"), [("shuffle", 1.0, 3), ("fixed", 1.0, 3), ("shuffle", 4.0, 6)])
def test_an_epoch_has_each_sample_once_and_drops_the_last_incomplete_batch(sampling, l, taken):
    """n = 11, B = 3: SGD takes 3 batches an epoch, SVAG 2B = 6 once."""
    one = stream(sampling, n=11, size=3, l=l)
    size, steps = (taken, 11 // taken)
    epochs = []
    for _ in range(40):
        drawn = torch.cat([one.next_indices()[:size] for _ in range(steps)]).tolist()
        assert len(set(drawn)) == len(drawn) == steps * size
        epochs.append(tuple(drawn))
    assert len(set(epochs)) == (1 if sampling == "fixed" else 40)
    if sampling == "shuffle":
        counts = torch.bincount(torch.tensor(epochs).flatten(), minlength=11)
        part = steps * size / 11  # of the samples, of which all are left out equally often
        assert (counts - 40 * part).abs().max() < 4.5 * (40 * part * (1 - part)) ** 0.5


def test_a_fixed_order_is_the_run_s_own():
    first, again, other = (stream("fixed", n=50, l=1.0, seed=seed).next_indices()[:B].tolist() for seed in (0, 0, 7))
    assert first == again != other


@pytest.mark.parametrize(("sampling", "l"), [*itertools.product(PAIRS, (1.0, 2.0)), ("fixed", 1.0)])
def test_streams_continue_in_mid_epoch_from_a_saved_state_to_the_bit(sampling, l, tmp_path):
    one, other = (stream(sampling, n=23, size=3, l=l, seed=seed) for seed in (0, 5))
    for steps in (0, 1, 2, 9):
        for _ in range(steps):
            one.next_indices()
        torch.save(one.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        later = [one.next_indices() for _ in range(30)]
        assert all(torch.equal(a, other.next_indices()) for a in later)


def test_the_two_older_modes_have_the_bits_of_before_and_take_an_older_state():
    for sampling, replacement in (("replacement", True), ("distinct", False)):
        plain = [torch.Generator().manual_seed(seed) for seed in generators()]
        draw = functools.partial(draw_batch, 20, 3, replacement=replacement)
        one = stream(sampling, n=20, size=3)
        for _ in range(5):
            assert torch.equal(one.next_indices(), torch.cat([draw(generator=g) for g in plain]))
        older = stream(sampling, n=20, size=3)
        older.load_state_dict([g.get_state() for g in plain])
        assert torch.equal(older.next_indices(), one.next_indices())


@pytest.mark.parametrize(
    "change",
    [{"taken": -1}, {"taken": 24}, {"taken": 2.0}, {"epoch": None}, {"epoch": torch.zeros(3)}, {"generators": []}],
    ids=str,
)
def test_a_state_that_is_not_the_stream_s_is_refused(change):
    one = stream("shuffle", n=23, size=3)
    one.next_indices()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        stream("shuffle", n=23, size=3).load_state_dict(one.state_dict() | change)
    with pytest.raises(ValueError, match="of the same sampling"):
        stream("distinct", n=23, size=3).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sometimes", 10, 2, 1.0), "sampling must be one of replacement, distinct, halves, shuffle, fixed, got 'some"),
        (("distinct", 10, 11, 2.0), "batch_size must be at most 10, the size of"),
        (("halves", 11, 6, 1.0), "batch_size must be at most 5, half the size of"),
        (("shuffle", 11, 6, 2.0), "batch_size must be at most 5, half the size of"),
        (("shuffle", 11, 12, 1.0), "batch_size must be at most 11, the size of"),
        (("fixed", 11, 2, 1.5), "l must be 1 at sampling fixed, got 1.5"),
    ],
)
def test_draws_that_can_t_be_are_refused(arguments, message):
    mode, n, size, l = arguments
    with pytest.raises(ValueError, match=message):
        make_streams(mode, n, size, [0, 1], l=l)


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


@pytest.mark.parametrize(
    ("sampling", "population", "factor"),
    [
        ("replacement", None, 1),
        ("distinct", 1437, 1429 / 1436),
        ("halves", 1437, 1437 / 1436),
        ("shuffle", 1437, 1437 / 1436),
        ("fixed", 1437, 1429 / 1436),
    ],
)
def test_a_run_s_population_is_that_of_its_batches_and_its_factor_that_of_its_sde(
    tmp_path, sampling, population, factor
):
    run = load_run(write_run(tmp_path, sampling=sampling))
    assert (run.population, run.noise_factor) == (population, factor)


@pytest.mark.parametrize(("sampling", "met"), [("shuffle", True), ("fixed", True), ("halves", False)])
def test_a_prediction_says_where_g_is_of_images_that_the_weights_have_met(tmp_path, sampling, met):
    """BatchNorm nets' G is of both batches; with per-sample norms SGD's second batch, drawn afresh, is enough."""
    write_grid(tmp_path, sampling=sampling)
    for table in tmp_path.glob("*/metrics.csv"):
        table.write_text(table.read_text().replace("per_sample", "two_batches"))
    said = "G is too high by an unknown part"
    assert (said in " ".join(from_runs(tmp_path).sentences())) == met
    sgd = load_run(tmp_path / "B8-l1-seed0")
    assert not dataclasses.replace(sgd, noise_source="per_sample").met_its_batches
    svag = load_run(tmp_path / "B8-l4-seed0")
    assert dataclasses.replace(svag, noise_source="per_sample").met_its_batches == met


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sampling", "l", "low", "high"),
    [
        ("replacement", 1.0, -0.25, 0.25),
        ("halves", 4.0, -0.25, 0.25),
        ("shuffle", 1.0, 0.1, 0.6),
        ("shuffle", 4.0, 0.1, 0.5),
    ],
)
def test_two_batches_of_an_epoch_make_g_too_high(sampling, l, low, high):
    """Softmax regression on digits, B = 32, lr 0.1, 8,000 steps: the mean of G's and N's errors, over G and N."""
    digits = load_dataset("digits", label_noise=0.2)
    x, labels = digits.train_images.flatten(1).double(), torch.eye(10, dtype=torch.float64)[digits.train_labels]
    n, size, c = len(x), 32, svag_coefficients(l)
    batches, weights = make_streams(sampling, n, size, [0, 1], l=l), torch.zeros(64, 10, dtype=torch.float64)
    halves = is_disjoint(sampling, l)
    found = []
    for step in range(8000):
        errors = torch.softmax(x @ weights, 1) - labels
        g1, g2 = (x[i].T @ errors[i] / size for i in batches.next_indices().split(size))
        if step >= 1600:
            G = (x.T @ errors / n).square().sum()
            sample = (x.square().sum(1) * errors.square().sum(1)).mean() - G
            norms = [(a * b).sum() for a, b in ((g1, g1), (g2, g2), (g1, g2))]
            drawn = {"batch_size": size, "population": n, "disjoint": True} if halves else {}
            estimate = noise.from_two_batches(*norms, **drawn)
            N = sample / size * noise_factor(size, population(sampling, n))
            found.append((estimate.grad_sq_norm - G, estimate.noise_trace - N, G, N))
        weights -= 0.1 / l * (c[0] * g1 + c[1] * g2 + 0.001 * weights)
    G_error, N_error, G, N = torch.tensor(found).mean(0).tolist()
    print(f"{sampling}, l = {l:g}: G {100 * G_error / G:+.1f} %, N {100 * N_error / N:+.1f} %, N/G {N / G:.1f}")
    assert low < G_error / G < high
    assert abs(N_error / N) < 0.02


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
        (
            {"sampling": "shuffled"},
            f"sampling must be one of {', '.join(MODES)}, got 'shuffled'",
        ),
        (
            {"sampling": ["distinct"]},
            f"sampling must be one of {', '.join(MODES)}, got a list",
        ),
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


def test_an_older_folder_continues_as_it_began(tmp_path):
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
