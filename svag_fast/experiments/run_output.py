"""What training writes into a run's folder, beside its checkpoint: config.json, metrics.csv, TensorBoard's events."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svag_fast.experiments.run_folder import read_config
from svag_fast.files import remove_leftovers, replace_file

MetricsRow = dict[str, "float | int | str | None"]


class RunBusyError(RuntimeError):
    """Another process is training the same run."""


def write_metrics(path: Path, rows: list[MetricsRow]) -> None:
    """Write the rows as CSV, whole or not at all; an empty cell was not measured in that row."""
    with replace_file(path) as file:
        file.write(_as_csv(rows))


def _as_csv(rows: list[MetricsRow]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_config(folder: Path, identity: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write config.json: the run's settings, and beside them versions and commit."""
    with replace_file(folder / "config.json") as file:
        file.write(json.dumps({**identity, **provenance}, indent=2).encode() + b"\n")


def repair(folder: Path, identity: dict[str, Any], provenance: dict[str, Any], rows: list[MetricsRow]) -> None:
    """Make again what a kill behind the last checkpoint, or anything else, has left missing, stale or damaged."""
    try:
        there = read_config(folder / "config.json")
        whole = all(there.get(name) == value for name, value in identity.items())
    except (FileNotFoundError, ValueError):
        whole = False
    if not whole:
        write_config(folder, identity, provenance)
    metrics = folder / "metrics.csv"
    # Compared by bytes: a file that is right is left alone, with its time.
    if not metrics.is_file() or metrics.read_bytes() != _as_csv(rows):
        write_metrics(metrics, rows)


class Events:
    """TensorBoard events of all rows; those that an interrupted process wrote are purged and written again.

    They are at effective steps, so that runs of different l cover each other; the run's config are its hparams.

    Args:
        folder: the run's.
        identity: its config.
        columns: of its rows.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], columns: Iterable[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.written = 0
        self.writer = SummaryWriter(str(folder), purge_step=0)
        # Not add_hparams, which makes a run of its own, in a folder of its own, of them.
        compared = [name for name in columns if name.startswith(("train_", "test_"))]
        metrics = dict.fromkeys((*compared, "nsr"), 0.0)
        for summary in hparams(identity, metrics):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def write(self, rows: list[MetricsRow]) -> None:
        """Write the rows that have come since the last call."""
        for row in rows[self.written :]:
            effective_step = round(float(row["effective_step"] or 0))  # rows stand within half a step of a whole one
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "effective_step", "time"):
                    self.writer.add_scalar(name, value, effective_step)
        self.written = len(rows)
        self.writer.flush()


_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    # A lock on the folder itself leaves no lock file behind, and ends with the process however that ends.
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusyError(f"{folder} is being trained by another process: wait for it or end it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {folder} has no locks ({error.strerror}): nothing keeps another process from "
                "training the same run at the same time",
                RuntimeWarning,
                stacklevel=4,
            )
        # Under the lock, or another process's file in the making would be taken for a leftover.
        remove_leftovers(folder)
        yield
    finally:
        os.close(handle)
