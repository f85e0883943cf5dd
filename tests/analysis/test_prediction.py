"""Predictions from run folders and CSV files: the numbers, the words, the command, the picture."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from scipy.signal import lfilter

from svag_fast.analysis import prediction as predict
from svag_fast.analysis.prediction import TooFewRowsError, from_csv, from_runs
from svag_fast.cli.main import main
from svag_fast.plots import prediction as predict_figure

LR, WEIGHT_DECAY = 0.1, 0.02
COLUMNS = [
    *("step", "effective_step", "time", "train_loss", "amplified_loss", "test_loss", "train_accuracy"),
    *("test_accuracy", "grad_sq_norm", "noise_trace", "weight_sq_norm", "nsr", "noise_source", "lr"),
    "samples_per_second",
]


def ar1(rng, n, phi=0.5):
    return lfilter([1.0], [1.0, -phi], rng.standard_normal(n + 100) * math.sqrt(1 - phi * phi))[100:]


def rows_of(rng, *, rows=240, batch_size=8, nsr=1.1, per=5, decay_at=0.8, ratio=1.0):
    """Rows at equation (11)'s equilibrium in the first phase (settling at first), other ones after the decay."""
    kappa = batch_size / 8
    step = per * np.arange(1, rows + 1)
    late = step > decay_at * step[-1]
    lr = np.where(late, 0.1, 1.0) * LR * kappa
    settle = 1 + 5 * np.exp(-np.arange(rows) / (0.1 * rows))
    G = settle * 2.0 * (1 + 0.05 * ar1(rng, rows)) * np.where(late, 0.3, 1.0)
    N = settle * 2.0 * nsr * (1 + 0.05 * ar1(rng, rows)) * np.where(late, 3.0, 1.0)
    R = ratio * lr * 2.0 * (1 + nsr) / ((2 - lr * WEIGHT_DECAY) * WEIGHT_DECAY) * (1 + 0.01 * ar1(rng, rows))
    return step, lr, G, N, R


def write_run(folder, *, batch_size=8, l=1, seed=0, lr=None, skip=(), sampling="replacement", **options):
    """A run folder as training leaves it; rows in ``skip`` have measured no G and N."""
    rng = np.random.default_rng([batch_size, l, seed])
    lr = LR * batch_size / 8 if lr is None else lr
    run = folder / f"b{batch_size}-lr{lr:g}-l{l}-seed{seed}"
    run.mkdir(parents=True)
    config = {
        "dataset": "digits",
        "model": "digits-net",
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": WEIGHT_DECAY,
        "l": l,
        "seed": seed,
        "effective_steps": 1200,
        "sampling": sampling,
        "schedule": "step",
        "versions": {},
        "commit": None,
    }
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        for i, (step, rate, G, N, R) in enumerate(zip(*rows_of(rng, batch_size=batch_size, **options), strict=True)):
            row = dict.fromkeys(COLUMNS, "")
            row |= {"step": step, "effective_step": step, "time": step * LR, "lr": rate, "noise_source": "two_batches"}
            if i not in skip:
                row |= {"grad_sq_norm": G, "noise_trace": N, "weight_sq_norm": R, "nsr": N / G}
            out.writerow(row)
    return run


@pytest.fixture
def runs(tmp_path):
    """Three seeds of SGD at B = 8 (nsr 1.1), SGD at B = 32 and 128, and SVAG runs that must not matter."""
    for seed in range(3):
        write_run(tmp_path / "runs", seed=seed)
    write_run(tmp_path / "runs", batch_size=32, nsr=0.4)
    write_run(tmp_path / "runs", batch_size=128, nsr=0.1)
    write_run(tmp_path / "runs", batch_size=8, l=4, nsr=50.0)
    return tmp_path / "runs"


