"""The device "logged" in this process, and its log: what a GPU would be asked to do, and when it is waited for."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = os.environ.get("SVAG_LOGGING_DEVICE", "")
"""What build.py has built, where this process is to have the device."""
_OURS = tuple(str(ROOT / folder) + "/" for folder in ("svag_fast", "kernels"))


class Entry(NamedTuple):
    """A line of the log."""

    kind: str
    """"launch" or "synchronisation"."""
    name: str
    """The op's."""
    origin: str
    """The three innermost places of this project that asked for it, innermost first; else what did."""


class Log(list[Entry]):
    """What was logged in a block."""

    @property
    def launches(self) -> int:
        return sum(entry.kind == "launch" for entry in self)

    @property
    def synchronisations(self) -> int:
        return sum(entry.kind == "synchronisation" for entry in self)

    def summary(self) -> str:
        """What was asked for how often from where, the most frequent first."""
        counted = collections.Counter(self)
        order = sorted(counted.items(), key=lambda item: (item[0].kind == "launch", -item[1]))
        lines = [f"{count:5d}  {kind:15}  {name:44}  {origin}" for (kind, name, origin), count in order]
        return "\n".join([f"{self.launches} launches, {self.synchronisations} synchronisations", *lines])


def _origin(places: str) -> str:
    *stack, last = places.split("|")
    node = [last] if last.startswith("backward of ") else []  # of autograd, by device.cpp
    stack = stack if node else [*stack, last]
    ours = [place.removeprefix(f"{ROOT}/") for place in stack if place.startswith(_OURS)]
    return " < ".join([*(ours[:3] or stack[:1]), *node])


class Device:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.PyDLL(str(library))
        self._library.logged_take.restype = ctypes.py_object
        self._library.logged_register()
        torch.utils.rename_privateuse1_backend("logged")
        torch._register_device_module("logged", _module())

    def note(self, kind: str, name: str) -> None:
        """Add a line to the log, of what is no op of PyTorch."""
        self._library.logged_note(kind.encode(), name.encode())

    @contextlib.contextmanager
    def unlogged(self) -> Iterator[None]:
        """Log nothing that this thread does in the block: the inside of a kernel."""
        self._library.logged_pause(1)
        try:
            yield
        finally:
            self._library.logged_pause(-1)

    @contextlib.contextmanager
    def log(self) -> Iterator[Log]:
        """What is logged in the block, there when it has ended."""
        self._library.logged_take()
        log = Log()
        try:
            yield log
        finally:
            log += [Entry(kind, name, _origin(places)) for kind, name, places in self._library.logged_take()]


def _module() -> types.ModuleType:
    """What PyTorch's Python code asks of ``torch.logged``."""
    module = types.ModuleType("torch.logged")
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 2,
        "current_device": 0,
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
        "_lazy_init": None,
        "manual_seed_all": None,
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    return module
