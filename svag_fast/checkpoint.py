"""Checkpoints of runs: tensors and plain Python only, written whole or not at all."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from svag_fast.files import replace_file

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
    raw = path.read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(raw)).testzip()  # torch itself doesn't compare checksums
        content = None if damaged else torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({error}). {_ADVICE}") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged} is wrong. {_ADVICE}")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program. {_ADVICE}")
    theirs = content["config"]
    if theirs != config:
        names = sorted(k for k in {*theirs, *config} if theirs.get(k) != config.get(k))
        differences = ", ".join(f"{k} is {theirs.get(k)!r} there and {config.get(k)!r} here" for k in names)
        raise CheckpointError(f"{path} is of another run: {differences}. {_ADVICE}")
    state: dict[str, Any] = content["state"]
    return state


_ADVICE = "It was left as it is: move it away to train this run from the start."
