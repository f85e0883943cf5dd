"""The table of backends: a call is served by what the table says when the call is made."""

from __future__ import annotations

import pytest
import torch
from op_calls import CALLS, copies

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


@pytest.mark.parametrize("by_name", [False, True], ids=["by the environment", "by name"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_op_says_why_a_gpu_s_backend_can_t_serve_it_and_what_could(
    name: str, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_name:
        monkeypatch.setenv("SVAG_FAST_BACKEND", name)
    monkeypatch.setitem(BACKENDS, "triton", Backend("triton", ("cuda",), lambda: None))  # interpreted or not
    asked = f"backend '{name}'" + ("" if by_name else " (of SVAG_FAST_BACKEND)")
    refused = set()
    for call in CALLS.values():
        tensors = call.make(torch.float32)
        before = copies(tensors)
        with pytest.raises(BackendError) as error:
            call.run(tensors, name if by_name else "auto")
        op = str(error.value).split(" can't serve ")[-1].partition(":")[0]
        why = "it serves cuda tensors, not cpu" if op in backends.ops_of(name) else f"it has no {op}"
        assert str(error.value) == f"{asked} can't serve {op}: {why}. Could serve it: cpu, reference"
        assert all(torch.equal(tensors[key], t) for key, t in before.items()), op
        refused.add(op)
    assert refused == set(backends._implementations)
