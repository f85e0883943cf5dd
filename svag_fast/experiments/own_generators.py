"""Random generators that a task brings along: found in its parts, seeded for a run, saved with it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_LEAVES = (torch.Tensor, np.ndarray, str, bytes, int, float, complex, types.ModuleType, type(None))
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "svag_fast"}
MOST_OBJECTS, MOST_ITEMS = 100_000, 1000  # looked at in all, and of one container: a data set may list its files


def own_generators(*parts: Any) -> list[Generator]:
    """Return the generators that functions, modules, Datasets and what they hold draw from; no global ones.

    Looked into are attributes, classes, containers, closures, defaults, partials and the global names that a function
    uses; not what libraries hold in secret.
    """
    found: list[Generator] = []
    known = {id(g) for g in (torch.default_generator, *torch.cuda.default_generators)}
    known |= {id(random._inst), id(np.random.mtrand._rand)}
    seen: dict[int, Any] = {}  # alive, so that no other gets its id
    waiting = deque(parts)
    while waiting and len(seen) < MOST_OBJECTS:
        part = waiting.popleft()
        if id(part) in seen or id(part) in known or isinstance(part, _LEAVES):
            continue
        seen[id(part)] = part
        if isinstance(part, _KINDS):
            if not isinstance(part, random.SystemRandom):  # it has no state
                found.append(part)
        else:
            waiting.extend(islice(_held(part), MOST_ITEMS))
    return found


def _held(part: Any) -> Iterator[Any]:
    """What an object is made of."""
    if isinstance(part, types.FunctionType):
        if not _is_library(part):
            yield from (part.__defaults__, part.__kwdefaults__)
            yield from (cell.cell_contents for cell in part.__closure__ or () if cell != types.CellType())
            yield from (part.__globals__[name] for name in _names(part.__code__) if name in part.__globals__)
    elif isinstance(part, types.MethodType):
        yield from (part.__func__, part.__self__)
    elif isinstance(part, types.BuiltinFunctionType):
        yield part.__self__
    elif isinstance(part, functools.partial):
        yield from (part.func, part.args, part.keywords)
    elif isinstance(part, (staticmethod, classmethod)):
        yield part.__func__
    elif isinstance(part, (property, functools.cached_property)):
        yield getattr(part, "fget", None) or getattr(part, "func", None)
    elif isinstance(part, type):
        if not _is_library(part):
            yield from (*vars(part).values(), *part.__bases__)
    else:
        if isinstance(part, dict):  # no other mapping, which might load what it has
            yield from part.values()
        elif isinstance(part, (list, tuple, set, frozenset, deque)):
            yield from part
        yield from (getattr(part, "__dict__", None), type(part))


def _names(code: types.CodeType) -> dict[str, None]:
    """The global names that a function's code uses, with the functions' that are made in it.

    In the code's order, by which generators are seeded and put back: a set has another in each process.
    """
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return dict.fromkeys([*code.co_names, *itertools.chain(*map(_names, inner))])


def _is_library(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).partition(".")[0] in _LIBRARIES


def seed_generators(generators: list[Generator], seed: int) -> None:
    """Seed each of them, with a seed of its own that follows from `seed`."""
    for place, generator in enumerate(generators):
        own = int.from_bytes(hashlib.sha256(f"{seed}, {place}".encode()).digest()[:8], "big") >> 1
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.seed(own if isinstance(generator, random.Random) else own % 2**32)


def state_of(generator: Generator) -> Any:
    """Where a generator stands: tensors and plain Python."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def put_back(generator: Generator, state: Any) -> None:
    """Let a generator continue from what `state_of` gave.

    Raises:
        TypeError, ValueError, RuntimeError: it is of another kind.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_with_arrays(state))
    else:
        generator.bit_generator.state = _with_arrays(state)


def _plain(value: Any) -> Any:
    """NumPy's state without arrays, which a checkpoint can't hold: unsigned words as tensors of bytes."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "bytes": torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "bytes"}:
        return np.frombuffer(value["bytes"].numpy().tobytes(), value["dtype"])
    return {name: _with_arrays(part) for name, part in value.items()}
