"""The verdict on made runs whose answer is known: three answers, divergence, missing runs, shared limits."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from make_runs import Mean, rising, write_process, write_run

from svag_fast.analysis.margins import Margin
from svag_fast.analysis.runs import Run, load_runs
from svag_fast.analysis.shared_limit import shared_limits
from svag_fast.analysis.verdict import Decision, Verdict, combine, decide, judge
from svag_fast.analysis.verdict_text import sentences

LS = (1, 2, 4, 8)


def verdict_of(folder: Path, **options: object) -> Verdict:
    (verdict,) = judge(load_runs(folder), **options)  # type: ignore[arg-type]
    return verdict


def law(limit: float, distance: float) -> dict[float, Mean]:
    """Accuracies ``distance``/l above the limit all along."""
    return {l: (lambda done, l=l: limit + distance / l + 0 * done) for l in LS}  # type: ignore[misc]


def write_sequence(
    folder: Path,
    means: Mapping[float, Mean],
    *,
    seeds: int = 3,
    sd: float = 0.003,
    rng_seed: int = 0,
    **settings: object,
) -> None:
    rng = np.random.default_rng(rng_seed)
    for l, mean in means.items():
        write_process(folder, mean, seeds=seeds, sd=sd, rng=rng, l=l, **settings)


def answers(verdict: Verdict) -> dict[str, dict[str, str]]:
    return {metric: {part: cell.answer for part, cell in parts.items()} for metric, parts in verdict.cells.items()}


def made(
    levels: Mapping[float, Sequence[float]], batch_size: int = 8, lr: float = 0.1, **values: Sequence[float]
) -> list[Run]:
    """Runs that end at once, so that there is only the end to judge: ``levels`` has one accuracy a run."""
    runs = []
    for l, ends in levels.items():
        for seed, level in enumerate(ends):
            config = {
                "batch_size": batch_size,
                "lr": lr,
                "weight_decay": 0.0,
                "l": l,
                "seed": seed,
                "effective_steps": 1,
            }
            metrics = {
                "effective_step": np.array([0.0, 1.0]),
                "lr": np.array([lr, lr / 10]),
                "test_accuracy": np.array([0.1, level]),
                "test_loss": np.array([2.0, 1 - level]),
            }
            runs.append(Run(f"B{batch_size}-l{l}-seed{seed}", config, metrics))
    return runs


def exact(mean: float, sd: float, count: int) -> list[float]:
    """Values with exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, count)
    return list(mean + sd * values / values.std(ddof=1))


def test_the_same_curve_at_every_l_matches_in_every_part(tmp_path: Path) -> None:
    write_sequence(tmp_path, dict.fromkeys(LS, rising()))
    verdict = verdict_of(tmp_path)
    parts = dict.fromkeys(("phase 1", "phase 2", "end"), "matches")
    assert answers(verdict) == {"test_accuracy": parts, "test_loss": parts}
    assert verdict.answer == "matches"
    cell = verdict.cells["test_accuracy"]["end"]
    assert cell.limit == pytest.approx(0.97, abs=0.002)
    assert (cell.converged_by, cell.regime_reached, cell.margin) == (2, True, 0.02)
    assert cell.sgd is not None
    assert cell.sgd.seeds_needed is None


def test_a_law_in_1_over_l_is_found_with_its_limit_and_distance(tmp_path: Path) -> None:
    write_sequence(tmp_path, law(0.9, -0.05), seeds=5)
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "departs"
    cell = verdict.cells["test_accuracy"]["phase 1"]
    assert cell.sgd is not None
    assert cell.limit_interval is not None
    assert cell.limit_interval[0] < 0.9 < cell.limit_interval[1]
    assert cell.sgd.interval[0] < -0.05 < cell.sgd.interval[1]
    assert cell.sgd.interval[1] - cell.sgd.interval[0] < 0.02
    assert cell.fitted == (2, 4, 8)
    assert {l: d.answer for l, d in cell.distances.items()} == {1: "departs", 2: "departs", 4: "matches", 8: "matches"}
    assert cell.converged_by == 4
    loss = verdict.cells["test_loss"]["phase 1"]  # 2.3 (1 - accuracy) + 0.08
    assert loss.sgd is not None
    assert loss.sgd.interval[0] < 2.3 * 0.05 < loss.sgd.interval[1]
    assert loss.margin == pytest.approx(0.1 * loss.means[8].value)


