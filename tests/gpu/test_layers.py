"""The weight gradient among devices, backends and captured graphs; its values are held by test_checks.py."""

from __future__ import annotations

import pytest
import torch
from draws import same_bits
from gpu_cases import LAYERS
from gpu_checks import LAYER_KERNELS
from layer_cases import make
from torch import Tensor

from svag_fast.ops import weight_grad_and_sq_norms
from svag_fast.ops.backends import select
from svag_fast.ops.weight_grad import triton as weight_grad_triton
from svag_fast.ops.weight_grad.shapes import layer_product

pytestmark = [pytest.mark.gpu, pytest.mark.kernels(*LAYER_KERNELS, ran="gpu")]


def draw(case: str, device: torch.device) -> tuple[Tensor, Tensor]:
    input_shape, shape, options = LAYERS[case]
    x, dy = make(input_shape, shape, dtype=torch.float32, **options)
    return x.to(device), dy.to(device)


def test_tensors_on_another_device_than_the_current_one(device: torch.device) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (
        weight_grad_and_sq_norms(*draw("3x3", torch.device("cuda", i)), LAYERS["3x3"][1], padding=1, backend="triton")
        for i in range(2)
    )
    assert there.grad.device == torch.device("cuda:1")
    assert torch.equal(here.grad.cpu(), there.grad.cpu())
    assert torch.equal(here.sq_norms.cpu(), there.sq_norms.cpu())
    assert torch.cuda.current_device() == 0


def test_auto_takes_triton_on_a_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter must be asked for")
    x, dy = draw("3x3", device)
    product = layer_product(x, dy, LAYERS["3x3"][1], padding=1)
    for op in ("weight_grad_and_sq_norms", "svag_weight_step_"):
        assert select(op, "auto", list(product[:2])) is select(op, "triton", list(product[:2]))


@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize("case", ["many chunks", "one chunk"])
def test_a_captured_graph_forms_the_same_gradient(device: torch.device, case: str, segments: int | None) -> None:
    """A capture forbids what waits for the host, so nothing in a backward pass does."""
    if device.type == "cpu":
        pytest.skip("needs CUDA graphs")
    x, dy = draw(case, device)
    of_samples = None if segments is None else [i % segments for i in range(len(x))]
    product = layer_product(x, dy, LAYERS[case][1], segments=of_samples, **LAYERS[case][2])
    expected = weight_grad_triton.direct(product)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = weight_grad_triton.direct(product)
    graph.replay()
    assert same_bits(found, expected)
