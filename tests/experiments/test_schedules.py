"""Schedules: their shapes, the same curve at every l, the pieces that the fused engine takes, and what is refused."""

import math
import pickle

import pytest

from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.schedules import milestones, resolve

RUN = {"batch_size": 8, "lr": 0.1, "l": 2, "seed": 0, "effective_steps": 100}
PIECEWISE = ("constant", "step", "milestones:0.8", "milestones:0.3,0.31,80/100*0.5", "milestones:0.001,0.999")
SMOOTH = ("cosine", "triangle", "warmup:0.1+cosine", "warmup:5/100+milestones:0.5", "warmup:0.2+constant")


def run(**changes):
    return RunConfig(**(RUN | changes))


def test_shapes():
    assert {resolve("constant")(x / 10) for x in range(10)} == {1.0}
    assert [resolve("step")(x) for x in (0, 0.79, 0.8, 0.99)] == [1, 1, 0.1, 0.1]
    assert [resolve("cosine")(x) for x in (0, 0.5, 1 - 1e-9)] == pytest.approx([1, 0.5, 1e-4], abs=1e-12)
    triangle = [resolve("triangle")(x) for x in (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1 - 1e-9)]
    assert triangle == pytest.approx([1e-4, 0.5, 1, 0.5, 1e-4, 0.5, 1e-4], abs=1e-12)
    drops = [resolve("milestones:0.5,3/4*0.2")(x) for x in (0, 0.4999, 0.5, 0.7499, 0.75, 0.99)]
    assert drops == [1, 1, 0.2, 0.2, 0.2**2, 0.2**2]
    warm = [resolve("warmup:0.1+milestones:0.05*0.5")(x) for x in (0, 0.025, 0.05, 0.1, 0.5)]
    assert warm == pytest.approx([1e-4, 0.25, 0.25, 0.5, 0.5])


def test_step_is_the_milestone_that_it_is_short_for_to_the_bit():
    for l, steps in ((1, 5120), (4, 640), (2.5, 11)):
        one, other = (run(l=l, effective_steps=steps, schedule=s) for s in ("step", "milestones:0.8*0.1"))
        assert [one.lr_at(k) for k in range(one.steps)] == [other.lr_at(k) for k in range(other.steps)]
        expected = [0.1 * (1.0 if k / l / steps < 0.8 else 0.1) for k in range(one.steps)]
        assert [one.lr_at(k) for k in range(one.steps)] == expected


@pytest.mark.parametrize("schedule", PIECEWISE + SMOOTH)
def test_every_l_has_the_same_curve_over_effective_steps(schedule):
    sgd = run(l=1, schedule=schedule)
    for l in (4, 16):
        svag = run(l=l, schedule=schedule)
        assert [svag.lr_at(l * step) for step in range(100)] == [sgd.lr_at(step) for step in range(100)]
    assert all(sgd.lr_at(step) > 0 for step in range(100))


def test_a_milestone_given_as_a_fraction_falls_on_the_very_step():
    """The paper's 300 epochs of 781 steps, a tenth from epoch 250 on."""
    config = run(l=1, effective_steps=300 * 781, schedule="milestones:250/300")
    assert config.lr_pieces == [(0, 0.1), (250 * 781, 0.1 * 0.1)]
    assert config.lr_at(250 * 781 - 1) == 0.1


@pytest.mark.parametrize("schedule", PIECEWISE)
@pytest.mark.parametrize(("l", "effective_steps"), [(1, 1), (1, 7), (2.5, 11), (4, 640)])
def test_the_pieces_of_a_schedule_are_its_learning_rates(schedule, l, effective_steps):
    config = run(l=l, effective_steps=effective_steps, schedule=schedule)
    pieces = dict(config.lr_pieces)
    assert len(pieces) == len(config.lr_pieces)
    lr = None
    for step in range(config.steps):
        lr = pieces.pop(step, lr)
        assert lr == config.lr_at(step)
    assert not pieces


def test_only_piecewise_constant_schedules_have_pieces():
    assert all(milestones(schedule) is not None for schedule in PIECEWISE)
    assert all(milestones(schedule) is None for schedule in (*SMOOTH, lambda done: 1.0))


def test_a_run_with_a_schedule_goes_to_another_process():
    config = run(schedule="warmup:0.1+milestones:0.5")
    before = [config.lr_at(k) for k in range(config.steps)]
    again = pickle.loads(pickle.dumps(config))
    assert [again.lr_at(k) for k in range(again.steps)] == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "Step",
        "step ",
        "milestones",
        "milestones:",
        "milestones:0",
        "milestones:1",
        "milestones:80",
        "milestones:-0.5",
        "milestones:nan",
        "milestones:1/0",
        "milestones:300/250",
        "milestones:0.5,",
        "milestones:0.5;0.8",
        "milestones:0.8,0.5",
        "milestones:0.5,0.5",
        "milestones:0.5*",
        "milestones:0.5*0",
        "milestones:0.5*2",
        "milestones:0.5*-1",
        "milestones:0.5*0.1*0.1",
        "milestones:\u0665/9",
        "warmup:0.1",
        "warmup:0.1+",
        "warmup:+step",
        "warmup:0+step",
        "warmup:1.5+step",
        "warmup+step",
        "warmup:0.1+warmup:0.1+step",
        "warmup:0.1+linear",
        "step+warmup:0.1",
    ],
)
def test_a_text_that_is_no_schedule_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^schedule") as refused:
        resolve(text)
    assert repr(text) in str(refused.value)
    with pytest.raises(ConfigError, match=r"^schedule"):
        ExperimentConfig.from_dict({"schedule": text})


def test_a_function_of_your_own_is_checked_when_it_is_called():
    assert [resolve(lambda done: 1 - done)(x) for x in (0, 0.5)] == [1, 0.5]
    for wrong in (lambda done: 0.0, lambda done: -1.0, lambda done: math.nan, lambda done: math.inf):
        with pytest.raises(ValueError, match=r"^schedule\(0\.25\) must be a finite number > 0"):
            resolve(wrong)(0.25)
    with pytest.raises(TypeError, match=r"^schedule\(0\.25\) must be a number"):
        resolve(lambda done: "0.1")(0.25)
    with pytest.raises(TypeError, match=r"^schedule must be constant"):
        resolve(0.1)
