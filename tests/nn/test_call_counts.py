"""The Python functions of the package that a pass goes through: a small net pays for each, so the numbers only fall."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import svag_fast
from svag_fast import SVAG, pair_pass, per_sample_sq_norms

PACKAGE = str(Path(svag_fast.__file__).parent)


def calls(function: Callable[[], object]) -> int:
    """How often a function of the package is called, once all is warm."""
    for _ in range(3):  # the first passes look at more
        function()
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    gc.collect()
    gc.disable()  # what other tests have left would be counted
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def norms():
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.arange(4)

    def run():
        with per_sample_sq_norms(model) as norms:
            F.cross_entropy(model(x), y).backward()
        return norms.total

    return run


def pair(**how):
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.arange(4)
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)

    def run():
        with pair_pass(model, optimizer, **how) as pair:
            pair.backward(F.cross_entropy(model(x), y, reduction="none"))
        optimizer.discard_gradient()

    return run


MOST = {
    # Two or three of each look whether a module's flags have changed, some of a pair whether one gradient alone has.
    "norms, entered and left": (norms, 93),
    "a pair": (pair, 100),
    "a pair with norms": (lambda: pair(norms=True), 124),
}


# An older PyTorch can't be asked who keeps saved tensors, so there each layer goes through our own function.
OLDER = 0 if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") else 6


@pytest.mark.parametrize(("make", "most"), MOST.values(), ids=MOST)
def test_a_pass_goes_through_no_more_functions_than_before(make, most):
    assert calls(make()) <= most + OLDER
