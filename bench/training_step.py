"""A whole training step of both batches, as a user would write it in each of the ways; and what it needs of memory.

`python bench/training_step.py NET BATCH FORMAT CONTENDER` prints the peak of a process's memory over what it had before
the first step, in MiB.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import svag_fast
from svag_fast.experiments.models import build_model
from svag_fast.nn import fuse

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
L, LR = 4, 1e-3


class Step:
    """A net, two batches, and a contender's step on them."""

    def __init__(self, net: str, batch: int, memory_format: str, contender: str) -> None:
        channels, size = (1, 8) if net == "digits-net" else (3, 32)
        self.model = build_model(net, in_channels=channels, num_classes=10).to(memory_format=FORMATS[memory_format])
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (
                torch.randn(batch, channels, size, size, generator=generator).to(memory_format=FORMATS[memory_format]),
                torch.randint(10, (batch,), generator=generator),
            )
            for _ in range(2)
        ]
        kind = torch.optim.SGD if "SGD" in contender else svag_fast.SVAG
        options = {"lr": LR} if kind is torch.optim.SGD else {"lr": LR, "l": L}
        if contender == "pair_pass, in backward":
            options["in_backward"] = True
        self.optimizer = kind(self.model.parameters(), **options)
        self.take = CONTENDERS[contender].__get__(self)

    def joined(self) -> tuple[Tensor, Tensor]:
        (x1, y1), (x2, y2) = self.batches
        return torch.cat([x1, x2]), torch.cat([y1, y2])

    def pair(self, way: str) -> None:
        with svag_fast.pair_pass(self.model, self.optimizer, way=way) as pair:
            x, y = self.joined()
            pair.backward(F.cross_entropy(self.model(x), y, reduction="none"))
        self.optimizer.step()

    def two_passes(self) -> None:
        self.optimizer.zero_grad()
        for which, (x, y) in enumerate(self.batches):
            F.cross_entropy(self.model(x), y).backward()
            if which == 0:
                self.optimizer.hold_gradient()
        self.optimizer.step()

    def two_forwards(self) -> None:
        c1, c2 = svag_fast.svag_coefficients(L)
        losses = [F.cross_entropy(self.model(x), y) for x, y in self.batches]
        self.optimizer.zero_grad()
        (c1 * losses[0] + c2 * losses[1]).backward()
        self.optimizer.step()

    def sgd(self) -> None:
        x, y = self.joined()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def norms_apart(take: Callable[[Step], None]) -> Callable[[Step], None]:
    """The step without the kernel that norms and ReLUs share: PyTorch's own layers, as a user's net has them."""

    def run(step: Step) -> None:
        least, fuse.FUSED_ELEMENTS = fuse.FUSED_ELEMENTS, sys.maxsize
        try:
            take(step)
        finally:
            fuse.FUSED_ELEMENTS = least

    return run


CONTENDERS: dict[str, Callable[[Step], None]] = {
    "pair_pass": lambda step: step.pair("auto"),
    "pair_pass, joint": lambda step: step.pair("joint"),
    "pair_pass, halves": lambda step: step.pair("halves"),
    "pair_pass, in backward": lambda step: step.pair("joint"),
    "pair_pass, norms apart": norms_apart(lambda step: step.pair("auto")),
    "two passes, SVAG": Step.two_passes,
    "two forwards, SGD": Step.two_forwards,
    "two forwards, SGD, norms apart": norms_apart(Step.two_forwards),
    "SGD at 2B": Step.sgd,
    "SGD at 2B, norms apart": norms_apart(Step.sgd),
}


def peak(net: str, batch: str, memory_format: str, contender: str) -> float:
    step = Step(net, int(batch), memory_format, contender)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step.take()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{peak(*sys.argv[1:]):.0f}")
