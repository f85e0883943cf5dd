"""The numbers in the documents are those that the commands gave."""

import json
import re
from pathlib import Path

import pytest

from svag_fast.analysis.report import SUMMARY_VERSION

ROOT = Path(__file__).resolve().parents[2]


def test_the_readmes_figures_are_those_of_the_committed_summary() -> None:
    """docs/summary.json is what `make run` wrote beside docs/convergence.png."""
    summary = json.loads((ROOT / "docs" / "summary.json").read_text())
    assert summary["version"] == SUMMARY_VERSION
    small, middle, large = (summary["batch_sizes"][size] for size in ("4", "32", "256"))
    shared = {size: found["metrics"] for size, found in summary["shared_limit"]["batch_sizes"].items()}
    text = " ".join((ROOT / "README.md").read_text().split())

    def distance(cell: dict, factor: float, digits: int, sign: str = "") -> str:
        low, high = cell["distance_interval"]
        value = abs(cell["distance"]) if not sign else cell["distance"]
        return f"{factor * value:{sign}.{digits}f} ± {factor * (high - low) / 2:.{digits}f}"

    def limit(cell: dict) -> str:
        low, high = cell["limit_interval"]
        return f"{100 * cell['limit']:.1f} ± {100 * (high - low) / 2:.1f} %"

    first, end = (small["metrics"]["test_accuracy"][part] for part in ("phase 1", "end"))
    between, between_end = (middle["metrics"]["test_accuracy"][part] for part in ("phase 1", "end"))
    far = large["metrics"]["test_accuracy"]["end"]
    assert f"test accuracy is {distance(first, 100, 1)} points below the limit of {limit(first)}" in text
    assert f"where {100 * first['margin']:.1f} would still count" in text
    assert f"It ends {distance(end, 100, 1, '+')} points from the limit of {limit(end)}" in text
    assert f"SGD ends {distance(far, 100, 1)} points of test accuracy below its limit" in text
    ends = {l: f"{100 * mean['value']:.1f} %" for l, mean in far["means"].items()}
    assert f"SGD ends at {ends['1']}, l = 4 at {ends['4']} and l = 16 at {ends['16']}" in text
    assert (
        f"their final test accuracies have limits {distance(shared['256']['test_accuracy']['end'], 100, 1, '+')}"
        in text
    )
    assert f"its test accuracy is {distance(between, 100, 1)} points below the limit there" in text
    assert f"final test accuracy matches ({distance(between_end, 100, 1, '+')} points)" in text
    star, (low, high) = summary["prediction"]["batch_size"]["value"], summary["prediction"]["batch_size_interval"]
    assert f"predicts B* = {star:.0f} (95 % interval {low:.0f} to {high:.0f})" in text
    equilibrium = summary["prediction"]["baseline"]["equilibrium"]
    ratio = equilibrium["residual"]["ratio"]
    assert f"left side over its right side is {ratio['value']:.3f} ± {ratio['standard_error']:.3f}" in text

    assert (small["answer"], middle["answer"], large["answer"]) == ("matches", "departs", "departs")
    assert {cell["answer"] for parts in small["metrics"].values() for cell in parts.values()} == {"matches"}
    assert {cell["answer"] for parts in large["metrics"].values() for cell in parts.values()} == {"departs"}
    assert {m: {p: c["answer"] for p, c in parts.items()} for m, parts in middle["metrics"].items()} == {
        metric: {"phase 1": "departs", "phase 2": "matches", "end": "matches"}
        for metric in ("test_accuracy", "test_loss")
    }
    assert max(first["distance_interval"]) < 0  # real, and within the margin
    assert shared["256"]["test_accuracy"]["end"]["answer"] == "matches"
    assert summary["shared_limit"]["answer"] == "open"
    assert shared["256"]["test_accuracy"]["phase 1"]["answer"] == "open"
    assert not any(c["regime_reached"] for parts in large["metrics"].values() for c in parts.values())
    assert abs(ratio["value"] - 1) < 0.03
    assert 32 < low < high < 256
    assert sum(found["runs"]["finished"] for found in (small, middle, large)) == 312
    assert {found["sampling"] for found in (small, middle, large)} == {"replacement"}


def test_the_documents_table_of_the_default_runs_is_that_of_the_committed_summary() -> None:
    summary = json.loads((ROOT / "docs" / "summary.json").read_text())
    text = (ROOT / "docs" / "verdict.md").read_text()
    rows = text[text.index("## On the default runs") :].split("```")[1].splitlines()
    for metric, parts in summary["batch_sizes"]["4"]["metrics"].items():
        factor, digits = (100, 1) if metric == "test_accuracy" else (1, 3)
        for part, cell in parts.items():
            limit, (low, high) = cell["limit"], cell["limit_interval"]
            begin, end = cell["distance_interval"]
            words = f"{part} {factor * limit:.{digits}f} ± {factor * (high - low) / 2:.{digits}f} "
            words += f"{factor * cell['distance']:+.{digits}f} ± {factor * (end - begin) / 2:.{digits}f} "
            words += f"{factor * cell['margin']:.{digits}f} {cell['answer']}"
            assert any(" ".join(row.split()).startswith(words) for row in rows), words


@pytest.mark.nightly
def test_the_error_rates_in_the_document_are_what_the_script_prints() -> None:
    from verdict_error_rates import curved_table, main_table, others_table, questions_table, traps_table

    text = (ROOT / "docs" / "verdict.md").read_text()
    for table in (main_table, questions_table, curved_table, traps_table, others_table):
        lines = list(table(10_000))
        start = text.index(lines[0])
        for line, written in zip(lines, text[start:].splitlines(), strict=False):
            ours, theirs = (re.findall(r"\d+\.\d", part) for part in (line, written))
            assert len(ours) == len(theirs)
            # numpy may draw other numbers one day: five standard errors of two rates, and rounding
            assert all(abs(float(a) - float(b)) < 3.7 for a, b in zip(ours, theirs, strict=True)), (line, written)
