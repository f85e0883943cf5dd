"""Checkpoints of runs: tensors and plain Python only, written whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from svag_fast.experiments.config import UNSAID
from svag_fast.experiments.task_file import same_task
from svag_fast.files import open_regular, replace_file

FORMAT = "svag_fast checkpoint 1"


class CheckpointError(RuntimeError):
    """A checkpoint can't be read, or isn't this run's; nothing was overwritten."""


def save_checkpoint(path: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python) of the run that `config` describes, atomically.

    Raises:
        OSError: the disk is full or the folder can't be written; `path` is as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "config": config, "state": state}, buffer)
    with replace_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read back the state that `save_checkpoint` wrote for the same `config`, tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged, no checkpoint of ours, or of a run with another config.
        OSError: it can't be read at all.
    """
    try:
        with open_regular(path) as file:
            content = _content(file)
    except OSError:
        raise
    except Exception as error:  # whatever the bytes of a foreign file lead an unpickler to
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({error or type(error).__name__}). {ADVICE}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program. {ADVICE}")
    theirs, state = content.get("config"), content.get("state")
    if not isinstance(theirs, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is no whole checkpoint: it lacks its config or its state. {ADVICE}")
    # An older version's checkpoint doesn't name settings that came later, and meant these.
    theirs = {k: v for k, v in UNSAID.items() if k in config} | theirs
    # The folder of a task's file is no part of a run: its hash is, which was compared before.
    if same_task(theirs.get("task"), config.get("task")):
        theirs |= {name: config[name] for name in ("task",) if name in config}
    if theirs != config:
        names = sorted((k for k in {*theirs, *config} if theirs.get(k) != config.get(k)), key=str)
        differences = ", ".join(f"{k} is {_shown(theirs.get(k))} there and {_shown(config.get(k))} here" for k in names)
        raise CheckpointError(f"{path} is of another run: {differences}. {ADVICE}")
    return state


def _content(file: BinaryIO) -> object:
    """Unpickle tensors and plain Python, in memory of no more than the file's size."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        # torch stores its parts as they are: what unpacks to more than the file holds is no checkpoint.
        if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise ValueError("its parts are larger than the file")
        if damaged := archive.testzip():  # torch itself doesn't compare checksums
            raise ValueError(f"the checksum of its part {damaged} is wrong")
    file.seek(0)
    # Without weights_only a foreign file could run any code. On the CPU, since the GPU of then may be missing now.
    return torch.load(file, map_location="cpu", weights_only=True)


def _shown(value: object) -> str:
    """A setting as text; a foreign file may hold anything in its place."""
    return repr(value) if isinstance(value, (str, float, bool, type(None))) or type(value) is int else f"{type(value)}"


ADVICE = "It was left as it is: move it away to train this run from the start."
