"""The command line: one file a command."""

from svag_fast.cli.main import main

__all__ = ["main"]
