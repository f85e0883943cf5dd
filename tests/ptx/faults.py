"""Plants one fault at a time in a kernel's real PTX, and says what the simulator made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.driver import Launch
from ptx.memory import FaultError
from ptx.parser import Instruction, Program, parse
from ptx.simulator import Simulator

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
                Simulator(seed, lambda *_: fault.program).launch(self._launch)
            except FaultError as error:
                return str(error).rpartition(": ")[2]
            except RecursionError:
                raise
            if not all(map(_same, self._tensors, self._after)):
                return "wrong numbers"
        return ""

    def restore(self) -> None:
        for tensor, after in zip(self._tensors, self._after, strict=True):
            tensor.copy_(after)


def _same(a: Tensor, b: Tensor) -> bool:
    view: Any = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(np.array_equal(a.contiguous().view(view).numpy(), b.contiguous().view(view).numpy()))
