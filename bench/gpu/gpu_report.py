"""`make gpu-report`: what can be known of the kernels on this machine's GPU, in one report, in 8 minutes.

python bench/gpu/gpu_report.py            with the Python whose torch sees the GPU; it installs nothing into it
python bench/gpu/gpu_report.py --dry      on a CPU: the same sections, the kernels interpreted or run on the host

Each section is a process that gets a part of the time that is left, so what comes first matters most and nothing can
take the others' time; past its limit it is ended with all its children. gpu-NAME-DATE.json and .md are written before
and after every section: whatever ends the report, what was finished is there. A section that fails is written down with
its reason, the others run all the same, and the exit status is 1. This file needs Python alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_machine import TOOLS, asked_identity, search_path
from gpu_report_text import markdown, times_verdict

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-report"
BUDGET_S = 480.0
DRY_BUDGET_S = 1800.0  # takes under a minute: this is for a machine that other work makes slow
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes of memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory's peak, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors' peak, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active, %",
    "launch__registers_per_thread": "registers",
}
KERNELS = "step_kernel|weight_grad_kernel|finish_layer_kernel|finish_kernel|finish_norms_kernel"
NCU = ["ncu", "--clock-control", "none", "--csv", "-k", f"regex:{KERNELS}", "--metrics", ",".join(METRICS)]


@dataclass
class Result:
    """What a section came to; ``status`` begins with "passed", "failed", "skipped" or "not run"."""

    name: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A command, its part of the time that is left, and how its output is read.

    ``tool`` is the NVIDIA program that the command runs under. Where there is no GPU the command runs without it if
    ``alone``, to show that it does, and else not at all. A command that holds "ROWS" writes rows there, as it goes.
    """

    name: str
    command: list[str]
    part: float
    tool: list[str] = field(default_factory=list)
    alone: bool = False
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[Result, str, int | None], None] = lambda result, output, code: None


def run(section: Section, left_s: float, *, dry: bool = False) -> Result:
    """Run a section within its part of the time that is left."""
    if section.missing:
        return Result(section.name, f"skipped: {section.missing}")
    if section.tool and dry and not section.alone:
        return Result(section.name, "skipped: no GPU")
    tool = [] if dry else section.tool
    if tool and shutil.which(tool[0], path=search_path()) is None:
        return Result(section.name, f"skipped: {tool[0]} is neither on the PATH nor in {', '.join(TOOLS)}")
    limit = section.part * left_s
    if limit < 1:
        return Result(section.name, "not run: no time was left")
    WORK.mkdir(parents=True, exist_ok=True)
    slug = re.sub("[^a-z0-9]+", "-", section.name.lower()).strip("-")
    log, rows = WORK / f"{slug}.log", WORK / f"{slug}.rows"
    rows.unlink(missing_ok=True)
    command = [str(rows) if word == "ROWS" else word for word in [*tool, *section.command]]
    start = time.monotonic()
    code = _run_to_limit(command, log, limit, section.environment)
    output = log.read_text(errors="replace")
    result = Result(section.name, "passed", round(time.monotonic() - start, 1), round(limit, 1), _last(output))
    result.rows = _rows(rows)
    if code is None:
        result.status = f"failed: ended at its limit of {limit:.0f} s"
    elif code != 0:
        result.status = f"failed: {f'exit status {code}' if code > 0 else signal.Signals(-code).name}"
    try:
        section.read(result, output, code)
    except Exception as error:  # what one program printed must not end the report
        result.status = f"failed: its output can't be read: {error!r}"
    if section.tool and dry and result.status.startswith("passed"):
        result.status = f"skipped: no GPU for {section.tool[0]} (its workload runs)"
    return result


# Waits until its standard input, a pipe from the report, is closed, as it is by any end of the report.
_END_WITH_REPORT = "import os, signal, sys; os.read(0, 1); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


