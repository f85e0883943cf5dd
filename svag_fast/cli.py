"""The command line: `svag-fast COMMAND`. No command's module is imported before that command is used."""

from __future__ import annotations

import importlib
from typing import Any

import rich_click as click

from svag_fast import __version__

# command -> (module:attribute, the line that `svag-fast --help` shows)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("svag_fast.run_command:run", "Train with SGD and SVAG: does SVAG converge, does SGD match its limit?"),
    "report": ("svag_fast.report:report", "Judge a folder of runs anew: matches, departs or open."),
    "predict": ("svag_fast.predict_command:predict", "Foretell from a baseline run where linear scaling fails."),
    "verify": ("svag_fast.verify.command:verify", "Check the paper's theorems by closed form and simulation."),
    "info": ("svag_fast.info:main", "Print versions, processor, devices and backends."),
}


class LazyCommand(click.RichCommand):
    """Stands in the group's table for a command whose module is imported when the command is used."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        super().__init__(name=name, short_help=short_help)
        self.target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse `args` by the real command, which click goes on with."""
        module, attribute = self.target.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    commands={name: LazyCommand(name, *entry) for name, entry in COMMANDS.items()},
)
@click.version_option(__version__, prog_name="svag_fast")
def main() -> None:
    """Does the SDE view of SGD hold for your network? Train with SVAG, measure the gradient noise, and see."""