def test_one_metric_or_part_that_departs_is_enough(tmp_path: Path) -> None:
    """A gap at the end alone, and one that only a narrower margin sees."""
    write_sequence(tmp_path, {1: lambda u: rising()(u) - 0.05 * (u > 0.9), 2: rising(), 4: rising(), 8: rising()})
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "departs"
    assert answers(verdict)["test_accuracy"] == {"phase 1": "matches", "phase 2": "departs", "end": "departs"}
    assert verdict_of(tmp_path, metrics=["test_accuracy"], margins={"test_accuracy": Margin(0.2)}).answer == "matches"


def test_more_seeds_settle_what_is_open_and_never_the_other_way(tmp_path: Path) -> None:
    """SGD is two margins off with noise of half a margin: open with 3 seeds, departs with 20, and never matches."""
    found = {}
    for seeds in (2, 3, 20):
        write_sequence(tmp_path / str(seeds), law(0.9, -0.04), seeds=seeds, sd=0.03, rng_seed=5)
        verdict = verdict_of(tmp_path / str(seeds), metrics=["test_accuracy"])
        found[seeds] = verdict.cells["test_accuracy"]["phase 1"]
    assert [cell.answer for cell in found.values()] == ["open", "open", "departs"]
    sgd = found[3].sgd
    assert sgd is not None
    assert sgd.seeds_needed is not None
    assert 3 < sgd.seeds_needed < 100


def test_seeds_needed_is_the_least_number_that_would_do() -> None:
    from svag_fast.stats.limit_fit import Figure

    def figure(seeds: int, value: float = 0.3, systematic: float = 0.0) -> Figure:
        of_one_run = (1.0, 1 / 3)  # a sum of three equal parts
        return Figure(*(np.array(x) for x in (value, seeds**-0.5, 3.0 * (seeds - 1), systematic, *of_one_run)))

    needed = decide(figure(4), 1.0, 0.95).seeds_needed
    assert needed is not None
    assert decide(figure(needed), 1.0, 0.95).answer == "matches"
    assert decide(figure(needed - 1), 1.0, 0.95).answer == "open"
    assert decide(figure(4, value=1.0), 1.0, 0.95).seeds_needed is None  # the margin itself
    assert decide(figure(4, systematic=0.8), 1.0, 0.95).seeds_needed is None  # the doubt is not about noise


@pytest.mark.parametrize("counts", [(3, 20, 20, 20), (12, 3, 3, 3), (5, 5, 5, 5)])
def test_so_many_seeds_for_each_l_settle_it_and_one_fewer_do_not(counts: tuple[int, ...]) -> None:
    """Made runs with exact means and variances, so that more seeds leave the estimates as they are."""

    def end(seeds: Sequence[int]) -> Decision:
        levels = {l: exact(0.9 - 0.01 * (l == 1), 0.012, n) for l, n in zip(LS, seeds, strict=True)}
        (verdict,) = judge(made(levels), metrics=["test_accuracy"])
        sgd = verdict.cells["test_accuracy"]["end"].sgd
        assert sgd is not None
        return sgd

    now = end(counts)
    assert now.answer == "open"
    assert now.seeds_needed is not None
    assert end([now.seeds_needed] * 4).answer == "matches"
    assert end([now.seeds_needed - 1] * 4).answer == "open"
    assert now.seeds_needed == 15


def test_a_noisier_test_set_makes_no_agreement(tmp_path: Path) -> None:
    """The very data that a criterion by the scatter of one evaluation called a match: SGD 9 points off, noise of 20."""
    write_sequence(tmp_path, law(0.9, -0.09), seeds=12, sd=0.2)
    assert verdict_of(tmp_path, metrics=["test_accuracy"]).answer != "matches"


def test_where_1_over_l_does_not_hold_the_limit_is_wide_and_it_is_said(tmp_path: Path) -> None:
    levels = {1: 0.14, 2: 0.40, 4: 0.75, 8: 0.88}
    write_sequence(tmp_path, {l: (lambda u, a=a: a + 0 * u) for l, a in levels.items()}, seeds=5, sd=0.01)  # type: ignore[misc]
    verdict = verdict_of(tmp_path)
    cell = verdict.cells["test_accuracy"]["phase 1"]
    assert verdict.answer == "departs"
    assert cell.regime_reached is False
    assert cell.fitted == (4, 8)
    assert cell.limit_interval is not None
    assert cell.limit_interval[0] < 0.92 < cell.limit_interval[1]
    assert cell.distances[4].answer == "departs"
    assert cell.distances[8].answer == "open"
    assert cell.distances[8].seeds_needed is None


