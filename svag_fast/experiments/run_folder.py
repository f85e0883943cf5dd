"""The one reader of a run's folder, for `run`, `report` and `predict`: every number of it has a range.

Files may be damaged, half-written or another program's: what isn't a run's is refused by name. A run that diverged has
losses and norms that are nan or infinite, from one row on to its end: that is a run's own way to end, and is told apart
from damage.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from array import array
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from svag_fast.experiments.config import UNSAID, run_name
from svag_fast.experiments.data import train_size
from svag_fast.experiments.data.sampling import MODES
from svag_fast.experiments.ranges import RANGES, Range
from svag_fast.files import read_text

Array: TypeAlias = NDArray[np.float64]

CONFIG_BYTES = 1 << 20
TABLE_BYTES = 1 << 28

# What a run's config.json must say for its curve to be placed among the others. Another trainer's length may be broken.
NEEDED = {name: RANGES[name] for name in ("batch_size", "lr", "weight_decay", "l", "seed")}
NEEDED["effective_steps"] = Range(1e-6, RANGES["effective_steps"].most)
TEXTS = ("dataset", "model", "task_sha256")
# What runs that are compared may differ in: what is varied (lengths are compared by the rows themselves), how and how
# often a run was computed and looked at, and where it comes from. All else decides its curve, known here or not.
MAY_DIFFER = {"batch_size", "lr", "l", "seed", "effective_steps", "epochs", "steps"}
MAY_DIFFER |= {"backend", "device", "threads", "jobs", "rows", "evaluations", "checkpoint_seconds"}
MAY_DIFFER |= {"engine", "stat_every", "replicas"}
MAY_DIFFER |= {"versions", "platform", "commit"}
# Runs of two files of one task are told apart by who knows which ones belong together: analysis.runs.
MAY_DIFFER |= {"task_sha256"}

_FINITE = Range(-1.8e308, 1.8e308)
_NOT_NEGATIVE = Range(0, 1.8e308)
_FRACTION = Range(0, 1)

# The columns of metrics.csv, in order; one without a range holds text.
METRICS: dict[str, Range | None] = {
    "step": Range(0, 1e15),
    "effective_step": _NOT_NEGATIVE,
    "time": _NOT_NEGATIVE,
    "train_loss": _FINITE,
    "amplified_loss": _FINITE,
    "test_loss": _FINITE,
    "train_accuracy": _FRACTION,
    "test_accuracy": _FRACTION,
    "grad_sq_norm": _FINITE,  # an unbiased estimate, which may fall below 0
    "noise_trace": _FINITE,  # see _check_noise
    "weight_sq_norm": _NOT_NEGATIVE,
    "nsr": _FINITE,
    "noise_source": None,
    "noise_cost": Range(-1, 1.8e308),
    "lr": RANGES["lr"],
    "samples_per_second": _NOT_NEGATIVE,
}
COLUMNS = tuple(METRICS)


def columns_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of a run whose task has these metrics: in accuracy's place each, of both data."""
    own = [f"{part}_{name}" for name in metrics for part in ("train", "test")]
    first = COLUMNS.index("train_accuracy")
    return (*COLUMNS[:first], *own, *COLUMNS[first + 2 :])


