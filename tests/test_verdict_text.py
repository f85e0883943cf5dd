"""Verdicts are said in words that carry the numbers, and say why where nothing can be said."""

from collections.abc import Sequence

import numpy as np
import pytest

from svag_fast.curves import Run
from svag_fast.verdict import judge
from svag_fast.verdict_text import headline, sentences


def run(batch_size: int, l: float, seed: int, level: float) -> Run:
    config = {"batch_size": batch_size, "lr": 0.1, "weight_decay": 0.0, "l": l, "seed": seed, "effective_steps": 10}
    steps = np.linspace(0, 10, 11)
    accuracy = np.full(11, level) + 0.01 * np.sin(steps * (1 + seed)) * (steps < 10)
    return Run(f"{batch_size}-{l}-{seed}", config, {"effective_step": steps, "test_accuracy": accuracy})


def runs(batch_size: int, levels: dict[float, float], seeds: int = 3) -> list[Run]:
    return [
        run(batch_size, l, seed, level + 0.002 * (seed - 1)) for l, level in levels.items() for seed in range(seeds)
    ]


SAME = {1: 0.9, 2: 0.9, 4: 0.9}
SGD_APART = {1: 0.4, 2: 0.9, 4: 0.9}
MOVING = {1: 0.4, 2: 0.6, 4: 0.9}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (runs(8, SAME) + runs(128, MOVING), "SGD stays with its SDE limit at B = 8 and leaves it at B = 128"),
        (runs(8, SAME) + runs(16, SAME) + runs(32, SAME), "SGD stays with its SDE limit at B = 8, 16 and 32"),
        (runs(64, MOVING) + runs(128, SGD_APART), "SGD leaves its SDE limit at B = 64 and 128"),
        (runs(8, {2: 0.9, 4: 0.9}), "SVAG has converged at B = 8"),
        (runs(8, SAME, seeds=1), "Too few finished runs to tell whether SGD follows its SDE limit"),
    ],
)
def test_headline_says_the_finding(found: Sequence[Run], text: str) -> None:
    assert headline(judge(found)) == text


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (
            runs(8, SAME),
            ["converged by l = 2: from there on its curves agree with l = 4", "SGD matches the limit", "0.0 ± "],
        ),
        (
            runs(8, SGD_APART),
            [
                "converged by l = 2",
                "SGD departs from the limit: it lies 50.0 ± ",
                "times the seed noise",
                "ends 50.0 ± ",
            ],
        ),
        (
            runs(8, MOVING),
            ["SVAG has not converged by l = 4: l = 2 lies 30.0 ± ", "SGD departs", "has not shown that it has reached"],
        ),
        (runs(8, {2: 0.9, 4: 0.9}), ["converged by l = 2", "no run at l = 1: nothing is said of SGD"]),
        (runs(8, {1: 0.9}), ["cannot be told yet: l = 1 is the only l"]),
        (runs(8, SAME, seeds=1), ["l = 2 and l = 4 need two finished seeds each", "l = 1 and l = 4 need two"]),
    ],
)
def test_sentences_carry_the_numbers(found: Sequence[Run], parts: list[str]) -> None:
    (verdict,) = judge(found)
    text = " ".join(sentences(verdict))
    for part in parts:
        assert part in text
    assert "nan" not in text
    assert "None" not in text


def test_a_difference_that_is_certain_but_small_is_owned_up_to() -> None:
    steps = np.linspace(0, 10, 201)
    rng = np.random.default_rng(0)
    found = []
    for l, level in ((1, 0.52), (2, 0.5)):
        for seed in range(30):
            r = run(8, l, seed, 0.5)
            accuracy = np.where(steps < 10, level + 0.05 * rng.standard_normal(201), 0.5)
            found.append(Run(r.name, r.config, {"effective_step": steps, "test_accuracy": accuracy}))
    (verdict,) = judge(found)
    assert verdict.sgd == "matches"
    assert "the difference is no chance (p = " in sentences(verdict)[1]


def test_an_open_question_says_what_keeps_it_open() -> None:
    levels = {1: (0.50, 0.52), 2: (0.58, 0.60)}
    found = [run(8, l, seed, level) for l, pair in levels.items() for seed, level in enumerate(pair)]
    (verdict,) = judge(found)
    assert verdict.sgd == "cannot tell"
    assert "which so few seeds cannot tell from chance; add seeds" in sentences(verdict)[1]


def test_an_unfinished_batch_size_says_so() -> None:
    (verdict,) = judge([Run("a", run(8, 1, 0, 0.9).config, {"effective_step": np.zeros(0), "lr": np.zeros(0)})])
    assert sentences(verdict) == ["No run has finished: nothing can be said yet."]
