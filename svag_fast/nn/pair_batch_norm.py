"""BatchNorm for both batches of a SVAG step in one forward pass: each half of the rows has statistics of its own.

SVAG's two losses each use their own batch's statistics. Plain BatchNorm on the concatenation would mix them, which is
another loss; here the first half of the rows is normalised by itself, then the second, as in two passes one after the
other.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DataParallel

from svag_fast.sample_norms.tape import in_backward

_M = TypeVar("_M", bound=nn.Module)
_Pair = tuple[Tensor | None, Tensor | None]


def pair_batch_norm(
    module: _BatchNorm, x: Tensor, *, weights: _Pair, biases: _Pair, second_updates: bool = True
) -> Tensor:
    """Normalise each half of the rows by its own statistics, with the options and buffers of a BatchNorm.

    Args:
        module: its running statistics, where it tracks them in training mode, are updated by the first half, then by
            the second. A recomputation inside a backward pass (activation checkpointing) leaves them alone: plain
            BatchNorm counts such a batch twice.
        x: [2B, C, ...], B rows of the first batch, then B of the second; any memory format, which the result has.
        weights, biases: [C] or None, for each half.
        second_updates: whether the second half updates the running statistics.

    Raises:
        ValueError: the rows are odd in number, or a half has a single value a channel; nothing was updated.
    """
    rows = x.shape[0]
    if rows % 2:
        raise ValueError(f"the input must be two batches of the same size, got {rows} rows {list(x.shape)}")
    if rows == 2 and math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"each batch must be of more than one value a channel in training mode, got {list(x.shape)} for both"
        )
    updates = module.training and module.track_running_stats
    halves = torch.split(x, rows // 2) if rows else (x, x)
    out = [
        _normalise(module, half, weight, bias, updates and (first or second_updates))
        for half, weight, bias, first in zip(halves, weights, biases, (True, False), strict=True)
    ]
    return torch.cat(out)


def _normalise(module: _BatchNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, updates: bool) -> Tensor:
    """One batch by its own statistics; as :class:`torch.nn.BatchNorm2d` does."""
    mean, var = (module.running_mean, module.running_var) if updates else (None, None)
    factor = _counted(module) if updates else 0.0
    if module.eps == 0:
        return _without_eps(x, mean, var, weight, bias, factor)
    return F.batch_norm(x, mean, var, weight, bias, True, factor, module.eps)


def _counted(module: _BatchNorm) -> float:
    """Count a batch; what it weighs in the running statistics."""
    if not torch.compiler.is_compiling() and in_backward():
        return 0.0  # a checkpoint's second look, which must save the same tensors as the first
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            return 1.0 / float(module.num_batches_tracked)
    return 0.0 if module.momentum is None else module.momentum


def update_running_statistics(module: _BatchNorm, means: Tensor, variances: Tensor, *, values: int) -> None:
    """Count each batch and put its moments into a BatchNorm's running statistics, as its own forward does.

    A recomputation inside a backward pass leaves them alone, as in `pair_batch_norm`.

    Args:
        module: in training mode, if anything is to happen.
        means, variances: [batches, C], each batch's, one after the other; the mean square about the mean.
        values: how many each is of.
    """
    if not (module.training and module.track_running_stats):
        return
    paired = isinstance(module, _PairBatchNorm)
    with torch.no_grad():
        for mean, var in zip(means, variances, strict=True):
            factor = _counted(module)
            if module.running_mean is not None and module.running_var is not None:
                pairs = ((module.running_mean, mean), (module.running_var, var * (values / (values - 1))))
                for running, new in pairs:
                    running.mul_(1 - factor).add_(new.to(running.dtype), alpha=factor)
            if paired and not module.second_updates:
                return


def _without_eps(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, factor: float
) -> Tensor:
    """With eps = 0, which PyTorch refuses in training mode: a channel of equal values is 0, and so is its gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = [0, *range(2, x.dim())]
    centre = wide.mean(over, keepdim=True)
    centred = wide - centre
    spread = centred.square().mean(over, keepdim=True)
    flat = spread == 0
    out = centred * torch.where(flat, 1, spread).rsqrt().masked_fill(flat, 0)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    if mean is not None and var is not None:
        values = x.numel() // x.shape[1]
        with torch.no_grad():
            mean.lerp_(centre.flatten().to(mean.dtype), factor)
            var.lerp_((spread.flatten() * (values / (values - 1))).to(var.dtype), factor)
    return out.to(x.dtype)


