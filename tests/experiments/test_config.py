"""Settings: what a grid of runs expands to, and that a wrong value is refused by name."""

import json
import math

import pytest

from svag_fast.experiments.config import SCHEDULES, ConfigError, ExperimentConfig, RunConfig, read_settings
from svag_fast.experiments.data import DATASETS

RUN = {"batch_size": 8, "lr": 0.1, "l": 2, "seed": 0, "effective_steps": 100}


def test_the_default_is_24_runs_of_equal_time_by_the_linear_scaling_rule():
    runs = ExperimentConfig().runs()
    assert len(runs) == len({run.name for run in runs}) == 24
    kinds = {(run.batch_size, run.lr, run.effective_steps) for run in runs}
    assert kinds == {(8, 0.1, 1008), (128, 1.6, 63)}
    assert all(math.isclose(run.lr * run.effective_steps, 100.8) for run in runs)
    assert {run.l for run in runs} == {1, 2, 4, 8}
    assert {run.seed for run in runs} == {0, 1, 2}


def test_a_list_of_lr_says_each_and_epochs_are_passes_over_the_data():
    runs = ExperimentConfig(batch_size=(8, 64), lr=(0.1, 0.3), l=(1,), seeds=1, epochs=4).runs()
    assert [(run.lr, run.effective_steps) for run in runs] == [(0.1, round(4 * 1437 / 8)), (0.3, round(4 * 1437 / 64))]


@pytest.mark.parametrize("l", [1, 1.5, 4, 65536])
@pytest.mark.parametrize("effective_steps", [1, 7, 63, 1008])
def test_rows_stand_at_the_same_effective_steps_for_every_l_and_the_last_at_the_end(l, effective_steps):
    run = RunConfig(**{**RUN, "l": l, "effective_steps": effective_steps})
    assert run.row_steps == sorted(set(run.row_steps))
    assert run.row_steps[-1] == run.steps == round(effective_steps * l)
    assert len(run.row_steps) == min(run.rows, effective_steps)
    sgd = RunConfig(**{**RUN, "l": 1, "effective_steps": effective_steps})
    assert [step / l for step in run.row_steps] == pytest.approx(sgd.row_steps, abs=0.5)
    assert run.evaluation_steps <= set(run.row_steps)
    assert run.train_evaluation_steps <= run.evaluation_steps
    assert run.steps in run.train_evaluation_steps


def test_schedules_are_functions_of_effective_steps():
    for schedule in SCHEDULES:
        sgd = RunConfig(**{**RUN, "l": 1, "schedule": schedule})
        svag = RunConfig(**{**RUN, "l": 4, "schedule": schedule})
        assert [svag.lr_at(4 * step) for step in range(100)] == [sgd.lr_at(step) for step in range(100)]


def test_schedules_have_their_shapes():
    assert {SCHEDULES["constant"](x / 10) for x in range(10)} == {1.0}
    assert [SCHEDULES["step"](x) for x in (0, 0.79, 0.8, 0.99)] == [1, 1, 0.1, 0.1]
    assert [SCHEDULES["cosine"](x) for x in (0, 0.5, 1 - 1e-9)] == pytest.approx([1, 0.5, 1e-4], abs=1e-12)
    triangle = [SCHEDULES["triangle"](x) for x in (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1 - 1e-9)]
    assert triangle == pytest.approx([1e-4, 0.5, 1, 0.5, 1e-4, 0.5, 1e-4], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate': known are backend, batch_size"),
        ({"dataset": "mnist"}, f"dataset must be one of {', '.join(DATASETS)}, got 'mnist'"),
        ({"batch_size": [8, 8]}, "batch_size must be a list without repetition"),
        ({"batch_size": []}, "batch_size must be a number or a list of numbers"),
        ({"batch_size": ["8"]}, "batch_size must be an integer from 1 to 1,000,000, got '8'"),
        ({"batch_size": 8.5}, "batch_size must be an integer from 1"),
        (
            {"batch_size": 1438, "sampling": "distinct"},
            "at most 1437, the size of digits's training set, or sampling replacement",
        ),
        ({"lr": [0.1, 0.2, 0.3]}, "lr must be one number, or 2"),
        ({"lr": -0.1}, "lr must be a number from 1e-12 to 1e+12, got -0.1"),
        ({"lr": math.nan}, "lr must be a number from 1e-12 to 1e+12, got nan"),
        ({"l": [1, 0.5]}, "l must be a number from 1 to 1e+06, got 0.5"),
        ({"l": math.inf}, "l must be a number from 1 to 1e+06, got inf"),
        ({"l": 1e21}, "l must be a number from 1 to 1e+06, got 1e+21"),
        ({"l": 10**5000}, "l must be a number from 1 to 1e+06, got an integer of many digits"),
        ({"l": [1.0000001, 1.0000002]}, "l must be a list without repetition"),
        ({"l": 1e5, "effective_steps": 10**8}, "l times effective_steps must be at most 10,000,000,000"),
        ({"seeds": 5000}, "the number of runs must be at most 10,000, got 40000"),
        ({"epochs": 1e300}, "epochs must be a number from 1e-06 to 1e+06, got 1e+300"),
        ({"lr": [1e12, 1e-12]}, "effective_steps must be an integer from 1"),
        ({"rows": 10**9}, "rows must be an integer from 1 to 100,000"),
        ({"threads": 10**9}, "threads must be an integer from 1 to 1,024"),
        ({"weight_decay": -1}, "weight_decay must be a number from 0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number from 0"),
        ({"seeds": 0}, "seeds must be an integer from 1"),
        ({"seeds": True}, "seeds must be an integer from 1"),
        ({"effective_steps": 0}, "effective_steps must be an integer from 1"),
        ({"effective_steps": 10, "epochs": 1}, "epochs must be alone"),
        ({"epochs": 0}, "epochs must be a number from"),
        ({"schedule": "linear"}, "schedule must be one of constant, step, cosine, triangle"),
        ({"init": "zero"}, "init must be one of shared, own"),
        ({"sampling": "shuffled"}, "sampling must be one of replacement, distinct"),
        ({"threads": 0}, "threads must be an integer from 1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values, message):
    with pytest.raises(ConfigError) as refused:
        ExperimentConfig.from_dict(values)
    assert message in str(refused.value)


def test_settings_survive_a_file(tmp_path):
    config = ExperimentConfig(batch_size=(4,), lr=(0.3,), l=(1, 2.5), epochs=2, seeds=1)
    (tmp_path / "x.json").write_text(json.dumps(config.to_dict()))
    assert ExperimentConfig.from_dict(read_settings(tmp_path / "x.json")) == config
    (tmp_path / "x.toml").write_text("batch_size = [4]\nlr = 0.3\nl = [1, 2.5]\nepochs = 2\nseeds = 1\n")
    assert ExperimentConfig.from_dict(read_settings(tmp_path / "x.toml")) == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "not JSON"),
        ("x.toml", "= 1", "not TOML"),
        ("x.json", "[1]", "keys and values, got list"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.json", "1" * 2_000_000, "larger than"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / name)
    with pytest.raises(ConfigError, match="can't be read"):
        read_settings(tmp_path / "missing.toml")
