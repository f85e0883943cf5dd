"""What a ``with`` block asks for reaches a GPU's backward pass, which runs in another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logging_device.device import Device
from torch import Tensor, nn

import svag_fast
from svag_fast.ops import backends
from svag_fast.ops.backends import BackendError
from svag_fast.ops.weight_grad import op


@pytest.fixture
def served(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """By whom the weight gradients are served from now on, and in which thread."""
    calls: list[tuple[int, str]] = []
    real = op.select

    def spy(name: str, backend: str, tensors: Any) -> Any:
        function = real(name, backend, tensors)
        by = [n for n, row in backends._implementations[name].items() if row.function is function]
        calls.append((threading.get_ident(), by[0]))
        return function

    monkeypatch.setattr(op, "select", spy)
    return calls


def losses(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long, device=x.device), reduction="none")


def net_and_input() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4 * 4, 3)).to("logged")
    return net, torch.randn(4, 1, 6, 6).to("logged")


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("way", ["norms", "pair_pass", "pair_pass with norms"])
def test_a_block_reaches_the_backward_pass(served: list[tuple[int, str]], name: str, way: str) -> None:
    net, x = net_and_input()
    optimizer = svag_fast.SVAG(net.parameters(), lr=0.1, l=4)
    with svag_fast.use_backend(name):
        if way == "norms":
            with svag_fast.per_sample_sq_norms(net):
                losses(net, x).mean().backward()
        else:
            with svag_fast.pair_pass(net, optimizer, norms="norms" in way, way="joint") as pair:
                pair.backward(losses(net, x))
    in_backward = [by for thread, by in served if thread != threading.get_ident()]
    if way == "pair_pass":  # without norms a GPU's weight gradients are PyTorch's own
        assert in_backward == []
    else:
        assert set(in_backward) == {name}
        assert len(in_backward) >= 2


def test_a_block_that_has_ended_counts_where_it_was_around_the_forward_pass(served: list[tuple[int, str]]) -> None:
    net, x = net_and_input()
    with svag_fast.per_sample_sq_norms(net):
        with svag_fast.use_backend("reference"):
            loss = losses(net, x).mean()
        loss.backward()
        assert {by for _, by in served} == {"reference"}
        served.clear()
        losses(net, x).mean().backward()  # and no longer
        assert {by for _, by in served} == {"triton"}


def test_what_can_t_serve_a_backward_pass_is_an_error_that_names_what_could(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = net_and_input()
    monkeypatch.setenv("SVAG_FAST_BACKEND", "cuda")  # no product kernel in CUDA
    with svag_fast.per_sample_sq_norms(net), pytest.raises(BackendError, match=r"it has no .*: triton, reference$"):
        losses(net, x).mean().backward()
