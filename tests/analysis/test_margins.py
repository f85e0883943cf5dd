"""Margins are read from text, have defaults, and are refused by name."""

import click
import pytest

from svag_fast.analysis.margins import Margin, choose_margins
from svag_fast.cli.options import MarginList


def test_a_margin_is_in_the_metrics_units_or_a_part_of_its_level() -> None:
    assert Margin.parse("0.02").at(0.9) == 0.02
    assert Margin.parse(" 10% ").at(-0.5) == pytest.approx(0.05)
    assert str(Margin.parse("10%")) == "10 %"
    assert str(Margin.parse("0.02")) == "0.02"


def test_defaults_are_two_points_of_accuracy_and_a_tenth_of_anything_else() -> None:
    chosen = choose_margins(["test_accuracy", "test_loss", "nsr"], {"nsr": Margin(0.5)})
    assert chosen == {"test_accuracy": Margin(0.02), "test_loss": Margin(0.1, relative=True), "nsr": Margin(0.5)}


@pytest.mark.parametrize(
    ("metrics", "given", "message"),
    [([], {}, "metrics must be one"), (["nsr"], {"test_loss": Margin(1.0)}, "margins must be for metrics that are")],
)
def test_a_margin_for_what_is_not_judged_is_refused(metrics: list[str], given: dict[str, Margin], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_margins(metrics, given)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "%", "1 %%", "1_0", "0,02", "٢"])
def test_what_is_no_margin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="margin"):
        Margin.parse(text)


def test_a_list_of_margins_is_read_from_one_option() -> None:
    found = MarginList().convert("test_accuracy=0.02, test_loss=10%", None, None)
    assert found == {"test_accuracy": Margin(0.02), "test_loss": Margin(0.1, relative=True)}
    for text, message in (("0.02", "does not name a metric"), ("nsr=big", "nsr: a margin must be a number such as")):
        with pytest.raises(click.UsageError, match=message):
            MarginList().convert(text, None, None)
