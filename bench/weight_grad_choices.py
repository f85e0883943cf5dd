"""Print which way serves each layer's weight gradient with per-sample norms, and the multiply-adds of each way.

python bench/weight_grad_choices.py preresnet32-gn preresnet32-gn-w4 vgg16-gn
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from svag_fast.experiments.models import build_model
from svag_fast.ops.weight_grad.cpu import choose


def rows(name: str) -> list[str]:
    """One table row for each shape of the net's trained convolutions and linear layers on 32x32 images."""
    counts: dict[str, int] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        if not weight.requires_grad:
            return
        d, p = weight.shape[0], weight[0].numel()
        T = output.shape[2:].numel() if output.dim() == 4 else 1
        # Products of pixels: one for each pair of pixels, then a sum over the taps for each pair of positions.
        taps, pairs = weight[0, 0].numel() if weight.dim() == 4 else 1, T * (T + 1) // 2
        pixels = pairs * (p // taps + taps + d)
        million = [f"{n / 1e6:.2f}" for n in (T * p * d, pairs * (p + d), pixels)]
        row = f"| {list(weight.shape)} | {T} | {' | '.join(million)} | {choose(tuple(weight.shape), T)} |"
        counts[row] = counts.get(row, 0) + 1

    model = build_model(name, in_channels=3, num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(2, 3, 32, 32))
    return [f"| {count} {row}" for row, count in counts.items()]


def main(names: list[str]) -> None:
    """Print a Markdown table for each net."""
    for name in names:
        print(f"\n### {name}\n")
        print("| layers | weight | T | direct, M | Gram, M | pixel-Gram, M | chosen |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        print("\n".join(rows(name)))


if __name__ == "__main__":
    main(sys.argv[1:])
