"""Plants one fault at a time in a kernel's real PTX, and says what the simulator made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ptx.driver import Launch
from ptx.memory import FaultError
from ptx.parser import Instruction, Program, parse
from ptx.simulator import Simulator
from torch import Tensor

_NOTHING = Instruction("fence", (), None, False)


@dataclass(frozen=True)
class Planted:
    """``kind``: barrier, wait, mask, bound or order. ``place``: of the instruction that was changed."""

    kind: str
    place: int
    program: Program

    def __str__(self) -> str:
        return f"{self.program.name}: {self.kind} at {self.place}"


def planted(program: Program, kinds: tuple[str, ...]) -> Iterator[Planted]:
    """Every barrier removed, wait loosened by a group, mask dropped, bound moved by 1, atomic's order dropped."""
    for place, instruction in enumerate(program.code):
        for kind, other in _changed(instruction):
            if kind in kinds:
                code = (*program.code[:place], other, *program.code[place + 1 :])
                yield Planted(kind, place, replace(program, code=code))


def _changed(i: Instruction) -> Iterator[tuple[str, Instruction]]:
    if i.op.startswith("bar.sync"):
        yield "barrier", _NOTHING
    elif i.op.startswith("cp.async.wait_group"):
        yield "wait", replace(i, operands=(str(int(i.operands[0], 0) + 1),))
    elif i.op.startswith(("ld.global", "st.global")) and i.guard:
        yield "mask", replace(i, guard=None)
    elif i.op.startswith("cp.async.c") and len(i.operands) == 4:
        yield "mask", replace(i, operands=i.operands[:3])
    elif i.op.startswith("atom"):
        yield "order", replace(i, op=i.op.replace("acq_rel", "relaxed"))
    elif i.op.startswith("setp.") and i.parts[2][0] in "su" and i.parts[1] in _LOOSER:
        yield "bound", replace(i, op=".".join((i.parts[0], _LOOSER[i.parts[1]], *i.parts[2:])))


_LOOSER = {"lt": "le", "gt": "ge", "le": "lt", "ge": "gt", "lo": "ls", "hi": "hs"}


def why_harmless(program: Program, place: int) -> str:
    """Why a barrier or wait does nothing that its neighbours don't, as far as the code alone can tell; else ""."""
    i = program.code[place]
    before, after = _until_barrier(program, place, -1), _until_barrier(program, place, 1)
    if i.op.startswith("bar.sync"):
        if not before or not after:
            return "nothing is read or written between it and the next barrier"
        if all(_reads_only(program, p) for p in before | after):
            return "between the barriers on both sides all only read"
    elif _idle(program, place):
        return "no copy was begun since another wait for as many, or none is before the next such wait"
    return ""


def _until_barrier(program: Program, place: int, step: int) -> set[int]:
    """The accesses to memory that may run between this place and the next barriers, in the direction of ``step``."""
    return {p for p in _reached(program, place, step, "bar.sync") if _touches_memory(program.code[p])}


def _reached(program: Program, place: int, step: int, stop: str) -> set[int]:
    """The instructions reached from ``place``, not beyond one whose name begins with ``stop``."""
    edges: dict[int, list[int]] = {p: [] for p in range(len(program.code))}
    for p, i in enumerate(program.code):
        following = [] if (i.op == "bra" and not i.guard) or i.op.startswith("bra.uni") or i.op == "ret" else [p + 1]
        if i.op.startswith("bra"):
            following.append(program.labels[i.operands[0]])
        for q in following:
            edges[p if step > 0 else q].append(q if step > 0 else p)
    found: set[int] = set()
    left = list(edges[place])
    while left:
        p = left.pop()
        if p in found:
            continue
        found.add(p)
        if not program.code[p].op.startswith(stop):
            left += edges[p]
    return found


def _touches_memory(i: Instruction) -> bool:
    return i.op.startswith(
        ("ld.shared", "st.shared", "ldmatrix", "cp.async.c", "cp.async.wait", "ld.global", "st.", "atom")
    )


def _reads_only(program: Program, place: int) -> bool:
    i = program.code[place]
    return i.op.startswith(("ld.", "ldmatrix")) or (i.op.startswith("cp.async.wait") and bool(_idle(program, place)))


def _idle(program: Program, place: int) -> bool:
    i = program.code[place]
    for step in (-1, 1):
        reached = _reached(program, place, step, i.op)
        others = {p for p in reached if program.code[p].op == i.op}
        between = {program.code[p].op.split(".")[0] for p in reached - others} if step > 0 else set()
        begun = any(program.code[p].op.startswith("cp.async.commit") for p in reached)
        equal = others and all(program.code[p].operands == i.operands for p in others)
        if equal and not begun and not {"ld", "ldmatrix", "bar"} & between:
            return True
    return False


class Trial:
    """A launch, run once as it is; then again, from the same memory, with a fault in it."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._tensors = [v for v in launch.arguments.values() if isinstance(v, Tensor)]
        self._before = [t.clone() for t in self._tensors]
        self.program = parse(launch.ptx)
        Simulator().launch(launch)
        self._after = [t.clone() for t in self._tensors]

    def verdict(self, fault: Planted, seeds: tuple[int, ...] = (0, 1)) -> str:
        """What was seen of it, or "" if nothing, for several orders of the blocks."""
        for seed in seeds:
            for tensor, before in zip(self._tensors, self._before, strict=True):
                tensor.copy_(before)
            try:
                Simulator(seed, lambda _: fault.program).launch(self._launch)
            except FaultError as error:
                return str(error).rpartition(": ")[2]
            if not all(map(_same, self._tensors, self._after)):
                return "wrong numbers"
        return ""

    def restore(self) -> None:
        for tensor, after in zip(self._tensors, self._after, strict=True):
            tensor.copy_(after)


def _same(a: Tensor, b: Tensor) -> bool:
    view: Any = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(np.array_equal(a.contiguous().view(view).numpy(), b.contiguous().view(view).numpy()))
