"""What the inner loop of a compiled kernel costs (SASS): its instructions against the tensor cores' cycles.

A multiprocessor of sm_80 issues an instruction for each of its four partitions a cycle, and a tensor core does 128 tf32
or 256 half-precision multiply-adds a cycle: NVIDIA's A100 whitepaper. A loop that issues longer than its tensor cores
work is bound by its issue slots.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from gpu_binary import tool

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
    skipped = max((to - place - 1 for place, to in jumps.items() if first <= place < to <= last), default=0)
    tensor = sum(_TENSOR[name] for name in inside if name.startswith("HMMA"))
    return Loop(len(inside) - skipped, skipped, tensor)
