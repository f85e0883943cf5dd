"""docs/roofline.md's tables of whole steps are what bench/roofline.py says, and its bytes are an op's operands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from roofline import GPUS, Ops, steps_of_a_run, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "roofline.md"


@pytest.mark.parametrize(
    ("net", "norms", "launches"),
    [("preresnet32-gn", False, 298), ("preresnet32-gn", True, 301), ("preresnet32-bn", False, 484)],
)
def test_the_document_has_the_table_as_it_is(net: str, norms: bool, launches: int) -> None:
    lines = table(net, (64, 1024), 64, norms=norms, launches=launches)
    assert "\n".join(lines) in DOCUMENT.read_text(), "python bench/roofline.py:\n" + "\n".join(lines)


def test_an_op_moves_its_operands_and_results_once() -> None:
    x, w = torch.empty(8, 3, 6, 6, device="meta"), torch.empty(4, 3, 3, 3, device="meta", requires_grad=True)
    with Ops() as ops:
        torch.nn.functional.conv2d(x, w).view(-1).sum().backward()
    moved = {name: bytes_ for name, bytes_, _ in ops.found}
    operations = {name: count for name, _, count in ops.found}
    y = 8 * 4 * 4 * 4
    assert moved["convolution"] == 4 * (x.numel() + w.numel() + y)
    assert operations["convolution"] == 2 * y * 27
    assert moved["convolution_backward"] == 4 * (y + x.numel() + 2 * w.numel())
    assert "view" not in moved


def test_a_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ops, gpu = Ops(), GPUS[0]
    ops.found += [
        ("memory", int(gpu.bandwidth), 0),
        ("arithmetic", 0, int(2 * gpu.tf32)),
        ("both", int(gpu.bandwidth), 1),
    ]
    assert ops.seconds(gpu) == pytest.approx(4)


def test_a_run_has_l_times_the_steps() -> None:
    assert steps_of_a_run(64, 64) == 300 * 781 * 64
