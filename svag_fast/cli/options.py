"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import rich_click as click

from svag_fast.analysis.margins import Margin


class MarginList(click.ParamType[dict[str, Margin]]):
    """Margins by name, such as test_accuracy=0.02,test_loss=10%."""

    name = "margins"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Margin]:
        """Parse the text, or say which part of it is no margin."""
        if isinstance(value, dict):
            return value
        margins = {}
        for part in str(value).split(","):
            name, equals, size = part.partition("=")
            if not (name.strip() and equals):
                self.fail(f"{part.strip()!r} does not name a metric; expected test_accuracy=0.02,test_loss=10%")
            try:
                margins[name.strip()] = Margin.parse(size)
            except ValueError as error:
                self.fail(f"{name.strip()}: {error}")
        return margins


metric_option = click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Column of metrics.csv to judge by; may be given again.  [default: test_accuracy, or a task's own first "
    "metric of the test data, and test_loss]",
)
margin_option = click.option(
    "--margin",
    "margins",
    type=MarginList(),
    metavar="NAME=SIZE,...",
    default={},
    help="Distance from the limit that does not matter, in the metric's units or in percent of its value.  "
    "[default: test_accuracy=0.02,test_loss=10%]",
)


def _search_first(context: click.Context, option: click.Parameter, folder: Path | None) -> Path | None:
    if folder is not None:
        os.environ["SVAG_FAST_DATA"] = str(folder.absolute())  # which the processes of the runs inherit
    return folder


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    expose_value=False,
    callback=_search_first,
    help="Folder of data sets, searched first.  [default: SVAG_FAST_DATA, then data here and at home]",
)


class NumberList(click.ParamType[list[Any]]):
    """Comma-separated numbers, such as 1,2,4; or lists of them with / between."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Parse the text, or say which part of it isn't a number."""
        if "/" in str(value):
            return [self.convert(part, param, ctx) for part in str(value).split("/")]
        numbers = []
        for part in str(value).split(","):
            try:
                numbers.append(_number(part))
            except ValueError:
                self.fail(f"{part.strip()!r} is not a number; expected numbers with commas between, such as 1,2,4")
        return numbers


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


Command = TypeVar("Command", bound=Callable[..., Any])


def setting_options(settings: type[Any]) -> Callable[[Command], Command]:
    """Give a command an option for each of the class's fields: the field has the help text and the default."""
    types = get_type_hints(settings)

    def decorate(command: Command) -> Command:
        fields = [field for field in dataclasses.fields(settings) if field.metadata]
        for field in reversed(fields):  # click shows first what was added last
            command = _setting_option(field, types[field.name])(command)
        return command

    return decorate


def _setting_option(field: dataclasses.Field[Any], annotation: Any) -> Callable[[Command], Command]:
    about = field.metadata
    default = field.default if about["shown"] is None else about["shown"]
    if isinstance(default, tuple):
        default = ",".join(f"{value:g}" for value in default)
    text = about["help"] if default is None else f"{about['help']}  [default: {default}]"
    kind = click.Choice(about["choices"]) if about["choices"] else _kind(annotation)
    return click.option(_option_name(field), type=kind, metavar=about["metavar"], help=text)


def _kind(annotation: Any) -> Any:
    """What click parses into a field of this type: str, int or float, also with None, or a tuple of numbers."""
    if any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation))):
        return NumberList()
    return next(kind for kind in (str, int, float) if kind in (annotation, *get_args(annotation)))


def _option_name(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def setting_panel(settings: type[Any], name: str, *more: str) -> Callable[[Command], Command]:
    """A panel of the help: the settings whose field names it, then ``more``."""
    names = [_option_name(f) for f in dataclasses.fields(settings) if f.metadata.get("panel") == name]
    return click.option_panel(name, options=[*names, *more])
