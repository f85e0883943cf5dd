"""Verdicts in plain words: a headline for all batch sizes, sentences for each, and numbers in the metric's units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from svag_fast.analysis.shared_limit import SharedLimit
from svag_fast.analysis.verdict import Cell, Decision, Interval, Verdict


def unit(metric: str) -> tuple[float, str]:
    """Return the factor that turns a column's values into what is shown, and the unit: accuracies in points."""
    return (100.0, " points") if metric.endswith("accuracy") else (1.0, "")


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """Return a value of ``metric`` as it is printed: accuracies in percent with one decimal, others with three."""
    factor, _ = unit(metric)
    return f"{factor * value:{'+' if signed else ''}.{1 if factor == 100 else 3}f}"


def with_error(value: float, ends: Interval, metric: str, *, signed: bool = False) -> str:
    """Return a value and half its interval's length, in the units of :func:`number`."""
    return f"{number(value, metric, signed=signed)} ± {number((ends[1] - ends[0]) / 2, metric)}"


def name(metric: str) -> str:
    """Return a column's name as it is read."""
    return metric.replace("_", " ")


def places(found: Iterable[tuple[str, str, Decision | None]]) -> str:
    """Say in which metrics and parts, with the distance and its interval where there is one.

    >>> places([("test_loss", "phase 2", None), ("test_loss", "end", None)])
    'test loss (phase 2, end)'
    """
    by_metric: dict[str, list[str]] = {}
    for metric, part, decision in found:
        units = unit(metric)[1]
        size = f" {with_error(decision.value, decision.interval, metric, signed=True)}{units}" if decision else ""
        by_metric.setdefault(metric, []).append(part + size)
    return _listed(f"{name(metric)} ({', '.join(parts)})" for metric, parts in by_metric.items())


def headline(verdicts: Sequence[Verdict]) -> str:
    """Return the finding in one line."""
    names = _names(verdicts)
    said = [
        f"{verb} {_batch_sizes(found)}"
        for answer, verb in (("matches", "matches its SDE limit at"), ("departs", "departs from it at"))
        if (found := [name for v, name in zip(verdicts, names, strict=True) if v.answer == answer])
    ]
    # "it" needs an SDE limit that was named before.
    if len(said) == 1:
        said = [said[0].replace("from it", "from its SDE limit")]
    still_open = [name for v, name in zip(verdicts, names, strict=True) if v.answer == "open"]
    if said:
        return "SGD " + " and ".join(said) + (f"; open at {_batch_sizes(still_open)}" if still_open else "")
    if still_open:
        return f"Open: whether SGD follows its SDE limit at {_batch_sizes(still_open)}"
    return "Every run diverged: no verdict"


def sentences(verdict: Verdict) -> list[str]:
    """Return the verdict of one batch size in sentences: SGD's answer and why, SVAG's convergence, divergence."""
    said = _sgd_sentences(verdict)
    if any(cell.distances for _, _, cell in _cells(verdict)):
        said += _convergence_sentences(verdict) + _regime_sentences(verdict)
        single = [f"l = {l:g}" for l, count in verdict.finished.items() if count == 1 and l > 1]
        if single:
            said.append(f"{_listed(single)}: one finished run each, two are needed to be in the fit.")
    return said + [_divergence_sentence(verdict, l) for l in verdict.diverged]


def shared_limit_sentence(shared: SharedLimit) -> str:
    """Say whether two batch sizes have the same limit, and where their draws make them different SDEs."""
    said = _shared_answer(shared)
    if shared.elsewhere:
        said += (
            f" Not compared: {_listed(shared.elsewhere)}, which are not at the same times and rates of the SDE in both."
        )
    if shared.noise_ratio == 1:
        return said
    if shared.noise_ratio is None:
        return (
            f"{said} The images of a batch are distinct ones of a data set whose size isn't known: the two SDEs are "
            "not quite the same, and nor need their limits be."
        )
    less = f"{100 * (1 - shared.noise_ratio):.2g} %"
    return (
        f"{said} The images of a batch are distinct, so N at B = {shared.batch_size} is {less} below what 1/B makes of "
        f"B = {shared.reference}'s: the two SDEs differ by that much, and so may their limits."
    )


def _shared_answer(shared: SharedLimit) -> str:
    rates = [f" (lr {lr:g})" if shared.several_rates else "" for lr in (shared.reference_lr, shared.lr)]
    pair = f"B = {shared.reference}{rates[0]} and B = {shared.batch_size}{rates[1]}"
    found = [(metric, part, d) for metric, parts in shared.cells.items() for part, d in parts.items()]
    if shared.answer == "matches":
        return f"{pair} share their limit, within the margins: linear scaling keeps its promise."
    if not any(d for _, _, d in found):
        return f"Whether {pair} share their limit is open" + ("." if shared.elsewhere else ": one of them has none.")
    chosen = [(m, p, d) for m, p, d in found if (d.answer if d else "open") == shared.answer]
    if shared.answer == "departs":
        return f"{pair} do not share their limit: it differs in {places(chosen)}."
    return f"Whether {pair} share their limit is open in {places(chosen)}{_seeds(d for _, _, d in chosen)}."


