"""What a compiled GPU kernel costs, read off its cubin with the tools that Triton's package carries."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "triton.json"
# A dozen kernels take 7 s of CPU for one. tests/ptx compiles for 80 and runs it, and looks for spills there too.
ARCHITECTURES = (90, *(pytest.param(other, marks=pytest.mark.nightly) for other in (80, 100, 120)))
_KEPT = ("registers", "shared")

Report = dict[str, int]


def tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm."""
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def report(cubin: bytes, shared: int) -> Report:
    """Return registers, stack, shared memory, local loads and stores, and the wide global accesses of one kernel.

    ``shared``: bytes, as Triton reports them, which asks for them at launch: the cubin does not know.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = run(tool("cuobjdump"), "-res-usage"), run(tool("nvdisasm"), "-c", "-ndf")
    numbers = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK")}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", sass)),
        "wide stores": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128", sass)),
    }


def check_golden(found: dict[str, Report], version: str, regenerate: bool) -> None:
    """Fail where a kernel needs more registers or shared memory than this version of Triton gave it before.

    Skips where the golden file has no line of that version: what it makes of the kernels was never looked at.
    """
    golden: dict[str, dict[str, Report]] = json.loads(GOLDEN.read_text())
    architectures = tuple({name.rpartition(", ")[2] for name in found})
    if regenerate:
        others = {name: line for name, line in golden.get(version, {}).items() if not name.endswith(architectures)}
        golden[version] = others | {name: {key: line[key] for key in _KEPT} for name, line in found.items()}
        GOLDEN.write_text(_one_kernel_a_line(golden))
        return
    if version not in golden:
        pytest.skip(
            f"{GOLDEN.name} has Triton {', '.join(golden)}, not {version}: registers and shared memory are not held. "
            "Record them with SVAG_REGENERATE_GOLDEN=1"
        )
    before = {name: line for name, line in golden[version].items() if name.endswith(architectures)}
    assert before.keys() == found.keys(), f"{GOLDEN.name} speaks of other kernels: rerun with SVAG_REGENERATE_GOLDEN=1"
    for name, line in found.items():
        for what in _KEPT:
            assert line[what] <= before[name][what], (
                f"{name} now needs {line[what]} {what}, {before[name][what]} before: "
                "mend it, or accept it with SVAG_REGENERATE_GOLDEN=1 and say why"
            )


def _one_kernel_a_line(golden: dict[str, dict[str, Report]]) -> str:
    blocks = (
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(line)}" for name, line in sorted(kernels.items()))
        + "\n  }"
        for version, kernels in sorted(golden.items())
    )
    return "{\n" + ",\n".join(blocks) + "\n}\n"
