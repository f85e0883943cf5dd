"""Runs for Theorem 4.3 on a net: many replicas from one initialisation at each l, and test functions at set times.

task = digits_task(settings := WeakSettings())
values = measure(task, settings, l=4, replicas=range(64))
"""

from __future__ import annotations

import dataclasses
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svag_fast.experiments.config import HOW, LENGTH, WHAT, cores, setting
from svag_fast.experiments.ranges import RANGES, ConfigError, Range, check_range
from svag_fast.numeric import shown

if TYPE_CHECKING:
    from torch import Tensor

    from svag_fast.replicas.chain import Chain
    from svag_fast.replicas.fused import Loss

Array = NDArray[np.float64]

MODELS = ("digits-mlp", "digits-net")
LEAST_REPLICAS = 8  # of a level: fewer don't tell its variance
MOST_REPLICAS = 100_000
_AT_ONCE = 64  # replicas of one call: enough for the threads, few enough for soon-answered Ctrl-C and progress
_PILOT = 16  # replicas of a level that a plan is made from
SINGLES = 3  # fixed test samples whose own losses are test functions


@dataclass(frozen=True, kw_only=True)
class WeakSettings:
    """What `svag-fast weak` trains. The command makes its options from these fields.

    ``task`` is a task of one's own in place of ``model`` and ``label_noise``, as ``svag-fast run`` names it.
    """

    model: str = setting("digits-mlp", WHAT, None, "Net on the digits.", choices=MODELS)
    label_noise: float = setting(0.2, WHAT, "PART", "Part of the training labels that is drawn again from all classes.")
    batch_size: int = setting(32, WHAT, "B", "Batch size.")
    lr: float = setting(3.2, WHAT, "LR", "Learning rate, constant.")
    weight_decay: float = setting(0.00125, WHAT, "LAMBDA", "Weight decay.")
    l: tuple[float, ...] = setting((1, 2, 4, 8, 16, 32, 64), WHAT, "L,...", "SVAG's l; at least four, 1 is SGD.")
    effective_steps: tuple[int, ...] = setting(
        (4, 16, 32, 64), LENGTH, "N,...", "Effective steps, l steps each, after which the test functions are measured."
    )
    replicas: tuple[int, ...] = setting(
        (512, 512, 512, 512, 320, 320, 256), LENGTH, "N[,...]", "Runs at each l: one number, or one for each l."
    )
    seed: int = setting(0, HOW, "N", "Of the one initialisation and, with l and the run's number, of the batches.")
    threads: int | None = setting(None, HOW, "N", "Threads, a run each.", shown="all cores")
    task: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "lr", "weight_decay", "seed"):
            object.__setattr__(self, name, check_range(name, getattr(self, name)))
        if self.model not in MODELS:
            raise ConfigError(f"model must be one of {', '.join(MODELS)}, got {shown(self.model)}")
        if self.label_noise not in (part := Range(0, 1)):
            raise ConfigError(f"label_noise must be {part}, got {shown(self.label_noise)}")
        if self.threads is not None:
            check_range("threads", self.threads)
        ls = tuple(check_range("l", value) for value in self.l)
        if len(ls) < 4 or list(ls) != sorted(set(ls)):
            raise ConfigError(f"l must be at least four numbers in ascending order, got {shown(ls)}")
        object.__setattr__(self, "l", ls)
        counts = self.replicas * len(ls) if len(self.replicas) == 1 else self.replicas
        if len(counts) != len(ls):
            raise ConfigError(f"replicas must be one number or {len(ls)}, one for each l, got {shown(self.replicas)}")
        for count in counts:
            if count not in (some := Range(LEAST_REPLICAS, MOST_REPLICAS, whole=True)):
                raise ConfigError(f"replicas must be {some}, got {shown(count)}")
        object.__setattr__(self, "replicas", tuple(int(count) for count in counts))
        times = tuple(check_range("effective_steps", value) for value in self.effective_steps)
        if not times or list(times) != sorted(set(times)):
            raise ConfigError(f"effective_steps must be in ascending order, at least one, got {shown(times)}")
        object.__setattr__(self, "effective_steps", times)
        if (steps := self.steps_at(times[-1], ls[-1])) not in RANGES["steps"]:
            raise ConfigError(f"l times effective_steps must be {RANGES['steps']}, got {steps}")

    def steps_at(self, effective: int, l: float) -> int:
        """Return how many steps at this l are so many effective ones."""
        return round(effective * l)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, without those that don't count beside a task, or without one."""
        left_out = ("model", "label_noise") if self.task else ("task",)
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


