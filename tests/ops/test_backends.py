"""The table of backends: a call is served by what the table says when the call is made."""

from __future__ import annotations

import pytest
import torch

import svag_fast
from svag_fast.ops import backends, svag_step_
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
    with pytest.raises(BackendError, match=r"backend must be one of auto, .*, got 'nowhere' \(of SVAG_FAST_BACKEND\)"):
        step()
    for name in ("reference", "auto"):
        with svag_fast.use_backend(name):
            step()


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("op", sorted(backends._implementations))
def test_every_op_says_why_a_gpu_s_backend_can_t_serve_it_and_what_could(
    op: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVAG_FAST_BACKEND", name)
    monkeypatch.setitem(BACKENDS, "triton", Backend("triton", ("cuda",), lambda: None))  # interpreted or not
    with pytest.raises(BackendError) as error:
        backends.select(op, "auto", [torch.ones(3)])
    why = "it serves cuda tensors, not cpu" if op in backends.ops_of(name) else f"it has no {op}"
    expected = f"backend '{name}' (of SVAG_FAST_BACKEND) can't serve {op}: {why}. Could serve it: cpu, reference"
    assert str(error.value) == expected
