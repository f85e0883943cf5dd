"""One run: the right process, honest rows, the same bits however often it is interrupted."""

import csv
import dataclasses
import errno
import math
import os
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from svag_fast.analysis.runs import load_run
from svag_fast.experiments.checkpoint import CheckpointError
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.ranges import ConfigError
from svag_fast.experiments.run_folder import COLUMNS, columns_of
from svag_fast.experiments.run_output import Events, RunBusyError, alone_in
from svag_fast.experiments.training import Training, make_engine, train
from svag_fast.ops.step import svag_coefficients

BASE = RunConfig(
    model="digits-net", label_noise=0, init="shared", weight_decay=0.02,
    batch_size=8, lr=0.1, l=2, seed=0, effective_steps=12, rows=6, evaluations=3,
)  # fmt: skip
DIGITS = load_dataset("digits")
TIMINGS = ("samples_per_second", "noise_cost")


def config(**changes):
    return dataclasses.replace(BASE, **changes)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def own_grads(training, images, labels):
    """Each sample's own gradient [B, parameters], float64."""
    params = training.params
    rows = []
    for image, label in zip(images, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(training.model(image[None]), label[None]), params)
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"]


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def plain_gradients(training, images, labels):
    losses = [F.cross_entropy(training.model(x), y) for x, y in zip(images.chunk(2), labels.chunk(2), strict=True)]
    return losses, [torch.autograd.grad(loss, training.params) for loss in losses]


