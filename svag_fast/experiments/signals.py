"""Signals that ask to stop: Ctrl-C, a polite kill, a terminal that is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """Whether a signal has asked to stop: its number, or None."""

    number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Context in which the first signal is only noted, so that a step may end. A second one interrupts at once."""
    request = StopRequest()

    def note(number: int, _: object) -> None:
        if request.number is not None:
            raise KeyboardInterrupt(number)
        request.number = number

    with _handled_by(note, STOPPING):
        yield request


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, as of a batch system or a container that ends, and SIGHUP, of a terminal, like Ctrl-C."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    with _handled_by(interrupt, (signal.SIGTERM, signal.SIGHUP)):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], None], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Python sets handlers in the main thread alone; elsewhere signals are the caller's."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
    # Under nohup SIGHUP is ignored, in a shell's background job SIGINT, and stays so. What isn't Python's can't be put
    # back.
    ours = [number for number, was in before.items() if was not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Context whose child processes never get Ctrl-C or the terminal's end, whichever thread starts them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
