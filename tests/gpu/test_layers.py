"""weight_grad_and_sq_norms and svag_weight_step_ on the device, by Triton, against float64 there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import CONVOLUTION, LINEAR, STEP, make, step_by_two_ops
from torch import Tensor

from svag_fast import SVAG, backend, per_sample_sq_norms
from svag_fast.ops import svag_weight_step_, weight_grad_and_sq_norms
from svag_fast.ops.backends import select
from svag_fast.ops.layer_product import layer_product

KERNELS = ("_weight_grad_kernel", "_add_chunks_kernel", "_add_norms_kernel", "_finish_kernel")
pytestmark = [pytest.mark.gpu, pytest.mark.kernels(*KERNELS, ran="gpu")]

CASES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    **{f"linear, {name}": (*case, {}) for name, case in LINEAR.items()},
    **CONVOLUTION,
    "many chunks": ([64, 16, 8, 8], [16, 16, 3, 3], {"padding": 1}),
    "one chunk": ([4, 512, 4, 4], [512, 512, 3, 3], {"padding": 1}),
}
SLOW_TO_INTERPRET = {
    "linear, wide", "wide and small", "depthwise", "depthwise, stride 2, dilation", "depthwise with multiplier",
    "many chunks", "one chunk",
}  # fmt: skip
TF32_EPS = 2.0**-10


def draw(case: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    if device.type == "cpu" and case in SLOW_TO_INTERPRET:
        pytest.skip("minutes under the interpreter")
    input_shape, shape, options = CASES[case]
    x, dy = make(input_shape, shape, dtype=dtype, **options)
    return x.to(device), dy.to(device)


def held_to_float64(case: str, x: Tensor, dy: Tensor, eps: float) -> None:
    _, shape, options = CASES[case]
    B = len(x)
    weights = torch.linspace(-1.5, 2.0, B, device=x.device)
    segments = [i % 2 for i in range(B)]
    ours = weight_grad_and_sq_norms(x, dy, shape, weights=weights, segments=segments, backend="triton", **options)
    exact = weight_grad_and_sq_norms(
        x.double(), dy.double(), shape, weights=weights, segments=segments, backend="reference", **options
    )
    # A product of T terms of size |a||b| is off by eps of each at most; the norms below bound the sum of those terms.
    scale = float((x.double().flatten(1).norm(dim=1) * dy.double().flatten(1).norm(dim=1)).sum()) + 1e-30
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    bound = 4 * eps * scale * taps**0.5
    assert float((ours.grad.double() - exact.grad).norm()) <= 2 * bound
    assert float((ours.sq_norms.sqrt() - exact.sq_norms.sqrt()).norm()) <= bound
    assert ours.segment_gram is not None
    assert exact.segment_gram is not None
    assert float((ours.segment_gram - exact.segment_gram).norm()) <= 8 * bound * (float(exact.grad.norm()) + scale)


@pytest.mark.usefixtures("ieee")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES)
def test_gradient_norms_and_segments(device: torch.device, case: str) -> None:
    x, dy = draw(case, device)
    held_to_float64(case, x, dy, 2.0**-22)
    if x.dim() == 4:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        held_to_float64(case, x, dy, 2.0**-22)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("case", ["linear, rows", "3x3", "stride 2", "groups", "many chunks", "one chunk"])
def test_tf32_rounds_products_to_tf32(device: torch.device, case: str) -> None:
    held_to_float64(case, *draw(case, device), TF32_EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["linear, rows", "3x3", "odd channels", "many chunks", "one chunk"])
def test_half_precision_inputs_are_summed_in_float32(device: torch.device, case: str, dtype: torch.dtype) -> None:
    held_to_float64(case, *draw(case, device, dtype), 2.0**-22)  # a product of two halves is exact in float32


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("l", [1, 4, 1e6])
@pytest.mark.parametrize("case", ["linear, rows", "3x3", "stride 2", "groups", "many chunks", "one chunk"])
def test_step_of_a_layer(device: torch.device, case: str, l: float, dtype: torch.dtype) -> None:
    x, dy = draw(case, device, dtype)
    _, shape, options = CASES[case]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    exact, segments = weight.double(), torch.arange(len(x), device=device) % 2
    norms, stats = svag_weight_step_(weight, x, dy, segments=segments, l=l, backend="triton", **STEP, **options)
    exact_norms, exact_stats = step_by_two_ops(exact, x.double(), dy.double(), segments, l=l, **options)
    torch.testing.assert_close(norms, exact_norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.raw, exact_stats.raw, rtol=0, atol=1e-5 * float(exact_stats.raw[:4].max()))
    step = STEP["lr"] / l * (2 * l) ** 0.5 * float(exact_stats.raw[:2].max()) ** 0.5
    assert float((weight.double() - exact).abs().max()) <= 1e-5 * step + 2.0**-23 * float(exact.abs().max())


def test_twenty_runs_give_the_same_bits_on_any_stream(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs streams")
    for case in ("many chunks", "one chunk"):
        x, dy = draw(case, device)
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        segments = [i % 2 for i in range(len(x))]
        torch.cuda.synchronize()
        results = []
        for i in range(20):
            with torch.cuda.stream(streams[i % 3]):
                grad, norms, gram = weight_grad_and_sq_norms(
                    x, dy, CASES[case][1], segments=segments, backend="triton", **CASES[case][2]
                )
                assert gram is not None
                results.append([grad, norms, gram])
        torch.cuda.synchronize()
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tensors_on_another_device_than_the_current_one(device: torch.device) -> None:
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, dy = draw("3x3", torch.device("cuda:1"))
    held_to_float64("3x3", x, dy, TF32_EPS)
    assert torch.cuda.current_device() == 0


def test_auto_takes_triton_on_a_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter must be asked for")
    x, dy = draw("3x3", device)
    product = layer_product(x, dy, CASES["3x3"][1], padding=1)
    for op in ("weight_grad_and_sq_norms", "svag_weight_step_"):
        assert select(op, "auto", list(product[:2])) is select(op, "triton", list(product[:2]))


def test_norms_of_a_net_and_a_step_of_it(device: torch.device) -> None:
    """What a user runs: forward, backward with norms, and the optimizer, without a sign of the CPU's kernels."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 5),
    ).to(device)  # fmt: skip
    x, y = torch.randn(6, 3, 6, 6, device=device), torch.randint(0, 5, (6,), device=device)
    exact = []
    for i in range(6):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        exact.append(sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None))
    optimizer = SVAG(net.parameters(), 0.1, l=1)
    optimizer.zero_grad()
    with backend("triton" if device.type == "cpu" else "auto"), per_sample_sq_norms(net) as norms:
        torch.nn.functional.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(norms.total.double().cpu(), torch.tensor(exact).double(), rtol=5e-3, atol=0)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
