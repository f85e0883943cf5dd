"""How a command ends that a signal or an error stopped."""

from __future__ import annotations

import rich_click as click


class Stopped(click.ClickException):
    """A signal stopped the command: the exit status is the shells' 128 + its number, 130 for Ctrl-C."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # type: ignore[misc]  # click reads it from the instance


def failure(text: str) -> click.ClickException:
    """Print what has more lines than one, such as a traceback, as it is: in the error's box its lines would break."""
    first, newline, _ = text.partition("\n")
    if newline:
        click.echo(text, err=True)
    return click.ClickException(first.rstrip(":"))
