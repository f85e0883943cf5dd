"""The runs of one folder, read back: settings and measured series, finished or still growing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svag_fast.experiments.data import train_size
from svag_fast.experiments.data.sampling import MODES, population_of
from svag_fast.experiments.run_folder import Array, read_config, read_metrics, require_comparable
from svag_fast.experiments.task_file import known_hashes
from svag_fast.stats.sampling import halves_noise_factor, noise_factor


@dataclass(frozen=True)
class Run:
    """One training run as its folder tells it.

    ``metrics`` maps a column of metrics.csv to one float64 value a row. It is NaN where the row did not measure it. It
    is infinite where the run had diverged and what it measured was no finite number.
    """

    name: str
    config: dict[str, Any]
    metrics: dict[str, Array]
    noise_source: str | None = None
    """What G and N were estimated from, as metrics.csv says."""
    diverged_at: float | None = None
    """The effective step of the first row with a loss, weight norm, G or N that is not finite."""

    @property
    def batch_size(self) -> int:
        """Samples in each of a step's batches (B)."""
        return int(self.config["batch_size"])

    @property
    def lr(self) -> float:
        """SGD's learning rate (the paper's eta) before any schedule."""
        return float(self.config["lr"])

    @property
    def l(self) -> float:
        """SVAG's hyperparameter; 1 is SGD."""
        return float(self.config["l"])

    @property
    def process(self) -> str:
        """What its steps are: "svag", which is SGD at l = 1, or "ngd" or "gd" on the full gradient."""
        return str(self.config.get("process", "svag"))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def effective_steps(self) -> float:
        """The length that the run was asked for, in effective steps."""
        return float(self.config["effective_steps"])

    @property
    def population(self) -> int | None:
        """The number of training images where a batch's are distinct; None for independent draws, or if unknown."""
        size = (
            int(self.config["train_size"]) or None
            if self.config.get("task")
            else train_size(self.config.get("dataset", ""))
        )
        return population_of(self._sampling, size)

    @property
    def unsized(self) -> bool:
        """Whether a batch's images are distinct ones of a data set of unknown size."""
        return MODES[self._sampling].distinct and self.population is None

    @property
    def noise_factor(self) -> float | None:
        """What the draw of the batches makes of the SDE's noise, over Tr Σ₁/B; None where n isn't known.

        The SDE is SVAG's limit, or SGD's where batches come in one fixed order.
        """
        if self.unsized:
            return None
        if self.population is not None and MODES[self._sampling].halves and 2 * self.batch_size <= self.population:
            return halves_noise_factor(self.batch_size, self.population, math.inf)
        return noise_factor(self.batch_size, self.population)

    @property
    def met_its_batches(self) -> bool:
        """Whether G and N were estimated from images that the weights may have met since the epoch began: G is high.

        SGD's second batch is drawn afresh, and with per-sample norms it is enough.
        """
        return MODES[self._sampling].epochs and not (self.l == 1 and self.noise_source == "per_sample")

    @property
    def _sampling(self) -> str:
        return str(self.config.get("sampling", "replacement"))

    @property
    def last_step(self) -> float:
        """The effective step from which on a row is the run's end: its length, in whole steps of 1/l."""
        return self.effective_steps - (0.5 + 1e-6) / self.l

    @property
    def finished(self) -> bool:
        """Whether the last row stands at the length that the run was asked for."""
        steps = self.metrics["effective_step"]
        return len(steps) > 0 and bool(steps[-1] >= self.last_step)

    def final(self, column: str) -> float:
        """Return the value of ``column`` at the run's end, NaN where it was not measured there.

        Raises:
            KeyError: metrics.csv has no such column.
        """
        steps, values = self.series(column)
        return float(values[-1]) if len(steps) and steps[-1] >= self.last_step else math.nan

    def series(self, column: str) -> tuple[Array, Array]:
        """Return the effective steps at which ``column`` was measured, and its values there (see `metrics`).

        Raises:
            KeyError: metrics.csv has no such column.
        """
        if column not in self.metrics:
            raise KeyError(f"{self.name}: no column {column!r} in metrics.csv; it has {', '.join(self.metrics)}")
        values = self.metrics[column]
        # Infinite values stay: they were measured, and say that the run diverged.
        measured = ~np.isnan(values)
        return self.metrics["effective_step"][measured], values[measured]

    def first_phase_mean(self, column: str) -> float:
        """Return the mean of ``column`` over the later half of the first phase, NaN where it was never measured there.

        The first phase ends where the learning rate first falls below half of its peak. Its earlier half is left out,
        since R, G and N come close to equilibrium only after a while.
        """
        steps, lr = self.metrics["effective_step"], self.metrics["lr"]
        if len(steps) == 0 or np.isnan(lr).all():
            return math.nan
        # From the peak on, so that a warm-up is not taken for the first drop.
        peak = int(np.nanargmax(lr))
        dropped = np.flatnonzero(lr[peak:] < lr[peak] / 2)
        end = steps[peak + dropped[0]] if len(dropped) else np.inf
        last = steps[steps < end][-1]
        at, values = self.series(column)
        values = values[(at > last / 2) & (at < end)]
        return float(values.mean()) if len(values) else math.nan