class _PairBatchNorm(_BatchNorm):
    """What the three have in common: the forward."""

    second_updates: bool = True
    """Whether the second half updates the running statistics; False at l = 1, where that batch only measures."""

    def forward(self, input: Tensor) -> Tensor:
        """[2B, C, ...] to the same shape; in evaluation mode plain BatchNorm, of any number of rows."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return pair_batch_norm(
            self,
            input,
            weights=(self.weight, self.weight),
            biases=(self.bias, self.bias),
            second_updates=self.second_updates,
        )


class PairBatchNorm1d(_PairBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d over [2B, C] or [2B, C, L], each half of the rows with statistics of its own in training mode.

    Arguments, parameters, buffers and state dict are those of :class:`torch.nn.BatchNorm1d`; evaluation mode is plain
    BatchNorm. Outputs, gradients and running statistics are those of two passes, the first half's, then the second's.
    ``second_updates = False`` (at l = 1, where the second batch only measures) has the running statistics follow the
    first half alone. With ``eps=0`` a channel of equal values gives 0 instead of nan.

    Raises:
        ValueError: in training mode, of an odd number of rows, or of one value a channel in each half.
    """


class PairBatchNorm2d(_PairBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d over [2B, C, H, W], NCHW or channels_last: see :class:`PairBatchNorm1d`."""


class PairBatchNorm3d(_PairBatchNorm, nn.BatchNorm3d):
    """BatchNorm3d over [2B, C, D, H, W]: see :class:`PairBatchNorm1d`."""


_PAIRED: dict[type[nn.Module], type[_PairBatchNorm]] = {
    nn.BatchNorm1d: PairBatchNorm1d,
    nn.BatchNorm2d: PairBatchNorm2d,
    nn.BatchNorm3d: PairBatchNorm3d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {paired: plain for plain, paired in _PAIRED.items()}


# Along their `dim`.
_ACROSS: tuple[type[nn.Module], ...] = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)


class CoupledSamples(TypeError):  # noqa: N818  (it names what was met)
    """A model in which one sample's output depends on others, where that can't be kept to one batch."""


def pair_(model: _M, *, second_updates: bool = True) -> _M:
    """Turn every BatchNorm of a model into its pair, in place: both batches of a step then go through in one pass.

    Parameters, buffers, hooks, options and the state dict's keys stay as they are. Optimizers and checkpoints work.
    :func:`unpair_` takes it back. In training mode the model then takes [2B, ...]: the first batch, then the second.

    Args:
        model: any module; returned.
        second_updates: False at ``l = 1``, where the second batch only measures: it leaves the running statistics
            alone. May be called again to change it.

    Raises:
        CoupledSamples: modules that couple the samples in ways that can't be paired, with all their names; nothing was
            changed. What no module shows (a mean over the batch in some forward) is found by
            :func:`svag_fast.check_independence`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refused = [
        f"{name or 'the model'} ({type(m).__name__}): {reason}"
        for name, m in model.named_modules()
        if (reason := why_not_paired(m)) is not None
    ]
    if refused:
        raise CoupledSamples("the model can't be paired:\n  " + "\n  ".join(refused))
    for module in model.modules():
        kind = _PAIRED.get(type(module))
        if kind is not None:
            module.__class__ = kind
        if isinstance(module, _PairBatchNorm):
            module.second_updates = second_updates
    return model


def unpair_(model: _M) -> _M:
    """Turn what :func:`pair_` made back into plain BatchNorm, in place; returns the model."""
    for module in model.modules():
        kind = _PLAIN.get(type(module))
        if kind is not None:
            module.__dict__.pop("second_updates", None)
            module.__class__ = kind
    return model


def why_not_paired(module: nn.Module) -> str | None:
    """Why a module's halves can't be kept apart in one pass, or None; its children are asked for themselves."""
    kind = type(module)
    if kind in _PAIRED or kind in _PLAIN:
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are of all processes: use plain BatchNorm, whose statistics each process has of its own"
    if isinstance(module, _LazyNormBase):
        return "not initialised yet: run the model once before"
    if isinstance(module, _BatchNorm):
        return "a kind of BatchNorm of its own: only torch's BatchNorm1d, 2d and 3d can be paired"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "its running statistics would be of both batches at once: track_running_stats=False can be paired"
    if isinstance(module, DataParallel):
        return "it cuts the rows into pieces of its own: use DistributedDataParallel"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which hides its layers: pair the model before"
    if isinstance(module, _ACROSS) and module.dim == 0:
        return "dim=0 couples the samples"
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        return "start_dim=0 couples the samples"
    return None
