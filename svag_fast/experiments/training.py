"""One run: SGD, SVAG, NGD or GD on a task, measured on the way, resumable at every step to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svag_fast.experiments.book import Book
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset, load_dataset
from svag_fast.experiments.data.sampling import MODES, is_disjoint, make_streams, population_of
from svag_fast.experiments.evaluation import checked_losses
from svag_fast.experiments.full_batch import FullBatchTraining
from svag_fast.experiments.fused_training import FusedTraining
from svag_fast.experiments.gradients import measuring_cost, pair_gradients
from svag_fast.experiments.measured_run import MeasuredRun, RowMeans, own_seed
from svag_fast.experiments.ranges import check_range
from svag_fast.experiments.run_output import alone_in
from svag_fast.experiments.task import Task
from svag_fast.experiments.task_check import augmented
from svag_fast.experiments.task_run import TaskRun
from svag_fast.noise.estimators import (
    NoiseEstimate,
    from_sample_norms,
    from_two_batches,
    from_two_batches_of_samples,
)
from svag_fast.ops.step import svag_coefficients
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim.svag import SVAG


class Training(TaskRun):
    """A run in progress by SVAG: the net, the optimizer, the two batch streams, and the rows of metrics so far.

    Everything that decides what comes next is in `state`, so a run that continues from a checkpoint is bit for bit the
    one that was never interrupted.

    Args:
        config: the run.
        task: what it trains; a data set means the config's net on it.

    Raises:
        TypeError, ValueError: what is wrong with the task, by name.
        TaskError: its own code failed.
    """

    sums = ("losses", "raw_stats", "sample_sq_norms")

    def __init__(self, config: RunConfig, task: Task | Dataset) -> None:
        super().__init__(config, task)
        self.augmentation: torch.Generator | None = None
        if self.task.augment is not None:
            self.augmentation = torch.Generator(config.device).manual_seed(own_seed(config, "augmentation"))
        self.optimizer = SVAG(
            self.params,
            config.lr_at(0),
            l=config.l,
            weight_decay=config.weight_decay,
            backend=config.backend,
        )
        seeds = [own_seed(config, f"stream {stream}") for stream in range(2)]
        self.streams = make_streams(config.sampling, len(self.train_data), config.batch_size, seeds, l=config.l)
        self.start()

    def clear_sums(self) -> None:
        """Begin a new row's means."""
        self.steps_summed = 0
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.config.device)
        # Sums stay on the device in float64: a `float()` a step would wait for the GPU, and float32 would lose small
        # terms.
        self.raw_stats = torch.zeros(5, dtype=torch.float64, device=self.config.device)
        self.sample_sq_norms = torch.zeros(2 * self.config.batch_size, dtype=torch.float64, device=self.config.device)

    def take_step(self) -> None:
        """One SVAG step on two fresh batches; at l = 1, where it is SGD on the first, the second measures the noise."""
        config = self.config
        # Set each step rather than by a scheduler: the factor depends on the effective step, and resumes with it.
        self.optimizer.param_groups[0]["lr"] = config.lr_at(self.step)
        with self.task_code():
            batch = self._two_batches()
            if self.augmentation is not None:
                batch = augmented(self.task, batch, self.augmentation)
            pair = pair_gradients(
                self.model, self.optimizer, batch, norms=self.has_sample_norms, losses=self._losses, way=self.way
            )
        stats = self.optimizer.step()
        self.losses += pair.losses
        self.raw_stats += stats.raw
        if pair.sq_norms is not None:
            self.sample_sq_norms += pair.sq_norms
        self.steps_summed += 1
        self.step += 1

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        return checked_losses(self.task.losses(model, batch), 2 * self.config.batch_size)

    def _two_batches(self) -> Any:
        return self.train_data.take(self.streams.next_indices())

    def row_means(self) -> RowMeans:
        """Return the means over the steps since the last row."""
        count = self.steps_summed
        stats = StepStats(self.raw_stats / count, has_second=True)
        loss1, loss2 = (self.losses / count).tolist()
        # Of the loss whose gradient the steps followed.
        c1, c2 = svag_coefficients(self.config.l)
        samples = 2 * self.config.batch_size * count
        return RowMeans(c1 * loss1 + c2 * loss2, self._noise(stats), float(stats.weight_sq_norm), samples)

    @property
    def time(self) -> float:
        """The SDE's time: the sum of lr/l over the steps taken."""
        return self.optimizer.time

    @property
    def noise_source(self) -> str:
        """What G and N are estimated from: "per_sample" norms where the model has them, else "two_batches"."""
        return "per_sample" if self.has_sample_norms and self.config.batch_size > 1 else "two_batches"

    def _noise_cost(self) -> float:
        """The time that measuring adds, as a fraction of the time of the gradient that the step itself needs."""
        if self.noise_source == "two_batches":
            return 1.0 if self.config.l == 1 else 0.0  # SGD draws its second batch for the measurement alone
        # Any samples do, but not the streams' own: a draw here would shift the run's batches.
        some = torch.arange(2 * self.config.batch_size, dtype=torch.int64, device="cpu") % len(self.train_data)
        batch = self.train_data.take(some)
        both = self.config.l > 1
        return measuring_cost(self.model, self.optimizer, batch, both=both, losses=self.task.losses, way=self.way)

    def _noise(self, stats: StepStats) -> NoiseEstimate:
        """G and N from the means over a row's steps, in which every estimator is linear."""
        config, norms = self.config, (stats.sq_norm1, stats.sq_norm2, stats.inner)
        # Distinct images have less noise than the theory's, and halves of one draw aren't independent: the estimators
        # need to know.
        halves = is_disjoint(config.sampling, config.l)
        drawn: dict[str, Any] = {
            "population": population_of(config.sampling, len(self.train_data)),
            "disjoint": halves,
        }
        if self.noise_source == "two_batches":
            B = config.batch_size if halves else None
            return from_two_batches(*norms, batch_size=B, **drawn)  # type: ignore[arg-type]
        sq_norms = self.sample_sq_norms / self.steps_summed
        if MODES[config.sampling].epochs and not halves:
            # The first batch comes from what is left of an epoch whose other images the weights have met. The second
            # is drawn afresh.
            assert stats.sq_norm2 is not None
            return from_sample_norms(sq_norms[config.batch_size :], stats.sq_norm2, population=drawn["population"])
        return from_two_batches_of_samples(sq_norms, *norms, **drawn)  # type: ignore[arg-type]

    def start_values(self) -> tuple[float, float | None]:
        """Return R of the initial weights, and what measuring the noise adds to a gradient's time."""
        return self.weight_sq_norm(), self._noise_cost()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next: tensors and plain Python."""
        own = {} if self.augmentation is None else {"augmentation": self.augmentation.get_state()}
        return {
            **super().state_dict(),
            **own,
            "optimizer": self.optimizer.state_dict(),
            "streams": self.streams.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: `state` is none of this run's; `self` may have taken a part.
        """
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.streams.load_state_dict(state["streams"])
        if self.augmentation is not None:
            self.augmentation.set_state(state["augmentation"])


