"""What a compiled GPU kernel costs, read off its cubin with the tools that Triton's package carries."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = (80, 90, 100, 120)

Report = dict[str, int]


def tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm."""
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def report(cubin: bytes) -> Report:
    """Return registers, stack, shared memory, local loads and stores, and the wide global accesses of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = run(tool("cuobjdump"), "-res-usage"), run(tool("nvdisasm"), "-c")
    numbers = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "SHARED")}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": numbers["SHARED"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", sass)),
        "wide stores": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128", sass)),
    }


def held_to_golden(file: str, found: dict[str, Report], regenerate: bool) -> None:
    """Fail where a kernel needs more registers or shared memory than its golden line allows, or has none."""
    path = GOLDEN / file
    if regenerate:
        path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        return
    golden: dict[str, Report] = json.loads(path.read_text())
    assert golden.keys() == found.keys(), f"{path.name} speaks of other kernels: rerun with SVAG_REGENERATE_GOLDEN=1"
    for name, line in found.items():
        for what in ("registers", "shared"):
            assert line[what] <= golden[name][what], (
                f"{name} now needs {line[what]} {what}, {golden[name][what]} before: "
                "mend it, or accept it with SVAG_REGENERATE_GOLDEN=1 and say why"
            )