def load_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """Read every run in ``folder``: each subfolder with a ``config.json``, whether it has finished or not.

    A last line that is still being written is left out. Runs come in the order of batch size, lr, l, seed.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it.
        ValueError: A file is not what a run writes, or two runs have the same settings and seed, or the same numbers.
            Or they differ in another setting than batch size, lr, l and seed, such as the weight decay or a momentum:
            their curves cannot be compared. The message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    runs = [load_run(path.parent) for path in sorted(folder.glob("*/config.json"))]
    if not runs:
        hint = ", but it is a run itself: name the folder above it" if (folder / "config.json").exists() else ""
        raise FileNotFoundError(f"{folder}: no run in it (no subfolder with a config.json){hint}")
    # Here, before any mean is taken: curves of two data sets would be averaged without a word.
    require_comparable({run.name: run.config for run in runs})
    _refuse_other_tasks(folder, runs)
    _refuse_copies(runs)
    return sorted(runs, key=lambda run: (run.batch_size, run.lr, run.l, run.seed))


def require_svag(runs: Iterable[Run]) -> None:
    """Refuse runs of another process than SGD and SVAG: what is asked of these says nothing of those.

    Raises:
        ValueError: one of the runs is named.
    """
    for run in runs:
        if run.process != "svag":
            raise ValueError(f"process must be svag, for SGD and SVAG are judged here, got {run.process} of {run.name}")


def group_by_batch_size(runs: Iterable[Run]) -> dict[tuple[int, float], list[Run]]:
    """Return the runs of each (batch size, lr), in that order."""
    groups: dict[tuple[int, float], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.batch_size, run.lr)):
        groups.setdefault((run.batch_size, run.lr), []).append(run)
    return groups


def group_by_l(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """Return the runs of each l, in ascending order."""
    groups: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.l):
        groups.setdefault(run.l, []).append(run)
    return groups


def _refuse_other_tasks(folder: Path, runs: Iterable[Run]) -> None:
    """Refuse runs of two files of a task, unless the experiment was told to continue with a changed one."""
    hashes = {str(found): run.name for run in runs if (found := run.config.get("task_sha256"))}
    if len(hashes) > 1 and not hashes.keys() <= set(known_hashes(folder)):
        one, other, *_ = hashes.values()
        raise ValueError(f"the runs must be of one version of their task's file, got {one} and {other}, of two")


def _refuse_copies(runs: Iterable[Run]) -> None:
    """Refuse two runs of different seeds with the same numbers: as two values they would have no scatter."""
    for group in group_by_batch_size(run for run in runs if run.finished and run.diverged_at is None).values():
        for alike in group_by_l(group).values():
            seen: dict[bytes, str] = {}
            for run in alike:
                if run.population == run.batch_size or run.process == "gd":
                    continue  # of all images: nothing in it is drawn
                columns = sorted(run.metrics.keys() - {"time", "samples_per_second", "noise_cost"})
                numbers = b"".join(run.metrics[column].tobytes() for column in columns)
                if numbers in seen:
                    raise ValueError(
                        f"{seen[numbers]} and {run.name} have the same numbers in every row: is one the other's copy?"
                    )
                seen[numbers] = run.name


def load_run(folder: Path) -> Run:
    """Read one run from its own folder: config.json, and metrics.csv as far as it has come.

    Raises:
        FileNotFoundError: There is no config.json in it.
        ValueError: A file is not what a run writes; the message names it.
    """
    config = read_config(folder / "config.json")
    table = read_metrics(folder / "metrics.csv")
    steps = table.values["effective_step"]
    diverged_at = None if table.diverged is None else float(steps[table.diverged])
    return Run(folder.name, config, table.values, table.texts.get("noise_source"), diverged_at)
