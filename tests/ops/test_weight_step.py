"""svag_weight_step_ against the product of each batch followed by the fused step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import close, same_bits
from layer_cases import CONVOLUTION, LINEAR, STEP, make, step_by_two_ops
from simd import torch_threads

from svag_fast.ops import svag_weight_step_, weight_grad_and_sq_norms, weight_step
from svag_fast.ops.backends import BackendError

BACKENDS = ["reference", "cpu"]
CASES = {**{f"linear, {name}": (*case, {}) for name, case in LINEAR.items()}, **CONVOLUTION}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("l", [1, 4, 1e6])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case[0][0] >= 2])
def test_one_pass_equals_the_two_ops(case: str, backend: str, l: float) -> None:
    input_shape, shape, options = CASES[case]
    for memory_format in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (None,):
        x, dy = make(input_shape, shape, **options)
        weight = torch.randn(shape, dtype=torch.float64)
        if memory_format is not None:
            x, dy, weight = (t.contiguous(memory_format=memory_format) for t in (x, dy, weight))
        segments = torch.arange(len(x)) % 2
        expected = weight.clone()
        norms, stats = step_by_two_ops(expected, x, dy, segments, l=l, **options)
        ours, our_stats = svag_weight_step_(weight, x, dy, segments=segments, l=l, backend=backend, **STEP, **options)
        close(weight, expected, 1e-12)
        close(ours, norms, 1e-12)
        close(our_stats.raw, stats.raw, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_is_sgd(backend: str) -> None:
    x, dy = make([6, 5, 7, 7], [9, 5, 3, 3], padding=1)
    weight = torch.randn([9, 5, 3, 3], dtype=torch.float64)
    grad = weight_grad_and_sq_norms(x, dy, [9, 5, 3, 3], padding=1, backend="reference").grad / 6
    expected = weight - STEP["lr"] * (grad + STEP["weight_decay"] * weight)
    _, stats = svag_weight_step_(weight, x, dy, segments=[0] * 6, l=1, padding=1, backend=backend, **STEP)
    close(weight, expected, 1e-13)
    close(stats.sq_norm1, grad.square().sum(), 1e-13)
    assert stats.inner is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_l_1_an_inf_of_the_second_batch_never_reaches_the_weight(backend: str) -> None:
    x, dy = make([4, 5, 7, 7], [9, 5, 3, 3], padding=1)
    dy[3, 2, 2, 2] = float("inf")
    weight = torch.randn([9, 5, 3, 3], dtype=torch.float64)
    _, stats = svag_weight_step_(weight, x, dy, segments=[0, 0, 1, 1], l=1, padding=1, backend=backend, **STEP)
    assert bool(weight.isfinite().all())
    assert not bool(stats.finite)


def test_same_bits_for_any_number_of_threads() -> None:
    for shape in ([40, 33, 3, 3], [256, 200, 3, 3]):
        x, dy = make([12, shape[1], 5, 5], shape, padding=1, dtype=torch.float32)
        start = torch.randn(shape)
        results = []
        for threads in (1, 2, 3):
            weight = start.clone()
            with torch_threads(threads):
                norms, stats = svag_weight_step_(
                    weight, x, dy, segments=torch.arange(12) % 2, l=4, padding=1, backend="cpu", **STEP
                )
            results.append((weight, norms, stats.raw))
        assert same_bits(*results)


X, DY, WEIGHT = torch.randn(4, 4, 6, 6), torch.randn(4, 8, 6, 6), torch.randn(8, 4, 3, 3)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "weight not a tensor": (TypeError, "weight must be a tensor, got a list", {"weight": [1.0]}),
    "weight's dtype": (TypeError, r"weight must be torch\.float32, in which gradients", {"weight": WEIGHT.double()}),
    "integer weight": (TypeError, r"weight must be one of torch\.float32,", {"weight": WEIGHT.long()}),
    "weight with repeated elements": (ValueError, "weight .* repeated", {"weight": WEIGHT[:1].expand(8, 4, 3, 3)}),
    "weight's device": (ValueError, "weight must be on cpu, as inputs is, got one", {"weight": WEIGHT.to("meta")}),
    "weight's shape": (ValueError, "inputs must be of 3 channels", {"weight": WEIGHT[:, :3].contiguous()}),
    "no second batch": (ValueError, "segments must be 1 for some sample, since a step", {"segments": [0, 0, 0, 0]}),
    "no first batch": (ValueError, "segments must be 0 for some sample, the first", {"segments": [1, 1, 1, 1]}),
    "three batches": (ValueError, r"segments must be 0 \(first batch\) or 1 \(second", {"segments": [0, 1, 2, 0]}),
    "segments missing": (ValueError, "segments", {"segments": None}),
    "output grads": (ValueError, r"output_grads must be of shape \[4, 8, 4, 4\] for inputs \[4, 4,", {"padding": 0}),
    "backend": (BackendError, "backend must be one of auto, cuda, triton, cpu, reference, got", {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str) -> None:
    error, message, change = BAD[case]
    weight = WEIGHT.clone()
    arguments = {
        "weight": weight, "inputs": X, "output_grads": DY, "segments": [0, 0, 1, 1], "lr": 0.1, "l": 2, "padding": 1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        svag_weight_step_(**{**arguments, **change})
    assert torch.equal(weight, WEIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x, dy = make([4, 6, 8, 8], [5, 6, 3, 3])
    weight = torch.randn(5, 6, 3, 3, dtype=torch.float64)
    segments = torch.tensor([0, 1, 0, 1])
    arguments = (weight, x, dy, segments, 2, 0.1, 4.0, 0.1, [1, 1], [0, 0], [1, 1], 1, backend)
    torch.library.opcheck(weight_step._op, arguments)