def test_the_smallest_batchs_sgd_runs_predict_kappa_and_batch_size(runs):
    found = from_runs(runs)
    assert found.baseline.equilibrium.state == "found"
    assert (found.baseline.batch_size, len(found.baseline.runs)) == (8, 3)
    nsr = found.baseline.equilibrium.nsr
    assert abs(nsr.value - 1.1) < 4 * nsr.standard_error
    assert nsr.standard_error < 0.02
    assert found.kappa["exact"].value == pytest.approx(2 * (1 + nsr.value))
    assert found.kappa["exact"].standard_error == pytest.approx(2 * nsr.standard_error)
    assert found.batch_size().value == pytest.approx(16 * (1 + nsr.value))
    assert [(o.batch_size, o.verdict) for o in found.outlook] == [(32, "silent"), (128, "fails")]
    assert found.outlook[1].measured.equilibrium.nsr.value == pytest.approx(0.1, rel=0.1)


def test_the_sentence_says_what_the_interval_rests_on(runs):
    """One run shows nothing of what runs differ in."""
    assert "(95 % interval " in from_runs(runs).headline()
    assert ", of 3 runs; C = 1.414; equilibrium" in from_runs(runs).headline()
    alone = from_runs(next(path for path in sorted(runs.iterdir()) if path.name.startswith("b8-lr0.1-l1")))
    assert ", of one run, without the scatter between runs; C = 1.414" in alone.headline()


def test_other_batch_sizes_do_not_enter_the_prediction(runs, tmp_path):
    for seed in range(3):
        write_run(tmp_path / "alone", seed=seed)
    together, alone = from_runs(runs), from_runs(tmp_path / "alone")
    assert together.kappa == alone.kappa
    assert replace(together, outlook=()) == alone


def test_seeds_are_averaged_so_that_errors_shrink(tmp_path):
    seeds = 9
    for seed in range(seeds):
        write_run(tmp_path, seed=seed, rows=1000, per=1)
    one, all_of_them = from_runs(tmp_path / "b8-lr0.1-l1-seed0"), from_runs(tmp_path)
    errors = [found.baseline.equilibrium.nsr.standard_error for found in (one, all_of_them)]
    # The root of 9, but for the nine's own error, 8 degrees of freedom, 1 in 1000 on either side, and 20 % for one's.
    spread = [math.sqrt(stats.chi2.ppf(p, seeds - 1) / (seeds - 1)) for p in (1e-3, 1 - 1e-3)]
    assert 3 / spread[1] / 1.2 < errors[0] / errors[1] < 3 / spread[0] * 1.2


def test_the_window_is_the_last_part_of_the_phase_before_the_decay(runs):
    baseline = from_runs(runs, last=0.25).baseline
    assert (baseline.lr, baseline.last_step) == (LR, 960)
    assert (baseline.first_step, baseline.rows) == (725, 48)
    assert baseline.relaxation_times == pytest.approx(4 * LR * WEIGHT_DECAY * 725)


def noisy(lr, step, seed=0):
    """A series with G = 2 and N = 3 and noise, at the given rates and steps."""
    rng, n = np.random.default_rng(seed), len(step)
    G, N = 2 + 0.1 * rng.standard_normal(n), 3 + 0.1 * rng.standard_normal(n)
    return predict.Series(str(seed), 8, 0.0, np.asarray(step, float), np.asarray(lr, float), G, N, None)


def test_the_longest_phase_is_so_in_steps_however_dense_its_rows():
    step = np.concatenate([np.arange(200, 8001, 200), np.arange(8010, 10001, 10)])
    found = predict.measure([noisy(np.where(step <= 8000, 0.1, 0.01), step)])
    assert (found.lr, found.last_step, found.rows) == (0.1, 8000, 12)


def test_rates_that_differ_by_rounding_are_one_phase_and_one_rate():
    step = np.arange(1, 101)
    rate = np.where(step <= 80, 0.1, 0.01)
    jitter = [rate * (1 + 3e-16 * ((step + seed) % 2)) for seed in range(2)]
    found = predict.measure([noisy(lr, step, seed) for seed, lr in enumerate(jitter)])
    assert (found.first_step, found.last_step, found.rows) == (61, 80, 20)
    with pytest.raises(ValueError, match="differ in learning rate"):
        predict.measure([noisy(rate, step), noisy(rate * (1 + 1e-8), step)])


