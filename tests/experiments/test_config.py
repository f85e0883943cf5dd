"""Settings: what a grid of runs expands to, and that a wrong value is refused by name."""

import json
import math

import pytest

from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.data import DATASETS
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.settings_file import read_settings

RUN = {"batch_size": 8, "lr": 0.1, "l": 2, "seed": 0, "effective_steps": 100}


def test_the_default_is_312_runs_of_equal_time_by_the_linear_scaling_rule():
    runs = ExperimentConfig().runs()
    assert len(runs) == len({run.name for run in runs}) == 312
    kinds = {(run.batch_size, run.lr, run.effective_steps, run.rows) for run in runs}
    assert kinds == {(4, 0.4, 5120, 320), (32, 3.2, 640, 320), (256, 25.6, 80, 320)}
    assert {len(run.evaluation_steps) for run in runs if run.batch_size < 256} == {320}
    assert {len(run.evaluation_steps) for run in runs if run.batch_size == 256} == {80}
    assert {len(run.train_evaluation_steps) for run in runs} == {20}
    assert all(math.isclose(run.lr * run.effective_steps, 2048) for run in runs)
    for size, levels in ((4, {1, 2, 4, 8}), (32, {1, 2, 4, 8}), (256, {1, 2, 4, 8, 16})):
        assert {run.l for run in runs if run.batch_size == size} == levels
    assert {run.seed for run in runs} == set(range(24))
    assert {(run.engine, run.stat_every, run.label_noise) for run in runs} == {("fused", 1, 0.2)}


def test_labels_are_made_noisy_on_digits_alone_unless_it_is_asked_for(tmp_path):
    own = tmp_path / "own.npz"
    own.touch()
    for dataset in ("fashion-mnist", "cifar10", "svhn", str(own)):
        assert ExperimentConfig(dataset=dataset, model="preresnet8-bn").label_noise == 0
        asked = ExperimentConfig(dataset=dataset, model="preresnet8-bn", label_noise=0.1)
        assert {run.label_noise for run in asked.runs()} == {0.1}
    assert ExperimentConfig(label_noise=0).label_noise == 0
    assert ExperimentConfig(model="digits-net").label_noise == 0.2
    with pytest.raises(ConfigError, match=r"^label_noise must be left out: the task has its own, got 0.2"):
        ExperimentConfig(task="<toy>", label_noise=0.2)


