"""Where a task is, and its file's copy and hash in the experiment's folder. Only `load_task` runs the file's code."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from svag_fast.experiments.data import DATASETS
from svag_fast.experiments.ranges import ConfigError
from svag_fast.files import read_text, replace_file
from svag_fast.numeric import must_be, shown

if TYPE_CHECKING:
    from svag_fast.experiments.task import Task

DEFAULT_NAME = "task"  # of the function in a task's file
SOURCE_BYTES = 1 << 24
SHOWN_LINES = 40  # of a difference
COPY, BOOK, FACTS = "task.py", "task.json", "task_facts.json"  # in the experiment's folder


def parse_target(text: str) -> dict[str, str]:
    """Return the settings that a target means: of a built-in data set and net, or of a task's file or module.

    Args:
        text: "digits", "digits/preresnet8-bn", "my_task.py", "my_task.py:name" or "package.module:name".

    Raises:
        ConfigError: it is none of these, or there is no such file.
    """
    place, colon, name = text.rpartition(":") if ":" in text else (text, "", "")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ConfigError(must_be("TARGET", "a file that is there", shown(place)))
        # Whole, so that a resumed experiment finds it from any folder.
        return {"task": f"{path.resolve()}:{_identifier(name or DEFAULT_NAME, text)}"}
    if colon:
        if not all(part.isidentifier() for part in place.split(".")):
            raise ConfigError(must_be("TARGET", "FILE.py:NAME or package.module:NAME", shown(text)))
        return {"task": f"{place}:{_identifier(name, text)}"}
    dataset, slash, model = text.partition("/")
    if dataset not in DATASETS or (slash and not model):
        known = ", ".join(DATASETS)
        expected = f"FILE.py[:NAME], package.module:NAME, or a data set ({known}) and perhaps /MODEL"
        raise ConfigError(must_be("TARGET", expected, shown(text)))
    return {"dataset": dataset, "model": model} if slash else {"dataset": dataset}


def _identifier(name: str, text: str) -> str:
    if not name.isidentifier():
        raise ConfigError(must_be("TARGET", "one whose NAME is a Python name", shown(text)))
    return name


class Place(NamedTuple):
    """Where a task's code is: a file, and the name in it; `module` where it is imported by that name."""

    path: Path
    name: str
    module: str | None


def place_of(task: str) -> Place:
    """Find the code of a setting `task`.

    Raises:
        ConfigError: it was made in Python, or there is no such file or module.
    """
    if task.startswith("<"):
        expected = "in a file for this; it was made in Python, and continues by svag_fast.study(task, ..., resume=True)"
        raise ConfigError(must_be("task", expected, shown(task)))
    place, _, name = task.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(must_be("task", "a file that is there", shown(place)))
        return Place(Path(place), name, None)
    if str(Path.cwd()) not in sys.path:  # where `python -m` would find it
        sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError) as error:
        raise ConfigError(must_be("task", "a module that is there", f"{shown(place)} ({error})")) from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(must_be("task", "a module that is there, in a file", shown(place)))
    return Place(Path(spec.origin), name, place)


def short_name(task: str) -> str:
    """Return a task's name for people: its file's or module's last part, and the name in it unless it is the usual."""
    if task.startswith("<"):
        return task[1:-1]
    place, colon, name = task.rpartition(":")
    if not colon:  # another program's
        return task
    last = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    return last if name == DEFAULT_NAME else f"{last}:{name}"


def same_task(one: object, other: object) -> bool:
    """Whether two settings `task` name the same task: of a file its own name and the name in it, in any folder.

    The file's hash says whether it is the same one: see `svag_fast.experiments.experiment_folder.check_task_file`.
    """
    if not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    places = [text.rpartition(":")[0] for text in (one, other)]
    if all(place.endswith(".py") for place in places):
        return Path(one).name == Path(other).name
    return one == other


