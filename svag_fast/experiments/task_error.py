"""Errors of a task's own code, told with its own traceback."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svag_fast.replicas.errors import NotReplicable

PACKAGE = str(Path(__file__).resolve().parents[1])
STANDARD = str(Path(contextlib.__file__).parent)


class TaskError(RuntimeError):
    """A task's own code failed; the message is its traceback."""


@contextmanager
def own_code(name: str) -> Iterator[None]:
    """Context in which a task's code runs; what it raises comes out as a :class:`TaskError`, what we refuse as it is.

    Args:
        name: the task's.
    """
    try:
        yield
    except (TaskError, NotReplicable):
        raise
    except (Exception, SystemExit) as error:  # code that ends the process hasn't made a task or a step either
        frames = traceback.extract_tb(error.__traceback__)
        own = next((i for i, frame in enumerate(frames) if not _is_library(frame.filename)), None)
        if own is None and isinstance(error, (TypeError, ValueError)) and " must be " in str(error):
            raise  # this package's own word on the task
        if own is None:  # what the task is made of, called from here, such as a layer on another shape
            own = 1 + max(i for i, frame in enumerate(frames) if frame.filename.startswith(PACKAGE))
        told = [*traceback.format_list(frames[own:]), *traceback.format_exception_only(type(error), error)]
        raise TaskError(f"the code of task {name!r} failed:\n" + "".join(told).rstrip()) from error


def _is_library(file: str) -> bool:
    if file.startswith((PACKAGE, "<frozen ")) or "/torch/" in file:
        return True
    # Packages that are installed into the standard library's folder are a task's, not Python's.
    return file.startswith(STANDARD) and "-packages" not in file
