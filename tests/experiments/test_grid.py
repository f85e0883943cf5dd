"""The grid of runs, end to end in real processes: spread, killed, interrupted, resumed, the same to the bit."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from svag_fast.cli.main import main
from svag_fast.experiments.config import ExperimentConfig
from svag_fast.experiments.experiment_folder import ExperimentError, prepare_folder, read_experiment
from svag_fast.experiments.run_output import RunBusyError, alone_in
from svag_fast.experiments.task_file import load_task
from svag_fast.experiments.training import train

OPTIONS = ["--batch-size", "4,16", "--lr", "0.1", "--l", "1,3", "--seeds", "2", "--effective-steps", "4000"]
OPTIONS += ["--rows", "100", "--evaluations", "10", "--replicas", "2"]
RUNS = {
    f"{kind}-seed{seed}" for kind in ("b4-lr0.1-l1", "b4-lr0.1-l3", "b16-lr0.4-l1", "b16-lr0.4-l3") for seed in (0, 1)
}


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
        # What a shell's background job ignores, and nohup's, its children would ignore too.
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)],
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
    assert "8 of 8 runs" in output
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
    assert [verdict["runs"]["finished"] for verdict in found.values()] == [4, 4]
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
    assert float(rows[-1]["effective_step"]) == 1000
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_killed_at_random_moments_and_resumed_it_is_the_same_to_the_bit(whole, tmp_path):
    out = tmp_path / "x"
    moments = random.Random(4)
    arguments = [*OPTIONS, "--out", out]
    # The last leaves workers, who notice, save and leave.
    for stop, jobs in ((kill_all, 1), (press_ctrl_c, 2), (subprocess.Popen.kill, 1)):
        begun = time.time()
        process = start(*arguments, "--checkpoint-seconds", 0, "--jobs", jobs)
        wait_for(lambda: any(file.stat().st_mtime > begun for file in out.glob("*/checkpoint.pt")), process)  # noqa: B023
        time.sleep(moments.uniform(0, 1.0))
        assert process.poll() is None, "it was done before it could be stopped"
        stop(process)
        output, _ = process.communicate(timeout=PATIENCE)
        if stop is press_ctrl_c:
            assert_stopped(process, output, 130)
        arguments = ["--resume", "--out", out]
    finish_when_free(out)
    assert result(out) == result(whole)


def kill_all(process):
    os.killpg(process.pid, signal.SIGKILL)


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does


def lose_terminal(process):
    os.killpg(process.pid, signal.SIGHUP)  # as the system does to all of them


def finish_when_free(out):
    """Resume; an orphaned worker may still be saving its run."""
    for _ in range(50):
        process = start("--resume", "--out", out, "--jobs", 1)
        output, _ = process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            return
        assert "being trained by another process" in output, output
        time.sleep(0.2)
    raise AssertionError(output)


@pytest.mark.parametrize(
    ("stop", "status"),
    [(subprocess.Popen.terminate, 143), (lose_terminal, 129)],
    ids=["SIGTERM", "SIGHUP"],
)
def test_stopping_ends_all_workers_keeps_what_is_done_and_says_how_to_continue(tmp_path, stop, status):
    out = tmp_path / "x"
    endless = ["--effective-steps", "10000000"]  # not done before it is stopped, however busy the machine is
    process = start(*OPTIONS, *endless, "--out", out, "--jobs", 2)
    wait_for(lambda: len(list(out.glob("*/config.json"))) >= 2, process)
    stop(process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert_stopped(process, output, status)
    assert any(out.glob("*/checkpoint.pt"))


def assert_stopped(process, output, status):
    assert process.returncode == status
    assert "--resume" in output
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):
        wait_for_end_of_group(process.pid)


OWN = """
import multiprocessing, torch, svag_fast

x = torch.randn(64, 8)
with multiprocessing.get_context("fork").Pool(1) as pool:  # as a task may that reads its data in processes
    y = torch.tensor(pool.map(int, [i % 3 for i in range(64)]))


def task():
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    model = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(), torch.nn.Linear(8, 3))
    return svag_fast.Task(model=model, train=(x, y), test=(x, y), loss=loss)
