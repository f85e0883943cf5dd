"""A run's folder while the run is trained: what is there, and what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from svag_fast.experiments.checkpoint import ADVICE, CheckpointError, load_checkpoint, save_checkpoint
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.measured_run import MeasuredRun, diverged
from svag_fast.experiments.run_folder import columns_of, metrics_of
from svag_fast.experiments.run_output import Events, repair, write_config, write_metrics


class Book:
    """A run's folder while it is trained: what is there, and what is written."""

    def __init__(
        self, place: int, config: RunConfig, folder: Path, provenance: dict[str, Any] | None, tensorboard: bool
    ) -> None:
        self.place, self.config, self.folder, self.tensorboard = place, config, folder, tensorboard
        self.row_steps = set(config.row_steps)
        self.events: Events | None = None
        self.identity = dataclasses.asdict(config)
        self.checkpoint = folder / "checkpoint.pt"
        self.state = read_state(self.checkpoint, config)
        self.provenance = provenance
        self.complete = False
        if self.state is None:
            write_config(folder, self.identity, provenance or {})
            return
        rows = self.state["rows"]
        self.provenance = self.state.get("provenance", provenance)
        repair(folder, self.identity, self.provenance or {}, rows)
        self.complete = self.state["step"] == config.steps or diverged(rows[-1])
        # A complete run may have been trained without events.
        if self.complete and tensorboard and not any(folder.glob("events.out.tfevents.*")):
            Events(folder, self.identity, rows[0]).write(rows)

    def load_into(self, run: MeasuredRun) -> None:
        """Continue the run from the checkpoint, if there is one."""
        if self.state is None:
            return
        try:
            run.load_state_dict(self.state)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.checkpoint} holds no whole state of this run ({error!r}). {ADVICE}"
            ) from error

    def open_events(self, run: MeasuredRun) -> None:
        """Begin TensorBoard's file, if asked for."""
        self.events = Events(self.folder, self.identity, run.columns) if self.tensorboard else None

    def save(self, run: MeasuredRun) -> None:
        """Write the checkpoint and what follows from it."""
        # Events first: of a complete run they are not written again.
        if self.events is not None:
            self.events.write(run.rows)
        save_checkpoint(self.checkpoint, self.identity, {**run.state_dict(), "provenance": self.provenance})
        write_metrics(self.folder / "metrics.csv", run.rows)


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
        or not all(isinstance(row, dict) and set(row) == set(columns_of(metrics_of(row))) for row in rows)
        or any(row.keys() != rows[0].keys() for row in rows)
    ):
        raise CheckpointError(f"{checkpoint} holds no rows of metrics. {ADVICE}")
    return state
