"""What a grid of runs will cost on this machine, from a few steps on made data of the data set's shape."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from svag_fast.experiments.config import ExperimentConfig, RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.full_batch import FullBatchTraining
from svag_fast.experiments.training import Training

LARGEST = 16  # batch size that is timed; of larger ones the time is taken to grow with the batch
STEPS = 2  # timed, behind one that warms up
# Channels, side of an image, classes, test images: enough to know a step's cost without the files.
SHAPES = {
    "digits": (1, 8, 10, 360),
    "fashion-mnist": (1, 28, 10, 10_000),
    "cifar10": (3, 32, 10, 10_000),
    "cifar100": (3, 32, 100, 10_000),
    "svhn": (3, 32, 10, 26_032),
}


def probe(config: ExperimentConfig) -> float:
    """Return the seconds that one core needs for all runs of a grid, by PyTorch, a run alone, a few steps timed.

    Batches of more than 16 samples are not timed: their time is taken to be proportional to the batch. Evaluations
    count as the forward passes that they are, at a third of a step's cost a sample.

    Raises:
        ValueError: a data set whose shape isn't known.
    """
    torch.set_num_threads(1)
    known: dict[tuple[str, int], float] = {}
    total = 0.0
    for run in config.runs():
        key = run.process, min(run.batch_size, LARGEST)
        if key not in known:
            known[key] = _sample_seconds(run, key[1])
        samples = 2 * run.batch_size if run.process == "svag" else run.population
        evaluated = len(run.evaluation_steps) * SHAPES[run.dataset][3]
        total += known[key] * (run.steps * samples + evaluated / 3)
    return total


def _sample_seconds(run: RunConfig, batch_size: int) -> float:
    """A step's time over the samples in it."""
    if run.dataset not in SHAPES:
        raise ValueError(f"dataset must be one of {', '.join(SHAPES)} to be timed, got {run.dataset!r}")
    channels, side, classes, _ = SHAPES[run.dataset]
    count = 2 * batch_size if run.process == "svag" else 64
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float32, device="cpu")
    labels = torch.arange(count, dtype=torch.int64, device="cpu") % classes
    data = Dataset(run.dataset, images, labels, images[:1], labels[:1], classes)
    short = dataclasses.replace(
        run, batch_size=batch_size, engine="torch", stat_every=1, sampling="replacement", effective_steps=STEPS + 1
    )
    training = (Training if run.process == "svag" else FullBatchTraining)(short, data)
    training.take_step()
    return _timed(training.take_step) / count


def _timed(call: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(STEPS):
        call()
    return (time.thread_time() - start) / STEPS
