"""What the runs of a preset say, in the paper's terms: a table of what it reports beside what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from svag_fast.analysis.phases import END
from svag_fast.analysis.prediction import Baseline, Prediction, from_baseline, measure_each
from svag_fast.analysis.runs import Run, group_by_batch_size, group_by_l, load_runs
from svag_fast.analysis.verdict import Cell, Verdict, judge
from svag_fast.analysis.verdict_text import svag_answer
from svag_fast.experiments.paths import LR, NOISE, Paths
from svag_fast.experiments.presets import FAILURE, Preset, Scale
from svag_fast.files import replace_file
from svag_fast.stats.estimate import Estimate

LAST = (
    0.1  # of a run: its final accuracy is the mean over this part, for one evaluation on few images is a noisy number
)
WINDOW = 0.2  # of the phase before the rate drops: the paper's epochs 200 to 250
NEAR = 0.02  # two accuracies that differ by no more are the same here
C_SQUARED = 2.0  # the paper's


@dataclass(frozen=True)
class Row:
    """A line of the table: a quantity, what the paper reports of it and what was measured here."""

    quantity: str
    paper: str
    measured: str


@dataclass(frozen=True)
class Reproduction:
    """A preset's answer.

    Attributes:
        preset, scale: which one.
        setting: what was trained, in words.
        rows: of the table.
        answer: whether the phenomenon shows, in a sentence.
        shows: yes, no, or None where it can't be told.
        runs: by the names of the experiments; none of paths.
        paths: of Figure 2.
        verdicts: of SVAG's convergence.
        measured: G and N by batch size.
        errors: the final test error by batch size, nan where a run diverged.
        predictions: one from each batch size at which linear scaling had not failed.
        fails_from: the least batch size that failed, None where none did.
    """

    preset: Preset
    scale: Scale
    setting: str
    rows: Sequence[Row]
    answer: str
    shows: bool | None
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    paths: Sequence[Paths] = ()
    verdicts: Sequence[Verdict] = ()
    measured: Mapping[int, Baseline | None] = field(default_factory=dict)
    errors: Mapping[int, Estimate] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()
    fails_from: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "preset": self.preset.name,
            "figure": self.preset.figure,
            "scale": self.scale,
            "setting": self.setting,
            "table": [asdict(row) for row in self.rows],
            "answer": self.answer,
            "shows": self.shows,
            "seeds": {name: len({run.seed for run in runs}) for name, runs in self.runs.items()},
        }

    def save(self, path: Path) -> None:
        """Write `as_dict` as JSON, in one step.

        Raises:
            OSError: the folder can't be written.
        """
        with replace_file(path) as file:
            file.write(json.dumps(self.as_dict(), indent=2).encode() + b"\n")


def reproduction(preset: Preset, scale: Scale, out: Path, names: Sequence[str]) -> Reproduction:
    """Read a preset's runs and answer.

    Args:
        preset: which one, not of paths.
        scale: of it.
        out: folder of its experiments.
        names: of these.

    Raises:
        FileNotFoundError, ValueError: as :func:`svag_fast.analysis.runs.load_runs`.
    """
    runs = {name: load_runs(out / name) for name in names}
    answer = {"processes": _processes, "scaling": _scaling, "convergence": _convergence}[preset.kind]
    return Reproduction(preset, scale, _setting(next(iter(runs.values()))), runs=runs, **answer(preset, runs))


def _setting(runs: Sequence[Run]) -> str:
    config = runs[0].config
    noise = f" with {100 * config['label_noise']:g} % label noise" if config.get("label_noise") else ""
    seeds = len({run.seed for run in runs})
    return f"{config['model']} on {config['dataset']}{noise}, {seeds} seed{'s' * (seeds > 1)}"


def final(run: Run, metric: str = "test_accuracy") -> float:
    """The mean of a metric over the last tenth of a run; nan of one that diverged or isn't finished."""
    if run.diverged_at is not None or not run.finished:
        return math.nan
    steps, values = run.series(metric)
    return float(values[steps > (1 - LAST) * run.effective_steps].mean())


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with its standard error: unknown of one, and all unknown where one is nan."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(np.mean(values)), error, degrees_of_freedom=max(count - 1, 1))


def percent(value: Estimate) -> str:
    """An estimate of a fraction as percent."""
    if math.isnan(value.value):
        return "diverged or unfinished"
    if math.isnan(value.standard_error):
        return f"{100 * value.value:.1f} %"
    return f"{100 * value.value:.2f} ± {100 * value.standard_error:.2f} %"


