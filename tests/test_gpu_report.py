"""`make gpu-report` writes a report with every section whatever happens in one of them, and fails if one failed."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench" / "gpu"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import gpu_report

    monkeypatch.setattr(gpu_report, "WORK", tmp_path / "work")
    return gpu_report


def python(report: ModuleType, code: str, part: float = 0.9, **options: Any) -> Any:
    return report.Section(options.pop("name", "a section"), [sys.executable, "-c", code], part, **options)


def status(report: ModuleType, code: str) -> str:
    return str(report.run(python(report, code), 60.0).status)


def test_a_section_says_how_it_ended(report: ModuleType) -> None:
    result = report.run(python(report, "print('first'); print('last')"), 60.0)
    assert (result.status, result.lines) == ("passed", ["first", "last"])
    assert status(report, "raise SystemExit(3)") == "failed: exit status 3"
    assert status(report, "import os; os.abort()") == "failed: SIGABRT"


def ended_soon(pid: int) -> bool:
    """Whether a process that was killed is gone, or is a zombie: a busy machine may take a moment."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


HANGS = r"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({pid!r}, "w").write(str(child.pid))
print('{{"row": 1}}\n{{"row": 2}}\n{{"ro', file=open(sys.argv[1], "w"), flush=True)
time.sleep(600)
"""


def test_a_section_that_hangs_is_ended_with_its_children_and_keeps_its_rows(report: ModuleType, tmp_path: Path) -> None:
    """The others run all the same, and the results say so."""
    pid = tmp_path / "pid"
    hangs = report.Section("hangs", [sys.executable, "-c", HANGS.format(pid=str(pid)), "ROWS"], 0.1)
    planned = [hangs, python(report, "print('well')", name="the next")]
    results = report.report(planned, tmp_path / "gpu-x", {"device": "x"}, dry=False, budget_s=80.0)
    assert [r.status for r in results] == ["failed: ended at its limit of 8 s", "passed"]
    assert results[0].rows == [{"row": 1}, {"row": 2}]
    assert ended_soon(int(pid.read_text()))
    text = (tmp_path / "gpu-x.md").read_text()
    assert "- **hangs** failed: ended at its limit of 8 s" in text
    assert "- **the next** passed" in text


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {bench!r})
import gpu_report as r
r.WORK = Path({folder!r})
r.asked_identity = lambda commit: {{"device": "x", "capability": None, "date": "2026-01-01"}}
r.sections = lambda **options: [
    r.Section("one", [sys.executable, "-c", "print('done')"], 0.9),
    r.Section("two", [sys.executable, "-c", {hangs!r}, "ROWS"], 0.9),
    r.Section("three", [sys.executable, "-c", ""], 0.9),
]
sys.argv = ["gpu_report.py", "--dry"]
r.main()
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_report_that_is_ended_in_the_middle_loses_nothing(tmp_path: Path, by: signal.Signals) -> None:
    pid = tmp_path / "pid"
    code = DRIVER.format(bench=str(BENCH), folder=str(tmp_path), hangs=HANGS.format(pid=str(pid)))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    process.send_signal(by)
    process.wait(60)
    child = int(pid.read_text())
    assert process.returncode == (143 if by == signal.SIGTERM else -signal.SIGKILL)
    assert ended_soon(child), "what it ran ends with it"
    found = json.loads((tmp_path / "gpu-x-2026-01-01.json").read_text())["sections"]
    assert [s["status"] for s in found] == [
        "passed",
        "not run: the report was ended during this section",
        "not run: the report was ended before it",
    ]
    assert found[0]["lines"] == ["done"]
    assert (
        "- **two** not run: the report was ended during this section" in (tmp_path / "gpu-x-2026-01-01.md").read_text()
    )


# As sitecustomize.py: a GPU machine may lack these.
BLOCKER = """
import sys

