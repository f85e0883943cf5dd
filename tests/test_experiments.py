"""The grid of runs, end to end in real processes: spread, killed, interrupted, resumed, the same to the bit."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from svag_fast.cli import main
from svag_fast.config import ExperimentConfig
from svag_fast.experiments import ExperimentError, prepare_folder, read_experiment

OPTIONS = ["--batch-size", "4,16", "--l", "1,3", "--seeds", "1", "--effective-steps", "80", "--rows", "12"]
RUNS = {"b4-lr0.1-l1-seed0", "b4-lr0.1-l3-seed0", "b16-lr0.4-l1-seed0", "b16-lr0.4-l3-seed0"}


PATIENCE = 500  # seconds: what takes longer hangs, however busy the machine is


def command(*arguments):
    return [sys.executable, "-m", "svag_fast", "run", *map(str, arguments)]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(*arguments):
    process = start(*arguments)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def result(out):
    """What the experiment measured, timings apart, and every run's weights."""
    found = {}
    for name in RUNS:
        with (out / name / "metrics.csv").open() as file:
            rows = [
                {k: v for k, v in row.items() if k not in ("samples_per_second", "noise_cost")}
                for row in csv.DictReader(file)
            ]
        state = torch.load(out / name / "checkpoint.pt", weights_only=True)["state"]
        found[name] = rows, {k: v.numpy().tobytes() for k, v in state["model"].items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The experiment, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "x"
    output = finish(*OPTIONS, "--out", out, "--jobs", 2)
    assert "4 of 4 runs" in output
    assert "B = 4" in output
    return out


def wait_for(condition, process, timeout=PATIENCE):
    end = time.monotonic() + timeout
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "it took too long to start"
        time.sleep(0.02)


def test_every_run_leaves_its_config_and_metrics(whole):
    assert {folder.name for folder in whole.iterdir() if folder.is_dir()} == RUNS
    found = json.loads((whole / "summary.json").read_text())["batch_sizes"]
    assert [verdict["runs"]["finished"] for verdict in found.values()] == [2, 2]
    assert (whole / "convergence.png").read_bytes().startswith(b"\x89PNG")
    for name in RUNS:
        config = json.loads((whole / name / "config.json").read_text())
        assert {
            "dataset",
            "model",
            "batch_size",
            "lr",
            "weight_decay",
            "l",
            "seed",
            "effective_steps",
            "schedule",
        } <= set(config)
        assert config["versions"]["torch"] == torch.__version__
        assert "commit" in config
    rows, _ = result(whole)["b16-lr0.4-l3-seed0"]
    assert float(rows[-1]["effective_step"]) == 20
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_killed_at_random_moments_and_resumed_it_is_the_same_to_the_bit(whole, tmp_path):
    out = tmp_path / "x"
    moments = random.Random(4)
    arguments = [*OPTIONS, "--out", out, "--jobs", 1]
    for stop in (kill_all, press_ctrl_c, subprocess.Popen.kill):  # the last leaves workers, who notice, save and leave
        begun = time.time()
        process = start(*arguments, "--checkpoint-seconds", 0)
        wait_for(lambda: any(file.stat().st_mtime > begun for file in out.glob("*/checkpoint.pt")), process)  # noqa: B023
        time.sleep(moments.uniform(0, 1.0))
        assert process.poll() is None, "it was done before it could be stopped"
        stop(process)
        process.communicate(timeout=PATIENCE)
        arguments = ["--resume", "--out", out, "--jobs", 2]
    finish_when_free(out)
    assert result(out) == result(whole)


def kill_all(process):
    os.killpg(process.pid, signal.SIGKILL)


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does


def finish_when_free(out):
    """Resume; an orphaned worker may still be saving its run."""
    for _ in range(50):
        process = start("--resume", "--out", out, "--jobs", 2)
        output, _ = process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            return
        assert "being trained by another process" in output, output
        time.sleep(0.2)
    raise AssertionError(output)


@pytest.mark.parametrize("stop", [press_ctrl_c, subprocess.Popen.terminate], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_ends_all_workers_keeps_what_is_done_and_says_how_to_go_on(tmp_path, stop):
    out = tmp_path / "x"
    process = start(*OPTIONS, "--out", out, "--jobs", 2)
    wait_for(lambda: len(list(out.glob("*/config.json"))) >= 2, process)
    stop(process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "--resume" in output
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):
        wait_for_end_of_group(process.pid)
    assert any(out.glob("*/checkpoint.pt"))


def wait_for_end_of_group(group):
    for _ in range(1000):
        os.killpg(group, 0)
        time.sleep(0.1)


def test_a_worker_s_error_stops_the_others_and_is_told(whole, tmp_path):
    import shutil

    out = tmp_path / "x"
    shutil.copytree(whole, out)
    damaged = out / "b4-lr0.1-l3-seed0" / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    answer = CliRunner().invoke(main, ["run", "--resume", "--out", str(out)])
    assert answer.exit_code == 1
    assert "b4-lr0.1-l3-seed0 failed" in answer.output
    assert "damaged" in answer.output
    assert damaged.read_bytes() == (whole / "b4-lr0.1-l3-seed0" / "checkpoint.pt").read_bytes()[:-50]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vgg3"], "no model is called"),
        (["--l", "1,x"], "'x' is not a number"),
        (["--l", "0.5"], "l must be a number >= 1"),
        (["--lr", "-1"], "lr must be"),
        (["--dataset", "nonesuch"], "nonesuch"),
        (["--device", "nonesuch"], "nonesuch"),
        (["--backend", "nonesuch"], "nonesuch"),
        (["--epochs", "1", "--effective-steps", "3"], "epochs"),
        (["--resume"], "no experiment to resume"),
        (["--init", "zero"], "'zero' is not one of"),
        (["--metric", "accuracy"], "metric must be a column of metrics.csv, not 'accuracy'"),
        (["--margin", "nsr=1"], "a margin is given for nsr"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path, arguments, message):
    answer = CliRunner().invoke(main, ["run", "--out", str(tmp_path / "x"), *arguments])
    assert answer.exit_code in (1, 2)
    assert message in " ".join(answer.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_where_every_run_diverges_the_exit_status_is_3(tmp_path):
    options = ["--model", "preresnet8-none", "--batch-size", "8", "--lr", "1e6", "--l", "1", "--seeds", "1"]
    process = start(*options, "--effective-steps", "40", "--rows", "20", "--out", tmp_path / "x")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, output
    assert "Every run diverged" in output
    assert "nan" not in output


def test_an_unknown_key_in_the_config_file_is_refused(tmp_path):
    (tmp_path / "c.toml").write_text("learning_rate = 0.1\n")
    answer = CliRunner().invoke(main, ["run", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "x")])
    assert answer.exit_code == 2
    assert "unknown setting 'learning_rate'" in answer.output
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_not_written_to_without_resume(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ExperimentError, match="not empty"):
        prepare_folder(tmp_path, ExperimentConfig(), resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_resume_refuses_another_experiment_s_options(tmp_path):
    prepare_folder(tmp_path, ExperimentConfig(), resume=False)
    assert read_experiment(tmp_path) == ExperimentConfig()
    with pytest.raises(ExperimentError, match=r"seeds is 3 there and 2 here"):
        prepare_folder(tmp_path, ExperimentConfig(seeds=2), resume=True)


def test_resume_clears_what_a_killed_process_left_half_written(tmp_path):
    prepare_folder(tmp_path, ExperimentConfig(), resume=False)
    leftover = tmp_path / ".convergence.png.0123abcd.tmp"
    leftover.write_bytes(b"half a picture")
    prepare_folder(tmp_path, ExperimentConfig(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    answer = CliRunner().invoke(main, ["run", *OPTIONS, "--out", str(tmp_path / "file" / "x")])
    assert answer.exit_code == 1
    assert "Not a directory" in answer.output
