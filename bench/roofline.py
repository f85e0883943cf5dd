"""The least time of a training step on a GPU, and of a whole run: bytes and operations over datasheet figures.

python bench/roofline.py                  docs/roofline.md's tables of whole steps
python bench/roofline.py vgg16-gn         of another net

Every op of a step moves its operands once and computes at the peak rate. Ops run one after the other, each at
the slower rate of the two. Nothing is run: the tensors are on the device "meta". Caches are left out, and launches but
for the last column: --launches is what tests/logging_device/test_counts.py holds.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from svag_fast.experiments.models import build_model
from svag_fast.kernels.weight_grad import Convolution, chunks_of, tile_of

IMAGES, EPOCHS = 50_000, 300  # CIFAR-10, and the paper's runs


@dataclass(frozen=True)
class GPU:
    """NVIDIA's datasheet: bytes/s, and operations/s of dense tf32."""

    name: str
    bandwidth: float
    tf32: float


GPUS = (GPU("A100", 2039e9, 156e12), GPU("H100", 3350e9, 494e12))


class Ops(TorchDispatchMode):
    """Bytes and operations of each op in the block that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []
        self.convolutions: list[tuple[Tensor, Tensor, list[int], Convolution]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.detach):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            # Written in place, a tensor is an operand and the result.
            moved = sum(t.numel() * t.element_size() for t in tensors)
            count = flop_registry.get(function.overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.found.append((function.overloadpacket.__name__, moved, operations))
            if function.overloadpacket is torch.ops.aten.convolution_backward:
                self.convolutions.append((args[0], args[1], list(args[2].shape), Convolution(*map(tuple, args[4:7]))))
        return out

    def add_norms(self) -> None:
        """What our weight gradient moves beyond PyTorch's backward: the output's gradient again, and partial sums."""
        for dy, x, (o, c, *k), convolution in self.convolutions:
            n = c * math.prod(k)
            image = (x.shape[2], dy.shape[2], dy.shape[3])
            tile = tile_of((o, c, k[0], k[1]), image, convolution, exact=False)
            tiles = tile.count(o, n)
            _, chunks = chunks_of(len(x) // 2, 2 * tiles, tile.warps)
            sums = 2 * chunks * o * n if chunks > 1 else 0
            self.found.append(("dy again", 4 * dy.numel(), 0))
            self.found.append(("partial sums, written and read", 2 * 4 * (sums + tiles * len(x)), 0))

    def seconds(self, gpu: GPU) -> float:
        return sum(max(moved / gpu.bandwidth, operations / gpu.tf32) for _, moved, operations in self.found)


def step_ops(net: str, batch: int, *, norms: bool) -> Ops:
    """A step's forward and backward pass over both batches together, and the update."""
    model: nn.Module = build_model(net, in_channels=3, num_classes=10).to("meta")
    images = torch.empty(2 * batch, 3, 32, 32, device="meta")
    labels = torch.empty(2 * batch, dtype=torch.long, device="meta")
    with Ops() as ops:
        F.cross_entropy(model(images), labels).backward()
    if norms:
        ops.add_norms()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ops.found.append(("svag_step_", 16 * numbers, 0))
    return ops


def steps_of_a_run(batch: int, l: int) -> int:
    return EPOCHS * (IMAGES // batch) * l


def table(net: str, batches: tuple[int, ...], l: int, *, norms: bool, launches: int) -> list[str]:
    lines = [
        f"| {net}, l = {l}{', norms' if norms else ''} | GB a step | G operations a step | M steps "
        "| A100: µs a step, hours | H100: µs a step, hours | hours for each µs a launch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in batches:
        ops, steps = step_ops(net, batch, norms=norms), steps_of_a_run(batch, l)
        moved, operations = (sum(row[i] for row in ops.found) for i in (1, 2))
        floors = [f"{s * 1e6:.0f}, {s * steps / 3600:.1f}" for s in map(ops.seconds, GPUS)]
        lines.append(
            f"| B = {batch} | {moved / 1e9:.2f} | {operations / 1e9:.0f} | {steps / 1e6:.2f} | {floors[0]} | "
            f"{floors[1]} | {launches * steps * 1e-6 / 3600:.2f} |"
        )
    return lines


def by_op(ops: Ops) -> list[str]:
    """What the step's time goes to: the eight ops that take most."""
    gpu = GPUS[0]
    names: dict[str, list[float]] = {}
    for name, moved, operations in ops.found:
        row = names.setdefault(name, [0, 0.0, 0.0])
        row[0] += 1
        row[1] += moved
        row[2] += max(moved / gpu.bandwidth, operations / gpu.tf32)
    lines = ["| op | number | MB | A100, µs |", "| --- | --- | --- | --- |"]
    for name, (number, moved, seconds) in sorted(names.items(), key=lambda item: -item[1][2])[:8]:
        lines.append(f"| {name} | {number:.0f} | {moved / 1e6:.0f} | {seconds * 1e6:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", nargs="?", default="preresnet32-gn")
    parser.add_argument("--l", type=int, default=64)
    parser.add_argument("--norms", action="store_true", help="every sample's norm as well")
    parser.add_argument("--launches", type=int, default=298, help="of a step")
    arguments = parser.parse_args()
    net, norms = arguments.net, arguments.norms
    lines = table(net, (64, 1024), arguments.l, norms=norms, launches=arguments.launches)
    print("\n".join([*lines, "", *by_op(step_ops(net, 64, norms=norms))]))


if __name__ == "__main__":
    main()