class Missing:
    def find_spec(name, path=None, target=None):
        if name in ("scipy", "pytest", "hypothesis", "rich", "click", "matplotlib", "sklearn"):
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Missing)
"""


def test_where_the_build_fails_the_triton_kernels_are_checked_and_the_cuda_ones_say_why_not(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    every = report.sections(dry=True, architecture="80")
    build = next(s for s in every if s.name == "build")
    build.command.remove("--quick")
    checks = next(s for s in every if s.name == "compute-sanitizer memcheck")
    command = [*checks.command, "--step", "4"]  # a quarter of the kernels: whether they can be called without `_C`
    checks = report.Section("checks", command, 0.9, environment=checks.environment, read=report._read_checks)
    built, checked = report.report([build, checks], tmp_path / "gpu-x", {"device": "x"}, dry=True, budget_s=600.0)
    assert built.status == "failed: exit status 1"
    assert "no-such-compiler" in " ".join(built.lines)
    assert checked.status.startswith("passed")
    by_status = {row["kernel"].split(", ")[1]: row["status"] for row in checked.rows}
    assert by_status == {"cuda": "skipped", "triton": "ok"}
    assert all("svag_fast._C can't be loaded" in row["why"] for row in checked.rows if row["status"] == "skipped")


def test_the_benchmark_finds_all_that_it_imports(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment that the report gives it, and without what a GPU machine may lack."""
    import gpu_build

    gpu_build.lay_out(tmp_path / "work" / "site")
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    times = next(s for s in report.sections(dry=True, architecture="80") if s.name == "times")
    result = report.run(report.Section("times", [*times.command[:2], "--help"], 0.9), 600.0)
    assert result.status == "passed", result.lines