class WeakRuns(Protocol):
    """Some runs at one l, which are trained side by side."""

    def advance(self, step: int) -> None:
        """Take every run to a step."""

    def test_functions(self) -> Tensor:
        """Return [functions, runs] float64, nan where a run diverged; the runs take one step more."""


class Trainable(Protocol):
    """What is trained, from one initialisation: a :class:`WeakTask`, or a task of one's own."""

    @property
    def functions(self) -> list[str]:
        """The names of the test functions."""

    def start(self, settings: WeakSettings, l: float, seeds: Sequence[int]) -> WeakRuns:
        """Return runs at their start, one for each seed of batches."""


@dataclass(frozen=True)
class WeakTask:
    """A chain of layers and its data, for the fused kernel.

    Attributes:
        chain: the net, with the weights that every run starts from.
        inputs, targets: the training data, as :class:`svag_fast.replicas.fused.FusedRuns` takes them.
        test_inputs, test_targets: the test data.
        loss: "cross_entropy" or "squared_error".
    """

    chain: Chain
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    loss: Loss = "cross_entropy"

    @property
    def functions(self) -> list[str]:
        """The names of the test functions."""
        accuracy = ["test accuracy"] if self.loss == "cross_entropy" else []
        singles = [f"loss of test sample {i}" for i in range(min(SINGLES, len(self.test_inputs)))]
        return ["test loss", *accuracy, "train loss", "|x|²", "G", "N", *singles]

    def start(self, settings: WeakSettings, l: float, seeds: Sequence[int]) -> WeakRuns:
        """Return runs at their start, one for each seed of batches.

        Raises:
            ValueError, MemoryError: as of :class:`svag_fast.replicas.fused.FusedRuns`.
        """
        return _ChainRuns(self, settings, l, seeds)


class _ChainRuns:
    def __init__(self, task: WeakTask, settings: WeakSettings, l: float, seeds: Sequence[int]) -> None:
        from svag_fast.replicas.fused import FusedRuns

        self._task = task
        self._step = 0
        self._runs = FusedRuns(
            task.chain,
            task.chain.initial().weights.expand(len(seeds), -1),
            inputs=task.inputs,
            targets=task.targets,
            loss=task.loss,
            seeds=seeds,
            batch_size=settings.batch_size,
            lr=settings.lr,
            l=l,
            weight_decay=settings.weight_decay,
            # The steps that are to be measured, each time's next one, are multiples of this.
            stat_every=math.gcd(*(settings.steps_at(t, l) for t in settings.effective_steps)),
            threads=settings.threads or cores(),
        )

    def advance(self, step: int) -> None:
        self._runs.advance(step)
        self._step = step

    def test_functions(self) -> Tensor:
        import torch

        runs, task = self._runs, self._task
        test = runs.evaluate(task.test_inputs, task.test_targets)
        accuracy = [] if test.accuracy is None else [test.accuracy]
        train = runs.evaluate(task.inputs, task.targets).loss
        sq_norm = runs.weights.double().square().sum(1)
        singles = [
            runs.evaluate(task.test_inputs[i : i + 1], task.test_targets[i : i + 1]).loss
            for i in range(min(SINGLES, len(task.test_inputs)))
        ]
        runs.clear_sums()
        runs.advance(self._step + 1)
        means = runs.sums.means()
        noise = (means.sq_norm1 + means.sq_norm2) / 2 - means.inner
        found = torch.stack([test.loss, *accuracy, train, sq_norm, means.inner, noise, *singles])
        found[:, runs.diverged] = math.nan
        return found


def digits_task(settings: WeakSettings) -> WeakTask:
    """Return the settings' net, with its initial weights by the seed, and the digits with noisy training labels."""
    from svag_fast.experiments.data import load_dataset
    from svag_fast.experiments.models import build_model
    from svag_fast.replicas.chain import chain_of

    data = load_dataset("digits", label_noise=settings.label_noise)
    model = build_model(settings.model, in_channels=1, num_classes=data.num_classes, seed=settings.seed)
    return WeakTask(chain_of(model), data.train_images, data.train_labels, data.test_images, data.test_labels)


