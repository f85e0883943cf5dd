"""What a run measures on its way, whichever engine takes its steps: rows of metrics, evaluations, divergence."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.models import build_model
from svag_fast.experiments.run_folder import METRICS, MUST_BE_FINITE, columns_of
from svag_fast.experiments.run_output import MetricsRow
from svag_fast.noise.estimators import NoiseEstimate

EVALUATION_LIMIT = 10_000  # an evaluation takes at most the first so many training samples

Part: TypeAlias = Literal["train", "test"]


class RowMeans(NamedTuple):
    """Means over the steps since the last row.

    Attributes:
        amplified_loss: of the loss whose gradient the steps followed, c1 times batch 1's and c2 times batch 2's.
        noise: G and N; None where no step measured them.
        weight_sq_norm: R, as well.
        samples: drawn by both batches, in all steps.
    """

    amplified_loss: float
    noise: NoiseEstimate | None
    weight_sq_norm: float | None
    samples: float


class MeasuredRun(ABC):
    """A run in progress.

    Attributes:
        config: the run.
        step: how many steps it has taken.
        seconds: that they took since the last row.
        rows: of metrics so far; the first is of the initial weights.
        columns: of a row.
    """

    def __init__(self, config: RunConfig, metrics: Sequence[str] = ("accuracy",)) -> None:
        self.config = config
        self.columns = columns_of(metrics)
        self.step = 0
        self.seconds = 0.0
        self.rows: list[MetricsRow] = []

    @property
    @abstractmethod
    def noise_source(self) -> str:
        """What G and N are estimated from."""

    @property
    @abstractmethod
    def time(self) -> float:
        """The SDE's time: the sum of lr/l over the steps taken."""

    @abstractmethod
    def evaluate(self, part: Part) -> dict[str, float]:
        """Return "loss", the mean, and each metric of the net as it is now."""

    @abstractmethod
    def start_values(self) -> tuple[float, float | None]:
        """Return R of the initial weights, and the part of a gradient's time that measuring the noise adds."""

    @abstractmethod
    def row_means(self) -> RowMeans:
        """Return the means over the steps since the last row."""

    @abstractmethod
    def clear_sums(self) -> None:
        """Begin a new row's means."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next: tensors and plain Python."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""

    @property
    def diverged(self) -> bool:
        """Whether the last row has a loss, metric, weight norm, G or N that is not finite: no number can follow."""
        return diverged(self.rows[-1])

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.step == self.config.steps or self.diverged

    def begin(self) -> None:
        """Add the row of the initial weights."""
        weight_sq_norm, noise_cost = self.start_values()
        start: MetricsRow = {"step": 0, "effective_step": 0.0, "time": 0.0, "weight_sq_norm": weight_sq_norm}
        start |= {"noise_source": self.noise_source, "noise_cost": noise_cost, "lr": self.config.lr_at(0)}
        self.rows.append(dict.fromkeys(self.columns) | start | self._evaluation("test") | self._evaluation("train"))

    def end_row(self) -> None:
        """Add a row: means over the steps since the last one, and the evaluations that fall on it."""
        config, means = self.config, self.row_means()
        row: MetricsRow = dict.fromkeys(self.columns) | {
            "step": self.step,
            "effective_step": self.step / config.l,
            "time": self.time,
            "amplified_loss": means.amplified_loss,
            "weight_sq_norm": means.weight_sq_norm,
            "noise_source": self.noise_source,
            "lr": config.lr_at(self.step - 1),
            "samples_per_second": means.samples / self.seconds,
        }
        if (noise := means.noise) is not None:
            row |= {"grad_sq_norm": float(noise.grad_sq_norm), "noise_trace": float(noise.noise_trace)}
            row |= {"nsr": float(noise.nsr)}
        if self.step in config.evaluation_steps:
            row |= self._evaluation("test")
        if self.step in config.train_evaluation_steps:
            row |= self._evaluation("train")
        self.rows.append(row)
        self.seconds = 0.0
        self.clear_sums()

    def _evaluation(self, part: Part) -> MetricsRow:
        return {f"{part}_{name}": value for name, value in self.evaluate(part).items()}


# Integers are never nan, and a cell that was not measured holds None.
def diverged(row: MetricsRow) -> bool:
    """Whether a row has a loss, a task's metric, weight norm, G or N that is not finite."""
    # What METRICS doesn't know is a task's own.
    judged = (v for name, v in row.items() if name in MUST_BE_FINITE or name not in METRICS)
    return not all(math.isfinite(value) for value in judged if isinstance(value, float))


def initial_model(config: RunConfig, dataset: Dataset) -> nn.Module:
    """Build the net with its initial weights; a fixed head, which is part of the problem, is the same for all runs."""
    image = dataset.train_images[0]
    shape = {"in_channels": len(image), "pixels": image[0].numel(), "num_classes": dataset.num_classes}
    model = build_model(config.model, **shape)
    if config.init == "shared":
        return model
    own = build_model(config.model, **shape, seed=own_seed(config, "initial weights"))
    # What isn't trained, such as a fixed head, is part of the problem, not of the initial weights.
    for mine, shared in zip(own.buffers(), model.buffers(), strict=True):
        mine.copy_(shared)
    return own


def own_seed(config: RunConfig, purpose: str) -> int:
    """Return a seed of this run's own: runs of different seed, batch size or l are independent."""
    name = f"seed {config.seed}, batch size {config.batch_size}, l {config.l:g}, {purpose}"
    # A hash rather than seed + l + ...: sums of small integers collide. The shift leaves the 63 bits that a generator
    # takes.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
