"""Augmentation of whole batches on the device where they are, each sample by itself, from a generator.

An augmentation is a function of images and a generator. All that is random in it comes from the generator, so that a
run which saves the generator's state continues to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svag_fast.numeric import integer


@dataclass(frozen=True)
class CropFlip:
    """See :func:`crop_flip`."""

    padding: int

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: [B, C, H, W], any dtype, on any device.
            generator: on the CPU, which gives the same draws for images on every device, or on theirs, without a copy.

        Returns:
            A new tensor like `images`.
        """
        if not isinstance(images, Tensor) or images.dim() != 4:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor [B, C, H, W], got {got}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        batch, channels, height, width = images.shape
        pad, there = self.padding, generator.device
        # Both are drawn whatever the padding, so that the order of the draws is one.
        shifts = torch.randint(2 * pad + 1, (2, batch), generator=generator, device=there, dtype=torch.int64)
        flips = torch.randint(2, (batch,), generator=generator, device=there, dtype=torch.int64)
        down, across, flips = (x.to(images.device, non_blocking=True) for x in (*shifts, flips))
        padded = images.new_zeros(batch, channels, height + 2 * pad, width + 2 * pad)
        padded[:, :, pad : pad + height, pad : pad + width] = images
        columns = torch.arange(width, device=images.device, dtype=torch.int64)
        # A flip is a crop that is read backwards.
        columns = torch.where(flips[:, None] == 1, width - 1 - columns, columns) + across[:, None]
        rows = torch.arange(height, device=images.device, dtype=torch.int64) + down[:, None]
        samples = torch.arange(batch, device=images.device, dtype=torch.int64)[:, None, None]
        # The indices are of dimensions apart, so that the result has their dimensions first: [B, H, W, C].
        cropped = padded[samples, :, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2).contiguous()


def crop_flip(padding: int = 4) -> CropFlip:
    """Random crops of the padded images, and a horizontal flip of half of them: the paper's augmentation of CIFAR.

    Each sample has a shift of its own, uniform over the (2 padding + 1)² crops of its size, and is flipped with
    probability 1/2. The padding is zeros: black in uint8 images as they are read, and the mean in standardised ones.

    Args:
        padding: pixels on each side, at least 0.

    Returns:
        A function of images [B, C, H, W] and a generator.

    Raises:
        TypeError, ValueError: padding is no integer, or below 0.
    """
    return CropFlip(integer("padding", padding, least=0))
