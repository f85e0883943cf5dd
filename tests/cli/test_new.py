"""`svag-fast new`: a task's file that runs as it is; no file is ever overwritten."""

from click.testing import CliRunner

from svag_fast.cli.main import main

QUICK = ["--batch-size", "4", "--l", "1", "--seeds", "1", "--effective-steps", "2", "--weight-decay", "0"]


def test_the_file_passes_the_check(tmp_path):
    file = tmp_path / "my_task.py"
    result = CliRunner().invoke(main, ["new", str(file)])
    assert result.exit_code == 0, result.output
    assert result.output == f"wrote {file}. Try it: svag-fast check {file}\n"
    assert f"svag-fast run {file} " in file.read_text()
    result = CliRunner().invoke(main, ["check", str(file), *QUICK])
    assert result.exit_code == 0, result.output
    assert "1,437 training and 360 test samples, 5,178 trained parameters" in result.output
    assert "per-sample norms: of all layers: 2 Conv2d, 2 GroupNorm, 1 Linear" in result.output
    assert "deterministic: yes" in result.output


def test_a_file_that_is_there_stays(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text("mine")
    result = CliRunner().invoke(main, ["new", str(file)])
    assert result.exit_code == 1
    assert "FILE must be a new one" in " ".join(result.output.split())
    assert file.read_text() == "mine"


def test_a_name_that_no_task_has_and_a_folder_that_is_not_there_are_refused(tmp_path):
    for name, code, message in (("my_task.txt", 2, "ends in .py"), ("none/my_task.py", 1, "can't be written")):
        result = CliRunner().invoke(main, ["new", str(tmp_path / name)])
        assert result.exit_code == code
        assert message in result.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