def _difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of independent means, with Welch's degrees of freedom."""
    first, second = a.standard_error**2, b.standard_error**2
    parts = [
        variance**2 / (estimate.degrees_of_freedom or 1) for variance, estimate in ((first, a), (second, b)) if variance
    ]
    freedom = (first + second) ** 2 / sum(parts) if parts and math.isfinite(first + second) else 1.0
    return Estimate(a.value - b.value, math.sqrt(first + second), degrees_of_freedom=freedom)


def _processes(preset: Preset, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    finals = {name: mean_of([final(run) for run in group]) for name, group in runs.items()}
    rows = [Row(f"{n}: final test accuracy", preset.reported.get(n, "—"), percent(v)) for n, v in finals.items()]
    sgd = finals["SGD"]
    near, far = _difference(finals["NGD"], sgd), _difference(sgd, finals["GD"])
    rows += [
        Row("NGD - SGD", _gap(preset, "NGD", "SGD"), _points(near)),
        Row("SGD - GD", _gap(preset, "SGD", "GD"), _points(far)),
    ]
    (low, high), (least, most) = near.interval(), far.interval()
    shows: bool | None = None
    if low >= -NEAR and high <= NEAR and least > NEAR:
        shows = True
        answer = f"It shows: NGD's accuracy is within {100 * NEAR:g} points of SGD's, GD's is lower by more than that."
    elif high < -NEAR or low > NEAR or most < NEAR:
        shows = False
        answer = f"It doesn't show: NGD differs from SGD by more than {100 * NEAR:g} points, or GD by less."
    else:
        answer = "It can't be told: the 95 % intervals are too wide, or there is one seed."
    return {"rows": rows, "answer": answer, "shows": shows}


def _points(difference: Estimate) -> str:
    if math.isnan(difference.standard_error):
        return f"{100 * difference.value:+.1f} points"
    low, high = difference.interval()
    return f"{100 * difference.value:+.2f} points, 95 % from {100 * low:+.2f} to {100 * high:+.2f}"


def _gap(preset: Preset, first: str, second: str) -> str:
    said = [preset.reported.get(name, "").removesuffix(" %") for name in (first, second)]
    return f"{float(said[0]) - float(said[1]):+.1f} points" if all(said) else "—"


def _convergence(preset: Preset, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    (group,) = runs.values()
    verdicts = judge(group, metrics=("test_accuracy",))
    (verdict,) = verdicts
    rows = []
    for l, of_l in group_by_l(group).items():
        name = "SGD (l = 1)" if l == 1 else f"SVAG, l = {l:g}"
        rows.append(Row(f"{name}: final test accuracy", "—", percent(mean_of([final(run) for run in of_l]))))
    cells = verdict.cells["test_accuracy"]
    # A rate that moves all the time has no phase but the end.
    parts = {part: cell for part, cell in cells.items() if part != END} or dict(cells)
    for part, cell in parts.items():
        if cell.limit is None or cell.limit_interval is None:
            rows.append(Row(f"{part}: limit of SVAG", "—", "can't be told"))
            continue
        low, high = cell.limit_interval
        rows += [
            Row(
                f"{part}: limit of SVAG",
                "—",
                f"{100 * cell.limit:.2f} %, 95 % from {100 * low:.2f} to {100 * high:.2f}",
            ),
            Row(f"{part}: SVAG", preset.reported.get("SVAG", "—"), _svag(cell)),
            Row(f"{part}: SGD", preset.reported.get("SGD", "—"), _sgd(cell)),
        ]
    if not parts:
        return {"rows": rows, "answer": "It can't be told: every run diverged.", "shows": None, "verdicts": verdicts}
    # The paper looks at the curves' ends.
    part, last = list(parts.items())[-1]
    expected = preset.reported.get("SGD")
    shows: bool | None = None
    if last.converged_by and last.answer != "open" and expected:
        shows = _sgd(last) == expected
    words = {True: "It shows", False: "It doesn't show", None: "What was found"}[shows]
    answer = f"{words}: in {part} SVAG {_svag(last)}; SGD {_sgd(last)}."
    return {"rows": rows, "answer": answer, "shows": shows, "verdicts": verdicts}


def _svag(cell: Cell) -> str:
    answer, by = svag_answer([cell])
    said = {"converged": f"converges, by l = {by or 0:g}", "not converged": f"hasn't converged by l = {by or 0:g}"}
    return said.get(answer, "is open: more seeds or larger l would tell")


def _sgd(cell: Cell) -> str:
    return {"matches": "matches the limit", "departs": "departs from the limit"}.get(cell.answer, "is open")


def _scaling(preset: Preset, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    (group,) = runs.values()
    measured = measure_each(group, last=WINDOW)
    errors = {
        batch_size: mean_of([1 - final(run) for run in of_size])
        for (batch_size, _), of_size in group_by_batch_size(group).items()
    }
    known = [error.value for error in errors.values() if not math.isnan(error.value)]
    lowest = min(known, default=math.nan)
    # A run that diverged has failed, and so has every larger batch: the paper's red region begins there.
    failed = [b for b, error in errors.items() if not error.value <= (1 + FAILURE) * lowest]
    best = min((b for b in errors if errors[b].value == lowest), default=0)
    fails_from = min((b for b in failed if b > best), default=None)
    holds = [b for b in measured if fails_from is None or b < fails_from]
    baselines = [base for b in holds if (base := measured[b]) is not None and base.equilibrium.nsr is not None]
    predictions = [p for p in (from_baseline(base, C=math.sqrt(C_SQUARED)) for base in baselines) if p.kappa]
    rows = []
    for batch_size, error in errors.items():
        base = measured[batch_size]
        nsr = None if base is None else base.equilibrium.nsr
        ratio = f"; N/G {nsr}" if nsr is not None else "; N/G not measured"
        rows.append(Row(f"B = {batch_size}: final test error", "—", percent(error) + ratio))
    stars = [p.batch_size() for p in predictions]
    values = [star.value for star in stars if star is not None]
    said = f"{min(values):.3g} to {max(values):.3g}" if values else "none can be given"
    rows.append(Row("B*, predicted by Theorem 5.6 from each B that holds", "above the failing B", said))
    cuts = [p.baseline.batch_size * p.kappa["approximate"].value / C_SQUARED**2 for p in predictions]
    said = f"{min(cuts):.3g} to {max(cuts):.3g}" if cuts else "none can be given"
    rows.append(Row("where lines of slope 1 through each cut G/N = 1/C²", "—", said))
    said = "none" if fails_from is None else f"B = {fails_from}"
    rows.append(Row(f"first B whose error is {100 * FAILURE:.0f} % above the lowest", "—", said))
    shows: bool | None = None
    if fails_from is None:
        answer = "It can't be told: no batch size failed."
    elif not values:
        answer = f"It can't be told: linear scaling fails from B = {fails_from} on, and no B* can be given."
    else:
        # B* is where it must have failed: failure earlier doesn't contradict the theorem, later does.
        shows = fails_from <= max(values)
        word = "It shows" if shows else "It doesn't show"
        answer = (
            f"{word}: linear scaling fails from B = {fails_from} on, and must have failed beyond B* = "
            f"{min(values):.3g} to {max(values):.3g}, as predicted from each batch size below."
        )
    return {
        "rows": rows,
        "answer": answer,
        "shows": shows,
        "measured": measured,
        "errors": errors,
        "predictions": predictions,
        "fails_from": fails_from,
    }


def of_paths(preset: Preset, scale: Scale, paths: Sequence[Paths]) -> Reproduction:
    """Answer for Figure 2: the distribution at the last time, of which the SDE's is known exactly."""
    time = float(paths[0].times[-1])
    rows, skewness = [], {}
    for of in paths:
        deviation = Estimate(float(of.end.std(ddof=1)), float(of.end.std(ddof=1)) / math.sqrt(2 * len(of.end)))
        z = (of.end - of.end.mean()) / of.end.std()
        # The error of a skewness whose values are nearly Gaussian; larger where they aren't.
        skewness[of.name] = Estimate(float((z**3).mean()), float((z**3).std()) / math.sqrt(len(z)))
        rows.append(Row(f"{of.name}: deviation at the end", "—", str(deviation)))
        rows.append(Row(f"{of.name}: skewness at the end", "—", str(skewness[of.name])))
    exact = math.sqrt(LR * NOISE**2 / 2)
    rows.append(Row("SDE, exact, at rest: deviation, skewness", "—", f"{exact:.4g}, 0"))
    sde, svag, sgd = skewness.values()
    near, far = abs(svag.value - sde.value), abs(sgd.value - sde.value)
    noise = 3 * math.hypot(svag.standard_error, sde.standard_error)
    shows = True if near + noise < far / 2 else None
    word = "It shows" if shows else "It can't be told"
    answer = f"{word}: {paths[1].name}, ends with skewness {svag}, SGD with {sgd}, the SDE with {sde}."
    setting = (
        f"L = x²/2, skewed noise of deviation {NOISE:g}, lr {LR:g}, time {time:g}, {len(paths[0].end):,} paths each"
    )
    return Reproduction(preset, scale, setting, rows, answer, shows, paths=paths)
