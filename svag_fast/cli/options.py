"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import rich_click as click

from svag_fast.analysis.margins import METRICS, Margin


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
    default=METRICS,
    help="Column of metrics.csv to judge by; may be given again.  [default: test_accuracy and test_loss]",
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