def test_rows_without_noise_are_left_out(tmp_path):
    write_run(tmp_path, skip=range(0, 240, 2))
    assert from_runs(tmp_path).baseline.rows == 24


def test_a_run_that_has_not_come_to_its_decay_is_predicted_from(tmp_path):
    run = write_run(tmp_path)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:101]) + lines[101][:20])  # in the middle of a line
    assert from_runs(run).baseline.last_step == 500


def test_the_window_is_widened_to_twelve_rows(tmp_path):
    write_run(tmp_path, rows=40)
    assert from_runs(tmp_path).baseline.rows == 12


def test_too_short_a_run_is_refused_with_what_to_do(tmp_path):
    write_run(tmp_path, rows=28)
    with pytest.raises(TooFewRowsError, match=r"22 rows .* at least 12: run longer"):
        from_runs(tmp_path)


def test_a_run_off_equilibrium_says_so_and_how_far(tmp_path):
    write_run(tmp_path, ratio=1.5)
    sentences = from_runs(tmp_path).sentences()
    assert "equilibrium not found" in sentences[0]
    assert "left side is +5" in sentences[1]


def test_a_gradient_hidden_by_noise_gives_no_kappa(tmp_path):
    path = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    path.write_text(
        "step,G,N\n" + "".join(f"{i},{-0.1 + 0.01 * rng.normal()},{1 + 0.01 * rng.normal()}\n" for i in range(60))
    )
    found = from_csv(path, batch_size=8, lr=0.1)
    assert found.kappa == {}
    assert found.batch_size() is None
    assert found.batch_size_interval[1] == math.inf
    assert found.as_dict()["batch_size_interval"][1] is None
    assert "no B* can be given" in found.headline()
    assert "Average over more steps" in found.headline()


def test_a_gradient_barely_above_its_noise_gives_no_upper_limit(tmp_path):
    """Fieller's interval: the estimate stands, and the sentence says that nothing bounds it from above."""
    rng = np.random.default_rng(1)
    G, N = 0.1 + rng.normal(size=60) * 0.7, 1 + 0.01 * rng.normal(size=60)
    G += 0.1 - G[-30:].mean()
    lines = [f"{i},{g},{n}" for i, (g, n) in enumerate(zip(G, N, strict=True))]
    (tmp_path / "log.csv").write_text("step,G,N\n" + "\n".join(lines) + "\n")
    found = from_csv(tmp_path / "log.csv", batch_size=8, lr=0.1, last=0.5)
    low, high = found.batch_size_interval
    assert low < found.batch_size().value < high == math.inf
    assert "no upper limit" in found.headline()
    predict_figure.figure([found])


def test_the_headline_names_both_numbers_and_the_state_of_the_equilibrium(runs):
    found = from_runs(runs)
    nsr = found.baseline.equilibrium.nsr.value
    assert found.noise_scale.value == pytest.approx(8 * nsr)
    for part in (f"B* = {16 * (1 + nsr):.3g}", f"B_simple = B·N/G is {8 * nsr:.3g}", "equilibrium found", "C = 1.414"):
        assert part in found.headline()


