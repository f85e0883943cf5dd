"""Verdicts in plain words: a headline for all batch sizes, and sentences for each."""

from __future__ import annotations

from collections.abc import Sequence

from svag_fast.estimate import Estimate
from svag_fast.verdict import Comparison, Difference, Verdict


def unit(metric: str) -> tuple[float, str]:
    """Return the factor that turns a column's values into what is shown, and the unit: accuracies in points."""
    return (100.0, " points") if metric.endswith("accuracy") else (1.0, f" of {metric}")


def shown(value: Estimate, metric: str, *, unit_name: bool = True) -> str:
    """Return a distance as it is printed, with its standard error and unit; points have one decimal."""
    factor, name = unit(metric)
    size, error = factor * value.value, factor * value.standard_error
    text = f"{size:.1f} ± {error:.1f}" if factor == 100 else str(Estimate(size, error))
    return text + (name if unit_name else "")


def headline(verdicts: Sequence[Verdict]) -> str:
    """Return the finding in one line."""
    stays = [v.batch_size for v in verdicts if v.sgd == "matches"]
    leaves = [v.batch_size for v in verdicts if v.sgd == "departs"]
    if stays and leaves:
        return f"SGD stays with its SDE limit at {_batch_sizes(stays)} and leaves it at {_batch_sizes(leaves)}"
    if stays:
        return f"SGD stays with its SDE limit at {_batch_sizes(stays)}"
    if leaves:
        return f"SGD leaves its SDE limit at {_batch_sizes(leaves)}"
    converged = [v.batch_size for v in verdicts if v.convergence == "converged"]
    if converged:
        return f"SVAG has converged at {_batch_sizes(converged)}"
    return "Too few finished runs to tell whether SGD follows its SDE limit"


def convergence_sentence(verdict: Verdict) -> str:
    """Say whether SVAG has converged, and why that is said."""
    largest = f"l = {verdict.largest_l:g}" if verdict.largest_l is not None else ""
    if verdict.convergence == "converged":
        return f"SVAG has converged by l = {verdict.converged_by:g}: from there on its curves agree with {largest}."
    steps = [c for l, c in verdict.comparisons.items() if l > 1] or list(verdict.comparisons.values())
    if verdict.convergence == "not converged":
        last = steps[-1]
        return f"SVAG has not converged by {largest}: l = {last.l:g} {_apart(last, verdict.metric)}."
    return f"Whether SVAG has converged cannot be told yet: {_why_open(verdict, steps[-1] if steps else None)}."


def sgd_sentence(verdict: Verdict) -> str:
    """Say whether SGD stays with the largest l, by how much, and against which seed noise."""
    if verdict.sgd == "not run":
        return "There is no run at l = 1: nothing is said of SGD."
    comparison = verdict.comparisons.get(1)
    if verdict.sgd == "cannot tell" or comparison is None:
        return f"Whether SGD stays with the limit cannot be told yet: {_why_open(verdict, comparison)}."
    if verdict.sgd == "departs":
        text = f"SGD departs from the limit: it {_apart(comparison, verdict.metric)}"
        if verdict.convergence != "converged":
            text += f" (l = {verdict.largest_l:g} stands for the limit, which SVAG has not shown that it has reached)"
        return f"{text}."
    curve, end = comparison.curve, comparison.end
    assert curve is not None  # or it could not have matched
    assert end is not None
    text = f"SGD matches the limit: its curve lies {shown(curve.size, verdict.metric)} from l = {verdict.largest_l:g}"
    text += f", {_against_noise(curve, verdict.metric)}, and ends {shown(end.size, verdict.metric)} away"
    if curve.p_value < comparison.alpha:
        text += f"; the difference is no chance (p = {curve.p_value:.1g}), but less than one run's own scatter"
    return f"{text}."


def sentences(verdict: Verdict) -> list[str]:
    """Return the verdict of one batch size in sentences."""
    if verdict.largest_l is None:
        return ["No run has finished: nothing can be said yet."]
    return [convergence_sentence(verdict), sgd_sentence(verdict)]


def _apart(comparison: Comparison, metric: str) -> str:
    """Say in which respect two processes differ."""
    assert comparison.curve is not None  # or they could not have differed
    assert comparison.end is not None
    parts = []
    if comparison.curve.agreement(comparison.alpha) == "differs":
        text = f"lies {shown(comparison.curve.size, metric)} from l = {comparison.largest_l:g} over the run"
        parts.append(f"{text}, {_against_noise(comparison.curve, metric)}")
    if comparison.end.agreement(comparison.alpha) == "differs" or not parts:
        parts.append(f"ends {shown(comparison.end.size, metric)} away, {_against_noise(comparison.end, metric)}")
    else:
        parts.append(f"ends {shown(comparison.end.size, metric)} away")
    return ", and ".join(parts)


def _against_noise(difference: Difference, metric: str) -> str:
    factor, _ = unit(metric)
    noise = f"{factor * difference.seed_noise:.2g}"
    ratio = difference.size.value / difference.seed_noise if difference.seed_noise > 0 else float("inf")
    if ratio <= 1:
        return f"within the seed noise of {noise}"
    return f"{ratio:.1f} times the seed noise of {noise}" if ratio < 1e3 else "where there is no seed noise"


def _why_open(verdict: Verdict, comparison: Comparison | None) -> str:
    if comparison is None:
        return f"l = {verdict.largest_l:g} is the only l whose runs have finished"
    pair = f"l = {comparison.l:g} and l = {comparison.largest_l:g}"
    if comparison.curve is None or comparison.end is None:
        return f"{pair} need two finished seeds each, since one run shows no noise"
    worst = max(comparison.curve, comparison.end, key=lambda d: d.agreement(comparison.alpha) == "cannot tell")
    return f"{pair} lie {shown(worst.size, verdict.metric)} apart, {_against_noise(worst, verdict.metric)}, " + (
        "which so few seeds cannot tell from chance; add seeds"
    )


def _batch_sizes(sizes: Sequence[int]) -> str:
    unique = list(dict.fromkeys(sizes))
    text = ", ".join(str(size) for size in unique[:-1])
    return f"B = {text} and {unique[-1]}" if text else f"B = {unique[-1]}"
