"""Are the battery's own standard errors right? Its z-scores over independent seeds must spread by 1.

A check passes where |z| < 5: with errors twice too large it would pass whatever is wrong by less than ten of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from svag_fast.verify import convergence, lemmas, steps, tails
from svag_fast.verify.check import Check, Outcome, SuiteSettings

SEEDS = 10
TAIL = 1e-7
"""Of each side: of a whole battery's 100 checks one in 50,000 fails by chance."""

GROUPS: tuple[Callable[[SuiteSettings], Outcome], ...] = (
    lemmas.lemma_4_7,
    lemmas.lemma_4_6,
    steps.theorem_4_3,
    convergence.decomposition,
    tails.known_laws,
)


def z_scores(settings: SuiteSettings) -> Outcome:
    """Σz² of every statistical check of the quick groups over ten seeds, against chi-squared; and of all together."""
    scores: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        fresh = SuiteSettings(fast=True, seed=1000 * (settings.seed + 1) + seed)
        for group in GROUPS:
            for check in group(fresh).checks:
                if check.z is not None:
                    scores.setdefault(f"{check.source}, {check.name}", []).append(check.z)
    z = np.array(list(scores.values()))  # [checks, seeds]
    squares = (z**2).sum(axis=1)
    p = np.minimum(stats.chi2.sf(squares, SEEDS), stats.chi2.cdf(squares, SEEDS))
    worst = int(np.argmin(p))
    # Checks of one seed share their random numbers; seeds share nothing.
    by_seed = (z**2).mean(axis=0)
    error = float(by_seed.std(ddof=1)) / math.sqrt(SEEDS)
    spread = math.sqrt(float(by_seed.mean()))
    return Outcome(
        [
            Check(
                "statistics",
                f"each of {len(z)} checks over {SEEDS} seeds: Σz² is chi-squared (the worst: {list(scores)[worst]})",
                f"p = {p[worst]:.2g}",
                f"above {TAIL:g}",
                bool(p[worst] > TAIL),
            ),
            Check(
                "statistics",
                "all of them together: root mean square of z",
                f"{spread:.3f} ± {error / (2 * spread):.1g}",
                "1",
                abs(float(by_seed.mean()) - 1) < stats.t.isf(TAIL, SEEDS - 1) * error and 0.7 < spread < 1.4,
            ),
        ]
    )