@pytest.mark.parametrize(
    ("runs", "n", "phi", "level"),
    [
        *((1, 240, 0.0, 0.0), (1, 480, 0.6, 0.0), (8, 120, 0.5, 0.0), (2, 200, 0.5, 0.5), (5, 200, 0.5, 1.0)),
        *(pytest.param(3, *case, marks=pytest.mark.nightly) for case in ((240, 0.6, 0.0), (200, 0.5, 0.3))),
    ],
)
def test_batch_size_intervals_cover_at_the_stated_rate(runs, n, phi, level):
    """The 95 % interval of B* holds the truth in 93 to 97 % of made runs, 20 independent values a run in the window
    or more, G noisy, G and N correlated (binomial, 1 in 10⁴ on either side). Each run's G has a level of its own:
    ``level`` times a run's standard deviation."""
    rng = np.random.default_rng(runs + n)
    draws, truth, covered = 400, 16 * (1 + 1.5), 0
    spread = 0.6 if level == 0 else 0.2  # G stays positive: below 0 intervals cover more
    for _ in range(draws):
        made = []
        for seed in range(runs):
            shared, own = ar1(rng, n, phi), level * rng.standard_normal()
            G, N = 2 * (1 + spread * (shared + own)), 3 * (1 + 0.2 * shared + 0.1 * ar1(rng, n, phi))
            made.append(predict.Series(f"{seed}", 8, 0.0, np.arange(n) + 1.0, np.full(n, 0.1), G, N, None))
        found = predict.from_baseline(predict.measure(made, last=0.25 if phi == 0 else 0.5))
        covered += found.batch_size_interval[0] <= truth <= found.batch_size_interval[1]
    assert stats.binom.ppf(1e-4, draws, 0.93) <= covered <= stats.binom.ppf(1 - 1e-4, draws, 0.97)


def write_csv(path, with_R=True, **options):
    step, lr, G, N, R = rows_of(np.random.default_rng(3), **options)
    lines = [f"{s},{g},{n}" + (f",{r},{e}" if with_R else "") for s, e, g, n, r in zip(step, lr, G, N, R, strict=True)]
    path.write_text("step,G,N" + (",R,lr" if with_R else "") + "\n" + "\n".join(lines) + "\n")


def test_another_trainers_csv_gives_what_its_run_folder_would(tmp_path):
    write_csv(tmp_path / "log.csv")
    found = from_csv(tmp_path / "log.csv", batch_size=8, lr=LR, weight_decay=WEIGHT_DECAY)
    assert found.baseline.equilibrium.state == "found"
    assert found.baseline.last_step == 960
    assert abs(found.baseline.equilibrium.nsr.value - 1.1) < 4 * found.baseline.equilibrium.nsr.standard_error


def test_a_csv_without_weight_norms_serves_too(tmp_path):
    write_csv(tmp_path / "log.csv", with_R=False, decay_at=1.0)
    found = from_csv(tmp_path / "log.csv", batch_size=8, lr=LR)
    assert found.baseline.equilibrium.weight_sq_norm is None
    assert found.baseline.relaxation_times is None
    assert found.baseline.last_step == 1200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no whole row; expected a first line step,G,N"),
        ("step,G\n1,2\n", "no column 'N'"),
        ("step,G,N\n1,2,x\n", "line 2: N is not a number but 'x'"),
        ("step,G,N\n,2,3\n", "line 2: step"),
        ("step,G,N\n2,2,3\n1,2,3\n", "must ascend"),
    ],
)
def test_a_malformed_csv_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_csv(tmp_path / "log.csv", batch_size=8, lr=0.1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("G,N\n{i},2.{i},0", "N is 0 from step 18 on"),
        ("G,N\n{i},0,3", "G is 0 from step 18 on"),
        ("G,N,R\n{i},2.{i},3,0", "R is 0 from step 18 on"),
        ("G,N\n{i},2e-200,3e-200", "G is 2e-200 from step 18 on"),
        ("G,N\n{i},2e200,3e200", "diverged: not finite from step 0 on"),
    ],
)
def test_what_leaves_no_ratio_is_refused_by_name(tmp_path, columns, message):
    header, row = columns.split("\n")
    (tmp_path / "log.csv").write_text(f"step,{header}\n" + "".join(row.format(i=i) + "\n" for i in range(30)))
    with pytest.raises(TooFewRowsError, match=message):
        from_csv(tmp_path / "log.csv", batch_size=8, lr=0.1, weight_decay=0.1)


def test_a_batch_of_all_samples_predicts_nothing(tmp_path):
    write_csv(tmp_path / "log.csv")
    with pytest.raises(TooFewRowsError, match="a batch of all 8 samples has no noise"):
        from_csv(tmp_path / "log.csv", batch_size=8, lr=LR, population=8)


