"""The command line: lazy, complete, and the same by either name."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from make_runs import write_run

from svag_fast import __version__
from svag_fast.cli.main import COMMANDS, main


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys\nfrom svag_fast.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch imported for --help'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, short_help) in COMMANDS.items():
        assert name in done.stdout
        assert short_help.split()[0] in done.stdout


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "svag_fast", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("svag_fast")
    assert __version__ in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_of_the_table_loads_and_explains_itself(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"{name} [OPTIONS]" in result.output


def test_unknown_command_is_refused_with_exit_code_2():
    result = CliRunner().invoke(main, ["nonesuch"])
    assert result.exit_code == 2
    assert "nonesuch" in result.output


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "kappa* +- - \\xdf \\udcff"),
        ("latin-1", "kappa* ± - ß \\udcff"),
        ("cp1252", "kappa* ± - ß \\udcff"),
        ("utf-8", "κ* ± ─ ß \\udcff"),
    ],
)
def test_letters_are_spelt_out_where_a_stream_has_none_for_them(encoding, expected):
    assert "κ* ± ─ ß \udcff".encode(encoding, "svag_fast.plain").decode(encoding) == expected


def test_no_text_fails_for_its_letters(tmp_path):
    """Help, tables, verdicts, a prediction and errors on an ASCII stream; and a name that is no text, and looks like
    markup."""
    folder = tmp_path / os.fsdecode(b"runs-\xff-[")
    for seed in range(2):
        for l in (1, 2):
            write_run(folder / "bold]", l=l, seed=seed)
    code = (
        "import sys\nfrom svag_fast.cli.main import main\n"
        "for arguments in (['predict', '--help'], ['report', sys.argv[1]], ['predict', sys.argv[1]],\n"
        "                  ['report', sys.argv[1] + '-ß κ']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: print('exit code', end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "bold]")],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        capture_output=True,
    )
    output = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert output.count("exit code 0") == 3, output + done.stderr.decode("ascii")
    assert output.count("exit code 1") == 1
    assert b"no such folder" in done.stderr
    assert "kappa*" in output


def test_ctrl_c_anywhere_ends_with_the_shells_status(monkeypatch):
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svag_fast.cli.report.make_report", interrupted)
    result = CliRunner().invoke(main, ["report", "."])
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.output
