"""Print how often the criterion errs on made curves: the table of docs/verdict.md.

python tests/verdict_error_rates.py [REPETITIONS]
"""

import sys

import numpy as np
from make_runs import Mean, made_processes, rising

from svag_fast.verdict import compare

REPETITIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
LS = (1.0, 2.0, 4.0, 8.0)
SD = 0.05


def rates(seeds: int, gap: float, correlation: float) -> tuple[float, float, float, float]:
    """SGD `gap` standard deviations below the others until the last 20 %, where it joins them.

    How often, in percent, it and any other l are called different, or left open.
    """
    rng = np.random.default_rng(0)
    means: dict[float, Mean] = dict.fromkeys(LS, rising()) | {1.0: lambda u: rising()(u) - gap * SD * (u < 0.8)}
    counts = np.zeros(4)
    for _ in range(REPETITIONS):
        sgd, *others = (
            c.agreement
            for c in compare(made_processes(rng, means, seeds, dict.fromkeys(LS, SD), correlation), alpha=0.05)
        )
        counts += [sgd == "differs", sgd == "cannot tell", "differs" in others, "cannot tell" in others]
    return tuple(100 * counts / REPETITIONS)  # type: ignore[return-value]


print("| seeds | SGD off by | SGD differs | SGD open | another l differs | another l open |")
print("| --- | --- | --- | --- | --- | --- |")
for seeds in (2, 3, 5):
    for gap in (0.0, 1.0, 2.0, 3.0):
        figures = " | ".join(f"{rate:.1f} %" for rate in rates(seeds, gap, correlation=0.5))
        print(f"| {seeds} | {gap:g} s | {figures} |", flush=True)
