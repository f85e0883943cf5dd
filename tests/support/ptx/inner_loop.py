"""What the inner loop of a compiled kernel costs (SASS): its instructions against the tensor cores' cycles.

A multiprocessor of sm_80 issues an instruction for each of its four partitions a cycle, and a tensor core does 128 tf32
or 256 half-precision multiply-adds a cycle: NVIDIA's A100 whitepaper. A loop that issues longer than its tensor cores
work is bound by its issue slots.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from gpu_binary import tool

_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TENSOR = {"HMMA.1688.F32.TF32": 8, "HMMA.16816.F32": 8, "HMMA.16816.F32.BF16": 8}  # cycles of one partition


@dataclass(frozen=True)
class Loop:
    """Instructions of one warp's turn by name, and its tensor core's cycles."""

    instructions: Counter[str]
    tensor: int

    @property
    def issued(self) -> int:
        return self.instructions.total()


def inner_loop(cubin: bytes) -> Loop:
    """Return the shortest loop that holds tensor core instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.search(line):
            lines.append((found[1], found[2]))
    loops = []
    for end, (name, rest) in enumerate(lines):
        target = re.search(r"L_x_\d+", rest)
        if name.startswith("BRA") and target and labels.get(target[0], end + 1) <= end:
            loops.append([name for name, _ in lines[labels[target[0]] : end + 1]])
    inner = min((loop for loop in loops if any(name.startswith("HMMA") for name in loop)), key=len)
    return Loop(Counter(inner), sum(_TENSOR[name] for name in inner if name.startswith("HMMA")))
