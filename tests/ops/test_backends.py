"""The table of backends: a call is served by what the table says when the call is made."""

from __future__ import annotations

import pytest
import torch

import svag_fast
from svag_fast.ops import svag_step_
from svag_fast.ops.backends import BACKENDS, Backend, BackendError


def step(backend: str = "auto") -> torch.Tensor:
    x = torch.ones(3)
    svag_step_([x], [torch.ones(3)], None, lr=0.25, l=1, backend=backend)
    return x


def test_a_row_that_changes_between_two_calls_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step("cpu")
    monkeypatch.setitem(BACKENDS, "cpu", Backend("cpu", ("cpu",), lambda: "away today"))
    with pytest.raises(BackendError, match="away today"):
        step("cpu")
    assert torch.equal(step(), expected)  # the reference served it
    monkeypatch.undo()
    assert torch.equal(step("cpu"), expected)


def test_the_block_s_choice_replaces_auto_alone_and_ends_with_it() -> None:
    with svag_fast.use_backend("cuda"):
        with pytest.raises(BackendError, match="'cuda'"):
            step()
        step("cpu")
    step()


def test_the_environment_s_choice_replaces_auto_and_the_block_s_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVAG_FAST_BACKEND", "nowhere")
    with pytest.raises(BackendError, match="backend must be one of auto, cuda, triton, cpu, reference, got"):
        step()
    with svag_fast.use_backend("reference"):
        step()