"""


def test_a_task_s_file_is_stopped_by_ctrl_c_and_continued_to_the_bit(tmp_path):
    file, out = tmp_path / "my task.py", tmp_path / "an experiment"
    file.write_text(OWN)
    options = ["--batch-size", 4, "--lr", 0.1, "--l", 1, "--seeds", 1, "--effective-steps", 500, "--rows", 4]
    process = start(file, *options, "--out", out, "--jobs", 1, "--checkpoint-seconds", 0)
    wait_for(lambda: list(out.glob("*/checkpoint.pt")), process)
    press_ctrl_c(process)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    said = f"Continue with: svag-fast run '{file}:task' --resume --out '{out}'"
    assert "".join(said.split()) in re.sub(r"[\s│]+", "", output)
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):
        wait_for_end_of_group(process.pid)
    (checkpoint,) = out.glob("*/checkpoint.pt")
    (run,) = read_experiment(out).runs()
    task = load_task(run.task)
    assert torch.load(checkpoint, weights_only=True)["state"]["step"] < run.steps
    train(run, checkpoint.parent, task=task)
    train(run, tmp_path / "whole", task=task)
    resumed, whole = (torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
        for folder in (checkpoint.parent, tmp_path / "whole"))  # fmt: skip
    assert {k: v.tolist() for k, v in resumed["model"].items()} == {k: v.tolist() for k, v in whole["model"].items()}


STUBBORN = """
import os, signal, time
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
os.kill(child, signal.SIGTERM)  # as a pool ends its processes
if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGTERM:
    raise RuntimeError("it lives on")
