"""The exit status of a command that a signal stopped."""

from __future__ import annotations

import rich_click as click


class Stopped(click.ClickException):
    """A signal stopped the command: the exit status is the shells' 128 + its number, 130 for Ctrl-C."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # type: ignore[misc]  # click reads it from the instance