def test_diverged_sgd_departs_and_is_in_no_mean(tmp_path: Path) -> None:
    write_sequence(tmp_path, {2: rising(), 4: rising(), 8: rising()})
    for seed in range(3):
        write_run(tmp_path, l=1, seed=seed, fraction=0.3, diverged=True)
    verdict = verdict_of(tmp_path)
    assert (verdict.answer, verdict.sgd_diverged) == ("departs", True)
    assert verdict.diverged == {1: (pytest.approx(11 / 40 * 1504),) * 3}
    assert verdict.finished == {1: 0, 2: 3, 4: 3, 8: 3}
    cell = verdict.cells["test_loss"]["end"]
    assert list(cell.means) == [2, 4, 8]
    assert cell.limit == pytest.approx(0.149, abs=0.003)
    assert (cell.sgd, cell.missing) == (None, "3 of 3 runs of SGD diverged")


def test_diverged_sgd_is_open_until_the_largest_l_has_finished_runs(tmp_path: Path) -> None:
    """Whether the largest l diverges too is not known while it trains."""
    write_sequence(tmp_path, {2: rising(), 4: rising()})
    for seed in range(3):
        write_run(tmp_path, l=1, seed=seed, fraction=0.3, diverged=True)
        write_run(tmp_path, l=8, seed=seed, fraction=0.2)
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "open"
    why = "3 of 3 runs of SGD diverged, and none of l = 8 has finished"
    assert verdict.cells["test_loss"]["end"].missing == why
    assert why in sentences(verdict)[0]
    write_run(tmp_path, l=8, seed=0)
    assert verdict_of(tmp_path).answer == "departs"


def test_survivors_of_a_diverging_process_make_no_agreement(tmp_path: Path) -> None:
    write_sequence(tmp_path, dict.fromkeys(LS, rising()))
    write_run(tmp_path, l=1, seed=2, diverged=True)  # its last row, so that it came as far as the others
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "open"
    assert verdict.cells["test_accuracy"]["end"].missing == "1 of 3 runs of SGD diverged"


def test_a_diverging_l_and_all_smaller_ones_are_left_out_of_the_limit(tmp_path: Path) -> None:
    write_sequence(tmp_path, dict.fromkeys(LS, rising()))
    write_run(tmp_path, l=2, seed=0, fraction=0.5, diverged=True)
    verdict = verdict_of(tmp_path)
    assert verdict.cells["test_accuracy"]["end"].fitted == (4, 8)
    assert list(verdict.cells["test_accuracy"]["end"].means) == [1, 4, 8]
    write_run(tmp_path, l=8, seed=0, fraction=0.5, diverged=True)
    cell = verdict_of(tmp_path).cells["test_accuracy"]["end"]
    assert (cell.limit, cell.missing) == (None, "runs diverged at l = 8")


def test_where_all_diverged_there_is_no_verdict(tmp_path: Path) -> None:
    for l in LS:
        for seed in range(2):
            write_run(tmp_path, l=l, seed=seed, diverged=True)
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "diverged"
    assert verdict.cells == {"test_accuracy": {}, "test_loss": {}}


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(1, 0.3), 2: rising(), 4: rising()}, seeds=1)
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "open"
    cell = verdict.cells["test_accuracy"]["end"]
    assert (cell.limit, cell.missing) == (None, "two l with two finished runs each are needed")
    assert cell.means[1].standard_error is None


def test_without_sgd_there_is_a_limit_and_no_answer(tmp_path: Path) -> None:
    write_sequence(tmp_path, {2: rising(), 4: rising(), 8: rising()})
    verdict = verdict_of(tmp_path)
    assert verdict.answer == "open"
    cell = verdict.cells["test_accuracy"]["end"]
    assert (cell.sgd, cell.converged_by, cell.missing) == (None, 2, "there is no run at l = 1")
    write_run(tmp_path, l=1)
    assert verdict_of(tmp_path).cells["test_accuracy"]["end"].missing == "two finished runs of SGD are needed"


