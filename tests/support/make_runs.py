"""Run folders with known curves, for the tests of whatever reads runs."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Mean = Callable[[np.ndarray], np.ndarray]  # accuracy against the fraction of the run that is done


def rising(speed: float = 8.0, final: float = 0.97) -> Mean:
    """An accuracy that rises from 0.1 and levels off at ``final``."""
    return lambda done: 0.1 + (final - 0.1) * (1 - np.exp(-speed * done))


def seed_noise(rng: np.random.Generator, points: int, sd: float, correlation: float = 0.5) -> np.ndarray:
    """A stationary Gaussian series, quieter by ten after 80 % of the run, as training is at a tenth of the rate."""
    noise = rng.standard_normal(points)
    for i in range(1, points):
        noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
    return sd * np.where(np.linspace(0, 1, points) < 0.8, 1.0, 0.1) * noise


def write_run(
    folder: Path,
    *,
    batch_size: int = 8,
    l: float = 1,
    seed: int = 0,
    accuracy: Sequence[float] | np.ndarray | None = None,
    fraction: float = 1.0,
    effective_steps: float | None = None,
    nsr: float = 1.1,
    diverged: bool = False,
    **config: Any,
) -> Path:
    """Write one run whose test accuracy at evenly spaced rows is ``accuracy``, cut off after ``fraction`` of them.

    The rate follows the linear scaling rule (0.1 at batch size 8) and drops to a tenth at 80 %. With ``diverged`` the
    last row's losses, G and N are nan.
    """
    accuracy = rising()(np.linspace(0, 1, 41)) if accuracy is None else np.asarray(accuracy)
    lr0 = config.pop("lr", 0.1 * batch_size / 8)
    total = 12032 / batch_size if effective_steps is None else effective_steps
    run = folder / f"B{batch_size}-l{l:g}-seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    settings = {"dataset": "digits", "model": "digits", "weight_decay": 0.02, "schedule": {"0.8": 0.1}}
    settings |= {"batch_size": batch_size, "lr": lr0, "l": l, "seed": seed, "effective_steps": total}
    settings |= {"versions": {"torch": "2.6"}, "commit": "0" * 40} | config
    (run / "config.json").write_text(json.dumps(settings))
    done = np.linspace(0, 1, len(accuracy))
    rows = [_row(u, a, lr0, total, l, nsr, seed) for u, a in zip(done, accuracy, strict=True)]
    rows = rows[: max(1, round(fraction * len(rows)))]
    if diverged:
        rows[-1] |= dict.fromkeys(("train_loss", "test_loss", "grad_sq_norm", "noise_trace", "nsr"), math.nan)
    with (run / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return run


def _row(
    u: float, accuracy: float, lr: float, effective_steps: float, l: float, nsr: float, seed: int
) -> dict[str, object]:
    """Return one line of metrics.csv at the fraction ``u`` of the run."""
    accuracy = min(max(accuracy, 0.0), 1.0)  # whatever the noise on it
    G = 0.5 + 2 * np.exp(-10 * u)
    return {
        "step": round(u * effective_steps * l),
        "effective_step": u * effective_steps,
        "time": lr * effective_steps * (min(u, 0.8) + 0.1 * max(u - 0.8, 0)),
        "train_loss": 2.3 * (1 - accuracy) + 0.05 + 1e-9 * seed,  # no two seeds are copies
        "amplified_loss": "",
        "test_loss": 2.3 * (1 - accuracy) + 0.08,
        "train_accuracy": accuracy,
        "test_accuracy": accuracy,
        "grad_sq_norm": G if u > 0 else "",
        "noise_trace": nsr * G if u > 0 else "",
        "weight_sq_norm": 100.0,
        "nsr": nsr if u > 0 else "",
        "noise_source": "per_sample",
        "noise_cost": -0.125 if u == 0 else "",
        "lr": lr * (1.0 if u < 0.8 else 0.1),
        "samples_per_second": 3000.0,
    }


def write_process(
    folder: Path,
    mean: Mean,
    *,
    seeds: int,
    sd: float,
    rng: np.random.Generator,
    points: int = 41,
    **settings: Any,
) -> None:
    """Write one run a seed, ``mean`` plus seed noise."""
    for seed in range(seeds):
        accuracy = mean(np.linspace(0, 1, points)) + seed_noise(rng, points, sd)
        write_run(folder, seed=seed, accuracy=accuracy, **settings)
