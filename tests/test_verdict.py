"""The criterion on made curves whose answer is known, and its error rates over many seeded repetitions."""

import math
from pathlib import Path

import numpy as np
import pytest
from make_runs import Mean, made_processes, rising, write_process, write_run

from svag_fast.curves import load_runs
from svag_fast.verdict import Verdict, compare, judge

Z = 3.0  # standard errors that an observed rate may lie off the stated one


def verdict_of(folder: Path, **options: object) -> Verdict:
    (verdict,) = judge(load_runs(folder), **options)  # type: ignore[arg-type]
    return verdict


def write_sequence(
    folder: Path, means: dict[float, Mean], *, seeds: int = 3, sd: float = 0.05, rng_seed: int = 0, **settings: object
) -> None:
    rng = np.random.default_rng(rng_seed)
    for l, mean in means.items():
        write_process(folder, mean, seeds=seeds, sd=sd, rng=rng, l=l, **settings)


def test_the_same_curve_at_every_l_has_converged_and_sgd_matches(tmp_path: Path) -> None:
    write_sequence(tmp_path, {l: rising() for l in (1, 2, 4, 8)})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("converged", 2, "matches")
    assert verdict.largest_l == 8
    assert verdict.effective_steps == 1504


def test_a_sequence_that_settles_has_converged_by_the_l_where_it_settles(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(1, 0.5), 2: rising(2, 0.8), 4: rising(8), 8: rising(8), 16: rising(8)})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("converged", 4, "departs")


def test_a_sequence_that_still_moves_has_not_converged(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(1, 0.5), 2: rising(2, 0.8), 4: rising(4, 0.9), 8: rising(8)})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("not converged", None, "departs")


def test_sgd_may_depart_where_svag_has_converged(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(2, 0.8), 2: rising(), 4: rising()})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("converged", 2, "departs")


def test_curves_that_part_only_at_the_end_differ(tmp_path: Path) -> None:
    """A quiet end shows a gap that the noise of the run hides."""

    def with_end(final: float) -> Mean:
        return lambda u: np.where(u < 0.8, rising()(u), final)

    write_sequence(tmp_path, {1: with_end(0.90), 2: with_end(0.97), 4: with_end(0.97)}, sd=0.1)
    comparison = verdict_of(tmp_path).comparisons[1]
    assert comparison.curve is not None
    assert comparison.end is not None
    assert comparison.curve.agreement(comparison.alpha) == "agrees"
    assert comparison.end.size.value == pytest.approx(0.07, abs=4 * comparison.end.size.standard_error)
    assert verdict_of(tmp_path).sgd == "departs"


def test_a_certain_difference_smaller_than_one_runs_scatter_is_agreement(tmp_path: Path) -> None:
    """Fifty seeds see a gap of two fifths of a run's standard deviation; a reader of single runs does not."""
    write_sequence(tmp_path, {1: lambda u: np.where(u < 0.8, 0.52, 0.5), 2: lambda u: 0.5 + 0 * u}, seeds=50)
    verdict = verdict_of(tmp_path)
    curve = verdict.comparisons[1].curve
    assert curve is not None
    assert curve.p_value < 1e-3
    assert curve.size.value < curve.seed_noise
    assert verdict.sgd == "matches"


def test_one_seed_cannot_tell(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(1, 0.3), 2: rising(), 4: rising()}, seeds=1)
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("cannot tell", None, "cannot tell")
    assert verdict.comparisons[1].curve is None


def test_two_seeds_tell_a_large_difference_and_admit_that_they_cannot_tell_a_middling_one(tmp_path: Path) -> None:
    write_sequence(tmp_path / "large", {1: rising(1, 0.3), 2: rising(), 4: rising()}, seeds=2)
    assert verdict_of(tmp_path / "large").sgd == "departs"

    flat = {1: [0.50, 0.52], 2: [0.58, 0.60]}  # 5.7 standard deviations apart, on two degrees of freedom
    for l, levels in flat.items():
        for seed, level in enumerate(levels):
            write_run(tmp_path / "middling", l=l, seed=seed, accuracy=[0.1, level, level, level])
    assert verdict_of(tmp_path / "middling").sgd == "cannot tell"


def test_without_l_1_nothing_is_said_of_sgd(tmp_path: Path) -> None:
    write_sequence(tmp_path, {2: rising(), 4: rising()})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.converged_by, verdict.sgd) == ("converged", 2, "not run")


def test_a_single_l_cannot_tell(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising()})
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.sgd, verdict.comparisons) == ("cannot tell", "cannot tell", {})


def test_sgd_alone_against_one_l_decides_convergence_too(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(), 8: rising()})
    assert verdict_of(tmp_path).converged_by == 1