def test_l_is_one_list_for_all_batch_sizes_or_one_for_each():
    for given in ((1, 3), [[1, 3]], ((1, 3), (1, 3))):
        config = ExperimentConfig.from_dict({"batch_size": [4, 8], "l": given, "seeds": 1})
        assert config.levels == ((1, 3), (1, 3))
    config = ExperimentConfig.from_dict({"batch_size": [4, 8], "l": [[1, 3], [2]], "seeds": 1})
    assert [(run.batch_size, run.l) for run in config.runs()] == [(4, 1), (4, 3), (8, 2)]
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ExperimentConfig(batch_size=(2, 128)).levels == ((1, 2, 4, 8), (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "fused"),
        ({"model": "digits-net", "replicas": 3}, "fused"),
        ({"model": "vgg11-gn", "replicas": "3"}, "fused"),
        ({"replicas": "off"}, "torch"),
        ({"model": "vgg11-gn"}, "torch"),
        ({"sampling": "distinct"}, "torch"),
        ({"schedule": "cosine"}, "torch"),
        ({"schedule": "milestones:0.5,0.8"}, "fused"),
        ({"schedule": "warmup:0.1+step"}, "torch"),
        ({"sampling": "shuffle"}, "torch"),
        ({"device": "cuda"}, "torch"),
        ({"backend": "cpp"}, "torch"),
    ],
    ids=str,
)
def test_the_fused_engine_trains_what_it_serves_unless_it_is_switched_off(changes, engine):
    runs = ExperimentConfig(**changes, seeds=1).runs()
    assert {run.engine for run in runs} == {engine}


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate': known are augment, backend, batch_size"),
        ({"dataset": "mnist"}, f"dataset must be one of {', '.join(DATASETS)} or FILE.npz, got 'mnist'"),
        ({"batch_size": [8, 8]}, "batch_size must be a list without repetition"),
        ({"batch_size": []}, "batch_size must be a number or a list of numbers"),
        ({"batch_size": ["8"]}, "batch_size must be an integer from 1 to 1,000,000, got '8'"),
        ({"batch_size": 8.5}, "batch_size must be an integer from 1"),
        (
            {"batch_size": 1438, "sampling": "distinct"},
            "at most 1437, the size of digits's training set, or sampling replacement",
        ),
        ({"lr": [0.1, 0.2]}, "lr must be one number, or 3"),
        ({"l": [[1, 2], [1]]}, "l must be one list, or 3: one for each batch size"),
        ({"l": [[1, 2], 3]}, "l must be a number from 1"),
        ({"l": []}, "l must be a number or a list of numbers"),
        ({"l": [[], [1], [1]]}, "l must be a number or a list of numbers"),
        ({"replicas": "on"}, "replicas must be auto, off or an integer from 1 to 10,000, got 'on'"),
        ({"replicas": 0}, "replicas must be auto, off or"),
        ({"replicas": True}, "replicas must be auto, off or"),
        ({"replicas": 2, "sampling": "distinct"}, "sampling must be replacement, or replicas off"),
        ({"replicas": 2, "schedule": "cosine"}, "schedule must be constant, step or milestones, or replicas off"),
        ({"replicas": 2, "device": "cuda"}, "device must be cpu, or replicas off"),
        ({"replicas": 2, "backend": "cpp"}, "backend must be auto, or replicas off"),
        ({"replicas": "off", "stat_every": 2}, "stat_every must be 1 where runs are not trained as replicas"),
        ({"stat_every": 0}, "stat_every must be an integer from 1"),
        ({"label_noise": 1.1}, "label_noise must be a number from 0 to 1"),
        ({"label_noise": math.nan}, "label_noise must be a number from 0 to 1"),
        ({"lr": -0.1}, "lr must be a number from 1e-12 to 1e+12, got -0.1"),
        ({"lr": math.nan}, "lr must be a number from 1e-12 to 1e+12, got nan"),
        ({"l": [1, 0.5]}, "l must be a number from 1 to 1e+06, got 0.5"),
        ({"l": math.inf}, "l must be a number from 1 to 1e+06, got inf"),
        ({"l": 1e21}, "l must be a number from 1 to 1e+06, got 1e+21"),
        ({"l": 10**5000}, "l must be a number from 1 to 1e+06, got an integer of many digits"),
        ({"l": [1.0000001, 1.0000002]}, "l must be a list without repetition"),
        ({"l": 1e5, "effective_steps": 10**8}, "l times effective_steps must be at most 10,000,000,000"),
        ({"seeds": 5000}, "the number of runs must be at most 10,000, got 65000"),
        ({"epochs": 1e300}, "epochs must be a number from 1e-06 to 1e+06, got 1e+300"),
        ({"lr": [1e12, 1, 1e-12]}, "effective_steps must be an integer from 1"),
        ({"rows": 10**9}, "rows must be an integer from 1 to 100,000"),
        ({"threads": 10**9}, "threads must be an integer from 1 to 1,024"),
        ({"weight_decay": -1}, "weight_decay must be a number from 0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number from 0"),
        ({"seeds": 0}, "seeds must be an integer from 1"),
        ({"seeds": True}, "seeds must be an integer from 1"),
        ({"effective_steps": 0}, "effective_steps must be an integer from 1"),
        ({"effective_steps": 10, "epochs": 1}, "epochs must be alone"),
        ({"epochs": 0}, "epochs must be a number from"),
        ({"schedule": "linear"}, "schedule must be constant, step, cosine, triangle or milestones:F"),
        ({"init": "zero"}, "init must be one of shared, own"),
        ({"sampling": "shuffled"}, "sampling must be one of replacement, distinct, halves, shuffle, fixed"),
        ({"sampling": "fixed"}, "l must be 1 at sampling fixed, got 2"),
        (
            {"batch_size": 719, "sampling": "halves", "l": 1},
            "at most 718, half the size of digits's training set, or sampling replacement, got 719",
        ),
        ({"batch_size": 719, "sampling": "shuffle", "l": 2}, "at most 718, half the size of digits's training set"),
        ({"batch_size": 1438, "sampling": "shuffle", "l": 1}, "at most 1437, the size of digits's training set"),
        ({"dataset": "no/such.npz", "epochs": 1}, "dataset must be a file that can be read where epochs are given"),
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
