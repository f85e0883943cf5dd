"""Normalisations: weight Σ_t b_t ⊙ x̂_t, x̂ the normalised input; bias Σ_t b_t."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast.sample_norms.layers.sums import positions, tokens, wide
from svag_fast.sample_norms.rule import Rule


def group_norm(module: nn.GroupNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Weight: Σ_t b_t ⊙ x̂_t, x̂ the normalised input; bias: Σ_t b_t."""
    normalised = F.group_norm(wide(inputs[0]), module.num_groups, eps=module.eps)
    return _affine(normalised, output_grad)


INSTANCE_NORMS: dict[type[nn.Module], int] = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


def instance_norm(module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """As GroupNorm's, with one group a channel, or with the running statistics where the module uses those."""
    x = wide(inputs[0])
    if module.training or not module.track_running_stats:
        return _affine(F.instance_norm(x, eps=module.eps), output_grad)
    return _affine(_by_running_statistics(module, x), output_grad)


def instance_norm_dims(module: Any) -> int:
    """The dimensions of a batched input."""
    return next(dims for kind, dims in INSTANCE_NORMS.items() if isinstance(module, kind))


def _by_running_statistics(module: Any, x: Tensor) -> Tensor:
    mean, var = (v.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 2)) for v in (module.running_mean, module.running_var))
    out: Tensor = (x - mean) * (var + module.eps).rsqrt()
    return out


def _affine(normalised: Tensor, output_grad: Tensor) -> Mapping[str, Tensor]:
    return {"weight": positions(output_grad * normalised), "bias": positions(wide(output_grad))}


def layer_norm(module: nn.LayerNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Weight: Σ_t b_t ⊙ x̂_t over the dimensions between the samples and the normalised ones; bias: Σ_t b_t."""
    normalised = F.layer_norm(wide(inputs[0]), module.normalized_shape, eps=module.eps)
    return {
        "weight": tokens(output_grad * normalised, module.normalized_shape),
        "bias": tokens(wide(output_grad), module.normalized_shape),
    }


def rms_norm(module: nn.RMSNorm, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
    """Σ_t b_t ⊙ x_t / rms(x_t)."""
    # Where eps is None, PyTorch takes the epsilon of the input's own dtype.
    eps = torch.finfo(inputs[0].dtype).eps if module.eps is None else module.eps
    normalised = F.rms_norm(wide(inputs[0]), list(module.normalized_shape), eps=eps)
    return {"weight": tokens(output_grad * normalised, module.normalized_shape)}


class BatchNormRule(Rule):
    """By its running statistics (evaluation mode) as GroupNorm's; in training mode the samples are coupled."""

    knows = frozenset({"weight", "bias"})

    def refusal(self, module: Any) -> str | None:
        """Why this module can't be served with its present options, or None."""
        if module.training or module.running_mean is None:
            return (
                "BatchNorm that uses the batch's statistics couples the samples, so that none has a gradient of its "
                "own (with affine=False too): use svag_fast.noise.from_two_batches or StepStats, replace it by "
                "GroupNorm, or put it into evaluation mode"
            )
        return None

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        """Each sample's gradient [B, *shape] of weight and bias."""
        return _affine(_by_running_statistics(module, wide(inputs[0])), output_grad)