@pytest.mark.parametrize(
    ("l", "sampling"), [(1, "replacement"), (2, "replacement"), (5.5, "distinct"), (2, "shuffle"), (1, "fixed")]
)
def test_steps_are_svag_s_and_rows_are_the_means_over_their_interval(l, sampling):
    """Three steps redone in plain PyTorch: x -= (lr/l)(c1 g1 + c2 g2 + weight_decay x), G, N, R and losses by hand."""
    ours, plain = (Training(config(l=l, sampling=sampling), DIGITS) for _ in range(2))
    c1, c2 = svag_coefficients(l)
    sums = {"grad_sq_norm": 0.0, "noise_trace": 0.0, "weight_sq_norm": 0.0, "amplified_loss": 0.0}
    for _ in range(3):
        images, labels = plain._two_batches()
        (loss1, loss2), (grads1, grads2) = plain_gradients(plain, images, labels)
        g1, g2, x = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (grads1, grads2, plain.params))
        # All pairs of the 2B samples for G; each batch's own scatter for N.
        B, n = len(labels) // 2, len(DIGITS.train_labels)
        left = 1 if sampling == "replacement" else (n - B) / n
        g = own_grads(plain, images, labels)
        noise = [(rows - rows.mean(0)).square().sum() / (B - 1) / B * left for rows in (g[:B], g[B:])]
        across = g1 @ g2
        if sampling == "shuffle":  # halves of one draw: E⟨g1, g2⟩ is Tr Σ₁/(n - 1) below G
            across = across + (noise[0] + noise[1]) / 2 / left * B / n
        within = g1.square().sum() - noise[0] + g2.square().sum() - noise[1]
        G, N = (B * across + (B - 1) * within / 2) / (2 * B - 1), (noise[0] + noise[1]) / 2
        if sampling == "fixed":  # the second batch alone, which is no part of the epoch
            G, N = g2.square().sum() - noise[1], noise[1]
        sums["grad_sq_norm"] += float(G) / 3
        sums["noise_trace"] += float(N) / 3
        sums["weight_sq_norm"] += float(x.square().sum()) / 3
        sums["amplified_loss"] += (c1 * loss1 + c2 * loss2).item() / 3
        with torch.no_grad():
            for p, a, b in zip(plain.params, grads1, grads2, strict=True):
                p -= 0.1 / l * (c1 * a + c2 * b + 0.02 * p)
        ours.take_step()
    ours.seconds = 1.0
    ours.end_row()
    row = ours.rows[-1]
    assert {name: row[name] for name in sums} == pytest.approx(sums, rel=1e-4)
    assert row["nsr"] == pytest.approx(row["noise_trace"] / row["grad_sq_norm"])
    assert row["time"] == pytest.approx(3 * 0.1 / l)
    assert row["effective_step"] == 3 / l
    assert row["train_loss"] is None
    for p, expected in zip(ours.params, plain.params, strict=True):
        assert (p - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("engine", ["torch", "fused"])
def test_images_of_bytes_train_as_the_same_images_standardised_before(engine):
    """To the bit: batches and evaluations; in the row, all but the timings."""
    images = torch.randint(256, (2, 1437, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor([[[120.0]]]), torch.tensor([[[70.0]]])
    small = dataclasses.replace(DIGITS, train_images=images[0], test_images=images[1, :360], pixels=pixels)
    found = []
    for data in (small, small.standardised()):
        (run,) = (made := make_engine([config(engine=engine, effective_steps=1, evaluations=1)], data)).runs
        while not run.step:
            made.advance()
        run.seconds = 1.0
        run.end_row()
        found.append([{k: v for k, v in row.items() if k not in TIMINGS} for row in run.rows])
    assert found[0] == found[1]
    assert found[0][-1]["test_loss"] != found[0][0]["test_loss"]


@pytest.mark.parametrize("sampling", ["replacement", "distinct", "halves", "shuffle", "fixed"])
def test_sgd_s_path_does_not_depend_on_the_batches_that_only_measure_its_noise(sampling):
    one, other = (Training(config(l=1, sampling=sampling), DIGITS) for _ in range(2))
    other.streams.generators[1].manual_seed(12345)
    for _ in range(4):
        one.take_step()
        other.take_step()
    # Halves of one draw come from the first stream alone.
    assert torch.equal(one.raw_stats, other.raw_stats) == (sampling == "halves")
    assert all(torch.equal(a, b) for a, b in zip(one.params, other.params, strict=True))


def test_all_runs_start_from_the_same_weights_and_seeds_and_l_draw_their_own_batches():
    runs = [Training(config(**c), DIGITS) for c in ({}, {"seed": 1}, {"l": 4}, {"batch_size": 16})]
    first = runs[0].model.state_dict()
    for run in runs[1:]:
        assert all(torch.equal(first[k], v) for k, v in run.model.state_dict().items())
    draws = [tuple(run._two_batches()[1].tolist()) for run in runs]
    assert len(set(draws)) == len(draws)


def test_own_initial_weights_differ_by_run_and_the_fixed_head_does_not():
    changes = ({}, {"seed": 1}, {"l": 4}, {"batch_size": 16})
    shared = Training(config(), DIGITS).model.state_dict()
    own = [Training(config(init="own", **c), DIGITS).model.state_dict() for c in changes]
    again = Training(config(init="own"), DIGITS).model.state_dict()
    assert all(torch.equal(own[0][k], v) for k, v in again.items())
    trained = [k for k in shared if k != "head"]
    for i, one in enumerate(own):
        assert torch.equal(one["head"], shared["head"])
        for other in [shared, *own[:i]]:
            assert not any(torch.equal(one[k], other[k]) for k in trained)
        for k in trained:
            assert float(one[k].std() / shared[k].std()) == pytest.approx(1, abs=0.3)


def test_a_trained_head_is_part_of_the_initial_weights():
    one, other = (Training(config(model="mlp8-ln-plain", init="own", seed=seed), DIGITS) for seed in (0, 1))
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    before = one.model.head.bias.clone()
    one.take_step()
    assert not torch.equal(one.model.head.bias, before)


def test_a_net_of_tokens_is_refused_on_images():
    with pytest.raises(ValueError, match="model must be one for images, got 'gpt1x12-ln', which takes tokens"):
        Training(config(model="gpt1x12-ln"), DIGITS)


def test_evaluated_rows_hold_the_plain_mean_loss_and_accuracy_of_all_the_data(tmp_path):
    assert train(config(), tmp_path)
    run = Training(config(), DIGITS)
    run.model.load_state_dict(weights(tmp_path))
    last = rows(tmp_path)[-1]
    for which, images, labels in (
        ("train", DIGITS.train_images, DIGITS.train_labels),
        ("test", DIGITS.test_images, DIGITS.test_labels),
    ):
        with torch.no_grad():
            logits = run.model(images)
        assert float(last[f"{which}_loss"]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        assert float(last[f"{which}_accuracy"]) == float((logits.argmax(1) == labels).double().mean())


def test_rows_of_a_run(tmp_path):
    assert train(config(), tmp_path)
    got = rows(tmp_path)
    assert list(got[0]) == [c for c in COLUMNS if c not in TIMINGS]
    assert [float(row["effective_step"]) for row in got] == [0, 2, 4, 6, 8, 10, 12]
    assert [row["test_accuracy"] != "" for row in got] == [True, False, True, False, True, False, True]
    assert [float(row["lr"]) for row in got] == pytest.approx([0.1] * 5 + [0.1, 0.01])
    assert float(got[-1]["time"]) == pytest.approx(sum(config().lr_at(k) / 2 for k in range(24)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"l": 1, "model": "preresnet8-bn"},
        {"sampling": "distinct"},
        {"sampling": "shuffle", "batch_size": 64},
        {"sampling": "fixed", "l": 1, "batch_size": 150},
    ],
    ids=str,
)
def test_stopped_anywhere_and_resumed_it_is_the_same_run_to_the_bit(tmp_path, changes):
    changes = {**changes, "effective_steps": 3 if "model" in changes else 12}
    assert train(config(**changes), tmp_path / "whole")
    generator = random.Random(0)
    for _ in range(100):
        countdown = iter([False] * generator.randrange(7))
        if train(config(**changes), tmp_path / "parts", should_stop=lambda left=countdown: next(left, True)):
            break
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_cudnn_has_to_add_in_the_same_order_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert train(config(effective_steps=1), tmp_path)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_a_complete_run_is_left_alone(tmp_path):
    assert train(config(), tmp_path)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert train(config(), tmp_path)
    assert before == {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}


def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_overwritten(tmp_path):
    train(config(), tmp_path, should_stop=lambda: True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"seed is 0 there and 1 here"):
        train(config(seed=1), tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        train(config(), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before["checkpoint.pt"][:-100]
    assert (tmp_path / "metrics.csv").read_bytes() == before["metrics.csv"]


def test_a_disk_that_fills_up_leaves_a_checkpoint_to_continue_from(tmp_path, monkeypatch):
    assert train(config(), tmp_path / "whole")
    train(config(), tmp_path / "run", should_stop=lambda: True)
    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            train(config(), tmp_path / "run")
    assert train(config(), tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_two_processes_never_train_the_same_run(tmp_path):
    with alone_in(tmp_path), pytest.raises(RunBusyError, match="another process"):
        train(config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_is_trained_on_with_a_warning(tmp_path, monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(RuntimeWarning, match="has no locks"):
        assert not train(config(), tmp_path, should_stop=lambda: True)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
    with pytest.raises(OSError, match="broken disk"):
        train(config(), tmp_path)


def test_an_error_inside_is_not_taken_for_a_lock_that_is_held(tmp_path):
    with pytest.raises(BlockingIOError, match="a full pipe"), alone_in(tmp_path):
        raise BlockingIOError("a full pipe")


@pytest.mark.parametrize("seconds", [math.nan, -1.0, "5"])
def test_checkpoint_seconds_out_of_range_are_refused_before_anything_is_written(tmp_path, seconds):
    with pytest.raises(ConfigError, match="checkpoint_seconds must be"):
        train(config(), tmp_path / "x", checkpoint_seconds=seconds)
    assert not (tmp_path / "x").exists()


def test_a_run_whose_folder_is_a_symbolic_link_is_trained_where_it_points(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    assert train(config(), tmp_path / "here")
    assert (tmp_path / "here").is_symlink()
    assert train(config(), tmp_path / "there")
    assert (tmp_path / "there" / "metrics.csv").exists()


@pytest.mark.parametrize("calls", [["rename", "replace"], ["fsync"]], ids=str)
def test_refused_at_any_call_that_makes_a_file_it_is_whole_in_the_end(tmp_path, monkeypatch, calls):
    """The disk refuses call number 1, 2, ... of os.fsync, or of Path.replace, for good; then it has room again."""
    short = config(effective_steps=2, rows=1, evaluations=1)
    assert train(short, tmp_path / "whole")
    for number in range(8):
        folder = tmp_path / str(number)
        with monkeypatch.context() as broken:
            left = iter([False] * number)
            refuse_after(broken, calls, left)
            try:
                assert train(short, folder)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
        assert train(short, folder)
        assert_same_run(tmp_path / "whole", folder)
        assert (folder / "config.json").exists()
        assert not list(folder.glob(".*"))
    assert number >= 3


def refuse_after(patch, calls, left):
    owner, name = (os, "fsync") if calls == ["fsync"] else (Path, "replace")
    real = getattr(owner, name)

    def call(*arguments):
        if next(left, True):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("step"), "stands at step None of 24"),
        (lambda state: state.update(step=10**6), "stands at step 1000000 of 24"),
        (lambda state: state.update(step=-1), "stands at step -1"),
        (lambda state: state.pop("rows"), "no rows"),
        (lambda state: state["rows"][0].pop("lr"), "no rows"),
        (lambda state: state.pop("model"), r"no whole state of this run \(KeyError\('model'\)"),
        (lambda state: state.pop("streams"), "no whole state"),
        (lambda state: state.update(losses=torch.zeros(1, dtype=torch.float64).expand(10**9)), "losses must be"),
        (lambda state: state.update(raw_stats=3.0), "no whole state"),
    ],
)
def test_a_checkpoint_with_half_a_state_is_refused(tmp_path, change, message):
    train(config(), tmp_path, should_stop=lambda: True)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change(content["state"])
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(config(), tmp_path)
    assert path.read_bytes() == before


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".checkpoint.pt.0123abcd.tmp").write_text("half")
    train(config(), tmp_path, should_stop=lambda: True)
    assert not list(tmp_path.glob(".*"))


def test_tensorboard_gets_every_row_once_also_across_an_interruption(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    countdown = iter([False] * 9)
    assert not train(config(), tmp_path, tensorboard=True, should_stop=lambda: next(countdown, True))
    assert train(config(), tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    got = [(event.step, event.value) for event in events.Scalars("weight_sq_norm")]
    expected = [(round(float(row["effective_step"])), float(row["weight_sq_norm"])) for row in rows(tmp_path)]
    assert got == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "step" not in events.Tags()["scalars"]
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = HParamsPluginData.FromString(hparams).session_start_info.hparams
    assert (found["l"].number_value, found["model"].string_value) == (2, "digits-net")


def test_tensorboards_table_has_the_columns_of_the_task(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for place, names in enumerate(((), ("f1",))):
        folder = tmp_path / str(place)
        folder.mkdir()
        Events(folder, {"l": 2}, columns_of(names)).write([])
        events = accumulator.EventAccumulator(str(folder)).Reload()
        content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
        found = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
        assert found == {"train_loss", "test_loss", "nsr"} | {
            f"{part}_{n}" for n in names for part in ("train", "test")
        }


def test_a_complete_run_without_events_gets_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(config(), tmp_path)
    assert train(config(), tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [0, 4, 8, 12]


DIVERGING = {"model": "preresnet8-none", "lr": 1e6, "effective_steps": 40, "rows": 20, "evaluations": 20}


def test_a_run_that_diverges_stops_at_the_first_row_that_shows_it(tmp_path):
    """Its last row alone has a number that is not finite; it is complete, and is left alone when resumed."""
    assert train(config(**DIVERGING), tmp_path)
    measured = [
        (row["train_loss"], row["amplified_loss"], row["test_loss"], row["grad_sq_norm"]) for row in rows(tmp_path)
    ]
    finite = [all(math.isfinite(float(cell)) for cell in cells if cell) for cells in measured]
    assert finite == [True] * (len(finite) - 1) + [False]
    assert len(finite) < 20
    before = (tmp_path / "metrics.csv").read_bytes()
    steps = []
    assert train(config(**DIVERGING), tmp_path, on_progress=steps.append)
    assert steps == []
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert load_run(tmp_path).diverged_at == float(rows(tmp_path)[-1]["effective_step"])
    assert not load_run(tmp_path).finished


@pytest.mark.parametrize(
    "column", ["train_loss", "amplified_loss", "test_loss", "grad_sq_norm", "noise_trace", "weight_sq_norm"]
)
def test_any_loss_weight_g_or_n_that_is_not_finite_is_a_divergence(column):
    run = Training(config(), DIGITS)
    assert not run.diverged
    for value in (math.nan, math.inf, -math.inf):
        run.rows[-1] = run.rows[-1] | {column: value}
        assert run.diverged


def test_rows_say_where_the_noise_comes_from_and_what_it_cost():
    source = {m: Training(config(model=m), DIGITS).rows[0] for m in ("digits-net", "preresnet8-bn")}
    assert source["digits-net"]["noise_source"] == "per_sample"
    assert math.isfinite(source["digits-net"]["noise_cost"])
    assert (source["preresnet8-bn"]["noise_source"], source["preresnet8-bn"]["noise_cost"]) == ("two_batches", 0.0)
    sgd = Training(config(model="preresnet8-bn", l=1), DIGITS)
    assert sgd.rows[0]["noise_cost"] == 1.0
    one = Training(config(batch_size=1), DIGITS)
    one.take_step()
    one.seconds = 1.0
    one.end_row()
    assert one.rows[-1]["noise_source"] == "two_batches"
