"""Verdicts are said in words that carry the numbers, name what doesn't match, and say why where nothing can be said."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from svag_fast.analysis.runs import Run
from svag_fast.analysis.shared_limit import shared_limits
from svag_fast.analysis.verdict import judge
from svag_fast.analysis.verdict_text import headline, places, sentences, shared_limit_sentence


def run(batch_size: int, l: float, seed: int, level: float, diverged_at: float | None = None) -> Run:
    lr, total = 0.1 * batch_size / 8, 1280 // batch_size  # the same time for every batch size
    config = {"batch_size": batch_size, "lr": lr, "weight_decay": 0.0, "l": l, "seed": seed, "effective_steps": total}
    steps = np.linspace(0, total, total + 1)
    accuracy = np.full(total + 1, level) + 0.001 * (seed - 1)
    metrics = {"effective_step": steps, "lr": np.where(steps <= 0.8 * total, lr, lr / 10), "test_accuracy": accuracy}
    if diverged_at is not None:
        metrics = {column: values[: int(diverged_at) + 1] for column, values in metrics.items()}
    return Run(f"{batch_size}-{l}-{seed}", config, metrics, diverged_at=diverged_at)


def runs(batch_size: int, levels: Mapping[float, float], seeds: int = 3) -> list[Run]:
    return [run(batch_size, l, seed, level) for l, level in levels.items() for seed in range(seeds)]


SAME = {1: 0.9, 2: 0.9, 4: 0.9, 8: 0.9}
SGD_APART = {1: 0.4, 2: 0.9, 4: 0.9, 8: 0.9}
MOVING = {1: 0.14, 2: 0.4, 4: 0.75, 8: 0.88}
LAW = {l: 0.9 - 0.05 / l for l in (1, 2, 4, 8)}
ALMOST = {1: 0.881, 2: 0.9, 4: 0.9, 8: 0.9}  # within the margin, by less than the noise


def diverging(ls: Sequence[float]) -> list[Run]:
    return [run(8, l, seed, 0.1, diverged_at=3.0 + seed) for l in ls for seed in range(3)]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (runs(8, SAME) + runs(128, MOVING), "SGD matches its SDE limit at B = 8 and departs from it at B = 128"),
        (runs(8, SAME) + runs(16, SAME) + runs(32, SAME), "SGD matches its SDE limit at B = 8, 16 and 32"),
        (runs(64, MOVING) + runs(128, SGD_APART), "SGD departs from its SDE limit at B = 64 and 128"),
        (runs(8, {2: 0.9, 4: 0.9}), "Open: whether SGD follows its SDE limit at B = 8"),
        (runs(8, SAME, seeds=1) + runs(16, LAW), "SGD departs from its SDE limit at B = 16; open at B = 8"),
        (diverging([1, 2]), "Every run diverged: no verdict"),
    ],
)
def test_headline_says_the_finding(found: Sequence[Run], text: str) -> None:
    assert headline(judge(found, metrics=["test_accuracy"])) == text


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (
            runs(8, SAME),
            [
                "SGD matches the limit in test accuracy (phase 1 +0.0 ± ",
                " points, phase 2 ",
                "SVAG has converged by l = 2: from there on it is within the margins",
            ],
        ),
        (
            runs(8, LAW),
            ["SGD departs from the limit in test accuracy (phase 1 -5.0 ± ", "SVAG has converged by l = 4"],
        ),
        (
            runs(8, MOVING),
            [
                "SGD departs from the limit",
                "SVAG has not converged by l = 4 in test accuracy (phase 1 -26.0 ± ",
                "Open: whether it has converged by l = 8 in test accuracy (phase 1, phase 2, end)",
                "more seeds alone would not settle it, a larger l might",
                "The 1/l regime is not reached in test accuracy (phase 1, phase 2, end)",
            ],
        ),
        (
            runs(8, ALMOST),
            ["Open: whether SGD matches the limit in test accuracy (phase 1 -1.9 ± ", "seeds for each l would settle"],
        ),
        (runs(8, {2: 0.9, 4: 0.9}), [": there is no run at l = 1.", "could not be tested", "with two l"]),
        (runs(8, {1: 0.9}), ["Open: whether SGD matches", ": two l with two finished runs each are needed."]),
        (
            diverging([1]) + runs(8, {2: 0.9, 4: 0.9, 8: 0.9}),
            [
                "SGD departs from the limit: all its runs diverged, and none at l = 8.",
                "3 of 3 runs of SGD diverged, at effective step 3, 4, 5; they are in no mean.",
            ],
        ),
        (diverging([1, 2]), ["Every run diverged: there is no limit and no verdict."]),
    ],
)
def test_sentences_carry_the_numbers(found: Sequence[Run], parts: list[str]) -> None:
    (verdict,) = judge(found, metrics=["test_accuracy"])
    text = " ".join(sentences(verdict))
    for part in parts:
        assert part in text
    assert "nan" not in text
    assert "None" not in text


def test_sentences_name_what_matches_beside_what_departs() -> None:
    found = runs(8, SAME)
    for r in found:
        r.metrics["test_loss"] = np.full(161, 0.3 + 0.2 / r.l) + 0.001 * r.seed
    (verdict,) = judge(found)
    said = sentences(verdict)
    assert verdict.answer == "departs"
    assert said[0].startswith("SGD departs from the limit in test loss (phase 1 +0.200 ± ")
    assert said[1].startswith("SGD matches the limit in test accuracy (phase 1 +0.0 ± ")


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        (SAME, "B = 8 and B = 128 share their limit, within the margins: linear scaling keeps its promise."),
        (dict.fromkeys(SAME, 0.8), "B = 8 and B = 128 do not share their limit: it differs in test accuracy (phase 1"),
        (MOVING, "Whether B = 8 and B = 128 share their limit is open in test accuracy (phase 1 +"),
        ({1: 0.9}, "Whether B = 8 and B = 128 share their limit is open: one of them has none."),
    ],
)  # fmt: skip
def test_shared_limits_are_said(levels: Mapping[float, float], text: str) -> None:
    (shared,) = shared_limits(judge(runs(8, SAME) + runs(128, levels), metrics=["test_accuracy"]))
    assert shared_limit_sentence(shared).startswith(text)


def test_places_are_grouped_by_metric() -> None:
    found = [("test_accuracy", "phase 1", None), ("test_loss", "phase 2", None), ("test_loss", "end", None)]
    assert places(found) == "test accuracy (phase 1) and test loss (phase 2, end)"


def test_an_unfinished_batch_size_says_so() -> None:
    empty = {"effective_step": np.zeros(0), "lr": np.zeros(0)}
    (verdict,) = judge([Run("a", run(8, 1, 0, 0.9).config, empty)])
    assert sentences(verdict) == ["Open: no run has finished yet."]
