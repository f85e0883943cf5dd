"""How many Python functions of this package one step goes through: what a small net's step costs beside its kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import svag_fast
from svag_fast import SVAG, SVAGAdam, SVAGRMSprop
from svag_fast.ops.step_call import tensor_reader

PACKAGE = str(Path(svag_fast.__file__).parent)
# From Python 3.12 on they are no calls.
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>"}
TENSORS = 34

pytestmark = pytest.mark.skipif(tensor_reader() is None, reason="this PyTorch has no DLPack exchange functions")

# Calls, and the files through which they go; counted so, torch 2.13's SGD makes 34 calls in 11 files.
MOST: dict[str, tuple[Callable[[list[nn.Parameter]], Any], int, int]] = {
    "plain": (lambda params: SVAG(params, lr=0.1, l=4), 10, 4),
    "l = 1": (lambda params: SVAG(params, lr=0.1), 10, 4),
    "momentum": (lambda params: SVAG(params, lr=0.1, l=4, momentum=0.9), 12, 4),
    "compensated": (lambda params: SVAG(params, lr=0.1, l=4, compensated=True), 12, 4),
    "two groups": (lambda params: SVAG([{"params": params[:9]}, {"params": params[9:]}], lr=0.1, l=4), 17, 5),
    "Adam": (lambda params: SVAGAdam(params, lr=0.1, l=4), 18, 6),
    "RMSprop": (lambda params: SVAGRMSprop(params, lr=0.1, l=4, initial_square_avg=1.0), 19, 6),
}


def give_gradients(params: list[nn.Parameter], optimizer: Any, backward: bool) -> None:
    for then in (optimizer.hold_gradient, None) if optimizer.l != 1 else (None,):
        for p in params:
            p.grad = None if backward else torch.randn_like(p)
        if backward:
            torch.stack([(p * torch.randn_like(p)).sum() for p in params]).sum().backward()
        if then is not None:
            then()


def hops(make: Callable[[list[nn.Parameter]], Any], *, backward: bool = False) -> list[tuple[str, str]]:
    """Return (file, function) of each call within svag_fast/ that a step makes once the state is there."""
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(TENSORS)]
    optimizer = make(params)
    calls: list[tuple[str, str]] = []

    def seen(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in COMPREHENSIONS:
            calls.append((code.co_filename[len(PACKAGE) + 1 :], code.co_name))

    for _ in range(3):
        give_gradients(params, optimizer, backward)
        optimizer.step()
    give_gradients(params, optimizer, backward)
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        optimizer.step()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("backward", [False, True], ids=["", "after backward passes"])
@pytest.mark.parametrize("case", MOST)
def test_a_step_takes_no_more_calls_and_files(case: str, backward: bool) -> None:
    make, most_calls, most_files = MOST[case]
    if backward and case != "l = 1":  # which of autograd's gradients were changed since: one look
        most_calls, most_files = most_calls + 1, most_files + 1
    calls = hops(make, backward=backward)
    path = "\n".join(f"{file}: {name}" for file, name in calls)
    assert 5 < len(calls) <= most_calls, f"{len(calls)} calls:\n{path}"
    assert len({file for file, _ in calls}) <= most_files, path
