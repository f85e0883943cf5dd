"""A SASS budget: the instructions of the weight gradient's inner loop against its tensor cores' cycles, by layer.

The bound is the most that this version of Triton needed before, as for the registers: tests/golden/inner_loop.json.
"""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter Triton compiles nothing", allow_module_level=True)

import triton
from gpu_binary import report
from gpu_cases import products
from ptx.driver import Launch, as_a_gpu
from ptx.inner_loop import GOLDEN, LAYERS, inner_loop, memory, tile

from svag_fast.kernels import weight_grad as kernels
from svag_fast.ops.weight_grad.shapes import layer_product
from svag_fast.ops.weight_grad.triton import direct

SHORT = ("16-16, 32x32", "32-32, 16x16", "64-64, 8x8", "512-512, 4x4")


def compiled(name: str, last: bool, precision: str) -> Launch:
    """The launch of a layer's products, which few positions on many channels would get in another way."""
    channels, out, size, stride = LAYERS[name]
    k = 1 if "1x1" in name else 3
    x, dy = torch.zeros(16, channels, size, size), torch.zeros(16, out, size // stride, size // stride)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return without_spills(x, dy, [out, channels, k, k], stride, precision)


def without_spills(
    x: torch.Tensor, dy: torch.Tensor, shape: list[int], stride: int, precision: str, architecture: int = 80
) -> Launch:
    launches: list[Launch] = []
    with as_a_gpu(launches.append, architecture), products(precision):
        direct(layer_product(x, dy, shape, segments=[0, 1] * 8, padding=shape[2] // 2, stride=stride))
    assert report(launches[0].cubin, launches[0].shared)["spills"] == 0
    return launches[0]


# Channels in and out, kernel, height. Rows of 31 or 15 begin at any element: each is an address of its own.
NARROW = {
    "3-64, 32x32": (3, 64, 3, 32),
    "16-16, 31x31": (16, 16, 3, 31),
    "32-64, 1x1, 15x15": (32, 64, 1, 15),
    "5-32, 31x31": (5, 32, 3, 31),
    "7-16, 31x31": (7, 16, 3, 31),
    "3-64, 31x31": (3, 64, 3, 31),
}


@pytest.mark.parametrize(
    ("name", "dtype", "architecture"),
    [
        pytest.param(n, d, a, marks=() if (n, d, a) == ("3-64, 32x32", torch.float32, 90) else pytest.mark.nightly)
        for n in NARROW
        for d in (torch.float32, torch.bfloat16)
        for a in (80, 90)
    ],
)
def test_contiguous_images_of_narrow_rows_do_not_spill(name: str, dtype: torch.dtype, architecture: int) -> None:
    channels, out, k, size = NARROW[name]
    x, dy = torch.zeros(16, channels, size, size, dtype=dtype), torch.zeros(16, out, size, size, dtype=dtype)
    without_spills(x, dy, [out, channels, k, k], 1, "tf32", architecture)


@pytest.mark.nightly
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_full_float32_does_not_spill(name: str, last: bool) -> None:
    compiled(name, last, "ieee")


@pytest.mark.parametrize(
    ("name", "last"),
    [
        pytest.param(n, last, marks=() if n in SHORT and last else pytest.mark.nightly)
        for n in LAYERS
        for last in (True, False)
    ],
)
def test_the_inner_loop_keeps_its_budget(name: str, last: bool) -> None:
    launch = compiled(name, last, "tf32")
    loop = inner_loop(launch.cubin)
    found = {"turn": loop.turn, "sample's end": loop.sample_end, "tensor core cycles of a turn": loop.tensor}
    found["registers"], found["shared"] = report(launch.cubin, launch.shared)["registers"], launch.shared
    key = f"{name}, {'channels_last' if last else 'contiguous'}"
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("SVAG_REGENERATE_GOLDEN") == "1":
        golden.setdefault(triton.__version__, {})[key] = found
        lines = (
            f"  {json.dumps(v)}: {{\n"
            + ",\n".join(f"    {json.dumps(k)}: {json.dumps(line)}" for k, line in sorted(layers.items()))
            + "\n  }"
            for v, layers in sorted(golden.items())
        )
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    if triton.__version__ not in golden:
        pytest.skip(f"{GOLDEN.name} has Triton {', '.join(golden)}: record it with SVAG_REGENERATE_GOLDEN=1")
    check_budget(key, found, golden[triton.__version__][key])


def check_budget(key: str, found: dict[str, int], before: dict[str, int]) -> None:
    assert found["tensor core cycles of a turn"] == before["tensor core cycles of a turn"], "another tile: look again"
    for what in before:
        assert found[what] <= before[what], f"{key}, {what}: {found[what]}, {before[what]} before"


def test_an_instruction_more_is_seen() -> None:
    for layers in json.loads(GOLDEN.read_text()).values():
        for key, line in layers.items():
            check_budget(key, line, line)
            for what in line:
                with pytest.raises(AssertionError):
                    check_budget(key, {**line, what: line[what] + 1}, line)


def test_another_tile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if triton.__version__ not in json.loads(GOLDEN.read_text()):
        pytest.skip(f"{GOLDEN.name} has no Triton {triton.__version__}")
    monkeypatch.setenv("SVAG_REGENERATE_GOLDEN", "0")
    real = kernels.tile_of
    monkeypatch.setattr(
        kernels, "tile_of", lambda *a, **k: dataclasses.replace(real(*a, **k), ROWS=real(*a, **k).ROWS // 2)
    )
    with pytest.raises(AssertionError, match="another tile"):
        test_the_inner_loop_keeps_its_budget("16-16, 32x32", True)


@pytest.mark.parametrize("version", json.loads(GOLDEN.read_text()))
def test_the_aim_is_held_where_issue_slots_could_bound(version: str) -> None:
    """At most 1.2 issue cycles a tensor core cycle of a turn, unless memory takes longer, or a sample is one turn."""
    for key, line in json.loads(GOLDEN.read_text())[version].items():
        name = key.rpartition(", ")[0]
        share = line["turn"] / line["tensor core cycles of a turn"]
        cut = tile(name)
        one_turn = cut.ROWS * cut.COLUMNS <= 16
        assert share <= (1.45 if one_turn else max(1.2, memory(name))), key