def test_two_l_are_judged_and_the_law_is_said_to_be_untested(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(), 8: rising()})
    cell = verdict_of(tmp_path).cells["test_accuracy"]["end"]
    assert (cell.answer, cell.regime_reached, cell.fitted) == ("matches", None, (1, 8))


def test_unfinished_runs_are_left_out_and_nothing_is_said_before_runs_finish(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, fraction=0.5)
    write_run(tmp_path, l=2, fraction=0.1)
    verdict = verdict_of(tmp_path)
    assert (verdict.answer, verdict.largest_l, verdict.cells["test_loss"]) == ("open", None, {})
    write_sequence(tmp_path, {l: rising() for l in (1, 2, 4)})
    write_run(tmp_path, l=8, seed=0, fraction=0.9)
    write_run(tmp_path, l=2, seed=7, fraction=0.9, accuracy=np.zeros(41))
    verdict = verdict_of(tmp_path)
    assert (verdict.largest_l, verdict.answer, verdict.total[8], verdict.finished[8]) == (4, "matches", 1, 0)


def test_a_metric_that_a_part_lacks_leaves_it_open(tmp_path: Path) -> None:
    write_sequence(tmp_path, dict.fromkeys(LS, rising()))
    cell = verdict_of(tmp_path, metrics=["amplified_loss"]).cells["amplified_loss"]["phase 1"]
    assert (cell.answer, cell.limit) == ("open", None)
    assert cell.missing == "it was not measured there in every run: ask for more evaluations"


def test_a_value_from_before_the_end_is_not_the_end(tmp_path: Path) -> None:
    """SGD's accuracy was last measured at 85 % of the run, where it was as high as the others end."""
    write_sequence(tmp_path, dict.fromkeys(LS, rising()))
    runs = load_runs(tmp_path)
    for run in runs:
        if run.l == 1:
            run.metrics["test_accuracy"][35:] = math.nan
    (verdict,) = judge(runs)
    cells = verdict.cells["test_accuracy"]
    assert (cells["end"].answer, cells["phase 1"].answer) == ("open", "matches")
    assert cells["end"].missing == "it was not measured there in every run: ask for more evaluations"
    assert verdict.answer == "open"


def test_runs_that_end_alike_by_chance_are_not_without_noise() -> None:
    """Accuracies are counts of 360 images: where all seeds of all l agree, rounding alone leaves an interval."""
    images = 360
    runs = made({l: [340 / images] * 3 for l in LS})
    runs[0].metrics["test_accuracy"][0] = 341 / images  # somewhere in the run the next count is seen
    (verdict,) = judge(runs, metrics=["test_accuracy"])
    sgd = verdict.cells["test_accuracy"]["end"].sgd
    assert sgd is not None
    assert sgd.value == pytest.approx(0, abs=1e-12)
    expected = math.sqrt(2.5 / 3) / images / math.sqrt(12)  # the contrast's weights squared sum to 2.5
    half = (sgd.interval[1] - sgd.interval[0]) / 2
    assert 2 * expected < half < 5 * expected


def test_a_smaller_test_set_makes_no_agreement_of_converged_runs() -> None:
    """Runs that repeat one value over the window: SGD misses one image, as often as makes D = -0.025, margin 0.02."""
    rng, steps, total = np.random.default_rng(0), np.linspace(0, 1000, 41), 20
    found: dict[int, list[str]] = {images: [] for images in (10, 20, 40)}
    for images, said in found.items():
        for _ in range(total):
            runs = []
            for l in LS:
                for run in made({l: [0.0] * 3}):
                    missed = l == 1 and rng.random() < 0.025 * images
                    accuracy = np.full(41, (images - 1 - missed) / images)
                    accuracy[:3] = np.array([0.1, 0.5, 0.8]).round(1)
                    metrics = {"effective_step": steps, "lr": np.full(41, 0.1), "test_accuracy": accuracy}
                    runs.append(Run(run.name, run.config | {"effective_steps": 1000}, metrics))
            (verdict,) = judge(runs, metrics=["test_accuracy"])
            said.append(verdict.cells["test_accuracy"]["phase 1"].answer)
    assert all(said.count("matches") <= 0.025 * total for said in found.values()), found


