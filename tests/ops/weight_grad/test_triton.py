"""The GPU's second way to norms, on the CPU, against the loop; and which way the rule takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import CONVOLUTION, LINEAR, loop, make

from svag_fast.ops.weight_grad.shapes import layer_product
from svag_fast.ops.weight_grad.triton import choose, library

CASES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    **{f"linear, {name}": (*case, {}) for name, case in LINEAR.items() if name[:3] != "no "},
    **{name: case for name, case in CONVOLUTION.items() if name != "no samples"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_way_beside_the_library_equals_the_loop(case: str, segments: bool) -> None:
    input_shape, shape, options = CASES[case]
    x, dy = make(input_shape, shape, dtype=torch.float32, **options)
    B = len(x)
    weights = torch.linspace(-1.5, 2.0, B)
    members = torch.arange(B) % 2 if segments else None
    each = loop(x.double(), dy.double(), shape, **options).flatten(1)
    grad, sq_norms, gram = library(layer_product(x, dy, shape, weights, members, **options))
    weighted = weights.double()[:, None] * each
    scale = float(weighted.norm(dim=1).sum())
    assert float((grad.double().flatten() - weighted.sum(0)).norm()) <= 1e-6 * scale
    torch.testing.assert_close(sq_norms, each.square().sum(1), rtol=1e-5, atol=1e-6 * scale**2)
    if members is not None:
        sums = torch.stack([weighted[members == s].sum(0) for s in range(int(members.max()) + 1)])
        assert float((gram - sums @ sums.T).norm()) <= 4e-6 * scale**2


def test_the_gradient_has_the_inputs_memory_order() -> None:
    x, dy = make([4, 16, 8, 8], [16, 16, 3, 3], dtype=torch.float32, padding=1)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    grad, _, _ = library(layer_product(x, dy, [16, 16, 3, 3], padding=1))
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(
    ("weight_shape", "positions", "expected"),
    [
        ([1024, 1024], 1, "library"),  # 15 of a tile's 16 positions would be padding
        ([512, 512, 3, 3], 4, "library"),
        ([512, 512, 3, 3], 16, "direct"),
        ([64, 64, 3, 3], 64, "direct"),
        ([16, 16, 3, 3], 1024, "direct"),  # T² would be a hundred times the gradient
        ([512, 512], 64, "direct"),
        ([10, 32], 1, "direct"),  # too little to pay for launches
    ],
)
def test_which_way_serves_a_layer_at_128_samples(
    weight_shape: list[int], positions: int, expected: str, tf32: bool
) -> None:
    assert choose(weight_shape, 128, positions, tf32=tf32) == expected


def test_every_further_segment_costs_the_library_a_product() -> None:
    assert choose([512, 512, 3, 3], 128, 4, segments=2) == "library"
    assert choose([512, 512, 3, 3], 128, 4, segments=4) == "direct"
