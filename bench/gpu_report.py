"""`make gpu-report`: all that can be known of the kernels on this machine's GPU, in one report, in under 9 minutes.

python bench/gpu_report.py            with the Python whose torch sees the GPU; it installs nothing into it
python bench/gpu_report.py --dry      on a CPU: the same sections; what needs a GPU says "skipped: no GPU"

Builds svag_fast into build/gpu-report/, runs each section in a process with a time limit, and writes
gpu-NAME-DATE.md and .json after each. A section that fails is written down with its reason, the others run all the
same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-report"
SITE = WORK / "site"
BUDGET_S = 530.0
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Small, and of the CUDA kernels: a sanitizer slows every launch down.
SANITIZED = "(cuda or per_sample) and not twenty and not graph and not waits and not another_device and not 65536"
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes of memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory's peak, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active, %",
    "launch__registers_per_thread": "registers",
}
NCU_OPTIONS = ["--clock-control", "none", "--csv", "-k", "regex:step_kernel|weight_grad_kernel|finish_kernel"]
NCU_OPTIONS += ["--metrics", ",".join(METRICS)]


@dataclass
class Result:
    """What a section came to; ``status`` is "passed", or "failed: ..." or "skipped: ..." with the reason."""

    name: str
    status: str
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A command with its time limit, and how its output is read."""

    name: str
    command: list[str]
    limit_s: float
    needs_gpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[Result, str, int], None] = lambda result, output, code: None