@pytest.mark.parametrize("sd", [0.1, 0.3, 1.0])
def test_intervals_of_rounded_values_hold_the_truth(sd: float) -> None:
    """Seeds' accuracies scattered by less than the resolution of the test set, three seeds: 90 % at least."""
    rng = np.random.default_rng(1)
    images, repetitions, held, expected = 360, 150, 0, {}
    for l, true in zip(LS, (340.0, 340.2, 340.4, 340.5), strict=True):
        expected[l] = np.round(true + sd * rng.standard_normal(200_000)).mean() / images
    weights = {1: 1.0, 2: 0.5, 4: -0.5, 8: -1.0}
    truth = sum(weights[l] * expected[l] for l in LS)
    for _ in range(repetitions):
        counts = {
            l: np.round(true + sd * rng.standard_normal(3)) / images
            for l, true in zip(LS, (340.0, 340.2, 340.4, 340.5), strict=True)
        }
        runs = made({l: list(v) for l, v in counts.items()})
        runs[0].metrics["test_accuracy"][0] = (counts[1][0] * images + 1) / images
        (verdict,) = judge(runs, metrics=["test_accuracy"])
        sgd = verdict.cells["test_accuracy"]["end"].sgd
        assert sgd is not None
        held += sgd.interval[0] <= truth <= sgd.interval[1]
    assert held >= 0.9 * repetitions - 3 * math.sqrt(repetitions * 0.9 * 0.1)


def test_batch_sizes_share_their_limit_or_do_not(tmp_path: Path) -> None:
    for name, limit in (("same", 0.9), ("other", 0.8)):
        write_sequence(tmp_path / name, law(0.9, -0.01), batch_size=8, seeds=5)
        write_sequence(tmp_path / name, law(limit, -0.05), batch_size=128, seeds=5, rng_seed=1)
        (shared,) = shared_limits(judge(load_runs(tmp_path / name)))
        assert (shared.reference, shared.batch_size) == (8, 128)
        assert shared.answer == {"same": "matches", "other": "departs"}[name]
        decision = shared.cells["test_accuracy"]["phase 1"]
        assert decision is not None
        assert decision.interval[0] < limit - 0.9 < decision.interval[1]


def test_limits_are_compared_under_the_linear_scaling_rule_alone() -> None:
    runs = made({l: [0.9, 0.91] for l in LS}) + made({l: [0.9, 0.91] for l in LS}, batch_size=16, lr=0.1)
    assert shared_limits(judge(runs)) == []
    runs += made({l: [0.9, 0.91] for l in LS}, batch_size=32, lr=0.2)
    (shared,) = shared_limits(judge(runs))
    assert (shared.reference, shared.batch_size) == (16, 32)


def test_each_batch_size_and_rate_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    write_sequence(tmp_path, dict.fromkeys(LS, rising()), batch_size=8)
    write_sequence(tmp_path, law(0.9, -0.3), batch_size=128, rng_seed=1)
    small, large = judge(load_runs(tmp_path))
    assert (small.batch_size, small.lr, small.answer) == (8, 0.1, "matches")
    assert (large.batch_size, large.lr, large.answer) == (128, 1.6, "departs")


def test_answers_combine_to_the_worst() -> None:
    assert combine(["matches", "matches"]) == "matches"
    assert combine(["matches", "open"]) == "open"
    assert combine(["open", "departs", "matches"]) == "departs"
    assert combine([]) == "open"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"metrics": []}, ValueError, "metrics must be one column or more, got none"),
        ({"margins": {"nsr": Margin(1.0)}}, ValueError, "margins must be for metrics that are judged,"),
        ({"metrics": ["accuracy"]}, KeyError, "no column 'accuracy'"),
    ],
)
def test_bad_arguments_are_refused(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    write_sequence(tmp_path, {1: rising(), 2: rising()}, seeds=2)
    with pytest.raises(error, match=message):
        verdict_of(tmp_path, **options)


def test_runs_of_different_length_are_refused_by_name(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, effective_steps=100)
    write_run(tmp_path, l=2, effective_steps=200)
    with pytest.raises(ValueError, match=r"B8-l1-seed0 has 100 .*B8-l2-seed0 200"):
        verdict_of(tmp_path)
