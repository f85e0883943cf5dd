"""`make gpu-report` writes a report with every section whatever happens in one of them, and fails if one failed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "bench" / "gpu_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_report", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "SITE", tmp_path / "work" / "site")
    return module


def python(report: ModuleType, code: str, **options: Any) -> Any:
    section = report.Section("a section", [sys.executable, "-c", code], options.pop("limit_s", 60.0), **options)
    return report.run(section, gpu=False, left_s=1000.0)


def test_a_section_that_ends_well_has_passed_and_keeps_its_last_lines(report: ModuleType) -> None:
    result = python(report, "print('first'); print('last')")
    assert (result.status, result.lines) == ("passed", ["first", "last"])


def test_a_section_that_fails_says_how(report: ModuleType) -> None:
    assert python(report, "raise SystemExit(3)").status == "failed: exit status 3"


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


def test_a_section_past_its_limit_is_ended_with_its_children(report: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    section = report.Section("slow", [sys.executable, "-c", code], 6.0)
    assert report.run(section, gpu=True, left_s=1000.0).status == "failed: not done after 6 s"
    assert ended_soon(int(pid.read_text()))


@pytest.mark.parametrize(
    ("change", "left_s", "status"),
    [
        ({"needs_gpu": True}, 1000.0, "skipped: no GPU"),
        ({"command": ["no-such-program"]}, 1000.0, "skipped: no-such-program is not on the PATH"),
        ({}, 1.0, "failed: no time left of 530 s"),
    ],
)
def test_a_section_that_is_not_run_says_why(
    report: ModuleType, change: dict[str, Any], left_s: float, status: str
) -> None:
    section = report.Section(**{"name": "x", "command": [sys.executable], "limit_s": 60.0, **change})
    assert report.run(section, gpu=False, left_s=left_s).status == status


SUMMARY = "========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("read", "output", "code", "status"),
    [
        ("_read_tests", "5 passed, 2 skipped in 3s", 0, "passed"),
        ("_read_tests", "7 skipped in 3s", 0, "skipped: every test was"),
        ("_read_tests", "no tests ran in 3s", 0, "failed: no test passed"),
        ("_read_sanitizer", SUMMARY, 0, "passed"),
        ("_read_sanitizer", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("_read_sanitizer", "3 passed", 0, "failed: compute-sanitizer printed no summary of 0 errors"),
        ("_read_sanitizer", SUMMARY.replace("0", "2"), 0, "failed: compute-sanitizer printed no summary of 0 errors"),
        ("_read_sanitizer", "Device not supported", 1, "skipped: compute-sanitizer says: Device not supported"),
        ("_read_ncu", "==ERROR== no permission", 1, "skipped: ncu does not run here (no permission)"),
        ("_read_ncu", "nothing", 0, "failed: ncu profiled no kernel"),
    ],
)
def test_what_a_section_printed_is_judged(report: ModuleType, read: str, output: str, code: int, status: str) -> None:
    result = report.Result("x", "passed")
    getattr(report, read)(result, output, code)
    assert result.status == status


def test_ncus_table_becomes_a_row_for_each_kernel(report: ModuleType) -> None:
    lines = ["==PROF== Disconnected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += ['"0","step_kernel(float *)","gpu__time_duration.sum","us","300"']
    lines += ['"0","step_kernel(float *)","launch__registers_per_thread","register/thread","64"']
    result = report.Result("ncu", "passed")
    report._read_ncu(result, "\n".join(lines), 0)
    assert result.rows == [
        {"group": "ncu", "contender": "step_kernel", "time": "300 us", "registers": "64 register/thread"}
    ]


def test_targets_are_met_missed_or_not_measured(report: ModuleType) -> None:
    rows = [
        {"group": "update, 60M", "contender": "ours, cuda", "GB/s": 1900.0},
        {"group": "update, 60M", "contender": "copy", "GB/s": 2000.0},
        {"group": "update, preresnet32", "contender": "eager PyTorch", "ratio": 5.0},
        {"group": "norms, vgg16", "contender": "plain", "ratio": 0.8},
    ]
    text = "\n".join(report.targets(rows))
    assert "copy bandwidth | >= 0.92 | 0.95 | met |" in text
    assert "eager / ours | >= 8 | 5.00 | MISSED |" in text
    assert "vgg16: with norms / plain | <= 1.1 | 1.25 | MISSED |" in text
    assert "mlp: with norms / plain | <= 1.1 | nan | not measured |" in text


def test_the_report_names_device_versions_commit_and_every_section(report: ModuleType, tmp_path: Path) -> None:
    about = report.identity("abc123")
    results = [
        report.Result("build", "passed", 3.0),
        report.Result("benches", "failed: exit status 1", 2.0, lines=["Traceback"]),
    ]
    results[1].rows = [
        {"group": "g", "contender": "ours", "ms": 1.25},
        {"group": "g", "contender": "x", "skipped": "no"},
    ]
    path = report.write(tmp_path, about, results, dry=False)
    text, data = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    for word in ("abc123", about["torch"], "| benches | failed: exit status 1 | 2.0 |", "Traceback", "1.250"):
        assert word in text
    assert [s["name"] for s in data["sections"]] == ["build", "benches"]
    assert data["about"]["commit"] == "abc123"
    assert path.name.startswith("gpu-")
    assert not list(tmp_path.glob("*.partial"))


def test_every_section_is_there_and_the_whole_fits_9_minutes(report: ModuleType) -> None:
    sections = report.sections(dry=False, architecture="90")
    names = [s.name for s in sections]
    assert names[:4] == ["build", "tests", "determinism over 20 runs", "benches"]
    assert [n.split()[-1] for n in names[4:]] == ["memcheck", "racecheck", "initcheck", "synccheck", "ncu"]
    assert report.BUDGET_S <= 9 * 60


def test_without_a_gpu_it_says_so_and_writes_nothing() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_report.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_dry_run_passes_every_section_or_says_why_not() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SVAG_TEST_DEVICE")}
    command = [sys.executable, str(ROOT / "bench" / "gpu_report.py"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = Path(done.stdout.splitlines()[-1])
    status = {s["name"]: s["status"] for s in json.loads(path.with_suffix(".json").read_text())["sections"]}
    assert {name for name, s in status.items() if s == "passed"} == {"build", "tests", "benches"}
    rest = {s for s in status.values() if s != "passed"}
    assert rest == {"skipped: no GPU"}
    assert "finish_norms_kernel" in path.read_text()