class Engine(Protocol):
    """Runs whose steps are taken together."""

    @property
    def runs(self) -> Sequence[MeasuredRun]:
        """The runs."""

    def advance(self) -> None:
        """Take whole steps of some of them, none beyond its next row."""


def make_engine(configs: Sequence[RunConfig], task: Task | Dataset | None = None) -> Engine:
    """Return runs that are alike but for the seed at their start; of engine "torch", a single one.

    Args:
        configs: the runs.
        task: what they train; None for what the config names, and a data set for its net on that.

    Raises:
        UnsupportedModuleError: engine "fused" has no kernel for the net.
        TypeError, ValueError, TaskError: as :class:`Training`.
    """
    first = configs[0]
    if task is None:
        task = load_dataset(first.dataset, label_noise=first.label_noise)
    if first.engine == "fused":
        assert isinstance(task, Dataset)
        return FusedTraining(configs, task)
    (config,) = configs
    return Training(config, task) if config.process == "svag" else FullBatchTraining(config, task)


def train(
    config: RunConfig,
    folder: Path,
    *,
    task: Task | None = None,
    provenance: dict[str, Any] | None = None,
    checkpoint_seconds: float = 5.0,
    tensorboard: bool = False,
    on_progress: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train one run in `folder`, from its checkpoint if it has one; return whether nothing is left to do.

    A run ends at its last step, or at the first row in which a loss, the weights, G or N are not finite: it has
    diverged, and that row is its last.

    `folder` gets config.json, metrics.csv (as old as the last checkpoint), checkpoint.pt and, if asked for,
    TensorBoard's events. What the checkpoint implies is made again where it isn't whole, also of a complete run.

    Args:
        config: the run.
        folder: made if missing; one process at a time may train in it.
        task: what it trains; None for the built-in net and data that the config names.
        provenance: goes into config.json beside the config: versions, commit.
        checkpoint_seconds: a checkpoint is written when the last one is so old, and at the end.
        tensorboard: write events into `folder` as well, against effective steps, and the config as hyperparameters.
        on_progress: called with the number of steps done, at every row.
        should_stop: asked after every step; when it says so, the run is saved and left.

    Raises:
        CheckpointError: the folder's checkpoint is damaged or another run's; nothing is overwritten.
        ConfigError: checkpoint_seconds is negative or nan.
        RunBusyError: another process is training this run.
        OSError: the folder can't be written or the disk is full; the last checkpoint is as it was.
    """
    return train_together(
        [config],
        [folder],
        task=task,
        provenance=provenance,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
        on_progress=lambda _, step: on_progress(step),
        should_stop=should_stop,
    )


def train_together(
    configs: Sequence[RunConfig],
    folders: Sequence[Path],
    *,
    task: Task | None = None,
    provenance: dict[str, Any] | None = None,
    checkpoint_seconds: float = 5.0,
    tensorboard: bool = False,
    on_progress: Callable[[int, int], None] = lambda run, step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train runs that one engine takes at once, each in its own folder; all else is as of `train`.

    Args:
        configs: the runs; more than one of engine "fused" alone, alike but for the seed.
        folders: of each.
        task, provenance, checkpoint_seconds, tensorboard: see `train`.
        on_progress: called with a run's place in `configs` and its number of steps done, at every row.
        should_stop: asked after whole steps, some tenths of a second apart at most where steps are short.

    Raises:
        As `train`; where one run is refused, none is trained.
    """
    check_range("checkpoint_seconds", checkpoint_seconds)
    # Runs share the machine: PyTorch would take every core for each of them, and they would wait for each other.
    torch.set_num_threads(configs[0].threads)
    # On a GPU cuDNN would else be free to add in another order each time, and no run resumes to the bit.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    with ExitStack() as locks:
        books = []
        for place, (config, folder) in enumerate(zip(configs, folders, strict=True)):
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(alone_in(folder))
            book = Book(place, config, folder, provenance, tensorboard)
            if not book.complete:
                books.append(book)
        if not books:
            return True
        engine = make_engine([book.config for book in books], task)
        working = list(zip(books, engine.runs, strict=True))
        for book, run in working:
            book.load_into(run)
            book.open_events(run)
            if run.ended:  # diverged before the first step
                book.save(run)
        working = [(book, run) for book, run in working if not run.ended]
        saved_at = time.monotonic()
        while working:
            engine.advance()
            # Asked after the steps, so that what is saved is a whole step's state.
            stopped = should_stop()
            for book, run in working:
                if run.step in book.row_steps and run.rows[-1]["step"] != run.step:
                    run.end_row()
                    on_progress(book.place, run.step)
            due = stopped or time.monotonic() - saved_at > checkpoint_seconds
            for book, run in working:
                if due or run.ended:
                    book.save(run)
            if due:
                saved_at = time.monotonic()
            working = [(book, run) for book, run in working if not run.ended]
            if stopped:
                break
        return not working
