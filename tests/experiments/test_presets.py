"""The presets: every one can be built at every scale, and at the paper's it is the paper's setting."""

from __future__ import annotations

import pytest

from svag_fast.experiments.data import DATASETS
from svag_fast.experiments.models.names import FAMILIES
from svag_fast.experiments.presets import PRESETS, SCALES, find_preset
from svag_fast.experiments.probe import probe
from svag_fast.experiments.ranges import ConfigError

TRAINED = [preset for preset in PRESETS.values() if preset.kind != "paths"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_preset_is_made_of_settings_that_a_run_may_have(scale):
    for preset in TRAINED:
        for config in preset.experiments(scale).values():
            assert any(family.options(config.model) is not None for family in FAMILIES), config.model
            assert config.dataset in DATASETS
            if not preset.name.endswith("-fashion"):
                assert (scale == "paper") == (config.dataset in ("cifar10", "cifar100", "svhn")), preset.name


@pytest.mark.parametrize("preset", TRAINED, ids=lambda preset: preset.name)
def test_at_paper_scale_the_rate_is_by_linear_scaling_from_the_paper_s(preset):
    rate = (0.01 if "none" in preset.settings("paper")["model"] else 0.8) / 128
    for config in preset.experiments("paper").values():
        assert config.weight_decay == 5e-4
        for run in config.runs():
            if preset.kind == "processes":
                # One rate for all: the text has B = 125 and the authors' code 500.
                assert (run.lr, run.augment, run.effective_steps) == (0.8, "none", 32_000)
                assert [run.lr_at(step) for step in (23_999, 24_000)] == pytest.approx([0.8, 0.08])
            else:
                assert run.lr / run.batch_size == pytest.approx(rate)
                assert run.augment == "crop-flip"
                assert run.effective_steps == pytest.approx(300 * config.population / run.batch_size, abs=1)


def test_what_sgd_is_compared_with_is_ngd_and_gd_of_its_rate_batch_and_length():
    for scale in SCALES:
        configs = find_preset("fig1").experiments(scale)
        assert {name: config.process for name, config in configs.items()} == {"SGD": "svag", "NGD": "ngd", "GD": "gd"}
        runs = [run for config in configs.values() for run in config.runs() if run.seed == 0]
        assert len(runs) == 3
        assert len({(run.batch_size, run.lr, run.l, run.effective_steps, run.schedule) for run in runs}) == 1


def test_changes_go_over_the_preset_and_are_checked():
    changed = find_preset("fig4-left").experiments("small", seeds=3, l=[1, 16])["runs"]
    assert (changed.seeds, changed.levels) == (3, ((1, 16),))
    with pytest.raises(ConfigError, match="seeds must be"):
        find_preset("fig4-left").experiments("small", seeds=0)
    with pytest.raises(ConfigError, match=r"NAME must be one of fig1, .*got 'fig9'"):
        find_preset("fig9")
    with pytest.raises(ConfigError, match="scale must be one of paper, small, smoke, got 'large'"):
        find_preset("fig1").settings("large")


def test_the_probe_counts_every_sample_of_every_run(monkeypatch):
    """A step takes a second for each of its samples: the seconds are the samples, and a third of those evaluated."""
    counts = {"svag": 2 * 16, "ngd": 64, "gd": 64}
    for process, count in counts.items():
        monkeypatch.setattr("svag_fast.experiments.probe._timed", lambda call, count=count: float(count))
        config = find_preset("fig1").experiments("smoke")[{"svag": "SGD", "ngd": "NGD", "gd": "GD"}[process]]
        (run,) = config.runs()
        samples = run.steps * (2 * run.batch_size if process == "svag" else 1437)
        assert probe(config) == pytest.approx(samples + 360 * len(run.evaluation_steps) / 3)
