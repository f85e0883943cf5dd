"""Runs that differ in their seed alone, side by side in the fused CPU kernel; each is to the bit what it is alone."""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.measured_run import EVALUATION_LIMIT, MeasuredRun, Part, RowMeans, initial_model, own_seed
from svag_fast.noise.estimators import from_two_batches
from svag_fast.ops.step import svag_coefficients
from svag_fast.replicas.chain import chain_of
from svag_fast.replicas.fused import Evaluation, FusedRuns, RunSums

# The kernel looks for weights that are not finite at every 32nd step: a pause between two would be one more look.
_PAUSE = 32


class FusedTraining:
    """Runs in progress whose steps are taken together.

    Args:
        configs: of engine "fused", alike but for the seed.
        dataset: their data, on the CPU.

    Raises:
        UnsupportedModuleError: the net is no chain of layers that the kernel serves.
        MemoryError: so many replicas don't fit.
    """

    def __init__(self, configs: Sequence[RunConfig], dataset: Dataset) -> None:
        first = configs[0]
        assert all(dataclasses.replace(config, seed=first.seed) == first for config in configs)
        models = [initial_model(config, dataset) for config in configs]
        self.chain = chain_of(models[0])
        self.data = dataset = dataset.standardised()
        self.fused = FusedRuns(
            self.chain,
            torch.stack([self.chain.flatten(model).weights for model in models]),
            inputs=dataset.train_images,
            targets=dataset.train_labels,
            seeds=[own_seed(config, "batches") for config in configs],
            batch_size=first.batch_size,
            lr=first.lr_pieces,
            l=first.l,
            weight_decay=first.weight_decay,
            stat_every=first.stat_every,
            threads=first.threads,
        )
        self._evaluated: dict[Part, Evaluation] = {}
        self._slice = _PAUSE
        self.runs = [FusedRun(config, self, s) for s, config in enumerate(configs)]
        for run in self.runs:
            run.begin()

    def advance(self) -> None:
        """Take every run to its next row, or pause before it after some 0.2 s; runs that lag behind come first."""
        start = time.monotonic()
        self._evaluated.clear()
        waiting = [run for run in self.runs if not run.ended]
        goals = {run.replica: run.next_row() for run in waiting}
        behind = min(run.step for run in waiting)
        goal = min(min(goals.values()), (behind // _PAUSE) * _PAUSE + self._slice)
        self.fused.advance([goal if s in goals else 0 for s in range(len(self.runs))])
        stopped = self.fused.diverged.tolist()
        moved = [run for run in waiting if run.step < goal]
        for run in moved:
            # One that has diverged stands still. The row that shows it is the next, as of a run that trains on nan.
            run.step = goals[run.replica] if stopped[run.replica] else goal
        seconds = time.monotonic() - start
        for run in moved:
            run.seconds += seconds / len(moved)
        # Twice as long or half of it, so that signals are answered and checkpoints written soon.
        self._slice = (
            2 * self._slice if seconds < 0.1 else max(_PAUSE, self._slice // 2) if seconds > 0.4 else self._slice
        )

    def evaluation(self, part: Part) -> Evaluation:
        """Return the loss and accuracy of every replica as it is now, computed once."""
        if part not in self._evaluated:
            data, limit = self.data, EVALUATION_LIMIT
            whole = {
                "train": (data.train_images[:limit], data.train_labels[:limit]),
                "test": (data.test_images, data.test_labels),
            }
            self._evaluated[part] = self.fused.evaluate(*whole[part])
        return self._evaluated[part]


class FusedRun(MeasuredRun):
    """One run among others; see :class:`FusedTraining`."""

    def __init__(self, config: RunConfig, training: FusedTraining, replica: int) -> None:
        super().__init__(config)
        self.replica = replica
        self._training = training
        self._fused = training.fused
        self._row_steps = config.row_steps

    def next_row(self) -> int:
        """The step of the next row."""
        return self._row_steps[bisect_right(self._row_steps, self.step)]

    @property
    def noise_source(self) -> str:
        """Two batches: the kernel forms no sample's own gradient."""
        return "two_batches"

    @property
    def time(self) -> float:
        """The SDE's time: the sum of lr/l over the steps taken."""
        pieces = self.config.lr_pieces
        ends = [begin for begin, _ in pieces[1:]] + [self.config.steps]
        spans = [(max(0, min(end, self.step) - begin), lr) for (begin, lr), end in zip(pieces, ends, strict=True)]
        return math.fsum(steps * lr for steps, lr in spans) / self.config.l

    def evaluate(self, part: Part) -> dict[str, float]:
        """Return "loss", the mean, and "accuracy", a fraction, of the net as it is now."""
        found = self._training.evaluation(part)
        assert found.accuracy is not None  # of classes
        return {"loss": float(found.loss[self.replica]), "accuracy": float(found.accuracy[self.replica])}

    def start_values(self) -> tuple[float, float | None]:
        """Return R, and for SGD the part of its gradients that are formed for the measurement alone."""
        # What SVAG's measured steps cost more is not a gradient, and is not known here.
        return float(self._weights.double().square().sum()), 1 / self.config.stat_every if self.config.l == 1 else None

    def row_means(self) -> RowMeans:
        """Return the means over the steps since the last row; of a run that has diverged, the loss is nan."""
        sums = self._sums()
        c1, c2 = svag_coefficients(self.config.l)
        loss = c1 * sums.loss1 / sums.steps1 + (c2 * sums.loss2 / sums.steps2 if c2 else 0.0)
        if self._fused.diverged[self.replica]:  # the kernel leaves out the loss that was not finite
            loss = torch.full((), math.nan, dtype=torch.float64, device="cpu")
        samples = self.config.batch_size * float(sums.steps1 + sums.steps2)
        if not sums.measured:
            return RowMeans(float(loss), None, None, samples)
        norms = (sums.sq_norm1 / sums.measured, sums.sq_norm2 / sums.measured, sums.inner / sums.measured)
        return RowMeans(float(loss), from_two_batches(*norms), float(sums.weight_sq_norm / sums.measured), samples)

    def clear_sums(self) -> None:
        """Begin a new row's means."""
        self._fused.clear_sums([self.replica])

    @property
    def _weights(self) -> Tensor:
        return self._fused.weights[self.replica]

    def _sums(self) -> RunSums:
        return RunSums(*(sums[self.replica] for sums in self._fused.sums))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next: tensors and plain Python."""
        return {
            "step": self.step,
            "model": self._fused.unstack(self.replica).state_dict(),
            "rows": self.rows,
            "seconds": self.seconds,
            "sums": torch.stack(list(self._sums())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: `state` is none of this run's; `self` may have taken a part.
        """
        model = self._fused.unstack(self.replica)
        model.load_state_dict(state["model"])
        whole = self._fused.state_dict()
        sums = state["sums"]
        if sums.shape != whole["sums"][0].shape or sums.dtype != torch.float64:
            raise ValueError(f"sums must be float64 [{len(whole['sums'][0])}], got {sums.dtype} {list(sums.shape)}")
        values = self._training.chain.flatten(model)
        if not torch.equal(values.frozen, self._fused.frozen):
            raise ValueError("the head must be this net's, got another")
        whole["weights"][self.replica] = values.weights
        whole["sums"][self.replica] = sums
        whole["steps"][self.replica] = state["step"]
        self._fused.load_state_dict(whole)
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
