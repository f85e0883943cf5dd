"""A task's file on the command line: found, copied, never run from the copy, and refused where it has changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from svag_fast.cli.main import main
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.task_file import load_task, parse_target, short_name

SOURCE = """
import torch
import neighbour

torch.manual_seed(0)
x, y = torch.randn(64, 8), torch.randint(3, (64,))


def task():
    from svag_fast import Task

    return Task(
        model=lambda: torch.nn.Linear(8, neighbour.CLASSES),
        train=(x, y),
        test=(x, y),
        loss=torch.nn.CrossEntropyLoss(reduction="none"),
        metrics={"top": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
    )


def broken():
    return 1 / 0


small = task()
number = 3
"""
OPTIONS = ["--batch-size", "4", "--lr", "0.1", "--l", "1", "--seeds", "2", "--effective-steps", "20", "--rows", "4"]


# In an environment that workers share.
NEIGHBOUR = 'import os\n\nCLASSES = int(os.environ.get("CLASSES_OF_TASK", 3))\n'


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "my_task.py").write_text(SOURCE)
    return tmp_path / "my_task.py"


def invoke(*arguments):
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", {"dataset": "digits"}),
        ("digits/vgg11-gn", {"dataset": "digits", "model": "vgg11-gn"}),
        ("neighbour:task", {"task": "neighbour:task"}),
        ("a.b:c", {"task": "a.b:c"}),
    ],
)
def test_a_target_is_read_as_what_it_says(text, expected):
    assert parse_target(text) == expected


def test_a_file_is_named_whole_so_that_it_is_found_from_any_folder(file):
    assert parse_target("my_task.py") == {"task": f"{file}:task"}
    assert parse_target("my_task.py:small") == {"task": f"{file}:small"}
    assert [short_name(f"{file}:{name}") for name in ("task", "small")] == ["my_task", "my_task:small"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_file.py", "TARGET must be a file that is there, got 'no_such_file.py'"),
        ("imagenet", r"TARGET must be FILE.py\[:NAME\], package.module:NAME, or a data set \(digits, .*got 'imagenet'"),
        ("my_task.py:a-b", "TARGET must be one whose NAME is a Python name"),
        ("a/b:c", "TARGET must be FILE.py:NAME or package.module:NAME, got 'a/b:c'"),
        ("no_module:task", "task must be a module that is there, in a file, got 'no_module'"),
        ("my_task.py:other", "'other' in .*my_task.py must be a svag_fast.Task, or .* no such name there, but task"),
        ("my_task.py:number", "'number' in .*my_task.py must be a svag_fast.Task, or a function .* one, got 3"),
    ],
)  # fmt: skip
def test_a_wrong_target_is_refused_by_name_and_nothing_is_written(file, target, message):
    with pytest.raises(ConfigError, match=message):
        load_task(parse_target(target)["task"])
    answer = invoke(target)
    assert answer.exit_code == 2
    assert not (file.parent / "runs").exists()


def test_the_files_own_error_is_shown_with_its_traceback_and_nothing_is_written(file):
    answer = invoke("my_task.py:broken")
    assert answer.exit_code == 1
    assert re.search(r'my_task.py", line \d+, in broken\s+return 1 / 0\s', answer.output)
    assert "ZeroDivisionError" in answer.output
    assert "Nothing was written" in answer.output
    assert not (file.parent / "runs").exists()


def test_what_the_target_says_is_refused_as_an_option_too(file):
    answer = invoke("digits", "--dataset", "digits")
    assert answer.exit_code == 2
    assert "left out beside digits" in " ".join(answer.output.split())


def test_a_file_of_settings_names_no_code(file):
    (file.parent / "settings.json").write_text(json.dumps({"task": f"{file}:task"}))
    answer = invoke("--config", "settings.json")
    assert answer.exit_code == 2
    assert "task must be named on the command line" in " ".join(answer.output.split())


def test_a_file_is_trained_copied_and_refused_where_it_has_changed(file, monkeypatch):
    monkeypatch.setenv("CLASSES_OF_TASK", "4")
    answer = invoke("my_task.py", *OPTIONS)
    assert answer.exit_code == 0, answer.output
    out = file.parent / "runs" / "my_task"
    assert (out / "task.py").read_text() == SOURCE
    (sha,) = json.loads((out / "task.json").read_text())["sha256"]
    assert json.loads((out / "b4-lr0.1-l1-seed0" / "config.json").read_text())["task_sha256"] == sha
    found = json.loads((out / "summary.json").read_text())["batch_sizes"]["4"]
    assert list(found["metrics"]) == ["test_top", "test_loss"]
    header = (out / "b4-lr0.1-l1-seed0" / "metrics.csv").read_text().splitlines()[0]
    assert ",train_top,test_top,grad_sq_norm," in header
    assert "final test" in answer.output

    # The file may be elsewhere by now: its hash says that it is the same.
    moved = file.parent / "elsewhere" / "my_task.py"
    moved.parent.mkdir()
    (moved.parent / "neighbour.py").write_text(NEIGHBOUR)
    file.rename(moved)
    (out / "b4-lr0.1-l1-seed1" / "metrics.csv").unlink()
    again = invoke(moved, "--resume", "--out", out)
    assert again.exit_code == 0, again.output
    assert (out / "b4-lr0.1-l1-seed1" / "metrics.csv").exists()
    assert json.loads((out / "experiment.json").read_text())["task"] == f"{moved}:task"
    moved.rename(file)

    # The copy is never run: it may be anything, the file that is named is what counts.
    file.write_text(SOURCE.replace("Linear(8, neighbour.CLASSES)", "Linear(8, 3, bias=False)"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    unnamed = invoke("--resume", "--out", out)
    assert unnamed.exit_code == 2
    assert "TARGET must be named again, since no file of settings has code run" in " ".join(unnamed.output.split())
    (file.parent / "neighbour.py").write_text("raise SystemExit('the changed file was run')")
    refused = invoke("my_task.py", "--resume", "--out", out)
    assert refused.exit_code == 1
    assert "-        model=lambda: torch.nn.Linear(8, neighbour.CLASSES)," in refused.output
    assert "+        model=lambda: torch.nn.Linear(8, 3, bias=False)," in refused.output
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    # Nor may what the file imports change, where it makes another task.
    file.write_text(SOURCE)
    (file.parent / "neighbour.py").write_text("CLASSES = 5\n")
    sys.modules.pop("neighbour")
    refused = invoke("my_task.py", "--resume", "--out", out)
    assert refused.exit_code == 1
    assert "initial weights: float32 [4, 8], float32 [4] there and float32 [5, 8], float32 [5] here" in refused.output
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sys.modules.pop("neighbour")
    file.write_text(SOURCE.replace("Linear(8, neighbour.CLASSES)", "Linear(8, 3, bias=False)"))

    # Trained again under --force, one run is of the new file; the report takes both, as it was told to.
    for name in ("checkpoint.pt", "metrics.csv", "config.json"):
        (out / "b4-lr0.1-l1-seed0" / name).unlink()
    (file.parent / "neighbour.py").write_text(NEIGHBOUR)
    forced = invoke("my_task.py", "--resume", "--force", "--out", out)
    assert forced.exit_code == 0, forced.output
    hashes = json.loads((out / "task.json").read_text())["sha256"]
    assert hashes[0] == sha
    assert len(hashes) == 2
    assert (out / f"task-{sha[:8]}.py").read_text() == SOURCE
    (out / "task.json").unlink()
    mixed = CliRunner().invoke(main, ["report", str(out)])
    assert mixed.exit_code == 1
    assert "the runs must be of one version of their task's file" in mixed.output


def test_a_file_that_studies_itself_is_told_so(file):
    file.write_text(SOURCE + 'import svag_fast\nsvag_fast.study("my_task.py", out="runs/x")\n')
    answer = invoke("my_task.py")
    assert answer.exit_code == 1
    assert 'must be a file that calls svag_fast.study under if __name__ == "__main__": alone' in answer.output, (
        answer.output
    )
    assert not (file.parent / "runs").exists()


def test_a_script_without_a_guard_may_study_another_file(file):
    script = file.with_name("script.py")
    options = "batch_size=4, lr=0.1, l=1, seeds=1, effective_steps=2, rows=1, jobs=1, progress=False"
    script.write_text(
        f'import svag_fast\nprint(svag_fast.study("my_task.py", out="runs/x", {options}).runs[0].finished)\n'
    )
    done = subprocess.run([sys.executable, script], cwd=file.parent, capture_output=True, text=True, timeout=500)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_a_file_makes_the_same_data_in_every_process_or_is_refused(file):
    """Nobody seeds torch, Python and NumPy here; a generator of the system's entropy can't be."""
    file.write_text(SOURCE.replace("torch.manual_seed(0)", "import random, numpy")
        .replace("torch.randn(64, 8)", "torch.randn(64, 8) + random.random() + numpy.random.rand()"))  # fmt: skip
    tasks = [load_task(f"{file}:task") for _ in range(2)]
    assert torch.equal(tasks[0].train[0], tasks[1].train[0])
    file.write_text(SOURCE.replace("torch.manual_seed(0)", "import os")
        .replace("torch.randn(64, 8)", "torch.randn(64, 8) + os.urandom(1)[0] + os.urandom(1)[0]"))  # fmt: skip
    answer = invoke("my_task.py", *OPTIONS, "--jobs", "1")
    assert answer.exit_code == 1
    said = " ".join(answer.output.split())
    assert "run b4-lr0.1-l1-seed1 failed" in said
    assert "training data: float32 [64, 8] of SHA-256" in said
    assert "Does its code make the same data each time?" in said
