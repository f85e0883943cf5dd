"""How the two batches of a step are drawn: modes, streams of indices that resume in mid-epoch, and what each does to N.

| mode        | the two batches of a step                                     | the authors' `sample_mode`  |
| ----------- | ------------------------------------------------------------- | --------------------------- |
| replacement | 2B independent draws                                          | with_replacement            |
| distinct    | B distinct samples each, the two drawn independently          | two_without_replacement     |
| halves      | the halves of 2B distinct samples, drawn afresh               | without_replacement         |
| shuffle     | the halves of the next 2B samples of an epoch in random order | random_shuffling            |
| fixed       | as shuffle, but every epoch has the same order                | fixed_sequence              |

At l = 1, SGD, shuffle and fixed take B at a time, and batch 2, which only measures the noise, is B distinct samples
drawn afresh. The order of `fixed` is the run's own, by its seed.

Nothing here imports torch before it is used: `config` reads the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from svag_fast.numeric import integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Mode(NamedTuple):
    """What is known of a mode before anything is drawn."""

    text: str
    """What its batches are, in a picture's caption."""
    distinct: bool = True
    """Whether a batch has no sample twice."""
    halves: bool = False
    """Whether the two batches of a step of SVAG, l > 1, have no sample in common."""
    epochs: bool = False
    """Whether batches follow each other through epochs."""


MODES = {
    "replacement": Mode("batches drawn with replacement", distinct=False),
    "distinct": Mode("batches of distinct images"),
    "halves": Mode("two halves of distinct images", halves=True),
    "shuffle": Mode("batches of shuffled epochs", halves=True, epochs=True),
    "fixed": Mode("batches in one fixed order", epochs=True),
}


def is_disjoint(mode: str, l: float) -> bool:
    """Whether the two batches of a step are halves of one draw, and so not independent of each other."""
    # SGD's steps follow batch 1 alone: taking B at a time it sees each sample once an epoch, as it does elsewhere.
    return MODES[mode].halves and (l > 1 or not MODES[mode].epochs)


def population_of(mode: str, size: int | None) -> int | None:
    """Return n as the estimators' `population` takes it: `size` where a batch's samples are distinct, else None."""
    return size if MODES[mode].distinct else None


def require_drawable(mode: str, batch_size: int, l: float, size: int, dataset: str) -> None:
    """Refuse what can't be drawn, or is no SVAG.

    Raises:
        ValueError: the setting is named.
    """
    # The run would minimise a weighted loss with negative weights.
    if mode == "fixed" and l > 1:
        raise ValueError(
            f"l must be 1 at sampling fixed, got {l:g}: with the same order in every epoch a sample would keep one of "
            "SVAG's two coefficients for ever"
        )
    most = size // 2 if is_disjoint(mode, l) else size
    if MODES[mode].distinct and batch_size > most:
        part = "half the size" if most != size else "the size"
        raise ValueError(
            f"batch_size must be at most {most}, {part} of {dataset}'s training set, or sampling replacement, got "
            f"{batch_size}"
        )


class Streams:
    """The indices of a run's batches, drawn on the CPU, so that a run has the same ones on every device.

    Each batch has a generator of its own, so that SGD's path does not depend on the batches that only measure its
    noise; halves of one draw are drawn by the first's.

    Attributes:
        generators: the two batches' own.
    """

    def __init__(self, mode: str, population: int, batch_size: int, l: float, generators: Sequence[torch.Generator]):
        require_drawable(mode, batch_size, l, population, "the data set")
        self.generators = list(generators)
        self._mode, self._population, self._batch_size = MODES[mode], population, batch_size
        self._disjoint = is_disjoint(mode, l)
        self._fixed = mode == "fixed"
        # Of an epoch: its order, how much of it is taken, and the state that drew it. The order itself would make
        # checkpoints large.
        self._order: Tensor | None = None
        self._taken = 0
        self._epoch_state: Tensor | None = None

    def next_indices(self) -> Tensor:
        """Return the next step's indices [2B], int64 on the CPU: the first batch's, then the second's."""
        import torch

        B = self._batch_size
        if self._disjoint:
            return self._next(2 * B)
        return torch.cat([self._next(B), self._draw(B, self.generators[1])])

    def _next(self, count: int) -> Tensor:
        """What the first generator draws: afresh, or the next of its epoch."""
        if not self._mode.epochs:
            return self._draw(count, self.generators[0])
        # A last incomplete batch is dropped.
        if self._order is None or self._taken + count > self._population:
            if not (self._fixed and self._order is not None):
                self._begin_epoch()
            self._taken = 0
        assert self._order is not None
        self._taken += count
        return self._order[self._taken - count : self._taken]

    def _begin_epoch(self) -> None:
        self._epoch_state = self.generators[0].get_state()
        self._order = draw_batch(self._population, self._population, replacement=False, generator=self.generators[0])

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        return draw_batch(self._population, count, replacement=not self._mode.distinct, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are: the generators' states, and how much of the epoch is taken."""
        states = [generator.get_state() for generator in self.generators]
        return {"generators": states, "epoch": self._epoch_state, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Tensor]) -> None:
        """Continue from what `state_dict` gave; an older version's were the two generators' states alone.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is no such state; `self` may have taken a part.
        """
        if not isinstance(state, Mapping):
            state = {"generators": state, "epoch": None, "taken": 0}
        taken, epoch = integer("taken", state["taken"], least=0, most=self._population), state["epoch"]
        if (epoch is not None and not self._mode.epochs) or (epoch is None and taken):
            raise ValueError("the batches' state must be of the same sampling, got another's")
        self._order, self._taken = None, taken
        if epoch is not None:
            self.generators[0].set_state(epoch)
            self._begin_epoch()
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)


def make_streams(mode: str, population: int, batch_size: int, seeds: Sequence[int], *, l: float) -> Streams:
    """Make the streams of a run at their beginning.

    Args:
        mode: a name in `MODES`.
        population: n, the number of training samples.
        batch_size: B, of each of a step's two batches.
        seeds: of the first batch's draws and of the second's. `fixed` takes its order from the first.
        l: SVAG's; 1 is SGD.

    Raises:
        ValueError: no such mode, or batches that can't be drawn.
    """
    import torch

    if mode not in MODES:
        raise ValueError(f"sampling must be one of {', '.join(MODES)}, got {mode!r}")
    first, second = (torch.Generator("cpu").manual_seed(seed) for seed in seeds)
    return Streams(mode, population, batch_size, l, (first, second))


def draw_batch(population: int, batch_size: int, *, replacement: bool, generator: torch.Generator) -> Tensor:
    """Draw the indices [batch_size] of a batch from 0 .. population - 1, fresh at every call.

    Args:
        population: size of the data set.
        batch_size: 1 <= batch_size, and <= population without replacement.
        replacement: independent draws; else all distinct.
        generator: decides the draw.
    """
    import torch

    if replacement:
        return torch.randint(population, (batch_size,), generator=generator, dtype=torch.int64, device="cpu")
    return torch.randperm(population, generator=generator, dtype=torch.int64, device="cpu")[:batch_size]
