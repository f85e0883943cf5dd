"""Do batch sizes have the same limit? The linear scaling rule promises it where lr/B is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svag_fast.analysis.phases import END, SAME, same_within_rounding
from svag_fast.analysis.verdict import Answer, Cell, Decision, Verdict, combine, decide


@dataclass(frozen=True)
class SharedLimit:
    """Whether a batch size has the limit of the smallest one whose lr/B is the same: the linear scaling rule's promise.

    ``cells`` holds, by metric and part, its limit minus the reference's; a part that one of them lacks is None.
    ``noise_ratio`` is its noise over what the reference's and 1/B make of it. It is 1 for independent draws, and below
    1 where images of a batch are distinct. Then not even the two SDEs are quite the same. It is None where they are of
    a data set of unknown size. ``elsewhere`` names the parts that are at other times or rates of the SDE than the
    reference's, and are not compared. ``several_rates``: one of the two batch sizes was run at several learning rates.
    """

    batch_size: int
    lr: float
    reference: int
    reference_lr: float
    answer: Answer
    cells: Mapping[str, Mapping[str, Decision | None]]
    noise_ratio: float | None
    elsewhere: tuple[str, ...]
    several_rates: bool = False


def shared_limits(verdicts: Sequence[Verdict]) -> list[SharedLimit]:
    """Compare each batch size's limits with those of the first one of the same lr/B, where linear scaling applies."""
    found: list[SharedLimit] = []
    references: list[Verdict] = []
    sizes = Counter(verdict.batch_size for verdict in verdicts)
    for verdict in verdicts:
        # The first of its SDE, the smallest batch: the linear scaling rule starts from there.
        reference = next((r for r in references if same_sde(r, verdict)), None)
        if reference is None:
            references.append(verdict)
            continue
        elsewhere = tuple(part for part in verdict.times if not _same_time(part, reference, verdict))
        cells = {
            metric: {
                part: None
                if part in elsewhere
                else _difference(cell, reference.cells[metric].get(part), verdict.confidence)
                for part, cell in parts.items()
            }
            for metric, parts in verdict.cells.items()
        }
        answers = [d.answer if d else "open" for parts in cells.values() for d in parts.values()]
        ratio = None
        if verdict.noise_factor is not None and reference.noise_factor is not None:
            # Both are 0 where a batch is the whole data set: no noise is as much as no noise.
            ratio = verdict.noise_factor / reference.noise_factor if reference.noise_factor else 1.0
        several = max(sizes[verdict.batch_size], sizes[reference.batch_size]) > 1
        pair = verdict.batch_size, verdict.lr, reference.batch_size, reference.lr
        found.append(SharedLimit(*pair, combine(answers), cells, ratio, elsewhere, several))
    return found


def same_sde(a: Verdict, b: Verdict) -> bool:
    """Whether lr/B, and with it the SDE of independent draws, is the same: the linear scaling rule."""
    return abs(a.lr * b.batch_size / (b.lr * a.batch_size) - 1) < 1e-6


def _difference(cell: Cell, reference: Cell | None, confidence: float) -> Decision | None:
    if reference is None or cell.figure is None or reference.figure is None or reference.margin is None:
        return None
    return decide(cell.figure.minus(reference.figure), reference.margin, confidence)


def _same_time(part: str, reference: Verdict, verdict: Verdict) -> bool:
    """Whether a part is at the same times and rate of the SDE, but for whole steps; one that one lacks is not."""
    if part not in reference.times:
        return not reference.times  # it has no usable runs, and no limit
    # A whole step of either counts as no difference: a milestone falls on one.
    room = SAME * max(verdict.times[END]) + max(verdict.lr, reference.lr)
    if not same_within_rounding(verdict.rates[part] / verdict.lr, reference.rates[part] / reference.lr):
        return False
    return all(abs(a - b) <= room for a, b in zip(reference.times[part], verdict.times[part], strict=True))