def run(section: Section, *, gpu: bool, left_s: float) -> Result:
    """Run a section within its limit and what is left of the budget."""
    if section.needs_gpu and not gpu:
        return Result(section.name, "skipped: no GPU")
    program = section.command[0]
    if shutil.which(program) is None:
        return Result(section.name, f"skipped: {program} is not on the PATH")
    limit = min(section.limit_s, left_s)
    if limit < 5:
        return Result(section.name, f"failed: no time left of {BUDGET_S:.0f} s")
    WORK.mkdir(parents=True, exist_ok=True)
    paths = [str(SITE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | section.environment
    log = WORK / f"{re.sub('[^a-z]+', '-', section.name)}.log"
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            # In SITE `python -m pytest` finds the package that was built, not the checkout's.
            section.command,
            cwd=SITE if SITE.exists() else ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output = log.read_text(errors="replace")
    result = Result(section.name, "passed", round(time.monotonic() - start, 1), _last(output))
    if code is None:
        result.status = f"failed: not done after {limit:.0f} s"
    elif code != 0:
        result.status = f"failed: exit status {code}"
    section.read(result, output, -1 if code is None else code)
    return result


def _last(output: str, count: int = 12) -> list[str]:
    return [line.rstrip()[:300] for line in output.splitlines() if line.strip()][-count:]


def _read_tests(result: Result, output: str, code: int) -> None:
    """Keep the counts, the reasons of what was skipped, and each failure."""
    wanted = re.compile(
        r"^(SKIPPED|FAILED|ERROR)|^=*\s*\d+ (passed|failed|skipped|deselected)|^\d+ kernels|tested in this"
    )
    result.lines = [line[:300] for line in output.splitlines() if wanted.search(line)] or result.lines
    if code == 0 and not re.search(r"\d+ passed", output):
        result.status = "failed: no test passed" if "skipped" not in output else "skipped: every test was"


def _read_sanitizer(result: Result, output: str, code: int) -> None:
    if "Device not supported" in output:
        result.status = "skipped: compute-sanitizer says: Device not supported"
    elif code == 0 and not re.search(r"(ERROR|RACECHECK) SUMMARY: 0 ", output):
        result.status = "failed: compute-sanitizer printed no summary of 0 errors"
    result.lines = [line[:300] for line in output.splitlines() if line.startswith("=========")][-15:] or result.lines


def _read_bench(result: Result, output: str, code: int) -> None:
    path = WORK / "rows.json"
    result.rows = json.loads(path.read_text()) if path.exists() else []
    result.lines = [] if code == 0 else result.lines
    if code == 0 and not any("ms" in row for row in result.rows):
        result.status = "failed: no contender ran"


def _read_ncu(result: Result, output: str, code: int) -> None:
    if "==ERROR==" in output or code != 0:
        why = next((line for line in output.splitlines() if "==ERROR==" in line), result.status)
        result.status = f"skipped: ncu does not run here ({why.replace('==ERROR==', '').strip()})"
        return
    start = output.find('"ID"')
    table = csv.DictReader(output[start:].splitlines()) if start >= 0 else []
    kernels: dict[str, dict[str, Any]] = {}
    for line in table:
        if line.get("Metric Name") in METRICS:
            row = kernels.setdefault(line["ID"], {"group": "ncu", "contender": line["Kernel Name"].split("(")[0]})
            row[METRICS[line["Metric Name"]]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    result.rows, result.lines = list(kernels.values()), []
    if not kernels:
        result.status = "failed: ncu profiled no kernel"


def sections(*, dry: bool, architecture: str) -> list[Section]:
    """The report's sections, in the order in which they run: what matters most comes first."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    pytest += ["-p", "no:cacheprovider", "-q", "-m", "gpu"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not dry else []  # compiling takes the time
    files = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade"]
    on_cpu = {"TRITON_INTERPRET": "1", "SVAG_TEST_DEVICE": "cpu"} if dry else {}
    build = {"SVAG_CUDA": "auto" if dry else "1", "SVAG_CUDA_ARCHS": architecture}
    bench = [*python, str(ROOT / "bench" / "gpu_bench.py")]
    sanitized = [*pytest, "-x", "-k", SANITIZED, str(ROOT / "tests" / "gpu" / "test_steps.py")]
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    return [
        Section("build", [*python, *install, "--target", str(SITE), str(ROOT)], 420 if dry else 120, environment=build),
        Section(
            "tests",
            [*pytest, *parallel, "-k", "not twenty", *files],
            900 if dry else 150,
            environment=on_cpu,
            read=_read_tests,
        ),
        Section("determinism over 20 runs", [*pytest, "-k", "twenty", *files], 60, needs_gpu=True, read=_read_tests),
        Section(
            "benches",
            [*bench, *(["--dry"] if dry else []), str(WORK / "rows.json")],
            300 if dry else 170,
            environment=on_cpu,
            read=_read_bench,
        ),
        *(
            Section(
                f"compute-sanitizer {tool}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *sanitized],
                60,
                needs_gpu=True,
                environment=no_cache,
                read=_read_sanitizer,
            )
            for tool in TOOLS
        ),
        Section(
            "ncu",
            ["ncu", *NCU_OPTIONS, *bench, "--profile"],
            60,
            needs_gpu=True,
            read=_read_ncu,
        ),
    ]


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """Say of each target whether it was met, and by how much not."""

    def value(group: str, contender: str, column: str) -> float:
        found = [r[column] for r in rows if (r["group"], r["contender"]) == (group, contender) and column in r]
        return float(found[0]) if found else float("nan")

    def line(what: str, found: float, bound: float, least: bool) -> str:
        verdict = (
            "not measured" if found != found else "met" if (found >= bound if least else found <= bound) else "MISSED"
        )
        return f"| {what} | {'>=' if least else '<='} {bound} | {found:.2f} | {verdict} |"

    ours, copy = (value("update, 60M", c, "GB/s") for c in ("ours, cuda", "copy"))
    lines = [
        "| target | bound | found | |",
        "| --- | --- | --- | --- |",
        line("60 M parameters: ours / copy bandwidth", ours / copy, 0.92, True),
        line("preresnet32's list: eager / ours", value("update, preresnet32", "eager PyTorch", "ratio"), 8, True),
    ]
    for net in ("preresnet32", "vgg16", "mlp"):
        lines.append(line(f"{net}: with norms / plain", 1 / value(f"norms, {net}", "plain", "ratio"), 1.10, False))
    return lines


def identity(commit: str | None) -> dict[str, Any]:
    """What ran the report: device, driver, versions, commit."""

    def says(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
        except (OSError, subprocess.CalledProcessError):
            return None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.is_available()
    head, changed = says("git", "rev-parse", "HEAD"), says("git", "status", "--porcelain")
    smi = says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = re.search(r"V(\d[\d.]+)", says("nvcc", "--version") or "")
    return {
        "device": torch.cuda.get_device_name() if gpu else "no GPU",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "devices": torch.cuda.device_count(),
        "driver": smi.splitlines()[0] if smi else None,
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "triton": version("triton"),
        "nvcc": nvcc[1] if nvcc else None,
        "python": platform.python_version(),
        "commit": commit or (f"{head}{' with changes' if changed else ''}" if head else "unknown: not a git checkout"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "skipped"))
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns]
        if "skipped" in row:
            cells[2:] = [f"skipped: {row['skipped'][:100]}", *cells[3:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(about: dict[str, Any], results: list[Result], *, dry: bool) -> str:
    """The report to read."""
    lines = [f"# GPU report: {about['device']}", ""]
    if dry:
        lines += ["Dry run on a CPU: no time in it means anything.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()] + [""]
    lines += ["| section | status | s |", "| --- | --- | --- |"]
    lines += [f"| {r.name} | {r.status} | {r.seconds} |" for r in results] + [""]
    for result in results:
        if result.rows:
            lines += [f"## {result.name}", ""]
            lines += [*targets(result.rows), ""] if result.name == "benches" and not dry else []
            lines += [*_table(result.rows), ""]
        if result.lines and (result.status != "passed" or result.name != "build"):
            lines += [f"## {result.name}: output", "", "```", *result.lines, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, about: dict[str, Any], results: list[Result], *, dry: bool) -> Path:
    """Write both files, each to a temporary name first; return the one to read."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    base = folder / f"gpu-{name}-{about['date'][:10]}"
    text = json.dumps({"about": about, "dry": dry, "sections": [asdict(r) for r in results]}, indent=1) + "\n"
    for path, content in (
        (base.with_name(base.name + ".md"), markdown(about, results, dry=dry)),
        (base.with_name(base.name + ".json"), text),
    ):
        partial = path.with_name(path.name + ".partial")
        with partial.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return base.with_name(base.name + ".md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU; writes into build/gpu-report")
    parser.add_argument("--commit", help="what the sources are, where this is no git checkout")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available() and not arguments.dry
    if not gpu and not arguments.dry:
        raise SystemExit("torch sees no CUDA device. `make gpu-report DRY=1` tries all but what needs one")
    about = identity(arguments.commit)
    folder = WORK if arguments.dry else ROOT / "bench" / "results"
    architecture = "80" if arguments.dry else about["capability"].replace(".", "")
    (WORK / "rows.json").unlink(missing_ok=True)
    results: list[Result] = []
    budget = 3600.0 if arguments.dry else BUDGET_S
    start = time.monotonic()
    for section in sections(dry=arguments.dry, architecture=architecture):
        print(f"{section.name} ...", end=" ", flush=True)
        results.append(run(section, gpu=gpu, left_s=budget - (time.monotonic() - start)))
        print(f"{results[-1].status} ({results[-1].seconds} s)", flush=True)
        report = write(folder, about, results, dry=arguments.dry)
        if section.name == "build" and results[-1].status != "passed":
            print("\n".join(results[-1].lines))
            break
    print(report)
    if any(r.status.startswith("failed") for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