def test_runs_that_share_no_rows_are_refused_as_such(tmp_path):
    write_run(tmp_path, seed=0, rows=100, decay_at=1.0)
    write_run(tmp_path, seed=1, rows=100, decay_at=1.0, per=7)
    with pytest.raises(TooFewRowsError, match=r"rows with G and N of all runs"):
        from_runs(tmp_path)


def test_only_svag_runs_are_refused(tmp_path):
    write_run(tmp_path, l=4)
    with pytest.raises(ValueError, match=r"no SGD run \(l = 1\)"):
        from_runs(tmp_path)


@pytest.mark.parametrize("last", [0.0, 1.5, math.nan])
def test_last_out_of_range_is_refused(runs, last):
    with pytest.raises(ValueError, match="last must be in"):
        from_runs(runs, last=last)


def test_unlike_runs_are_not_averaged(runs):
    series = predict._series(predict.load_run(runs / "b8-lr0.1-l1-seed0"))
    with pytest.raises(ValueError, match="differ in learning rate"):
        predict.measure([series, replace(series, lr=2 * series.lr)])
    with pytest.raises(ValueError, match="differ in batch size"):
        predict.measure([series, replace(series, batch_size=16)])
    with pytest.raises(ValueError, match="series must be one run or more, got none"):
        predict.measure([])


# ---- the command


def invoke(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_command_prints_words_and_writes_the_figure(runs, tmp_path):
    result = invoke(runs, "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert "equilibrium found" in " ".join(result.output.split())
    assert "B = 128 (κ = 16): predicted to fail." in " ".join(result.output.split())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_gives_json_with_all_numbers(runs):
    result = invoke(runs, "--json", "--C", "2")
    (found,) = json.loads(result.output)
    expected = from_runs(runs, C=2.0)
    assert found["C"] == 2.0
    assert found["batch_size"]["value"] == expected.batch_size().value
    assert found["batch_size_interval"] == list(expected.batch_size_interval)
    assert found["baseline"]["equilibrium"]["residual"]["ratio"]["value"] > 0
    assert found["verdict"] == expected.sentences()
    assert [o["verdict"] for o in found["outlook"]] == [
        "undecided" if o.verdict == "undecided" else o.verdict for o in expected.outlook
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "does not exist"),
        (["LOG"], 2, "--batch-size and --lr"),
        (["LOG", "--batch-size", "8", "--lr", "-1"], 1, "lr must be a finite number > 0, got -1"),
        (["RUNS", "--C", "0.5"], 1, "C (ratios are in [1/C, C]) must be a"),
        (["RUNS", "--C", "1e200"], 1, "C (ratios are in [1/C, C]) must be a"),
        (["RUNS", "--plot", "nowhere/out.png"], 1, "nowhere"),
        (["EMPTY"], 1, "no run"),
    ],
)
def test_command_refuses_in_one_line(runs, tmp_path, arguments, code, message):
    write_csv(tmp_path / "log.csv")
    (tmp_path / "empty").mkdir()
    places = {"LOG": tmp_path / "log.csv", "RUNS": runs, "EMPTY": tmp_path / "empty"}
    result = invoke(*(places.get(a, a) for a in arguments))
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


# ---- the figure


def test_figure_shows_baseline_prediction_and_what_was_measured(runs):
    found = from_runs(runs)
    (axes,) = predict_figure.figure([found]).axes
    points = {tuple(np.round(c.lines[0].get_xydata()[0], 6)) for c in axes.containers}
    nsr = found.baseline.equilibrium.nsr.value
    assert (8.0, round(1 / nsr, 6)) in points
    low, high = axes.get_xlim()
    assert low < 8 < found.batch_size().value < high
    assert f"B* = {found.batch_size().value:.3g}" in [t.get_text() for t in axes.texts]


def test_figure_refuses_what_it_can_not_draw(runs):
    found = from_runs(runs)
    with pytest.raises(ValueError, match="nothing to draw"):
        predict_figure.figure([replace(found, kappa={})])
    with pytest.raises(ValueError, match="the predictions must be of one C, got several"):
        predict_figure.figure([found, from_runs(runs, C=2.0)])