def source_of(task: str) -> str:
    """Return the text of a task's file.

    Raises:
        ConfigError: as `place_of`, or it can't be read.
    """
    path = place_of(task).path
    try:
        return read_text(path, SOURCE_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(must_be("task", "a file that can be read", f"{shown(str(path))} ({error})")) from error


def hash_of(source: str) -> str:
    """The SHA-256 of a file's text."""
    return hashlib.sha256(source.encode()).hexdigest()


_loading: set[Path] = set()


def load_task(task: str, sha256: str | None = None) -> Task:
    """Run a task's file, and return the task.

    Args:
        task: the setting.
        sha256: of the file; None: of any.

    Raises:
        ConfigError: there is no such file, module or name, the file is another one, or no task comes out of it; and
            what is wrong with the task.
        TaskError: its code failed; the message has the traceback.
    """
    from svag_fast.experiments.random_state import OwnRandom
    from svag_fast.experiments.task_error import own_code

    place, source = place_of(task), source_of(task)
    if sha256 is not None and hash_of(source) != sha256:
        raise ConfigError(must_be(str(place.path), "as it was when the experiment began", "a changed file"))
    if place.path in _loading:
        expected = 'a file that calls svag_fast.study under if __name__ == "__main__": alone, since a run loads it'
        raise ConfigError(must_be(str(place.path), expected, "one that calls it whenever it is loaded"))
    _loading.add(place.path)
    try:
        # Every process makes the same data, also of global generators that nobody seeded.
        with OwnRandom(0, "cpu").active(), own_code(short_name(task)):
            made = _made(place, source)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    finally:
        _loading.discard(place.path)
    return dataclasses.replace(made, name=short_name(task)) if made.name == DEFAULT_NAME else made


def _made(place: Place, source: str) -> Task:
    from svag_fast.experiments.task import Task

    module = _run(place, source)
    what, expected = f"{place.name!r} in {place.path}", "a svag_fast.Task, or a function that returns one"
    if not hasattr(module, place.name):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ConfigError(must_be(what, expected, f"no such name there, but {', '.join(own) or 'no function'}"))
    found: Any = getattr(module, place.name)
    result = found() if callable(found) else found
    if not isinstance(result, Task):
        raise ConfigError(must_be(what, expected, shown(result)))
    return result


def _run(place: Place, source: str) -> types.ModuleType:
    if place.module is not None:
        return importlib.import_module(place.module)
    folder = str(place.path.parent)
    # As of a script: it may import its neighbours, before those of a file that ran earlier.
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    module = types.ModuleType(f"svag_fast_task_{place.path.stem}")
    module.__file__ = str(place.path)
    sys.modules[module.__name__] = module
    # What was read and hashed is what runs, whoever writes the file meanwhile.
    exec(compile(source, str(place.path), "exec"), module.__dict__)
    return module


def keep_copy(out: Path, task: str, source: str, forced: list[str] | None = None) -> None:
    """Write a task's file and its hash into the experiment's folder. Nothing ever runs the copy.

    Args:
        out: the folder.
        task: the setting.
        source: the file's text.
        forced: hashes of the files that runs in the folder were trained with before.
    """
    with replace_file(out / COPY) as file:
        file.write(source.encode())
    with replace_file(out / BOOK) as file:
        hashes = [*(forced or []), hash_of(source)]
        file.write(json.dumps({"task": task, "sha256": hashes}, indent=2).encode() + b"\n")


def known_hashes(out: Path) -> list[str]:
    """Return the hashes of the task files that an experiment was trained with, the last one last.

    Raises:
        ValueError: the folder's book of them can't be read.
    """
    path = out / BOOK
    try:
        book = json.loads(read_text(path, 1 << 20))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    hashes = book.get("sha256") if isinstance(book, dict) else None
    if not isinstance(hashes, list) or not all(isinstance(text, str) for text in hashes):
        raise ValueError(f"{path}: no hashes of task files in it")
    return hashes


def difference(out: Path, source: str) -> str:
    """Return how a task's file differs from the copy in the experiment's folder, in at most 40 lines."""
    before = read_text(out / COPY, SOURCE_BYTES).splitlines()
    lines = list(difflib.unified_diff(before, source.splitlines(), str(out / COPY), "now", lineterm="", n=1))
    more = [f"... and {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else []
    return "\n".join(lines[:SHOWN_LINES] + more)
