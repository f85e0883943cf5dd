"""Normalisation and the ReLU behind it as one kernel, in models as they are.

Nothing about the layers changes: it is the container that looks, at each call, whether the two may be one, and calls
them one after the other where not. So hooks, contexts that serve a layer, compilers and other devices see plain layers.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from svag_fast.nn.pair_batch_norm import _PAIRED, _PairBatchNorm, update_running_statistics
from svag_fast.ops.backends import wanted, why_not
from svag_fast.ops.norm_relu import NormOptions, norm_relu_cpu
from svag_fast.sample_norms.dispatch import is_served, plain_forward

_M = TypeVar("_M", bound=nn.Module)

FUSED_ELEMENTS = 131072
"""Activations from which one kernel is quicker than two of PyTorch's, whose calls cost less: bench/test_norm_relu.py"""

# The dimensions of the inputs that each kind takes; GroupNorm: any from 2 on.
_DIMS: dict[type[nn.Module], tuple[int, ...]] = {
    kind: dims
    for plain, dims in ((nn.BatchNorm1d, (2, 3)), (nn.BatchNorm2d, (4,)), (nn.BatchNorm3d, (5,)))
    for kind in (plain, _PAIRED[plain])
}
_NORMS: tuple[type[nn.Module], ...] = (nn.GroupNorm, *_DIMS)
_FORWARDS: dict[type[nn.Module], object] = {kind: plain_forward(kind) for kind in (*_NORMS, nn.ReLU)}


def norm_then_relu(
    norm: nn.Module, x: Tensor, *, relu: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return ``relu(norm(x) + residual)``, in one kernel where that gives the same, for a block of your own.

    One kernel serves GroupNorm, and BatchNorm1d, 2d, 3d and their pairs where they take the batch's statistics, on
    float32 and float64 tensors of the CPU with at least 131,072 elements. Where anything looks at the layers (hooks,
    parametrizations, a forward of their own, torch.compile, autocast, torch.func), and for all others, they are called.

    Args:
        norm: any module.
        x: its input.
        relu: the module to call after it; torch.relu for None.
        residual: as the norm's output, added before the ReLU.
    """
    if (
        _can_fuse(norm, x)
        and (relu is None or (type(relu) is nn.ReLU and _is_plain(relu)))
        and (residual is None or (residual.shape == x.shape and _fits(residual, x)))
    ):
        return _fused(norm, x, residual)
    out = norm(x)
    if residual is not None:
        out = out + residual
    rectified: Tensor = torch.relu(out) if relu is None else relu(out)
    return rectified


class FusedSequential(nn.Sequential):
    """A Sequential whose norms run in one kernel with the ReLUs behind them: see :func:`norm_then_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """As of :class:`torch.nn.Sequential`."""
        modules = list(self._modules.values())
        place = 0
        while place < len(modules):
            module = modules[place]
            following = modules[place + 1] if place + 1 < len(modules) else None
            assert module is not None
            if isinstance(module, _NORMS) and type(following) is nn.ReLU:
                input = norm_then_relu(module, input, relu=following)
                place += 2
            else:
                input = module(input)
                place += 1
        return input


def fuse_(model: _M) -> list[str]:
    """Have every norm that a ReLU follows in an ``nn.Sequential`` run in one kernel with it, in place.

    Layers, their names, hooks and the state dict stay as they are; the Sequentials become
    :class:`FusedSequential`. :func:`unfuse_` takes it back (before ``torch.jit.script``). Blocks of your own call
    :func:`norm_then_relu`. Outputs, gradients and running statistics are the same to rounding,
    but that a checkpoint's recomputation isn't counted a second time.

    Returns:
        What was fused, such as ``"features.1 (GroupNorm) + features.2 (ReLU)"``. What looks as if it could be and
        can't is said in a warning, with the reason.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fused, left = [], []
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Sequential):
            continue
        children = [(f"{path}.{name}" if path else name, child) for name, child in module._modules.items()]
        pairs = [
            ((name, norm), (other, relu))
            for (name, norm), (other, relu) in itertools.pairwise(children)
            if isinstance(norm, (nn.GroupNorm, _BatchNorm)) and isinstance(relu, nn.ReLU)
        ]
        for one, two in pairs:
            label = " + ".join(f"{name} ({type(m).__name__})" for name, m in (one, two))
            reason = _why_no_container(module) or _why_left(one[1]) or _why_left(two[1])
            if reason is None:
                fused.append(label)
                module.__class__ = FusedSequential
            else:
                left.append(f"{label}: {reason}")
    if left:
        warnings.warn("not fused:\n  " + "\n  ".join(left), stacklevel=2)
    return fused


def unfuse_(model: _M) -> _M:
    """Turn what :func:`fuse_` made back into plain Sequentials, in place; returns the model."""
    for module in model.modules():
        if type(module) is FusedSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return model


def _why_no_container(module: nn.Module) -> str | None:
    if type(module) not in (nn.Sequential, FusedSequential):
        return f"their container is a {type(module).__name__}, which may have a forward of its own"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "their container has a forward of its own, or is compiled"
    return None


def _why_left(module: nn.Module) -> str | None:
    if type(module) not in _FORWARDS:
        return f"{type(module).__name__} is not one of torch's own kinds (or its parameters are parametrized)"
    if _has_hooks(module):
        return f"the {type(module).__name__} has hooks, which see what is between the two"
    if not _is_plain(module):
        return f"the {type(module).__name__} has a forward of its own"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's call does what its class says, and nobody looks on."""
    kind = type(module)
    return (
        kind in _FORWARDS
        and plain_forward(kind) is _FORWARDS[kind]
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not _has_hooks(module)
        and not torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and not is_served(module)
    )


def _fits(t: Tensor | None, x: Tensor) -> bool:
    return t is None or (type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device)


def _can_fuse(norm: nn.Module, x: Tensor) -> bool:
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or x.numel() < FUSED_ELEMENTS
        or not _is_plain(norm)
    ):
        return False
    if x.layout != torch.strided or torch.is_autocast_enabled("cpu") or wanted() not in ("auto", "cpu"):
        return False
    if not all(_fits(getattr(norm, name), x) for name in ("weight", "bias")):
        return False
    if why_not("norm_relu", "cpu", [x]) is not None:
        return False
    if isinstance(norm, nn.GroupNorm):
        return norm.eps > 0 and x.dim() >= 2 and x.shape[1] == norm.num_channels
    assert isinstance(norm, _BatchNorm)
    if not norm.training and norm.running_mean is not None:
        return False
    segments = _segments(norm)
    values = x.numel() // max(1, x.shape[1]) if x.dim() >= 2 else 0
    return (
        norm.eps > 0
        and x.dim() in _DIMS[type(norm)]
        and x.shape[1] == norm.num_features
        and x.shape[0] % segments == 0
        and values > segments
    )


def _segments(norm: nn.Module) -> int:
    return 2 if isinstance(norm, _PairBatchNorm) and norm.training else 1


def _fused(norm: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
    segments = _segments(norm)
    options = NormOptions(groups, segments, norm.eps, relu=True)
    y: Tensor
    y, means, variances = norm_relu_cpu(x, norm.weight, norm.bias, residual, options)
    if isinstance(norm, _BatchNorm):
        update_running_statistics(norm, means, variances, values=x.numel() // x.shape[1] // segments)
    return y
