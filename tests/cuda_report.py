"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, and the instructions of the SASS.

python tests/cuda_report.py            the instruction mix of the float32 loops, as docs/roofline.md shows it
python tests/cuda_report.py --write    write tests/golden/cuda.json anew, after a change that is meant
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
GOLDEN = ROOT / "tests" / "golden" / "cuda.json"
ARCHS = (80, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3")  # as in setup.py
WRITE = "python tests/cuda_report.py --write"

Report = dict[str, Any]

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);")


def why_unavailable() -> str | None:
    """Why the kernels can't be compiled and read here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return None if _cuobjdump() else "cuobjdump is neither on the PATH nor in the triton package"


def nvcc_version() -> str:
    """Return nvcc's version, such as "13.0.88"."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (spec.submodule_search_locations or [])] if spec else []
    found = (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists())
    return shutil.which("cuobjdump") or next(found, None)


def sources() -> list[Path]:
    """Return the .cu files that hold kernels."""
    return [p for p in sorted((CSRC / "cuda").glob("*.cu")) if "__global__" in p.read_text()]


def digest() -> str:
    """Return a hash of all that a report depends on."""
    files = [*sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").iterdir())]
    parts = [nvcc_version().encode(), repr((ARCHS, FLAGS)).encode(), Path(__file__).read_bytes()]
    return hashlib.sha256(b"".join(parts + [p.read_bytes() for p in files])).hexdigest()[:16]


def compile_source(text: str, arch: int) -> dict[str, Report]:
    """Compile one source for one architecture; return a report for each kernel, by its name such as "step<76>"."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(text)
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, f"-I{CSRC}", target, "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr)
        sass = subprocess.run([str(_cuobjdump()), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    listings = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", sass.stdout, re.DOTALL))
    reports = {}
    for entry in _ENTRY.finditer(result.stderr):
        numbers = {key: int(value or 0) for key, value in entry.groupdict().items() if key != "name"}
        code = [(int(i["address"], 16), i["opcode"], i["rest"]) for i in _INSTRUCTION.finditer(listings[entry["name"]])]
        reports[_plain_name(entry["name"])] = numbers | {
            "opcodes": Counter(opcode for _, opcode, _ in code),
            "loops": [Counter(opcode for a, opcode, _ in code if first <= a <= last) for first, last in _loops(code)],
        }
    return reports


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


def compile_all(archs: Sequence[int] = ARCHS) -> dict[str, dict[str, Report]]:
    """Return the report of every kernel on every architecture: kernel, then "sm_80" and so on."""
    jobs = [(path, arch) for path in sources() for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_source(job[0].read_text(), job[1]), jobs))
    table: dict[str, dict[str, Report]] = {}
    for (_, arch), reports in zip(jobs, results, strict=True):
        for kernel, report in reports.items():
            table.setdefault(kernel, {})[f"sm_{arch}"] = report
    return table


def cached(cache: Path, archs: Sequence[int]) -> dict[str, dict[str, Report]]:
    """Return :func:`compile_all`, from ``cache`` if nothing has changed."""
    path = cache / f"{digest()}-{'-'.join(map(str, archs))}.json"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(compile_all(archs)))
        partial.rename(path)
    table: dict[str, dict[str, Report]] = json.loads(path.read_text())
    return table


def float32_only(text: str) -> str:
    """Return step.cu with the case of float32 params and gradients alone, to read that path's instructions."""
    return re.sub(r"^ +SVAG_CASE\((?!float, float, float,).*\n", "", text, flags=re.MULTILINE)


def write_golden() -> None:
    """Write registers and shared memory of every kernel."""
    table = {
        kernel: {arch: {key: report[key] for key in ("registers", "shared")} for arch, report in sorted(archs.items())}
        for kernel, archs in sorted(compile_all().items())
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
    print("| kernel | loop of float32 packs | instructions | of these |\n| --- | --- | --- | --- |")
    for path in sources():
        text = float32_only(path.read_text()) if path.stem == "step" else path.read_text()
        for arch in ARCHS:
            for kernel, report in compile_source(text, arch).items():
                for loop in report["loops"]:
                    mix = instruction_mix(loop)
                    if "128-bit load" in mix:
                        shown = ", ".join(f"{count} {name}" for name, count in mix.items())
                        print(f"| {kernel} | sm_{arch} | {sum(loop.values())} | {shown} |")


if __name__ == "__main__":
    main()
