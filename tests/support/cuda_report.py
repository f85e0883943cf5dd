"""What nvcc made of the CUDA kernels in the installed extension: registers, stack, shared memory, instructions.

python tests/support/cuda_report.py            the loops that move 128 bits, as docs/roofline.md shows them
python tests/support/cuda_report.py --write    write tests/golden/cuda.json again, after a change that is meant
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

from svag_fast import _C

GOLDEN = Path(__file__).parents[1] / "golden" / "cuda.json"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
WRITE = "python tests/support/cuda_report.py --write"

Report = dict[str, Any]

_USAGE = re.compile(
    r"Function (?P<name>\w+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)
_INSTRUCTION = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);")


def why_unavailable() -> str | None:
    """Why there is nothing to read here, or None."""
    if not hasattr(_C, "cuda_step"):
        return "svag_fast was built without CUDA"
    return None if _cuobjdump() else "cuobjdump is neither on the PATH nor in the triton package"


def nvcc_version() -> str:
    """Return nvcc's version, such as "13.0.88"."""
    if shutil.which("nvcc") is None:
        return "unknown"
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (spec.submodule_search_locations or [])] if spec else []
    found = (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists())
    return shutil.which("cuobjdump") or next(found, None)


def _dump(*options: str) -> str:
    command = [str(_cuobjdump()), *options, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_extension() -> dict[str, dict[str, Report]]:
    """Return the report of every kernel, such as "step_kernel<76>", on every architecture, such as "sm_80".

    What is spilled goes to the stack: without a stack frame nothing is.
    """
    table: dict[str, dict[str, Report]] = {}
    for arch in ARCHS:
        sass = _dump("-arch", arch, "-sass")
        listings = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
        for usage in _USAGE.finditer(_dump("-arch", arch, "-res-usage")):
            code = [
                (int(i["address"], 16), i["opcode"], i["rest"]) for i in _INSTRUCTION.finditer(listings[usage["name"]])
            ]
            at = [address for address, _, _ in code]
            loops = [
                Counter(op for _, op, _ in code[bisect_left(at, first) : bisect_right(at, last)])
                for first, last in _loops(code)
            ]
            numbers = {key: int(value) for key, value in usage.groupdict().items() if key != "name"}
            table.setdefault(_plain_name(usage["name"]), {})[arch] = numbers | {"loops": loops}
    return table


def _plain_name(mangled: str) -> str:
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+(?:<[^(]*>)?)\(", plain.replace("(anonymous namespace)::", ""))
    return found[1] if found else mangled


def _loops(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return the innermost loops as address ranges: a branch back that spans no other branch back."""
    spans = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    return [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]


def write_golden() -> None:
    """Write registers and shared memory of every kernel; from sm_90 on the system's own 1 KB counts in."""
    table = {
        kernel: {arch: {key: report[key] for key in ("registers", "shared")} for arch, report in sorted(archs.items())}
        for kernel, archs in sorted(read_extension().items())
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"nvcc": nvcc_version(), "kernels": table}, indent=2) + "\n")


_CLASSES = {
    "128-bit load": r"LDG.*\.128",
    "other load": r"LD[GCS](?!.*\.128)|LDGSTS",
    "128-bit store": r"STG.*\.128",
    "other store": r"ST[GS](?!.*\.128)",
    "FMA": r"FFMA",
    "add, mul": r"FADD|FMUL",
    "float64": r"D(FMA|ADD|MUL|SETP)",
    "select, compare": r"FSEL|FSETP|ISETP|SEL|PLOP3|UISETP|FMNMX",
    "integer, move": r"IMAD|IADD|LEA|MOV|LOP3|SHF|UMOV|UIADD|UIMAD|ULEA|PRMT|VIADD|R2UR|CS2R",
    "shuffle": r"SHFL",
    "branch, barrier": r"BRA|BSSY|BSYNC|EXIT|BAR|WARPSYNC|BREAK|YIELD|NOP",
}


def instruction_mix(loop: dict[str, int]) -> dict[str, int]:
    """Return the number of instructions of each class."""
    mix: Counter[str] = Counter()
    for opcode, count in loop.items():
        mix[next((name for name, pattern in _CLASSES.items() if re.match(pattern, opcode)), "other")] += count
    return {name: mix[name] for name in [*_CLASSES, "other"] if mix[name]}


def main() -> None:
    """Print the instruction mix, or write the golden file."""
    if reason := why_unavailable():
        raise SystemExit(reason)
    if sys.argv[1:] == ["--write"]:
        write_golden()
        return
    print("| kernel | architecture | instructions | of these |\n| --- | --- | --- | --- |")
    for kernel, archs in read_extension().items():
        for arch, report in archs.items():
            for loop in report["loops"]:
                mix = instruction_mix(loop)
                if "128-bit load" in mix and not {"float64", "other load", "other store"} & mix.keys():
                    shown = ", ".join(f"{count} {name}" for name, count in mix.items())
                    print(f"| {kernel} | {arch} | {sum(loop.values())} | {shown} |")


if __name__ == "__main__":
    main()