def test_a_disk_that_becomes_full_ends_nothing_and_the_report_is_printed(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full is the disk once the first section is written."""
    opens, written = Path.open, tmp_path / "gpu-x.json"

    def open_full(path: Path, mode: str = "r", **options: Any) -> Any:
        full = path.suffix == ".partial" and written.exists() and '"passed"' in written.read_text()
        return opens(Path("/dev/full") if full else path, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)
    planned = [python(report, "print('well')", name=name) for name in ("one", "two", "three")]
    results = report.report(planned, tmp_path / "gpu-x", {"device": "x"}, dry=False, budget_s=60.0)
    assert [r.status for r in results] == ["passed"] * 3
    printed = capsys.readouterr().out
    assert "the report can't be written: [Errno 28]" in printed
    assert "- **three** passed" in printed
    assert json.loads((tmp_path / "gpu-x.json").read_text())["sections"][0]["status"] == "passed"
    assert list(tmp_path.glob("*.partial")) == []


def test_where_nothing_can_be_written_nothing_is_run(report: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = tmp_path / "ran"
    with pytest.raises(OSError, match="file"):
        report.report(
            [python(report, f"open({str(ran)!r}, 'w')")], tmp_path / "file" / "x", {}, dry=False, budget_s=60.0
        )
    assert not ran.exists()


def test_a_section_that_can_not_be_started_fails_alone(report: ModuleType, tmp_path: Path) -> None:
    planned = [report.Section("absent", ["/no/such/program"], 0.5), python(report, "")]
    results = report.report(planned, tmp_path / "gpu-x", {"device": "x"}, dry=False, budget_s=60.0)
    assert results[0].status.startswith("failed: [Errno 2]")
    assert results[1].status == "passed"


def test_what_can_not_be_read_or_shown_does_not_end_the_report(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise KeyError("worst")

    monkeypatch.setattr(report, "markdown", fails)
    planned = [python(report, "", read=fails), python(report, "")]
    results = report.report(planned, tmp_path / "gpu-x", {"device": "x"}, dry=False, budget_s=60.0)
    assert [r.status for r in results] == ["failed: its output can't be read: KeyError('worst')", "passed"]
    assert len(json.loads((tmp_path / "gpu-x.json").read_text())["sections"]) == 2
    assert "KeyError" in (tmp_path / "gpu-x.md").read_text()


def test_a_section_that_is_not_run_says_why(report: ModuleType) -> None:
    def of(left_s: float = 60.0, dry: bool = False, **options: Any) -> str:
        return str(report.run(python(report, "", **options), left_s, dry=dry).status)

    assert of(left_s=1.0) == "not run: no time was left"
    assert of(missing="no pytest") == "skipped: no pytest"
    assert of(tool=["no-such-program"]).startswith("skipped: no-such-program is neither on the PATH nor in /usr/local/")
    assert of(tool=["no-such-program"], dry=True) == "skipped: no GPU"
    alone = of(tool=["no-such-program"], alone=True, dry=True)
    assert alone == "skipped: no GPU for no-such-program (its workload runs)"


def test_cudas_programs_are_found_outside_the_path(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "cuda-99" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\nshift 4; "$@"; echo "========= ERROR SUMMARY: 0 errors"\n')
    tool.chmod(0o755)
    monkeypatch.setattr("gpu_machine.TOOLS", [str(tmp_path / "cuda-*" / "bin")])
    every = report.sections(dry=False, architecture="90")
    section = next(s for s in every if s.name == "compute-sanitizer racecheck")
    writes = 'import sys; open(sys.argv[1], "w").write(\'{"status": "ok"}\\n\')'
    section = python(report, "", tool=section.tool, read=section.read)
    section.command[2:] = [writes, "ROWS"]
    assert report.run(section, 60.0).status == "passed: ERROR SUMMARY: 0 errors, 1 cases"


SUMMARY = "========= ERROR SUMMARY: 0 errors\n"
HAZARDS = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)"
OK, WRONG, SKIPPED = ({"kernel": "k", "status": s, "worst": 0.5, "why": "no _C"} for s in ("ok", "wrong", "skipped"))


@pytest.mark.parametrize(
    ("read", "output", "code", "rows", "status"),
    [
        ("_read_build", "built _C with CUDA kernels", 0, [], "passed: built _C with CUDA kernels"),
        ("_read_checks", "", 0, [OK, OK], "passed: 2 checks within their bounds, the worst at 0.50 of its own"),
        ("_read_checks", "", 1, [OK, WRONG], "failed: 1 wrong and 0 failed of 2 checks"),
        ("_read_checks", "", None, [OK, WRONG], "failed: x, after 2 checks, 1 of them not passed"),
        ("_read_checks", "", 11, [OK], "failed: x, after 1 checks"),
        ("_read_checks", "", 0, [], "failed: no check ran"),
        ("_read_checks", "", 0, [SKIPPED], "skipped: no _C"),
        ("_read_times", "", 0, [{"skipped": "no"}], "failed: nothing could be timed"),
        ("_read_times", "", 0, [{"us": 1.0}, {"skipped": "no"}], "passed: 1 of 2 timed"),
        ("_read_times", "", None, [{"us": 1.0}], "failed: x, after 1 times"),
        ("_read_tests", "5 passed, 2 skipped in 3s", 0, [], "passed: 5 passed, 2 skipped"),
        ("_read_tests", "1 failed, 4 passed in 3.1s", 1, [], "failed: 1 failed, 4 passed"),
        ("_read_tests", "7 skipped in 3s", 0, [], "failed: no test passed"),
        ("_read_tests", "no tests ran in 3s", 0, [], "failed: no test passed"),
        ("_read_sanitizer", SUMMARY, 0, [OK], "passed: ERROR SUMMARY: 0 errors, 1 cases"),
        ("_read_sanitizer", SUMMARY, 0, [SKIPPED], "failed: no case ran under it"),
        ("_read_sanitizer", HAZARDS.format(0), 0, [OK], f"passed: {HAZARDS.format(0)[10:]}, 1 cases"),
        ("_read_sanitizer", HAZARDS.format(3), 9, [OK], f"failed: {HAZARDS.format(3)[10:]}"),
        ("_read_sanitizer", "3 passed", 0, [OK], "failed: compute-sanitizer printed no summary"),
        ("_read_sanitizer", SUMMARY.replace("0", "2"), 0, [OK], "failed: ERROR SUMMARY: 2 errors"),
        ("_read_sanitizer", "Device not supported", 1, [], "skipped: compute-sanitizer says: Device not supported"),
        ("_read_ncu", "==ERROR== no permission", 1, [], "skipped: ncu does not run here (no permission)"),
        ("_read_ncu", "nothing", 0, [], "failed: ncu profiled no kernel"),
    ],
)
def test_what_a_section_printed_is_judged(
    report: ModuleType, read: str, output: str, code: int | None, rows: list[dict[str, Any]], status: str
) -> None:
    result = report.Result("x", "passed" if code == 0 else "failed: x", rows=rows)
    getattr(report, read)(result, output, code)
    assert result.status == status


def test_ncus_table_becomes_a_row_for_each_kernel(report: ModuleType) -> None:
    lines = ["==PROF== Disconnected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += ['"0","step_kernel(float *)","gpu__time_duration.sum","us","300"']
    lines += ['"0","step_kernel(float *)","launch__registers_per_thread","register/thread","64"']
    result = report.Result("ncu", "passed")
    report._read_ncu(result, "\n".join(lines), 0)
    assert result.rows == [{"kernel": "step_kernel", "time": "300 us", "registers": "64 register/thread"}]


TIMES = [
    {"group": "update, 60M", "kernel": "step, cuda", "us": 500.0, "of peak": 0.95, "peak": "copy", "timed by": "graph"},
    {
        "group": "update, 60M",
        "kernel": "step, triton",
        "us": 600.0,
        "of peak": 0.8,
        "peak": "copy",
        "timed by": "graph",
    },
    {"group": "update, preresnet32", "kernel": "eager PyTorch", "us": 50.0},
    {"group": "update, preresnet32", "kernel": "step, cuda", "us": 10.0},
    {"group": "norms, vgg16", "kernel": "with norms", "us": 1.25},
    {"group": "norms, vgg16", "kernel": "plain", "us": 1.0},
    {"group": "dW a, tf32", "kernel": "the tiles", "us": 1.0, "of peak": 0.25, "peak": "tf32 products"},
    {"group": "dW a, tf32", "kernel": "library", "skipped": "no memory"},
]


def test_targets_are_met_missed_or_not_measured(report: ModuleType) -> None:
    text = report.markdown({"device": "x"}, [vars(report.Result("times", "passed", rows=TIMES))], dry=False)
    assert "| 60 M parameters, cuda: of the copy rate | >= 0.92 | 0.95 | met |" in text
    assert "| 60 M parameters, triton: of the copy rate | >= 0.92 | 0.80 | MISSED |" in text
    assert "eager / ours, GPU time | >= 8 | 5.00 | MISSED |" in text
    assert "vgg16: with norms / plain | <= 1.1 | 1.25 | MISSED |" in text
    assert "mlp: with norms / plain | <= 1.1 | nan | not measured |" in text
    assert "| step, cuda | 500 | 0.95 | copy | graph |" in text
    assert "- library: skipped: no memory" in text
    verdict = report.times_verdict(TIMES)
    assert "the step on 60 M parameters at cuda 0.95, triton 0.80 of the copy rate" in verdict
    assert "the weight gradient with norms (tf32) at 0.25 to 0.25 of its peak" in verdict


def test_the_report_names_device_versions_commit_and_every_verdict(report: ModuleType, tmp_path: Path) -> None:
    from gpu_machine import identity

    about = identity("abc123")
    rows = [{"kernel": "k", "case": "c", "status": "wrong", "worst": 2.0, "why": "params: off by 2 times the bound"}]
    results = [
        report.Result("build", "passed: built", 3.0),
        report.Result("Triton against float64", "failed: 1 wrong", 2.0, lines=["Traceback"], rows=rows),
    ]
    base = report.file_base(tmp_path, about, dry=False)
    report.write(base, about, results, dry=False)
    text = base.with_name(base.name + ".md").read_text()
    data = json.loads(base.with_name(base.name + ".json").read_text())
    for word in ("abc123", about["torch"], "- **build** passed: built (3.0 s)", "Traceback"):
        assert word in text
    assert "| k | c | wrong | params: off by 2 times the bound |" in text
    assert [s["name"] for s in data["sections"]] == ["build", "Triton against float64"]
    assert data["about"]["commit"] == "abc123"
    assert re.fullmatch(r"gpu-[a-z0-9-]+-\d{4}-\d\d-\d\d", base.name)
    assert not list(tmp_path.glob("*.partial"))
    again = report.file_base(tmp_path, about, dry=False)
    assert again.name == f"{base.name}-2", "an earlier report of the same day is kept"


def test_what_matters_most_comes_first_and_the_whole_fits_8_minutes(report: ModuleType) -> None:
    planned = report.sections(dry=False, architecture="90")
    assert [s.name.removeprefix("compute-sanitizer ") for s in planned] == [
        *("build", "Triton against float64", "CUDA against float64", "times"),
        *("memcheck", "racecheck", "initcheck", "synccheck", "ncu", "tests marked gpu"),
    ]
    assert report.BUDGET_S <= 8 * 60
    assert all(0 < s.part < 1 for s in planned), "so that any of them may run to its limit"
    left = report.BUDGET_S * math.prod(1 - s.part for s in planned[:3])
    assert left * planned[3].part > 60, "the times have a minute though all before them ran to their limits"
    sanitized = [s for s in planned if s.tool[:1] == ["compute-sanitizer"]]
    assert all(s.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for s in sanitized)


def test_without_a_gpu_it_says_so_and_writes_nothing() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(BENCH / "gpu_report.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr


def closure(package: str) -> set[str]:
    """The packages that one needs here, by their normalized names."""
    found: set[str] = set()
    todo = [package]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            todo += [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need]
    return found


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """An environment with torch, triton, numpy and setuptools alone: no pip, pybind11 or pytest."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for name in set.union(*map(closure, ("torch", "triton", "numpy", "setuptools"))):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    for stamp in (".packages", ".installed"):
        (venv / stamp).touch()
    return venv


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_dry_run_passes_on_a_machine_without_pybind11_pip_pytest_nvcc_on_the_path_or_network(
    bare_machine: Path, tmp_path: Path
) -> None:
    python = bare_machine / "bin" / "python"
    for module in ("pip", "pybind11", "pytest", "scipy", "hypothesis", "svag_fast"):
        assert subprocess.run([python, "-I", "-c", f"import {module}"], capture_output=True, check=False).returncode
    tree = tmp_path / "tree"  # no git checkout
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", "*.so", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    # What `make test` has built of the CUDA sources for the host is taken over where nothing has changed since.
    built = Path(".pytest_cache", "d", "cuda_on_host")
    if (ROOT / built).exists():
        shutil.copytree(ROOT / built, tree / built)
    before = {p.relative_to(tree) for p in tree.rglob("*")}
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    command = ["make", "gpu-report", "DRY=1", f"VENV={bare_machine}"]
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0:
        command = ["unshare", "-n", *command]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.splitlines()[-1])
    data = json.loads(path.with_suffix(".json").read_text())
    status = {s["name"]: s["status"] for s in data["sections"]}
    passed = {name for name, s in status.items() if s.startswith("passed")}
    assert passed == {"build", "Triton against float64", "CUDA against float64", "times"}, status
    assert status["build"].endswith("with CUDA kernels" if Path("/usr/local/cuda/bin/nvcc").exists() else "kernels")
    (build,) = (s for s in data["sections"] if s["name"] == "build")
    assert any("no pybind11 package: its headers are taken from" in line for line in build["lines"])
    rest = {name: s for name, s in status.items() if name not in passed}
    assert rest.pop("tests marked gpu") == f"skipped: pytest is not installed in {python}"
    assert all(s.startswith("skipped: no GPU") for s in rest.values()), rest
    for section in data["sections"]:
        assert all(row.get("status", "ok") == "ok" and "skipped" not in row for row in section["rows"]), section
    assert data["about"]["commit"] == "not a git checkout"
    made = {p.relative_to(tree) for p in tree.rglob("*")} - before
    assert {p.parts[0] for p in made} <= {"build", ".pytest_cache"}, "the checkout stays as it was"
    print(path.read_text(), *(f"{s['name']}: {s['seconds']} s" for s in data["sections"]), sep="\n")
