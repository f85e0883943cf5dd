"""A run's phases of constant rate, the window that is averaged, and one number a run for each."""

import math

import numpy as np
import pytest

from svag_fast.analysis.phases import common_phases, part_mean, phases, resolution
from svag_fast.analysis.runs import Run
from svag_fast.experiments.config import RunConfig


def run(schedule: str = "step", effective_steps: int = 100, l: float = 1, name: str = "a", rows: int = 50) -> Run:
    """A run as `svag-fast run` writes it, with the effective step as its test loss."""
    config = RunConfig(batch_size=8, lr=0.4, l=l, seed=0, effective_steps=effective_steps, schedule=schedule, rows=rows)
    steps = np.array([0, *config.row_steps])
    lr = np.array([config.lr_at(max(step - 1, 0)) for step in steps])
    values = np.where(steps % 2 == 0, steps / l, math.nan)
    metrics = {"effective_step": steps / l, "lr": lr, "test_loss": values}
    return Run(name, {"l": l, "effective_steps": effective_steps}, metrics)


def test_phases_are_the_stretches_of_constant_rate() -> None:
    assert phases(run()) == [(0, 80), (80, 100)]
    assert phases(run("constant")) == [(0, 100)]
    assert phases(run("cosine")) == []
    assert phases(run("triangle")) == []
    assert phases(Run("new", {}, {"effective_step": np.empty(0), "lr": np.empty(0)})) == []


def test_a_phase_is_averaged_over_its_last_half_and_the_end_is_the_last_value() -> None:
    one = run()
    windows = common_phases([one])
    assert list(windows) == ["phase 1", "phase 2", "end"]
    assert part_mean(one, "test_loss", "phase 1", windows["phase 1"]) == (np.arange(42, 81, 2).mean(), 20)
    assert part_mean(one, "test_loss", "phase 2", windows["phase 2"]) == (np.arange(92, 101, 2).mean(), 5)
    assert part_mean(one, "test_loss", "end", windows["end"]) == (100, 1)


@pytest.mark.parametrize("l", [1.0, 2.0, 1.3, 16.0])
def test_every_l_is_averaged_over_the_same_rows(l: float) -> None:
    windows = common_phases([run(), run(l=l, name="b")])
    sgd, svag = (part_mean(r, "effective_step", "phase 1", windows["phase 1"]) for r in (run(), run(l=l)))
    assert sgd[1] == svag[1]
    assert sgd[0] == pytest.approx(svag[0], abs=0.5)


def test_runs_of_other_lengths_or_schedules_are_not_compared() -> None:
    for other in (run("constant", name="b"), run(effective_steps=200, name="b")):
        with pytest.raises(ValueError, match=r"a has 100 effective steps.*0 to 80, 80 to 100 and b .*same length"):
            common_phases([run(), other])


@pytest.mark.parametrize("schedule", ["cosine", "triangle", "warmup:0.1+cosine"])
def test_every_l_of_a_schedule_that_is_still_moving_at_the_end_is_compared_there(schedule: str) -> None:
    """A row holds the rate of the step before it, which is nearer to the end at a larger l."""
    runs = [run(schedule, effective_steps=80, l=l, name=f"l{l}") for l in (1, 4, 16)]
    assert len({one.metrics["lr"][-1] for one in runs}) > 1
    assert list(common_phases(runs)) == ["end"]
    with pytest.raises(ValueError, match="must have the same"):
        common_phases([*runs, run("constant", effective_steps=80, name="other")])


def test_what_was_not_measured_has_no_mean() -> None:
    one = run(rows=4)
    assert part_mean(one, "test_loss", "phase 2", (99, 99.4))[1] == 0
    with pytest.raises(KeyError, match="no column 'x'"):
        part_mean(one, "x", "end", (0, 1))


def test_resolution_is_the_least_gap_between_values() -> None:
    assert resolution(np.array([353, 353, 350, 351, 90]) / 360) == pytest.approx(1 / 360)
    assert resolution(np.array([0.5, 0.5])) == 0
    assert resolution(np.array([0.5, math.inf, 0.75])) == 0.25
    assert 0.95 - 1 / 40 != 37 / 40  # the same count of images, differently rounded
    assert resolution(np.array([0.95, 0.95 - 1 / 40, 37 / 40])) == pytest.approx(1 / 40)
