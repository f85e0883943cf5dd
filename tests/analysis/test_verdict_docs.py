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
    small, large = (summary["batch_sizes"][size] for size in ("8", "128"))
    text = " ".join((ROOT / "README.md").read_text().split())

    def distance(cell: dict, factor: float, digits: int, sign: str = "") -> str:
        low, high = cell["distance_interval"]
        value = abs(cell["distance"]) if not sign else cell["distance"]
        return f"{factor * value:{sign}.{digits}f} ± {factor * (high - low) / 2:.{digits}f}"

    loss, accuracy = (small["metrics"][metric]["end"] for metric in ("test_loss", "test_accuracy"))
    first = small["metrics"]["test_accuracy"]["phase 1"]
    far = large["metrics"]["test_accuracy"]["end"]
    assert f"test accuracy is {distance(first, 100, 1)} points below the limit" in text
    assert f"where {100 * first['margin']:.1f} would still count" in text
    assert f"test loss ends {distance(loss, 1, 3)} above the limit of {loss['limit']:.3f}" in text
    assert f"open whether the final test accuracy matches ({distance(accuracy, 100, 1, '+')} points)" in text
    assert f"SGD ends {distance(far, 100, 1)} points of test accuracy below" in text
    assert f"predicts B* = {summary['prediction']['batch_size']['value']:.0f}." in text

    assert (small["answer"], large["answer"]) == ("departs", "departs")
    assert [c["answer"] for c in (first, loss, accuracy, far)] == ["departs", "departs", "open", "departs"]
    assert loss["distance"] > 0 > max(first["distance"], far["distance"])
    assert any("has not converged by l = 4" in sentence for sentence in large["sentences"])
    assert not any(c["regime_reached"] for parts in large["metrics"].values() for c in parts.values())
    assert summary["shared_limit"]["answer"] == "open"
    assert summary["prediction"]["baseline"]["equilibrium"]["state"] == "undecided"
    assert sum(found["runs"]["finished"] for found in (small, large)) == 24
    assert {found["sampling"] for found in (small, large)} == {"replacement"}


def test_the_documents_table_of_the_default_runs_is_that_of_the_committed_summary() -> None:
    summary = json.loads((ROOT / "docs" / "summary.json").read_text())
    text = (ROOT / "docs" / "verdict.md").read_text()
    rows = text[text.index("## On the default runs") :].split("```")[1].splitlines()
    for metric, parts in summary["batch_sizes"]["8"]["metrics"].items():
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