def _run_to_limit(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> int | None:
    """Return the exit status, or None where the limit came first; the process group ends here, or with the report."""
    paths = [
        str(WORK / "site"),
        str(ROOT / "tests" / "support"),
        str(ROOT / "tests"),
        str(ROOT / "bench"),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    caches = {"TRITON_CACHE_DIR": str(WORK / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}
    everything = os.environ | caches | {"PATH": search_path(), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=WORK,
            env=everything | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watchdog = [sys.executable, "-I", "-S", "-c", _END_WITH_REPORT, str(process.pid)]
        guard = subprocess.Popen(watchdog, stdin=subprocess.PIPE, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            guard.kill()
            guard.communicate()
            with contextlib.suppress(ProcessLookupError):  # the group is gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last(output: str, count: int = 12) -> list[str]:
    return [line.rstrip()[:300] for line in output.splitlines() if line.strip()][-count:]


def _rows(path: Path) -> list[dict[str, Any]]:
    """What was written; the last line may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _read_build(result: Result, output: str, code: int | None) -> None:
    if code == 0:
        result.status = f"passed: {_last(output)[-1]}" if output.strip() else "failed: it printed nothing"


def _read_checks(result: Result, output: str, code: int | None) -> None:
    counts = {s: sum(row["status"] == s for row in result.rows) for s in ("ok", "wrong", "failed", "skipped")}
    ran = counts["ok"] + counts["wrong"] + counts["failed"]
    wrong = f"{counts['wrong']} wrong and {counts['failed']} failed of {ran} checks"
    if code is None:
        result.status += f", after {ran} checks, {counts['wrong'] + counts['failed']} of them not passed"
    elif counts["wrong"] or counts["failed"]:
        result.status = f"failed: {wrong}"
    elif code:
        result.status += f", after {ran} checks"
    elif ran:
        worst = max(row["worst"] for row in result.rows if row["status"] == "ok")
        result.status = f"passed: {ran} checks within their bounds, the worst at {worst:.2f} of its own"
    else:
        result.status = f"skipped: {result.rows[0]['why']}" if result.rows else "failed: no check ran"


def _read_times(result: Result, output: str, code: int | None) -> None:
    timed = sum("us" in row for row in result.rows)
    if code == 0 and not timed:
        result.status = "failed: nothing could be timed"
    elif code == 0:
        result.status = f"passed: {timed} of {len(result.rows)} timed{times_verdict(result.rows)}"
    else:
        result.status += f", after {timed} times"


def _read_sanitizer(result: Result, output: str, code: int | None) -> None:
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+).*)", output)
    if "Device not supported" in output:
        result.status = "skipped: compute-sanitizer says: Device not supported"
    elif any(int(count) for _, count in summary):
        result.status = f"failed: {summary[-1][0]}"
    elif code == 0 and not summary:
        result.status = "failed: compute-sanitizer printed no summary"
    elif code == 0:
        ran = sum(row["status"] == "ok" for row in result.rows)
        result.status = f"passed: {summary[-1][0]}, {ran} cases" if ran else "failed: no case ran under it"
    result.lines = [line[:300] for line in output.splitlines() if line.startswith("=========")][-30:] or result.lines
    if ran_not := [row for row in result.rows if row["status"] == "skipped"]:
        result.lines.append(f"not run: {ran_not[0]['kernel']}, {len(ran_not)} cases: {ran_not[0]['why']}")


def _read_alone(result: Result, output: str, code: int | None) -> None:
    """Of a workload without its tool: no more than that it ran."""
    if code == 0:
        result.lines = result.rows = []


def _read_ncu(result: Result, output: str, code: int | None) -> None:
    if error := next((line for line in output.splitlines() if "==ERROR==" in line), None):
        result.status = f"skipped: ncu does not run here ({error.replace('==ERROR==', '').strip()})"
        return
    start = output.find('"ID"')
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(output[start:].splitlines()) if start >= 0 else []:
        if line.get("Metric Name") in METRICS:
            row = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"].split("(")[0]})
            row[METRICS[line["Metric Name"]]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    result.rows = list(kernels.values())
    if code == 0:
        result.status = f"passed: {len(kernels)} launches" if kernels else "failed: ncu profiled no kernel"


def _read_tests(result: Result, output: str, code: int | None) -> None:
    """Keep the counts, the reasons of what was skipped, and each failure."""
    wanted = re.compile(
        r"^(SKIPPED|FAILED|ERROR)|^=*\s*\d+ (passed|failed|skipped|deselected)|^\d+ kernels|tested in this"
    )
    result.lines = [line[:300] for line in output.splitlines() if wanted.search(line)] or result.lines
    counts = re.findall(r"(?:\d+ \w+, )*\d+ \w+(?= in [\d.]+)", output)
    if code == 0:
        passed = counts and "passed" in counts[-1]
        result.status = f"passed: {counts[-1]}" if passed else "failed: no test passed"
    elif code is not None and counts:
        result.status = f"failed: {counts[-1]}"


def sections(*, dry: bool, architecture: str) -> list[Section]:
    """The report's sections, in the order in which they run: what matters most comes first."""
    python, cpu = [sys.executable], ["--cpu"] if dry else []
    on_cpu = {"TRITON_INTERPRET": "1", "SVAG_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if dry else {}
    checks = [*python, str(ROOT / "tests" / "support" / "gpu_checks.py")]
    shared = ["ROWS", *cpu, "--jobs", str(min(8, os.cpu_count() or 1))]
    bench = [*python, str(ROOT / "bench" / "gpu" / "gpu_bench.py"), "ROWS", *cpu]
    built = [*python, str(ROOT / "bench" / "gpu" / "gpu_build.py"), str(WORK / "site"), *(["--quick"] if dry else [])]
    build = {"SVAG_CUDA": "auto" if dry else "1", "SVAG_CUDA_ARCHS": architecture}
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor with bounds of its own, and not used before
    pytest = [*python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q", "-m", "gpu"]
    pytest += ["-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    pytest += ["--ignore", str(ROOT / "tests" / "gpu" / "test_checks.py")]  # run before, without pytest
    no_pytest = None if importlib.util.find_spec("pytest") else f"pytest is not installed in {sys.executable}"
    found = [
        Section("build", built, 0.4, environment=build, read=_read_build),
        Section("Triton against float64", [*checks, "triton", *shared], 0.4, environment=on_cpu, read=_read_checks),
        Section("CUDA against float64", [*checks, "cuda", *shared], 0.3, environment=on_cpu, read=_read_checks),
        Section("times", bench, 0.5, environment=on_cpu, read=_read_times),
    ]
    for i, tool in enumerate(SANITIZERS):
        found.append(
            Section(
                f"compute-sanitizer {tool}",
                [*checks, "sanitized", "ROWS", *cpu],
                (0.2, 0.25, 0.35, 0.4)[i],
                tool=["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"],
                alone=i == 0,
                environment=on_cpu | no_cache,
                read=_read_alone if dry else _read_sanitizer,
            )
        )
    read = _read_alone if dry else _read_ncu
    return [
        *found,
        Section("ncu", [*bench, "--profile"], 0.5, tool=NCU, alone=True, environment=on_cpu, read=read),
        Section("tests marked gpu", pytest, 0.95, missing=no_pytest, environment=on_cpu, read=_read_tests),
    ]


def file_base(folder: Path, about: dict[str, Any], *, dry: bool) -> Path:
    """The report's files without their ending: not those of an earlier report of the same day."""
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    name = f"gpu-{slug}-{about['date'][:10]}"
    taken = [] if dry else [p.stem for p in folder.glob(f"{name}*.json")]
    return folder / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)


def write(base: Path, about: dict[str, Any], results: list[Result], *, dry: bool) -> None:
    """Write both files, each to a temporary name first."""
    base.parent.mkdir(parents=True, exist_ok=True)
    found = [asdict(r) for r in results]
    text = json.dumps({"about": about, "dry": dry, "sections": found}, indent=1) + "\n"
    try:
        to_read = markdown(about, found, dry=dry)
    except Exception:  # the JSON file has everything; the text must not end the report
        to_read = f"The text could not be made of the JSON file beside this one:\n\n{traceback.format_exc()}"
    for ending, content in ((".json", text), (".md", to_read)):
        partial = base.with_name(base.name + ending + ".partial")
        try:
            with partial.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(base.with_name(base.name + ending))
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def report(planned: list[Section], base: Path, about: dict[str, Any], *, dry: bool, budget_s: float) -> list[Result]:
    """Run the sections; before and after each, write what is known, and what is still to come as not run.

    A disk that becomes full ends nothing: what could not be written in the end is printed.

    Raises:
        OSError: nothing can be written from the first; nothing was run.
    """
    start, results = time.monotonic(), []
    for i, section in enumerate(planned):
        running = Result(section.name, "not run: the report was ended during this section")
        to_come = [Result(s.name, "not run: the report was ended before it") for s in planned[i + 1 :]]
        try:
            write(base, about, [*results, running, *to_come], dry=dry)
        except OSError:
            if not results:
                raise
        print(f"{section.name} ...", end=" ", flush=True)
        try:
            results.append(run(section, budget_s - (time.monotonic() - start), dry=dry))
        except OSError as error:
            results.append(Result(section.name, f"failed: {error}"))
        print(f"{results[-1].status} ({results[-1].seconds} s)", flush=True)
        try:
            write(base, about, [*results, *to_come], dry=dry)
        except OSError as error:
            print(f"the report can't be written: {error}", flush=True)
            if not to_come:
                print(markdown(about, [asdict(r) for r in results], dry=dry))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU; writes into build/gpu-report")
    parser.add_argument("--commit", help="what the sources are, where this is no git checkout")
    arguments = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the running section's processes are ended too
    about = asked_identity(arguments.commit)
    if about["capability"] is None and not arguments.dry:
        raise SystemExit("torch sees no CUDA device. `make gpu-report DRY=1` tries all but what needs one")
    base = file_base(WORK if arguments.dry else ROOT / "bench" / "results", about, dry=arguments.dry)
    architecture = "80" if arguments.dry else about["capability"].replace(".", "")
    planned = sections(dry=arguments.dry, architecture=architecture)
    budget_s = (DRY_BUDGET_S if arguments.dry else BUDGET_S) - (time.monotonic() - start)
    try:
        results = report(planned, base, about, dry=arguments.dry, budget_s=budget_s)
    except OSError as error:
        raise SystemExit(f"the report can't be written, so nothing was run: {error}") from None
    print(base.with_name(base.name + ".md"))
    if any(r.status.startswith(("failed", "not run")) for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