"""


def test_a_task_s_own_processes_end_when_asked_to(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN + STUBBORN)
    options = ["--batch-size", 4, "--lr", 0.1, "--l", 1, "--seeds", 1, "--effective-steps", 2, "--rows", 2]
    process = start(file, *options, "--out", tmp_path / "x", "--jobs", 1)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


def wait_for_end_of_group(group):
    for _ in range(1000):
        os.killpg(group, 0)
        time.sleep(0.1)


def copy_of(whole, out):
    shutil.copytree(whole, out)
    return out


def resume(out):
    answer = CliRunner().invoke(main, ["run", "--resume", "--out", str(out)])
    return answer, " ".join(answer.output.replace("│", " ").split())


def test_a_worker_s_error_stops_the_others_and_is_told(whole, tmp_path):
    out = copy_of(whole, tmp_path / "x")
    with alone_in(out / "b4-lr0.1-l3-seed0"):
        answer, output = resume(out)
    assert answer.exit_code == 1
    assert "b4-lr0.1-l3-seed0 to b4-lr0.1-l3-seed1 failed" in output
    assert "being trained by another process" in output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("checkpoint", "run b4-lr0.1-l3-seed0 can't continue: .* is damaged"),
        ("foreign garbage", "not JSON .* Move what is no run of this experiment"),
        ("foreign model", "belong in folders of their own"),
    ],
)
def test_what_can_t_be_resumed_or_reported_is_refused_before_anything_is_trained(whole, tmp_path, damage, message):
    out = copy_of(whole, tmp_path / "x")
    unfinished = out / "b16-lr0.4-l1-seed0"
    shutil.rmtree(unfinished)
    if damage == "checkpoint":
        path = out / "b4-lr0.1-l3-seed0" / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path = out / "mine" / "config.json"
        path.parent.mkdir()
        other = json.loads((out / "b4-lr0.1-l3-seed0" / "config.json").read_text()) | {"model": "vgg11-gn", "seed": 7}
        path.write_text("{" if damage == "foreign garbage" else json.dumps(other))
    before = path.read_bytes()
    answer, output = resume(out)
    assert answer.exit_code == 1
    assert re.search(message, output), output
    assert path.read_bytes() == before
    assert not unfinished.exists()


def test_what_follows_from_the_checkpoints_is_made_again(whole, tmp_path):
    """Missing, stale and damaged files of complete runs; a folder that only looks like a leftover is left alone."""
    out = copy_of(whole, tmp_path / "x")
    (out / "b4-lr0.1-l1-seed0" / "metrics.csv").unlink()
    stale = out / "b4-lr0.1-l3-seed0" / "metrics.csv"
    stale.write_text("".join(stale.read_text().splitlines(keepends=True)[:-3]))
    (out / "b16-lr0.4-l1-seed0" / "config.json").write_text("{")
    (out / "b16-lr0.4-l3-seed0" / "config.json").unlink()
    for folder in (out, out / "b4-lr0.1-l1-seed0"):
        (folder / ".mine.tmp").mkdir()
    answer, output = resume(out)
    assert answer.exit_code == 0, output
    for name in RUNS:
        for file in ("metrics.csv", "config.json"):
            assert (out / name / file).read_bytes() == (whole / name / file).read_bytes()
    assert (out / ".mine.tmp").is_dir()


def test_one_command_line_starts_a_job_and_continues_it(whole, tmp_path):
    out = copy_of(whole, tmp_path / "x")
    config = ExperimentConfig.from_dict(json.loads((out / "experiment.json").read_text()))
    for place in (tmp_path / "new", tmp_path / "empty", tmp_path / "killed"):
        if place.name != "new":
            place.mkdir()
        if place.name == "killed":  # while the first file was written
            (place / ".experiment.json.0123abcd.tmp").write_text("{")
        prepare_folder(place, config, resume=True)
        assert [file.name for file in place.iterdir()] == ["experiment.json"]
        assert read_experiment(place) == config
    same = [*OPTIONS, "--out", str(out), "--resume"]
    answer = CliRunner().invoke(main, ["run", *same])
    assert answer.exit_code == 0, answer.output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(ExperimentError, match="no experiment to resume"):
        prepare_folder(tmp_path / "other", config, resume=True)


def test_workers_end_with_their_parent_however_it_ends(tmp_path):
    """A run of 10 million steps and one row, whose worker would not notice for an hour, and its lock is free again."""
    out = tmp_path / "x"
    options = [
        "--batch-size",
        "4",
        "--lr",
        "0.1",
        "--l",
        "1000000",
        "--seeds",
        "1",
        "--effective-steps",
        "10",
        "--rows",
        "1",
    ]
    process = start(*options, "--out", out, "--jobs", 1)
    run = out / "b4-lr0.1-l1e+06-seed0"
    wait_for((run / "config.json").exists, process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    for _ in range(1000):
        try:
            with alone_in(run):
                break
        except RunBusyError:
            time.sleep(0.1)
    else:
        raise AssertionError("the worker trains on")
    with pytest.raises(ProcessLookupError):
        wait_for_end_of_group(process.pid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vgg3"], "model must be digits-mlp"),
        (["--l", "1,x"], "'x' is not a number"),
        (["--l", "1,2/1"], "l must be one list, or 3: one for each batch size"),
        (["--replicas", "some"], "replicas must be auto, off or an integer from 1 to 10,000, got 'some'"),
        (["--replicas", "2", "--model", "preresnet8-gn"], "--replicas off trains each run alone"),
        (["--stat-every", "2", "--model", "preresnet8-gn"], "stat_every must be 1 where runs are not trained as"),
        (["--label-noise", "2"], "label_noise must be a number from 0 to 1"),
        (["--l", "0.5"], "l must be a number from 1 to 1e+06"),
        (["--l", "1e21"], "l must be a number from 1 to 1e+06"),
        (["--epochs", "1e300"], "epochs must be a number"),
        (["--seeds", "1000000000"], "seeds must be"),
        (["--model", "preresnet999998-gn"], "depth must be"),
        (["--checkpoint-seconds", "nan"], "checkpoint_seconds must be"),
        (["--jobs", "100000"], "jobs must be"),
        (["--lr", "-1"], "lr must be"),
        (["--dataset", "nonesuch"], "nonesuch"),
        (["--device", "nonesuch"], "nonesuch"),
        (["--backend", "nonesuch"], "nonesuch"),
        (["--epochs", "1", "--effective-steps", "3"], "epochs"),
        (["--init", "zero"], "'zero' is not one of"),
        (["--metric", "accuracy"], "metric must be a column of metrics.csv, got 'accuracy'"),
        (["--margin", "nsr=1"], "margins must be for metrics that are judged"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path, arguments, message):
    answer = CliRunner().invoke(main, ["run", "--out", str(tmp_path / "x"), *arguments])
    assert answer.exit_code in (1, 2)
    assert message in " ".join(answer.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_where_every_run_diverges_the_exit_status_is_3(tmp_path):
    options = ["--model", "mlp16-none", "--batch-size", "8", "--lr", "1e6", "--l", "1", "--seeds", "1"]
    options += ["--effective-steps", "40", "--rows", "20", "--out", str(tmp_path / "x")]
    answer = CliRunner().invoke(main, ["run", *options])
    assert answer.exit_code == 3, answer.output
    assert "Every run diverged" in answer.output
    assert "nan" not in answer.output


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
    with pytest.raises(ExperimentError, match=r"seeds is 24 there and 2 here"):
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