def svag_answer(cells: Sequence[Cell]) -> tuple[str, float | None]:
    """Say whether SVAG has converged in all of the cells: "converged" by l, "not converged" by l, or "open"."""
    by = [cell.converged_by for cell in cells]
    if by and all(by):
        return "converged", max(l for l in by if l is not None)
    apart = [l for cell in cells for l, d in cell.distances.items() if l > 1 and d.answer == "departs"]
    return ("not converged", max(apart)) if apart else ("open", None)


def _sgd_sentences(verdict: Verdict) -> list[str]:
    if verdict.answer == "diverged":
        return ["Every run diverged: there is no limit and no verdict."]
    if verdict.sgd_diverged and verdict.answer == "departs":
        return [f"SGD departs from the limit: all its runs diverged, and none at l = {max(verdict.total):g}."]
    cells = list(_cells(verdict))
    if not cells:
        return ["Open: no run has finished yet."]
    by_answer: dict[str, list[tuple[str, str, Decision | None]]] = {}
    for metric, part, cell in cells:
        by_answer.setdefault(cell.answer, []).append((metric, part, cell.sgd))
    said = []
    if found := by_answer.get("departs"):
        said.append(f"SGD departs from the limit in {places(found)}.")
    if found := by_answer.get("matches"):
        said.append(f"SGD matches the limit in {places(found)}.")
    if found := by_answer.get("open"):
        # A dict rather than a set, so that reasons come in the cells' order, each once.
        reasons = dict.fromkeys(cell.missing for _, _, cell in cells if cell.missing)
        why = f": {_listed(reason for reason in reasons if reason)}" if reasons else ""
        said.append(f"Open: whether SGD matches the limit in {places(found)}{why}{_seeds(d for _, _, d in found)}.")
    return said


def _convergence_sentences(verdict: Verdict) -> list[str]:
    cells = [(metric, part, cell) for metric, part, cell in _cells(verdict) if cell.distances]
    largest = max(l for _, _, cell in cells for l in cell.distances)
    answer, by = svag_answer([cell for _, _, cell in _cells(verdict)])
    if answer == "converged":
        return [f"SVAG has converged by l = {by:g}: from there on it is within the margins of the limit."]
    said = []
    if answer == "not converged" and by is not None:
        apart = [(m, p, c.distances[by]) for m, p, c in cells if by in c.distances]
        apart = [(m, p, d) for m, p, d in apart if d.answer == "departs"]
        said.append(f"SVAG has not converged by l = {by:g} in {places(apart)}.")
    if by != largest:
        doubtful = [(m, p, c.distances[largest]) for m, p, c in cells if c.distances[largest].answer == "open"]
        if doubtful:
            where = places((m, p, None) for m, p, _ in doubtful)
            seeds = _seeds(d for _, _, d in doubtful)
            said.append(f"Open: whether it has converged by l = {largest:g} in {where}{seeds}.")
    return said


def _regime_sentences(verdict: Verdict) -> list[str]:
    outside = [(m, p, None) for m, p, cell in _cells(verdict) if cell.regime_reached is False]
    untested = [(m, p, None) for m, p, cell in _cells(verdict) if cell.distances and cell.regime_reached is None]
    said = []
    if outside:
        said.append(
            f"The 1/l regime is not reached in {places(outside)}: the limit there is extrapolated from the largest l, "
            "and the intervals have the extrapolation's own length added on both sides."
        )
    if untested:
        said.append(f"The 1/l law could not be tested in {places(untested)}, with two l: intervals are wider for it.")
    return said


def _divergence_sentence(verdict: Verdict, l: float) -> str:
    at, total = verdict.diverged[l], verdict.total[l]
    who = "SGD" if l == 1 else f"l = {l:g}"
    steps = ", ".join(f"{step:g}" for step in sorted(at))
    return f"{len(at)} of {total} runs of {who} diverged, at effective step {steps}; they are in no mean."


def _seeds(decisions: Iterable[Decision | None]) -> str:
    needed = [decision.seeds_needed for decision in decisions if decision]
    if not needed:
        return ""
    # One that no number of seeds settles decides for all of them.
    if any(seeds is None for seeds in needed):
        return "; more seeds alone would not settle it, a larger l might"
    return f"; about {max(seeds for seeds in needed if seeds is not None)} seeds for each l would settle it"


def _cells(verdict: Verdict) -> Iterable[tuple[str, str, Cell]]:
    for metric, parts in verdict.cells.items():
        for part, cell in parts.items():
            yield metric, part, cell


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _names(verdicts: Sequence[Verdict]) -> list[str]:
    """Each verdict's batch size, with its rate where the batch size has several."""
    sizes = Counter(v.batch_size for v in verdicts)
    return [f"{v.batch_size}" + (f" (lr {v.lr:g})" if sizes[v.batch_size] > 1 else "") for v in verdicts]


def _batch_sizes(names: Sequence[str]) -> str:
    return "B = " + _listed(names)
