"""The answers on a preset's runs: they show, they don't, or it can't be told, from runs whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from make_runs import write_run

from svag_fast.analysis.reproduction import final, mean_of, of_paths, reproduction
from svag_fast.analysis.runs import load_run
from svag_fast.experiments.paths import Paths
from svag_fast.experiments.presets import PRESETS


def test_the_final_accuracy_is_the_mean_over_the_last_tenth_and_no_other_row_s(tmp_path):
    curve = np.linspace(0, 1, 41)
    run = load_run(write_run(tmp_path, accuracy=curve))
    assert final(run) == pytest.approx(curve[37:].mean())
    for wrong in ({"fraction": 0.9}, {"diverged": True}):
        assert math.isnan(final(load_run(write_run(tmp_path, seed=1, accuracy=curve, **wrong))))


def test_one_run_has_no_standard_error_and_one_that_diverged_leaves_no_mean():
    assert math.isnan(mean_of([0.5]).standard_error)
    assert mean_of([0.5, 0.7]).standard_error == pytest.approx(0.1)
    assert math.isnan(mean_of([0.5, math.nan]).value)


PROCESSES = {
    "as in the paper": ((0.97, 0.971, 0.969), (0.968, 0.97, 0.97), (0.90, 0.91, 0.90), True),
    "GD as good": ((0.97, 0.971, 0.969), (0.968, 0.97, 0.97), (0.97, 0.972, 0.968), False),
    "NGD worse": ((0.97, 0.971, 0.969), (0.91, 0.911, 0.90), (0.90, 0.91, 0.90), False),
    "too few seeds": ((0.97,), (0.97,), (0.90,), None),
    "too much scatter": ((0.9, 0.97, 0.99), (0.99, 0.9, 0.95), (0.80, 0.95, 0.90), None),
    "GD diverged": ((0.97, 0.971), (0.97, 0.971), (math.nan, 0.9), None),
}


@pytest.mark.parametrize(("sgd", "ngd", "gd", "shows"), PROCESSES.values(), ids=PROCESSES.keys())
def test_figure_1_shows_where_intervals_say_so(sgd, ngd, gd, shows, tmp_path):
    for name, accuracies in {"SGD": sgd, "NGD": ngd, "GD": gd}.items():
        for seed, accuracy in enumerate(accuracies):
            broken = math.isnan(accuracy)
            curve = np.full(41, 0.5 if broken else accuracy)
            write_run(tmp_path / name, seed=seed, accuracy=curve, diverged=broken)
    found = reproduction(PRESETS["fig1"], "small", tmp_path, ["SGD", "NGD", "GD"])
    assert found.shows is shows
    assert [row.paper for row in found.rows] == ["89.4 %", "89.3 %", "75.5 %", "-0.1 points", "+13.9 points"]


def scaling(tmp_path, errors, nsr):
    for batch_size, error in errors.items():
        for seed, change in enumerate((-0.0005, 0.0005)):
            accuracy = np.full(81, 1 - error + change)
            write_run(tmp_path / "runs", batch_size=batch_size, seed=seed, accuracy=accuracy, nsr=nsr * 8 / batch_size)
    return reproduction(PRESETS["fig3"], "small", tmp_path, ["runs"])


def test_figure_3_fails_where_the_error_is_a_fifth_above_the_lowest_and_b_star_is_the_theorem_s(tmp_path):
    found = scaling(tmp_path, {8: 0.030, 16: 0.029, 32: 0.0345, 64: 0.036, 128: 0.3}, nsr=4.0)
    assert found.fails_from == 64
    # kappa* = 2 (1 + N/G): 80 from B = 8, and 2 B more for each larger one, since N/G falls as 1/B.
    stars = [p.batch_size().value for p in found.predictions]
    assert [p.baseline.batch_size for p in found.predictions] == [8, 16, 32]
    assert stars == pytest.approx([80, 96, 128], rel=1e-6)
    assert found.shows is True


def test_figure_3_is_not_shown_by_a_failure_beyond_every_prediction(tmp_path):
    found = scaling(tmp_path, {8: 0.03, 16: 0.03, 512: 0.3}, nsr=0.5)
    assert found.fails_from == 512
    assert found.shows is False


def test_figure_3_cannot_be_told_where_nothing_fails_and_a_diverged_batch_has_failed(tmp_path):
    assert scaling(tmp_path / "a", {8: 0.03, 16: 0.03}, nsr=4.0).shows is None
    scaling(tmp_path / "b", {8: 0.03, 16: 0.03}, nsr=4.0)
    for seed in range(2):
        write_run(tmp_path / "b" / "runs", batch_size=32, seed=seed, accuracy=np.full(81, 0.97), diverged=True)
    found = reproduction(PRESETS["fig3"], "small", tmp_path / "b", ["runs"])
    assert found.fails_from == 32


def curves(tmp_path, accuracy_by_l):
    random = np.random.default_rng(0)
    for l, accuracy in accuracy_by_l.items():
        for seed in range(4):
            values = np.full(41, accuracy) + random.normal(0, 0.001, 41)
            write_run(tmp_path / "runs", l=l, seed=seed, accuracy=values)


@pytest.mark.parametrize(
    ("name", "accuracies", "shows"),
    [
        ("fig4-left", {1: 0.95, 2: 0.95, 4: 0.95, 8: 0.95}, True),
        ("fig4-right", {1: 0.95, 2: 0.95, 4: 0.95, 8: 0.95}, False),
        ("fig4-left", {1: 0.3, 2: 0.949, 4: 0.95, 8: 0.95}, False),
        ("fig4-right", {1: 0.3, 2: 0.949, 4: 0.95, 8: 0.95}, True),
        ("cosine", {1: 0.95, 2: 0.95, 4: 0.95, 8: 0.95}, None),
    ],
)
def test_figure_4_shows_where_sgd_does_at_the_end_what_it_does_in_the_paper(name, accuracies, shows, tmp_path):
    curves(tmp_path, accuracies)
    found = reproduction(PRESETS[name], "small", tmp_path, ["runs"])
    assert found.shows is shows, found.answer


@pytest.mark.parametrize(("skewness", "shows"), [(-0.05, True), (-0.9, None)])
def test_figure_2_shows_where_svag_s_skewness_is_near_the_sde_s(skewness, shows):
    random = np.random.default_rng(0)
    gaussian = random.normal(size=20_000)

    def skewed(by):  # a centred gamma's skewness is 2/sqrt(shape)
        shape = 4 / by**2
        return -(random.gamma(shape, size=20_000) - shape) / math.sqrt(shape)

    ends = {"SDE": gaussian, "SVAG, l = 16": skewed(skewness), "SGD": skewed(-1.0)}
    paths = [Paths(name, np.array([0.0, 1.0]), np.zeros((2, 1)), end) for name, end in ends.items()]
    assert of_paths(PRESETS["fig2"], "small", paths).shows is shows
