"""Checkpoints come back to the bit, or are refused with the reason and left alone."""

import os
import tracemalloc
import zipfile

import pytest
import torch

from svag_fast.experiments.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

CONFIG = {"lr": 0.1, "l": 2, "dataset": "digits"}
STATE = {"step": 3, "weights": torch.arange(5000, dtype=torch.float32) / 7, "rows": [{"time": 0.1, "loss": None}]}


def assert_same(got):
    assert torch.equal(got["weights"], STATE["weights"])
    assert {k: v for k, v in got.items() if k != "weights"} == {k: v for k, v in STATE.items() if k != "weights"}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", CONFIG, STATE)
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_comes_back_to_the_bit(path):
    assert_same(load_checkpoint(path, CONFIG))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_every_damage_is_refused_and_the_file_left_alone(path):
    """A flipped byte may hit padding, which is harmless; anywhere else it must be noticed. Cuts always are."""
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        damaged = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        path.write_bytes(damaged)
        try:
            assert_same(load_checkpoint(path, CONFIG))
        except CheckpointError:
            noticed += 1
        assert path.read_bytes() == damaged
    assert noticed > 40
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="left as it is"):
            load_checkpoint(path, CONFIG)


def test_a_foreign_file_is_refused(path):
    torch.save({"state_dict": STATE}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load_checkpoint(path, CONFIG)
    path.write_text("PK but no archive")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint(path, CONFIG)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError):
        load_checkpoint(path, CONFIG)


@pytest.mark.parametrize("part", ["config", "state"])
@pytest.mark.parametrize("content", [None, 3])
def test_a_checkpoint_without_config_or_state_is_refused(path, part, content):
    whole = {"format": "svag_fast checkpoint 1", "config": CONFIG, "state": STATE, part: content}
    torch.save({k: v for k, v in whole.items() if v is not None}, path)
    with pytest.raises(CheckpointError, match="lacks its config or its state"):
        load_checkpoint(path, CONFIG)


def test_a_config_that_explodes_when_it_is_printed_is_refused_without_that(path):
    laughs = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    torch.save({"format": "svag_fast checkpoint 1", "config": {**CONFIG, "lr": laughs}, "state": STATE}, path)
    with pytest.raises(CheckpointError, match="lr is <class 'list'> there"):
        load_checkpoint(path, CONFIG)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data.pkl", bytes(200_000_000))
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_checkpoint(path, CONFIG)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_what_is_no_file_is_refused_and_not_waited_on(path):
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no file, but a folder, a pipe or a device"):
        load_checkpoint(path, CONFIG)


def test_code_in_a_checkpoint_is_never_run(path, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"format": "svag_fast checkpoint 1", "config": CONFIG, "state": Evil()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, CONFIG)
    assert not (tmp_path / "made").exists()


def test_another_run_s_checkpoint_is_refused_with_what_differs(path):
    with pytest.raises(CheckpointError, match=r"lr is 0\.1 there and 0\.2 here"):
        load_checkpoint(path, {**CONFIG, "lr": 0.2})


def test_a_full_disk_leaves_the_last_good_checkpoint(path, monkeypatch):
    """RLIMIT_FSIZE makes a write beyond the limit fail as a full disk does, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_checkpoint(path, CONFIG, {**STATE, "step": 4})
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert_same(load_checkpoint(path, CONFIG))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]
