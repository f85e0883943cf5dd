"""The command line: `svag-fast COMMAND`. No command's module is imported before that command is used."""

from __future__ import annotations

import codecs
import importlib
import signal
import sys
from typing import Any

import rich_click as click

from svag_fast import __version__
from svag_fast.cli.stopped import Stopped

# command -> (module:attribute, the line that `svag-fast --help` shows)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("svag_fast.cli.run:run", "Train with SGD and SVAG: does SVAG converge, does SGD match its limit?"),
    "new": ("svag_fast.cli.new:new", "Write a task's file to begin from: your network, your data."),
    "check": ("svag_fast.cli.check:check", "Try a task: what would fail, what is measured, what a grid costs."),
    "report": ("svag_fast.cli.report:report", "Judge a folder of runs: matches, departs or open."),
    "predict": ("svag_fast.cli.predict:predict", "Predict from a baseline run where linear scaling fails."),
    "reproduce": ("svag_fast.cli.reproduce:reproduce", "Reproduce a figure of the paper: runs, picture and table."),
    "weak": ("svag_fast.cli.weak:weak", "See on a net that SVAG goes to its limit as 1/l (Theorem 4.3)."),
    "verify": ("svag_fast.cli.verify:verify", "Check the paper's theorems by closed form and simulation."),
    "info": ("svag_fast.cli.info:main", "Print versions, processor, devices and backends."),
}


class LazyCommand(click.RichCommand):
    """Stands in the group's table for a command whose module is imported when the command is used."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        super().__init__(name=name, short_help=short_help)
        self.target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse `args` by the real command, with which click continues."""
        module, attribute = self.target.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)


# For output streams that can't encode what formulae and tables are made of: LC_ALL=C, PYTHONIOENCODING=ascii, latin-1.
_PLAIN = {
    "κ": "kappa", "η": "eta", "λ": "lambda", "Σ": "Sigma", "∇": "grad ", "²": "^2", "³": "^3", "±": "+-", "×": "x",
    "·": "*", "√": "sqrt ", "∝": "~", "≈": "~", "≥": ">=", "≤": "<=", "−": "-", "–": "-", "—": "-", "…": "...",
    "’": "'", "“": "'", "”": "'", "•": "*", "→": "->", "⟨": "<", "⟩": ">",
}  # fmt: skip
_PLAIN |= dict.fromkeys("─━═╌╴╶╸╺", "-") | dict.fromkeys("│┃║", "|") | dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛┡┩╇╈╞╡", "+")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Spell out in ASCII what a stream can't encode; also what no stream can, such as a broken file name's bytes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    spelt = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in bad)
    return "".join(spelt), error.end


codecs.register_error("svag_fast.plain", _plain)


def spell_out_letters() -> None:
    """Let no text that a command prints fail for its letters."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not, and needs it not
            stream.reconfigure(errors="svag_fast.plain")


class Program(click.RichGroup):
    """The group, on output streams of any encoding."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        spell_out_letters()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped("interrupted", signal.SIGINT) from stop


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    commands={name: LazyCommand(name, *entry) for name, entry in COMMANDS.items()},
)
@click.version_option(__version__, prog_name="svag_fast")
def main() -> None:
    """Does the SDE view of SGD hold for your network? Train with SVAG, measure the gradient noise, and see."""