def measure(
    task: Trainable,
    settings: WeakSettings,
    l: float,
    replicas: range,
    *,
    advanced: Callable[[float], object] = lambda steps: None,
) -> Array:
    """Train some of the runs at one l and return the test functions, [times, functions, replicas] float64.

    Losses, accuracy and |x|² are those of the weights x after so many steps. G and N are the unbiased estimates of the
    two batches of the step that would come next, <g1, g2> and |g1 - g2|²/2. A run that diverged is nan from there on.

    Args:
        replicas: the runs' numbers: with l and the seed they decide the batches, whatever else is trained.
        advanced: called now and then with the effective steps taken since the last call, over all these runs.

    Raises:
        ValueError, MemoryError: as the task's ``start``.
    """
    steps = [settings.steps_at(t, l) for t in settings.effective_steps]
    results = []
    for first in range(replicas.start, replicas.stop, _AT_ONCE):
        some = range(first, min(first + _AT_ONCE, replicas.stop))
        runs = task.start(settings, l, [_seed(settings.seed, l, replica) for replica in some])
        values, at = np.empty((len(steps), len(task.functions), len(some))), 0
        for row, to in enumerate(steps):
            for step in _stops(at, to, l):
                runs.advance(step)
                advanced((step - at) / l * len(some))
                at = step
            values[row] = runs.test_functions().numpy()
        results.append(values)
    return np.concatenate(results, axis=2)


def _stops(at: int, to: int, l: float) -> list[int]:
    """Where to pause for the progress bar: about every effective step where these are long."""
    pause = round(max(l, 16))
    return [*range(at + pause, to, pause), to]


def _seed(seed: int, l: float, replica: int) -> int:
    """Return the key of a run's batches: runs of other l, numbers or seeds draw independently."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", l))
    return int(np.random.SeedSequence([seed, bits, replica]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Pilot:
    """What a few runs at each l cost and how they scatter: ``seconds`` a run, ``variances`` [levels, ...]."""

    seconds: Array
    variances: Array

    def plan(self, budget: float) -> list[int]:
        """Return the replicas of each level that make the means' relative variances least for so many seconds.

        The sum over levels of variance/replicas at a given cost is least where replicas are as the root of variance
        over cost. A level's variance is the mean over test functions and times, each relative to its mean over levels.
        """
        relative = self.variances / np.maximum(self.variances.mean(axis=0), 1e-300)
        variance = np.nanmean(relative.reshape(len(relative), -1), axis=1)
        share = np.sqrt(variance / self.seconds)
        counts = budget * share / (share * self.seconds).sum()
        return [int(min(count, MOST_REPLICAS)) for count in counts]


def run_levels(
    task: Trainable,
    settings: WeakSettings,
    *,
    had: Mapping[float, Array] | None = None,
    budget: float | None = None,
    planned: Callable[[Sequence[int], Sequence[int], Mapping[float, float]], object] = lambda counts, todo, seconds: (
        None
    ),
    advanced: Callable[[float, float], object] = lambda l, steps: None,
) -> Iterator[dict[float, Array]]:
    """Train all runs in rounds over the levels, and yield what is complete after each round: l -> values.

    In the first round a few replicas at each l are trained; after it comes the plan, by the budget or the settings.

    Args:
        had: values that are there already, of replicas 0, 1, ... of the same settings.
        budget: seconds for everything; by default the settings' replicas are trained.
        planned: called with the replicas of each level, how many of them are to come, and the seconds of one at each l.
        advanced: called with an l and the effective steps taken there since the last call.
    """
    values: dict[float, list[Array]] = {l: [had[l]] if had and l in had else [] for l in settings.l}
    began = time.monotonic()
    seconds = {}

    def done(l: float) -> int:
        return sum(part.shape[2] for part in values[l])

    def train(l: float, upto: int) -> None:
        if upto > (first := done(l)):
            some = range(first, upto)
            values[l].append(measure(task, settings, l, some, advanced=lambda steps: advanced(l, steps)))

    def complete() -> dict[float, Array]:
        return {l: np.concatenate(parts, axis=2) for l, parts in values.items()}

    counts = dict(zip(settings.l, settings.replicas, strict=True))
    for l in settings.l:
        first, start = done(l), time.monotonic()
        train(l, first + _PILOT if budget is not None else max(first, min(first + _PILOT, counts[l])))
        seconds[l] = (time.monotonic() - start) / max(1, done(l) - first)
    if budget is not None:
        variances = np.stack([x.var(axis=2, ddof=1) for x in complete().values()])
        left = budget - (time.monotonic() - began)
        more = Pilot(np.array(list(seconds.values())), variances).plan(max(left, 0.0))
        counts = {l: done(l) + count for l, count in zip(settings.l, more, strict=True)}
    counts = {l: max(count, done(l)) for l, count in counts.items()}
    planned(list(counts.values()), [counts[l] - done(l) for l in settings.l], seconds)
    yield complete()
    rounds = max(math.ceil((counts[l] - done(l)) / _AT_ONCE) for l in settings.l)
    for left in range(rounds, 0, -1):
        for l in settings.l:
            train(l, done(l) + math.ceil((counts[l] - done(l)) / left))
        yield complete()