def test_unfinished_runs_are_left_out_and_nothing_is_said_before_runs_finish(tmp_path: Path) -> None:
    write_run(tmp_path, l=1, fraction=0.5)
    write_run(tmp_path, l=2, fraction=0.1)
    verdict = verdict_of(tmp_path)
    assert (verdict.convergence, verdict.sgd, verdict.largest_l) == ("cannot tell", "cannot tell", None)

    write_sequence(tmp_path, {l: rising() for l in (1, 2, 4)})
    write_run(tmp_path, l=8, seed=0, fraction=0.9)
    write_run(tmp_path, l=2, seed=7, fraction=0.9, accuracy=np.zeros(41))
    verdict = verdict_of(tmp_path)
    assert (verdict.largest_l, verdict.converged_by, verdict.sgd) == (4, 2, "matches")


def test_curves_of_different_length_and_spacing_are_compared_where_both_are(tmp_path: Path) -> None:
    """A longer, finer curve through the same points is at distance 0 of the shorter one."""
    for seed in range(3):
        bump = 0.01 * seed
        write_run(tmp_path, l=1, seed=seed, effective_steps=100, accuracy=np.linspace(0.1, 0.5, 11) + bump)
        write_run(tmp_path, l=2, seed=seed, effective_steps=200, accuracy=np.linspace(0.1, 0.9, 81) + bump)
    verdict = verdict_of(tmp_path)
    assert verdict.effective_steps == 100
    comparison = verdict.comparisons[1]
    assert comparison.curve is not None
    assert comparison.end is not None
    assert comparison.curve.size.value == 0
    assert comparison.end.size.value == pytest.approx(0, abs=1e-12)
    assert comparison.agreement == "agrees"


def test_runs_without_noise_are_told_apart_by_any_difference(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, l=1, seed=seed, accuracy=[0.1, 0.5, 0.6])
        write_run(tmp_path, l=2, seed=seed, accuracy=[0.1, 0.5, 0.6])
        write_run(tmp_path, l=4, seed=seed, accuracy=[0.1, 0.5, 0.7])
    assert {l: c.agreement for l, c in verdict_of(tmp_path).comparisons.items()} == {1: "differs", 2: "differs"}


def test_seeds_that_end_alike_by_chance_are_no_proof_of_a_difference(tmp_path: Path) -> None:
    """Two seeds each, whose accuracies happen to end on the same count of test images."""
    for l, end in ((1, 0.97), (2, 0.98)):
        for seed in range(2):
            write_run(tmp_path, l=l, seed=seed, accuracy=[0.1, 0.8 + 0.1 * seed, 0.9 - 0.1 * seed, end])
    comparison = verdict_of(tmp_path).comparisons[1]
    assert comparison.end is not None
    assert comparison.end.seed_noise == 0
    assert comparison.agreement == "cannot tell"


def test_each_batch_size_and_rate_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(), 2: rising(), 4: rising()}, batch_size=8)
    write_sequence(tmp_path, {1: rising(1, 0.4), 2: rising(), 4: rising()}, batch_size=128, rng_seed=1)
    small, large = judge(load_runs(tmp_path))
    assert (small.batch_size, small.lr, small.sgd) == (8, 0.1, "matches")
    assert (large.batch_size, large.lr, large.sgd) == (128, 1.6, "departs")


def test_any_measured_column_can_be_judged(tmp_path: Path) -> None:
    write_sequence(tmp_path, {1: rising(1, 0.4), 2: rising(), 4: rising()})
    by_loss, by_accuracy = (
        verdict_of(tmp_path, metric=m).comparisons[1].curve for m in ("train_loss", "test_accuracy")
    )
    assert by_loss is not None
    assert by_accuracy is not None
    assert by_loss.size.value == pytest.approx(2.3 * by_accuracy.size.value)
    assert by_loss.p_value == pytest.approx(by_accuracy.p_value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"windows": 0}, ValueError, "windows"),
        ({"metric": "accuracy"}, KeyError, "no column 'accuracy'"),
        ({"metric": "amplified_loss"}, ValueError, "B8-l1-seed0: amplified_loss was measured 0 times"),
    ],
)
def test_bad_arguments_are_refused(
    tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    write_sequence(tmp_path, {1: rising(), 2: rising()}, seeds=2)
    with pytest.raises(error, match=message):
        verdict_of(tmp_path, **options)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("correlation", "sgd_sd"), [(0.0, 0.1), (0.9, 0.05), (0.9, 0.1)])
