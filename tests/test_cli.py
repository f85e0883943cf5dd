"""The command line: lazy, complete, and the same by either name."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from svag_fast import __version__, cli


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys\nfrom svag_fast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch imported for --help'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, short_help) in cli.COMMANDS.items():
        assert name in done.stdout
        assert short_help.split()[0] in done.stdout


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "svag_fast", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("svag_fast")
    assert __version__ in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_of_the_table_loads_and_explains_itself(name):
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"{name} [OPTIONS]" in result.output


def test_unknown_command_is_refused_with_exit_code_2():
    result = CliRunner().invoke(cli.main, ["nonesuch"])
    assert result.exit_code == 2
    assert "nonesuch" in result.output