def metrics_of(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the metrics, but for the loss, that a run's columns hold, in their order."""
    return tuple(name.removeprefix("train_") for name in columns if name.startswith("train_") and name != "train_loss")


# The columns that another trainer's log may have.
LOG: dict[str, Range | None] = {
    "step": METRICS["step"],
    "G": METRICS["grad_sq_norm"],
    "N": METRICS["noise_trace"],
    "R": METRICS["weight_sq_norm"],
    "lr": METRICS["lr"],
}

# Beyond it squares overflow: what was measured is as good as infinite.
_LARGEST = 1e100

# A run in which one of these stops being finite has diverged.
MUST_BE_FINITE = ("train_loss", "amplified_loss", "test_loss", "grad_sq_norm", "noise_trace", "weight_sq_norm")
# Never nan, however badly a run ends.
_ALWAYS_FINITE = {"step", "effective_step", "time", "train_accuracy", "test_accuracy", "noise_cost", "lr"}
_ALWAYS_FINITE |= {"samples_per_second"}
_RUN_NAME = re.compile(r"b\d+-lr[^-]+(-\d+)?-l[^-]+-seed\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)


class Columns(NamedTuple):
    """A CSV file's columns.

    Attributes:
        values: a float64 value a row; NaN where the row did not measure it, infinite where what it measured is no
            finite number, which only rows from `diverged` on have.
        texts: the last text of each column without a range, where there is one.
        diverged: the first row whose losses or norms aren't finite; None where all are.
    """

    values: dict[str, Array]
    texts: dict[str, str]
    diverged: int | None


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's config.json; what an older version's doesn't say of the draw of its batches is filled in.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it isn't one; the message names it, the setting and what was expected.
    """
    text = read_text(path, CONFIG_BYTES)
    try:
        config: dict[str, Any] = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON of settings, but nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    missing = [key for key in NEEDED if key not in config] if isinstance(config, dict) else list(NEEDED)
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)} in it; is this the config of a run?")
    for name, range_ in NEEDED.items():
        if config[name] not in range_:
            raise ValueError(f"{path}: {name} must be {range_}, got {_short(config[name])}")
    for name in TEXTS:
        value = config.get(name, "")
        if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
            raise ValueError(f"{path}: {name} must be a short text, got {_short(value)}")
    for name in UNSAID.keys() - {"sampling"}:
        config.setdefault(name, UNSAID[name])
    if config["task"] and config["train_size"] not in Range(0, 10**15, whole=True):
        raise ValueError(f"{path}: train_size must be an integer of at least 0, got {_short(config['train_size'])}")
    # Older versions drew distinct images, where the data set has as many as a batch; another trainer's say nothing.
    size = train_size(config.get("dataset", ""))
    if "sampling" not in config and size is not None and config["batch_size"] <= size:
        config["sampling"] = UNSAID["sampling"]
    sampling = config.get("sampling", "replacement")
    if not isinstance(sampling, str) or sampling not in MODES:
        raise ValueError(f"{path}: sampling must be one of {', '.join(MODES)}, got {_short(sampling)}")
    if MODES[sampling].distinct and size is not None and config["batch_size"] > size:
        raise ValueError(
            f"{path}: batch_size must be at most {size} where images are distinct, got {config['batch_size']}"
        )
    folder = Path(path).parent.name
    said = run_name(*(config[name] for name in ("batch_size", "lr", "l", "seed")))
    # A run's name says its settings: where the two disagree, one was edited, and a report would mislabel its curve.
    if _RUN_NAME.fullmatch(folder) and folder != said:
        raise ValueError(
            f"{path}: its settings are {said}'s, and its folder is {folder}: was one of them changed? (A folder of any "
            "other name may hold any run.)"
        )
    return config


def read_metrics(path: str | os.PathLike[str]) -> Columns:
    """Read a run's metrics.csv as far as it has come; a run that has only just started has none.

    Raises:
        ValueError: it isn't one; the message names it, the line and the column.
    """
    try:
        table = read_table(path, METRICS, needed=("effective_step", "lr"), others=_FINITE)
    except FileNotFoundError:
        return Columns({"effective_step": np.empty(0), "lr": np.empty(0)}, {}, None)
    written = [name for name in columns_of(metrics_of(table.values)) if METRICS.get(name, _FINITE) is not None]
    found = [name for name in table.values if name in written]
    # With all its columns it is `svag-fast run`'s own file, which writes them in this order.
    if sorted(found) == sorted(written) and found != written:
        moved = [f"{theirs} for {ours}" for theirs, ours in zip(found, written, strict=True) if theirs != ours]
        raise ValueError(f"{path}: its first line has {', '.join(moved)}; were names interchanged?")
    steps, time = table.values["effective_step"], table.values.get("time", np.empty(0))
    if (np.diff(steps) <= 0).any():
        raise ValueError(f"{path}: effective_step goes back or stands still; are these two runs' rows in one file?")
    if (np.diff(time[~np.isnan(time)]) < 0).any():
        raise ValueError(f"{path}: time goes back; are these two runs' rows in one file?")
    return table


def read_log(path: str | os.PathLike[str]) -> Columns:
    """Read another trainer's CSV with the columns step, G, N and perhaps R and lr; what else it has is left alone.

    Raises:
        OSError: it can't be read.
        ValueError: it isn't one; the message names it, the line and the column.
    """
    table = read_table(path, LOG, needed=("step", "G", "N"), others=None)
    if not len(table.values["step"]):
        raise ValueError(f"{path}: no whole row; expected a first line step,G,N[,R][,lr], then a row a line")
    if not (np.diff(table.values["step"]) > 0).all():
        raise ValueError(f"{path}: the column step must ascend")
    return table


def read_table(
    path: str | os.PathLike[str], ranges: Mapping[str, Range | None], *, needed: Collection[str], others: Range | None
) -> Columns:
    """Read a CSV file with a header line. A last line without its end is still being written and left out.

    Args:
        path: UTF-8, with or without a byte order mark, lines that end as on Unix or on Windows.
        ranges: of each column; None for one of text.
        needed: columns that must be there; of the first no cell may be empty.
        others: the range of all other columns; None to leave them out.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such file; the message names it, the line and the column.
    """
    text = read_text(path, TABLE_BYTES)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    # What follows the last line end is empty, or a row that is still being written.
    del lines[-1]
    try:
        # Line by line, so that a stray quote can't swallow the rest of the file as one cell.
        rows = list(csv.reader(lines, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error})") from error
    if len(rows) != len(lines) or (not lines and "\r" in text):
        raise ValueError(f"{path}: not CSV of a row a line")
    header = [name.strip() for name in rows[0]] if rows else list(needed)
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))}; its first line is {_short(lines[0])}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: {', '.join(map(repr, twice))} more than once in its first line")
    read = {name: (i, ranges.get(name, others)) for i, name in enumerate(header)}
    texts: dict[str, str] = {}
    # 8 bytes a cell: lists of Python floats would take four times a large file's size.
    values = {n: array("d") for n, (_, r) in read.items() if r is not None}
    first = next(iter(needed))
    at: list[int] = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} cells, but {len(header)} columns")
        at.append(number)
        for name, (index, range_) in read.items():
            cell = row[index].strip()
            if range_ is not None:
                if not cell and name == first:
                    raise ValueError(f"{path}, line {number}: {name} is empty")
                values[name].append(_value(cell, range_, f"{path}, line {number}: {name}", name))
            elif name in ranges and cell:
                texts[name] = cell
    columns: dict[str, Array] = {name: np.array(column, dtype=np.float64) for name, column in values.items()}
    for G, N in (("grad_sq_norm", "noise_trace"), ("G", "N")):
        if {G, N} <= columns.keys():
            _check_noise(path, at, columns[G], N, columns[N])
    return Columns(columns, texts, _divergence(path, columns, at))


def _value(cell: str, range_: Range, where: str, name: str) -> float:
    if not cell:
        return math.nan
    if not _NUMBER.fullmatch(cell):
        raise ValueError(f"{where} is not a number but {_short(cell)}")
    value = float(cell)
    # Written so that nan takes this branch too.
    if not abs(value) <= _LARGEST and name not in _ALWAYS_FINITE:
        if name == "nsr":  # N/G where G is 0
            return math.nan
        return math.inf if math.isnan(value) else math.copysign(math.inf, value)
    if value not in range_:
        raise ValueError(f"{where} must be {range_}, got {cell[:40]}")
    return value


def _check_noise(path: str | os.PathLike[str], lines: list[int], G: Array, name: str, N: Array) -> None:
    """Refuse a negative trace; one of 0, estimated as a difference of squares, may come out below it by rounding."""
    # Comparisons with nan are false here, which is meant: unmeasured rows are not wrong.
    with np.errstate(invalid="ignore"):
        wrong = -1e-5 * np.abs(np.nan_to_num(G)) > N
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{path}, line {lines[row]}: {name} is a trace and must be at least 0, got {N[row]:g}")


def _divergence(path: str | os.PathLike[str], columns: Mapping[str, Array], lines: list[int]) -> int | None:
    """The first row with a value that isn't finite; all behind it must have one."""
    if not (lines and columns):
        return None
    infinite = np.asarray(np.isinf(np.stack(list(columns.values()))).any(axis=0))
    if not infinite.any():
        return None
    first = int(np.argmax(infinite))
    if not infinite[first:].all():
        back = first + int(np.argmin(infinite[first:]))
        names = [name for name, column in columns.items() if np.isinf(column[first])]
        raise ValueError(
            f"{path}, line {lines[first]}: {', '.join(names)} is nan or infinite, and line {lines[back]} is finite "
            f"again: no run that diverges comes back (beyond {_LARGEST:g} counts as infinite). A cell is left empty "
            "where nothing was measured"
        )
    return first


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 200:
        return "an integer of many digits"
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def require_comparable(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse runs (name -> config.json) that are the same one twice, or whose curves can't be compared.

    Raises:
        ValueError: the message names two of them, and in what they are alike or differ.
    """
    seen: dict[tuple[int, float, float, int], str] = {}
    # Against the first alone: being equal carries over from pair to pair.
    first = next(iter(configs), "")
    for name, config in configs.items():
        key = (int(config["batch_size"]), float(config["lr"]), float(config["l"]), int(config["seed"]))
        if key in seen:
            raise ValueError(f"{name} and {seen[key]} have the same batch_size, lr, l and seed: {key}")
        seen[key] = name
        for setting in sorted((configs[first].keys() | config.keys()) - MAY_DIFFER):
            one, other = configs[first].get(setting), config.get(setting)
            # A task's file may be in another folder on another machine: its hash says whether it is the same.
            if setting == "task":
                one, other = (Path(str(value or "")).name for value in (one, other))
            if other != one:
                raise ValueError(
                    f"{first} has {setting} {one!r} and {name} {other!r}: "
                    "runs that differ in more than batch size, lr, l and seed belong in folders of their own"
                )
