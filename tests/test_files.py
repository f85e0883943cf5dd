"""Files are either wholly there or untouched."""

import os
from pathlib import Path

import pytest

from svag_fast.files import replace_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_there_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (b"one", b"two"):
        with replace_file(path) as file:
            file.write(text)
        assert path.read_bytes() == text
    assert names(tmp_path) == ["a.json"]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with replace_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def write_half_of_it(path: Path) -> None:
    with replace_file(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half_of_it(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_a_missing_folder_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), replace_file(tmp_path / "nowhere" / "a.json") as file:
        file.write(b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    real = os.fdopen

    def on_a_full_disk(handle: int, mode: str):  # the file lands on a device that is always full
        os.close(handle)
        return real(os.open("/dev/full", os.O_WRONLY), mode)

    monkeypatch.setattr(os, "fdopen", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"), replace_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with replace_file(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
