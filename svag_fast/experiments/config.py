"""What a run and an experiment are made of: plain values, checked before anything is written. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from svag_fast.experiments.data import DATASETS, check_name, train_size
from svag_fast.experiments.data.sampling import MODES, require_drawable
from svag_fast.experiments.ranges import RANGES, ConfigError, Range, check, check_numbers, check_range, settle
from svag_fast.experiments.schedules import milestones, resolve, starts

# Settings of the built-in nets and data, and what they are where a task takes their place.
BUILTIN: dict[str, Any] = {"dataset": "", "model": "", "label_noise": 0.0, "augment": "none"}
# By data set, where none is asked for: nobody's own data are made noisy.
LABEL_NOISE = {"digits": 0.2}
AUGMENTS = ("none", "crop-flip")
INITS = ("shared", "own")
ENGINES = ("torch", "fused")
# What the files of a run mean where they don't name a setting, as older versions'.
UNSAID = {"sampling": "distinct", "init": "shared", "label_noise": 0.0, "engine": "torch", "stat_every": 1}
UNSAID |= {"task": "", "train_size": 0, "process": "svag", "augment": "none"}
# Of the paper's section 2: svag is SGD at l = 1; ngd and gd follow the full gradient, with and without Gaussian noise.
PROCESSES = ("svag", "ngd", "gd")
FULL_BATCH = " where process is ngd or gd"
DRAWN_AFRESH = ("replacement", "distinct")
# The nets that the fused engine trains where nobody says how: its kernel is made for small ones.
SMALL_CHAINS = ("digits-mlp", "digits-net")
MOST_RUNS = 10_000
EFFECTIVE_STEPS = 5120  # of an experiment that says nothing of its length
TRAIN_EVALUATIONS = 20  # at most; the training set is larger than the test set, and no answer rests on it
DEFAULT_BATCH_SIZES = (4, 32, 256)
DEFAULT_L: tuple[tuple[float, ...], ...] = ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16))


def run_name(batch_size: int, lr: float, l: float, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"b{batch_size}-lr{lr:g}-l{l:g}-seed{seed}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


WHAT, LENGTH, HOW, BOOKKEEPING = "What to train", "How long", "How", "Bookkeeping"


def setting(
    default: Any, panel: str, metavar: str | None, text: str, *, choices: Iterable[str] = (), shown: str | None = None
) -> Any:
    """A field that a command has an option for.

    Args:
        default: its value where none is given.
        panel: of the command's help.
        metavar: what the help calls a value; None for choices.
        text: what it is, one or two sentences, as the help says it.
        choices: the values that it may have, where these are names; a number's are its `RANGES`.
        shown: the default as the help says it, where `default` does not.
    """
    metadata = {"panel": panel, "metavar": metavar, "help": text, "choices": tuple(choices), "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of an experiment share. `svag-fast run` makes its options from these fields."""

    # The network and data of one's own instead of dataset and model: "/path/file.py:name", "package.module:name", or
    # "<name>" where it was made in Python; and how many training samples it has, filled in when it is loaded.
    task: str = ""
    train_size: int = 0
    process: str = "svag"
    dataset: str = setting("digits", WHAT, "NAME", f"{', '.join(DATASETS)}, or FILE.npz with your own images.")
    label_noise: float = setting(
        None,
        WHAT,
        "PART",
        "Part of the training labels, chosen once, that is redrawn from all classes. On other data than digits 0.",
        shown="0.2",
    )
    # The convolutional net's honest setting, in which N/G is far above 1 as well: B = 2, lr 0.1, decay 0.0025.
    model: str = setting(
        "digits-mlp",
        WHAT,
        "NAME",
        "digits-mlp, digits-net (convolutions; made for --batch-size 2 --lr 0.1 --weight-decay 0.0025), "
        "or by its family: preresnet32-bn, resnet32-bn-plain, vgg16-gn-w2, wrn16-4-gn, mlp128x64-ln; see docs/nets.md.",
    )
    augment: str = setting(
        "none", WHAT, None, "Of training images: none, or random crops with padding 4 and flips.", choices=AUGMENTS
    )
    weight_decay: float = setting(0.00125, WHAT, "LAMBDA", "Weight decay.")
    schedule: str = setting(
        "step",
        HOW,
        "SHAPE",
        "Learning rate over the effective steps: constant, cosine, triangle, step (a tenth from 80 % on) or "
        "milestones:0.5,250/300 (a tenth from each of these parts on; *0.2 at the end: a fifth); warmup:0.05+SHAPE.",
    )
    # The head of a net, which is fixed, is shared in any case.
    init: str = setting(
        "own", HOW, None, "Initial weights: one draw shared by all runs, or each run's own.", choices=INITS
    )
    # Independent draws have the theory's noise Σ/B; without an image twice it is (n - B)/(n - 1) of that.
    sampling: str = setting(
        "replacement",
        HOW,
        None,
        "Images of a step's two batches: drawn with replacement; all distinct in each; distinct in both (halves); of "
        "shuffled epochs; of epochs in one fixed order, for SGD alone.",
        choices=MODES,
    )
    backend: str = setting("auto", HOW, "NAME", "Of the fused step: auto, or see `svag-fast info`.")
    device: str = setting("cpu", HOW, "NAME", "Where net and data live: cpu, cuda, cuda:1.")
    threads: int = setting(1, HOW, "N", "Threads of each run's process.")
    rows: int = setting(320, BOOKKEEPING, "N", "Rows of metrics a run, evenly spaced over the effective steps.")
    evaluations: int = setting(320, BOOKKEEPING, "N", "Rows that evaluate on test data; some 20 on training data too.")

    def __post_init__(self) -> None:
        check(isinstance(self.task, str), "task", self.task, "a string")
        check(self.process in PROCESSES, "process", self.process, f"one of {', '.join(PROCESSES)}")
        if self.process != "svag":
            check(self.sampling in DRAWN_AFRESH, "sampling", self.sampling, " or ".join(DRAWN_AFRESH) + FULL_BATCH)
            check(self.backend == "auto", "backend", self.backend, "auto" + FULL_BATCH)
        sizes = Range(0, 10**15 if self.task else 0, whole=True)
        check(self.train_size in sizes, "train_size", self.train_size, str(sizes))
        for field in dataclasses.fields(Settings):
            name, value, choices = field.name, getattr(self, field.name), field.metadata.get("choices")
            if self.task and name in BUILTIN:
                nothing = BUILTIN[name]
                check(value in (field.default, nothing), name, value, "left out: the task has its own")
                object.__setattr__(self, name, nothing)
            elif name == "label_noise" and value is None:
                object.__setattr__(self, name, LABEL_NOISE.get(self.dataset, 0.0))
            elif choices:
                check(isinstance(value, str) and value in choices, name, value, f"one of {', '.join(choices)}")
            elif name in RANGES:
                object.__setattr__(self, name, check_range(name, value))
            elif name != "train_size":
                check(isinstance(value, str), name, value, "a string")
        if not self.task:
            settle(lambda: check_name(self.dataset))
        settle(lambda: resolve(self.schedule))

    @property
    def population(self) -> int:
        """The number of training samples; 0 of a task that isn't loaded yet, and of a file that can't be read."""
        return self.train_size if self.task else train_size(self.dataset) or 0


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run: everything that decides its numbers.

    Attributes:
        batch_size: B, of each of SVAG's two batches.
        lr: the paper's eta at schedule factor 1; the step taken is lr/l.
        l: SVAG's hyperparameter; 1 is SGD.
        seed: of the batches and, where init is "own", of the initial weights.
        effective_steps: length; l steps are one effective step.
        engine: "torch": a net alone, its steps PyTorch's; "fused": beside others in the fused kernel, with another
            stream of batches. Paths differ between the two, their laws don't.
        stat_every: steps 0, k, 2k, ... measure G, N and R; "torch" measures every step.
    """

    batch_size: int
    lr: float
    l: float
    seed: int
    effective_steps: int
    engine: str = "torch"
    stat_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "lr", "l", "seed", "effective_steps", "stat_every"):
            object.__setattr__(self, name, check_range(name, getattr(self, name)))
        check(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        if self.engine == "torch":
            check(self.stat_every == 1, "stat_every", self.stat_every, "1 where runs are not trained as replicas")
        else:
            check(not self.task, "task", self.task, "left out, or replicas off")
            check(self.process == "svag", "process", self.process, "svag, or replicas off")
            check(self.augment == "none", "augment", self.augment, "none, or replicas off")
            check(self.device == "cpu", "device", self.device, "cpu, or replicas off")
            check(self.backend == "auto", "backend", self.backend, "auto, or replicas off")
            check(self.sampling == "replacement", "sampling", self.sampling, "replacement, or replicas off")
            expected = "constant, step or milestones, or replicas off"
            check(milestones(self.schedule) is not None, "schedule", self.schedule, expected)
        expected = f"at most {RANGES['steps'].most:,}: it is the number of steps"
        check(self.steps in RANGES["steps"], "l times effective_steps", self.steps, expected)
        if self.sampling != "replacement" and (size := self.population):
            name = self.dataset or "the task"
            settle(lambda: require_drawable(self.sampling, self.batch_size, self.l, size, name))

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return run_name(self.batch_size, self.lr, self.l, self.seed)

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self._step_at(self.effective_steps)

    def _step_at(self, effective_step: int) -> int:
        return round(effective_step * self.l)

    @cached_property
    def row_steps(self) -> list[int]:
        """The steps after which a row of metrics is written."""
        # Rows at the same effective steps for every l, so that curves can be compared row by row.
        count = min(self.rows, self.effective_steps)
        return [self._step_at(round(self.effective_steps * row / count)) for row in range(1, count + 1)]

    @cached_property
    def evaluation_steps(self) -> set[int]:
        """The steps among `row_steps` after which the net is evaluated; the last one always."""
        rows = self.row_steps
        count = min(self.evaluations, len(rows))
        # Counted so that the last point is the last row: a run's end is always evaluated.
        return {rows[round(len(rows) * point / count) - 1] for point in range(1, count + 1)}

    @cached_property
    def train_evaluation_steps(self) -> set[int]:
        """Every third of `evaluation_steps`, counted from the last, or fewer where they would be more than 20."""
        steps = sorted(self.evaluation_steps, reverse=True)
        return set(steps[:: max(3, math.ceil(len(steps) / TRAIN_EVALUATIONS))])

    def _done(self, step: int) -> float:
        return step / self.l / self.effective_steps

    def lr_at(self, step: int) -> float:
        """The scheduled lr of step number `step` = 0, 1, ..."""
        return self.lr * resolve(self.schedule)(self._done(step))

    @cached_property
    def lr_pieces(self) -> list[tuple[int, float]]:
        """The steps from which each lr holds, for schedules that are piecewise constant."""
        return [(step, self.lr_at(step)) for step in starts(self.schedule, self._done, self.steps) or ()]

    @property
    def cost(self) -> float:
        """Relative time that the run takes, for balance and for the progress bar."""
        # A step costs about as much before its first sample as 20 samples do; in the fused kernel as 3.
        samples = self.batch_size if self.process == "svag" else self.population / 2
        return self.steps * ((20.0 if self.engine == "torch" else 3.0) + samples)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Settings):
    """A grid of runs: every batch size with its lr, every l, every seed."""

    batch_size: tuple[int, ...] = setting(DEFAULT_BATCH_SIZES, WHAT, "B,...", "Batch sizes.")
    lr: tuple[float, ...] = setting(
        (0.4,),
        WHAT,
        "LR[,...]",
        "Learning rate: one is scaled linearly from the first batch size, a list says each.",
    )
    l: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = setting(
        None,
        WHAT,
        "L,...",
        "SVAG's l; 1 is SGD. One list for all batch sizes, or one for each with / between.",
        shown="/".join(",".join(f"{l:g}" for l in ls) for ls in DEFAULT_L),
    )
    seeds: int = setting(24, WHAT, "N", "Number of seeds: 0, 1, ...")
    effective_steps: int | None = setting(
        None,
        LENGTH,
        "N",
        "Length at the first batch size; the others train for the same time.",
        shown=str(EFFECTIVE_STEPS),
    )
    epochs: float | None = setting(None, LENGTH, "N", "Length in passes over the data, instead of effective steps.")
    replicas: str | int = setting(
        "auto",
        HOW,
        "auto|N|off",
        "Train runs that differ in the seed side by side in the fused CPU kernel: N at a time, or with auto the digits "
        "nets. off: each run alone, by PyTorch.",
    )
    stat_every: int = setting(1, HOW, "N", "Replicas measure G, N and |x|² at every Nth step, others at every step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "lr"):
            object.__setattr__(self, name, check_numbers(name, getattr(self, name)))
        count = len(self.batch_size)
        object.__setattr__(self, "l", self._checked_levels())
        check(len(self.lr) in (1, count), "lr", self.lr, f"one number, or {count}: one for each batch size")
        object.__setattr__(self, "seeds", check_range("seeds", self.seeds))
        check(self.epochs is None or self.effective_steps is None, "epochs", self.epochs, "alone or effective_steps be")
        for name in ("epochs", "effective_steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_range(name, getattr(self, name)))
        if self.replicas not in ("auto", "off"):
            text = str(self.replicas)
            asked = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else self.replicas
            expected = f"auto, off or {RANGES['replicas']}"
            check(asked in RANGES["replicas"], "replicas", self.replicas, expected)
            object.__setattr__(self, "replicas", asked)
        object.__setattr__(self, "stat_every", check_range("stat_every", self.stat_every))
        runs = sum(map(len, self.levels)) * self.seeds
        check(runs <= MOST_RUNS, "the number of runs", runs, f"at most {MOST_RUNS:,}")
        # Each run checks its own values: what is wrong with one is said before anything starts.
        self.runs()

    def _checked_levels(self) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
        """Return `l` as one list of numbers for all batch sizes, or as one for each."""
        given = self.l
        if given is None and self.process != "svag":
            given = (1,)
        if given is None:
            given = DEFAULT_L if self.batch_size == DEFAULT_BATCH_SIZES else DEFAULT_L[0]
        if not (isinstance(given, tuple) and given and all(isinstance(ls, (tuple, list)) for ls in given)):
            return check_numbers("l", given)
        lists = tuple(check_numbers("l", tuple(ls)) for ls in given)  # type: ignore[arg-type]
        count = len(self.batch_size)
        check(len(lists) in (1, count), "l", given, f"one list, or {count}: one for each batch size")
        return lists if len(lists) > 1 else lists[0]

    @property
    def levels(self) -> tuple[tuple[float, ...], ...]:
        """The l of each batch size."""
        assert self.l is not None  # filled in
        if isinstance(self.l[0], tuple):
            return self.l
        return (self.l,) * len(self.batch_size)

    @property
    def engine(self) -> str:
        """How the runs are trained; see :class:`RunConfig`."""
        served = not self.task and self.model in SMALL_CHAINS and self.sampling == "replacement"
        served = served and milestones(self.schedule) is not None
        served = served and self.process == "svag" and self.augment == "none"
        served = served and self.device == "cpu" and self.backend == "auto"
        return "torch" if self.replicas == "off" or (self.replicas == "auto" and not served) else "fused"

    def runs(self) -> list[RunConfig]:
        """Return every run of the grid, in the order batch size, l, seed.

        Raises:
            ConfigError: a value is out of range.
        """
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        shared |= {"engine": self.engine, "stat_every": self.stat_every}
        first = self.batch_size[0]
        # The linear scaling rule: the same lr for each sample seen.
        lrs = self.lr if len(self.lr) > 1 else [self.lr[0] * b / first for b in self.batch_size]
        runs = []
        for batch_size, lr, ls in zip(self.batch_size, lrs, self.levels, strict=True):
            if self.epochs is not None:
                known = self.population or self.task
                check(bool(known), "dataset", self.dataset, "a file that can be read where epochs are given")
                length = self.epochs * max(1, self.population) / batch_size
            else:
                # The same time lr * steps at each batch size: the SDE's own clock.
                length = (self.effective_steps or EFFECTIVE_STEPS) * lrs[0] / lr
            steps = max(1, round(length))
            runs += [
                RunConfig(**shared, batch_size=batch_size, lr=lr, l=l, seed=seed, effective_steps=steps)
                for l in ls
                for seed in range(self.seeds)
            ]
        return runs

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `from_dict` takes them: plain values, lists for tuples."""

        def plain(value: Any) -> Any:
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """Build from plain values; a single number means a list of one.

        Raises:
            ConfigError: an unknown key, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ConfigError(f"unknown setting {', '.join(map(repr, unknown))}: known are {', '.join(sorted(known))}")
        settings = dict(values)
        for name in ("batch_size", "lr", "l"):
            if name in settings:
                value = settings[name]
                settings[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return cls(**settings)