def test_pure_noise_is_called_a_difference_at_most_as_often_as_promised(
    seeds: int, correlation: float, sgd_sd: float
) -> None:
    sds = {1: sgd_sd, 2: (sgd_sd + 0.05) / 2, 4: 0.05, 8: 0.05}
    rng = np.random.default_rng(5)
    repetitions, alpha = 120, 0.05
    alarms = 0
    for _ in range(repetitions):
        found = compare(made_processes(rng, {l: rising() for l in sds}, seeds, sds, correlation), alpha=alpha)
        alarms += any(comparison.agreement == "differs" for comparison in found)
    assert alarms <= repetitions * alpha + Z * math.sqrt(repetitions * alpha * (1 - alpha))


def test_three_seeds_of_pure_noise_seldom_leave_it_open() -> None:
    """docs/verdict.md promises at most one batch size in ten, for three comparisons with three seeds."""
    rng = np.random.default_rng(6)
    repetitions, rate = 200, 0.1
    sds = dict.fromkeys((1.0, 2.0, 4.0, 8.0), 0.05)
    still_open = 0
    for _ in range(repetitions):
        found = compare(made_processes(rng, {l: rising() for l in sds}, 3, sds, 0.5), alpha=0.05)
        still_open += any(comparison.agreement == "cannot tell" for comparison in found)
    assert still_open <= repetitions * rate + Z * math.sqrt(repetitions * rate * (1 - rate))


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.2])
def test_squared_distance_is_unbiased_and_its_error_is_honest(gap: float) -> None:
    """The mean of d² over repetitions is the true one, and one standard error holds the truth as often as claimed."""
    rng = np.random.default_rng(7)
    repetitions, sds = 250, {1.0: 0.08, 2.0: 0.05}
    means: dict[float, Mean] = {1: lambda u: 0.5 + 0 * u, 2: lambda u: 0.5 + gap + 0 * u}
    squares, covered = [], 0
    for _ in range(repetitions):
        processes = made_processes(rng, means, 3, sds, 0.5)
        a, b = (np.array([y for _, y in processes[l]]) for l in (1.0, 2.0))
        (found,) = compare(processes, alpha=0.05, windows=40)
        assert found.curve is not None
        covered += found.curve.low <= gap <= found.curve.high
        squares.append(_unclipped_square(a, b))
    error = np.std(squares, ddof=1) / math.sqrt(repetitions)
    assert abs(np.mean(squares) - gap**2) < Z * error
    assert covered >= 0.6827 * repetitions - Z * math.sqrt(repetitions * 0.6827 * 0.3173)


def _unclipped_square(a: np.ndarray, b: np.ndarray) -> float:
    """The squared distance before it is clipped at 0, written out pair by pair of seeds (a U-statistic)."""
    a, b = ((c[:, 1:] + c[:, :-1]) / 2 for c in (a, b))  # windows between neighbouring points

    def pairs(c: np.ndarray) -> float:
        return float(np.mean([(c[i] * c[j]).mean() for i in range(len(c)) for j in range(len(c)) if i != j]))

    return pairs(a) + pairs(b) - 2 * float((a.mean(axis=0) * b.mean(axis=0)).mean())


def test_distance_is_the_u_statistic_over_pairs_of_seeds() -> None:
    rng = np.random.default_rng(8)
    processes = made_processes(rng, {1: rising(2), 2: rising(8)}, 4, {1: 0.05, 2: 0.1}, 0.5)
    (found,) = compare(processes, alpha=0.05, windows=40)
    a, b = (np.array([y for _, y in processes[l]]) for l in (1, 2))
    assert found.curve is not None
    assert found.curve.size.value == pytest.approx(math.sqrt(_unclipped_square(a, b)))


def test_end_is_welchs_t_test() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(9)
    processes = made_processes(rng, {1: rising(2), 2: rising(8)}, 4, {1: 0.05, 2: 0.1}, 0.5)
    (found,) = compare(processes, alpha=0.05)
    a, b = ([y[-1] for _, y in processes[l]] for l in (1, 2))
    assert found.end is not None
    assert found.end.p_value == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue)
    assert found.end.seed_noise == pytest.approx(math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2))


def test_a_departure_of_three_standard_deviations_is_found_with_three_seeds() -> None:
    """Power: a curve three seed standard deviations off is called different in at least 95 % of repetitions."""
    rng = np.random.default_rng(10)
    means: dict[float, Mean] = {1: rising(8, 0.82), 2: rising(), 4: rising(), 8: rising()}
    sds = dict.fromkeys(means, 0.05)
    repetitions = 100
    found = 0
    for _ in range(repetitions):
        first, *_ = compare(made_processes(rng, means, 3, sds, 0.5), alpha=0.05)
        found += first.agreement == "differs"
    assert found >= 0.95 * repetitions - Z * math.sqrt(repetitions * 0.95 * 0.05)
