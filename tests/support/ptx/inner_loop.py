"""What the inner loop of a compiled kernel costs (SASS): its instructions against the tensor cores' cycles.

A multiprocessor of sm_80 issues an instruction for each of its four partitions a cycle, and a tensor core does 128 tf32
or 256 half-precision multiply-adds a cycle: NVIDIA's A100 whitepaper. A loop that issues longer than its tensor cores
work is bound by its issue slots.

PYTHONPATH=tests/support python tests/support/ptx/inner_loop.py VERSION     the table of docs/roofline.md, of a Triton
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_binary import tool

if TYPE_CHECKING:
    from svag_fast.kernels.weight_grad import Tile

GOLDEN = Path(__file__).parents[2] / "golden" / "inner_loop.json"
# The layers of PreResNet-32 and VGG-16: channels in and out, height, stride; 3x3, or 1x1 where the name says so.
LAYERS = {
    "3-16, 32x32": (3, 16, 32, 1),
    "16-16, 32x32": (16, 16, 32, 1),
    "16-16, 1x1, 32x32": (16, 16, 32, 1),
    "16-32, 32x32, stride 2": (16, 32, 32, 2),
    "16-32, 1x1, 32x32, stride 2": (16, 32, 32, 2),
    "32-32, 16x16": (32, 32, 16, 1),
    "32-64, 16x16, stride 2": (32, 64, 16, 2),
    "32-64, 1x1, 16x16, stride 2": (32, 64, 16, 2),
    "64-64, 8x8": (64, 64, 8, 1),
    "3-64, 32x32": (3, 64, 32, 1),
    "64-64, 32x32": (64, 64, 32, 1),
    "64-128, 16x16": (64, 128, 16, 1),
    "128-128, 16x16": (128, 128, 16, 1),
    "128-256, 8x8": (128, 256, 8, 1),
    "256-256, 8x8": (256, 256, 8, 1),
    "256-512, 4x4": (256, 512, 4, 1),
    "512-512, 4x4": (512, 512, 4, 1),
    "512-512, 2x2": (512, 512, 2, 1),
}

_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TENSOR = {"HMMA.1688.F32.TF32": 8, "HMMA.16816.F32": 8, "HMMA.16816.F32.BF16": 8}  # cycles of one partition


@dataclass(frozen=True)
class Loop:
    """What a warp issues in a turn, and besides at a sample's end; and its tensor core's cycles in a turn."""

    turn: int
    sample_end: int
    tensor: int


def inner_loop(cubin: bytes) -> Loop:
    """Return the shortest loop that holds tensor core instructions; what a branch in it skips is the sample's end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    names: list[str] = []
    targets: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.search(line):
            if found[1].startswith("BRA") and (target := re.search(r"L_x_\d+", found[2])):
                targets[len(names)] = target[0]
            names.append(found[1])
    jumps = {place: labels[name] for place, name in targets.items()}
    loops = [(start, end) for end, start in jumps.items() if start <= end]
    first, last = min(
        (loop for loop in loops if any(n.startswith("HMMA") for n in names[loop[0] : loop[1] + 1])),
        key=lambda loop: loop[1] - loop[0],
    )
    inside = names[first : last + 1]
    skipped = max(to - place - 1 for place, to in jumps.items() if first <= place < to <= last)
    tensor = sum(_TENSOR[name] for name in inside if name.startswith("HMMA"))
    return Loop(len(inside) - skipped, skipped, tensor)


def a_warps_cycles(name: str) -> float:
    """The least tensor core cycles of a sample's products: 128 multiply-adds each."""
    channels, out, size, stride = LAYERS[name]
    return channels * out * (1 if "1x1" in name else 9) * (size // stride) ** 2 / 128


def memory(name: str) -> float:
    """The A100's time for a sample's bytes over its time for the products, by its datasheet (docs/roofline.md)."""
    channels, out, size, stride = LAYERS[name]
    inputs = size // stride if "1x1" in name else size
    moved = 4 * (channels * inputs**2 + out * (size // stride) ** 2)
    return moved / 2039e9 / (128 * a_warps_cycles(name) / 78e12)


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """How many warps fit an A100's multiprocessor: 65,536 registers, 164 KiB, of which each program costs one."""
    tiles = min(65536 // (math.ceil(registers / 8) * 8 * 32 * warps), 164 * 1024 // (shared + 1024))
    return tiles * warps


def tile(name: str) -> Tile:
    from svag_fast.kernels.weight_grad import Convolution, tile_of

    channels, out, size, stride = LAYERS[name]
    k = 1 if "1x1" in name else 3
    convolution = Convolution(stride=(stride, stride), padding=(k // 2, k // 2))
    image = (size, size // stride, size // stride)
    return tile_of((out, channels, k, k), image, convolution, exact=False)


def table(version: str) -> list[str]:
    """Issue cycles over the least tensor core cycles, of a turn and a sample, and warps, in both memory formats."""
    golden, lines = json.loads(GOLDEN.read_text())[version], []
    for name, (channels, out, size, stride) in LAYERS.items():
        cells, image, cut = [], size // stride, tile(name)
        for last in (True, False):
            line = golden[f"{name}, {'channels_last' if last else 'contiguous'}"]
            turns = math.ceil(image / cut.ROWS) * math.ceil(image / cut.COLUMNS)
            turn, tensor = line["turn"], line["tensor core cycles of a turn"]
            issued = turns * turn + line["sample's end"]
            issued *= cut.count(out, channels * (1 if "1x1" in name else 9)) * cut.warps
            warps = resident_warps(line["registers"], line["shared"], cut.warps)
            cells.append(f"{turn / tensor:.2f}; {issued / a_warps_cycles(name):.2f}; {warps}")
        lines.append(f"| {name} | {' | '.join(cells)} | {memory(name):.1f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(sys.argv[1])))
