"""One run: SGD or SVAG on a data set, measured on the way, resumable at every step to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast.experiments.checkpoint import ADVICE, CheckpointError, load_checkpoint, save_checkpoint
from svag_fast.experiments.config import RunConfig, check_range
from svag_fast.experiments.data import Dataset, draw_batch, load_dataset
from svag_fast.experiments.gradients import has_sample_norms, measuring_cost, pair_gradients
from svag_fast.experiments.models import FixedHeadNet, build_model
from svag_fast.experiments.run_folder import COLUMNS, MUST_BE_FINITE
from svag_fast.experiments.run_output import Events, MetricsRow, alone_in, repair, write_config, write_metrics
from svag_fast.noise.estimators import NoiseEstimate, from_two_batches, from_two_batches_of_samples
from svag_fast.ops.step import svag_coefficients
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim.svag import SVAG

EVALUATION_LIMIT = 10_000  # an evaluation takes at most the first so many training samples
EVALUATION_BATCH = 128


class Training:
    """A run in progress: the net, the optimizer, the two batch streams, and the rows of metrics so far.

    Everything that decides what comes next is in `state`, so a run that continues from a checkpoint is bit for bit the
    one that was never interrupted.

    Args:
        config: the run.
        dataset: its data, on the run's device.
    """

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config = config
        self.data = dataset
        self.model = _initial_model(config, dataset).to(config.device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.has_sample_norms = has_sample_norms(self.model)
        self.optimizer = SVAG(
            self.params,
            config.lr_at(0),
            l=config.l,
            weight_decay=config.weight_decay,
            backend=config.backend,
        )
        # A stream of batches each, so that SGD's path does not depend on the batches that only measure its noise.
        self.streams = [torch.Generator("cpu").manual_seed(_seed(config, f"stream {stream}")) for stream in range(2)]
        self.step = 0
        self.seconds = 0.0
        self.rows: list[MetricsRow] = [self._first_row()]
        self._clear_sums()

    def _clear_sums(self) -> None:
        self.steps_summed = 0
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.config.device)
        # Sums stay on the device in float64: a `float()` a step would wait for the GPU, and float32 would lose small
        # terms.
        self.raw_stats = torch.zeros(5, dtype=torch.float64, device=self.config.device)
        self.sample_sq_norms = torch.zeros(2 * self.config.batch_size, dtype=torch.float64, device=self.config.device)

    def take_step(self) -> None:
        """One SVAG step on two fresh batches; at l = 1, where it is SGD on the first, the second measures the noise."""
        config = self.config
        images, labels = self._two_batches()
        # Set each step rather than by a scheduler: the factor depends on the effective step, and resumes with it.
        self.optimizer.param_groups[0]["lr"] = config.lr_at(self.step)
        pair = pair_gradients(self.model, self.optimizer, images, labels, norms=self.has_sample_norms)
        stats = self.optimizer.step()
        self.losses += pair.losses
        self.raw_stats += stats.raw
        if pair.sq_norms is not None:
            self.sample_sq_norms += pair.sq_norms
        self.steps_summed += 1
        self.step += 1

    def _two_batches(self) -> tuple[Tensor, Tensor]:
        population, replacement = len(self.data.train_labels), self.config.sampling == "replacement"
        drawn = [
            draw_batch(population, self.config.batch_size, replacement=replacement, generator=stream)
            for stream in self.streams
        ]
        # Drawn on the CPU, so that a run has the same batches on every device.
        indices = torch.cat(drawn).to(self.config.device)
        return self.data.train_images[indices], self.data.train_labels[indices]

    def end_row(self) -> None:
        """Add a row: means over the steps since the last one, and the evaluations that fall on it."""
        config, count = self.config, self.steps_summed
        stats = StepStats(self.raw_stats / count, has_second=True)
        loss1, loss2 = (self.losses / count).tolist()
        # Of the loss whose gradient the steps followed.
        c1, c2 = svag_coefficients(config.l)
        noise = self._noise(stats)
        row = dict.fromkeys(COLUMNS) | {
            "step": self.step,
            "effective_step": self.step / config.l,
            "time": self.optimizer.time,
            "amplified_loss": c1 * loss1 + c2 * loss2,
            "grad_sq_norm": float(noise.grad_sq_norm),
            "noise_trace": float(noise.noise_trace),
            "weight_sq_norm": float(stats.weight_sq_norm),
            "nsr": float(noise.nsr),
            "noise_source": self.noise_source,
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": 2 * config.batch_size * count / self.seconds,
        }
        if self.step in config.evaluation_steps:
            row |= self._test()
        if self.step in config.train_evaluation_steps:
            row |= self._train()
        self.rows.append(row)
        self.seconds = 0.0
        self._clear_sums()

    @property
    def diverged(self) -> bool:
        """Whether the last row has a loss, weight norm, G or N that is not finite: no number can follow."""
        return _diverged(self.rows[-1])

    @property
    def noise_source(self) -> str:
        """What G and N are estimated from: "per_sample" norms where the model has them, else "two_batches"."""
        return "per_sample" if self.has_sample_norms and self.config.batch_size > 1 else "two_batches"

    def _noise_cost(self) -> float:
        """The time that measuring adds, as a fraction of the time of the gradient that the step itself needs."""
        if self.noise_source == "two_batches":
            return 1.0 if self.config.l == 1 else 0.0  # SGD draws its second batch for the measurement alone
        # Any samples do, but not the streams' own: a draw here would shift the run's batches.
        some = torch.arange(2 * self.config.batch_size, dtype=torch.int64, device="cpu") % len(self.data.train_labels)
        some = some.to(self.config.device)
        images, labels = self.data.train_images[some], self.data.train_labels[some]
        return measuring_cost(self.model, self.optimizer, images, labels, both=self.config.l > 1)

    def _noise(self, stats: StepStats) -> NoiseEstimate:
        """G and N from the means over a row's steps, in which every estimator is linear."""
        norms = (stats.sq_norm1, stats.sq_norm2, stats.inner)
        if self.noise_source == "two_batches":
            return from_two_batches(*norms)  # type: ignore[arg-type]
        # Distinct images have less noise than the theory's, by a factor that the estimator undoes: it needs the
        # population.
        population = len(self.data.train_labels) if self.config.sampling == "distinct" else None
        sq_norms = self.sample_sq_norms / self.steps_summed
        return from_two_batches_of_samples(sq_norms, *norms, population=population)  # type: ignore[arg-type]

    def _first_row(self) -> MetricsRow:
        weight_sq_norm = sum(float(p.detach().double().square().sum()) for p in self.params)
        start: MetricsRow = {"step": 0, "effective_step": 0.0, "time": 0.0, "weight_sq_norm": weight_sq_norm}
        start |= {"noise_source": self.noise_source, "noise_cost": self._noise_cost()}
        return dict.fromkeys(COLUMNS) | start | {"lr": self.config.lr_at(0)} | self._test() | self._train()

    def _train(self) -> MetricsRow:
        data, limit = self.data, EVALUATION_LIMIT
        loss, accuracy = evaluate(self.model, data.train_images[:limit], data.train_labels[:limit])
        return {"train_loss": loss, "train_accuracy": accuracy}

    def _test(self) -> MetricsRow:
        loss, accuracy = evaluate(self.model, self.data.test_images, self.data.test_labels)
        return {"test_loss": loss, "test_accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next: tensors and plain Python."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streams": [stream.get_state() for stream in self.streams],
            "rows": self.rows,
            "seconds": self.seconds,
            "steps_summed": self.steps_summed,
            "losses": self.losses,
            "raw_stats": self.raw_stats,
            "sample_sq_norms": self.sample_sq_norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: `state` is none of this run's; `self` may have taken a part.
        """
        # These are added to, and a sum over another shape would broadcast without a word.
        for name in ("losses", "raw_stats", "sample_sq_norms"):
            theirs, ours = state[name], getattr(self, name)
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise ValueError(
                    f"{name} must be {ours.dtype} {list(ours.shape)}, got {theirs.dtype} {list(theirs.shape)}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.set_state(saved)
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
        self.steps_summed = state["steps_summed"]
        self.losses = state["losses"].to(self.config.device)
        self.raw_stats = state["raw_stats"].to(self.config.device)
        self.sample_sq_norms = state["sample_sq_norms"].to(self.config.device)


def train(
    config: RunConfig,
    folder: Path,
    *,
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
    check_range("checkpoint_seconds", checkpoint_seconds)
    # Runs share the machine: PyTorch would take every core for each of them, and they would wait for each other.
    torch.set_num_threads(config.threads)
    folder.mkdir(parents=True, exist_ok=True)
    identity = dataclasses.asdict(config)
    checkpoint = folder / "checkpoint.pt"
    with alone_in(folder):
        state = read_state(checkpoint, config)
        if state is None:
            write_config(folder, identity, provenance or {})
        else:
            provenance = state.get("provenance", provenance)
            repair(folder, identity, provenance or {}, state["rows"])
            if state["step"] == config.steps or _diverged(state["rows"][-1]):
                # A complete run may have been trained without events.
                if tensorboard and not any(folder.glob("events.out.tfevents.*")):
                    Events(folder, identity).write(state["rows"])
                return True
        training = Training(config, load_dataset(config.dataset).to(config.device))
        if state is not None:
            try:
                training.load_state_dict(state)
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{checkpoint} holds no whole state of this run ({error!r}). {ADVICE}") from error
        row_steps = set(config.row_steps)
        events = Events(folder, identity) if tensorboard else None
        saved_at = mark = time.monotonic()
        stopped = False
        while training.step < config.steps and not stopped and not training.diverged:
            training.take_step()
            # Asked after the step, so that what is saved is a whole step's state.
            stopped = should_stop()
            if training.step in row_steps:
                training.seconds += time.monotonic() - mark
                training.end_row()
                on_progress(training.step)
                mark = time.monotonic()
            done = training.step == config.steps or training.diverged
            if stopped or done or time.monotonic() - saved_at > checkpoint_seconds:
                training.seconds += time.monotonic() - mark
                # Events first: of a complete run they are not written again.
                if events is not None:
                    events.write(training.rows)
                save_checkpoint(checkpoint, identity, {**training.state_dict(), "provenance": provenance})
                write_metrics(folder / "metrics.csv", training.rows)
                saved_at = mark = time.monotonic()
        return training.step == config.steps or training.diverged


def read_state(checkpoint: Path, config: RunConfig) -> dict[str, Any] | None:
    """Read the state that `config`'s run was last saved in, None where it never was.

    Raises:
        CheckpointError: the file is damaged or another run's.
        OSError: it can't be read.
    """
    if not checkpoint.exists():
        return None
    state = load_checkpoint(checkpoint, dataclasses.asdict(config))
    step, rows = state.get("step"), state.get("rows")
    if not isinstance(step, int) or not 0 <= step <= config.steps:
        raise CheckpointError(f"{checkpoint} stands at step {step!r} of {config.steps}. {ADVICE}")
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and set(row) == set(COLUMNS) for row in rows)
    ):
        raise CheckpointError(f"{checkpoint} holds no rows of metrics. {ADVICE}")
    return state


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy (a fraction) of `model` in evaluation mode."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for some, expected in zip(
        torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True
    ):
        logits = model(some)
        # Sums, since the last batch may be smaller: a mean of means would weigh its samples more.
        loss += F.cross_entropy(logits, expected, reduction="sum")
        correct += (logits.argmax(1) == expected).sum()
    model.train(was_training)
    return float(loss) / len(labels), float(correct) / len(labels)


# Integers are never nan, and a cell that was not measured holds None.
def _diverged(row: MetricsRow) -> bool:
    return not all(math.isfinite(value) for name in MUST_BE_FINITE if isinstance(value := row[name], float))


def _initial_model(config: RunConfig, dataset: Dataset) -> FixedHeadNet:
    """Build the net with its initial weights; the head, which is part of the problem, is the same for all runs."""
    shape = {"in_channels": dataset.train_images.shape[1], "num_classes": dataset.num_classes}
    model = build_model(config.model, **shape)
    if config.init == "shared":
        return model
    own = build_model(config.model, **shape, seed=_seed(config, "initial weights"))
    # The head is part of the problem, not of the initial weights.
    own.head.copy_(model.head)
    return own


def _seed(config: RunConfig, purpose: str) -> int:
    """Return a seed of this run's own: runs of different seed, batch size or l are independent."""
    name = f"seed {config.seed}, batch size {config.batch_size}, l {config.l:g}, {purpose}"
    # A hash rather than seed + l + ...: sums of small integers collide. The shift leaves the 63 bits that a generator
    # takes.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
