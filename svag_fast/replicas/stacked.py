"""The stacked engines: S models as one, by giving each operation on parameters a form with S of each parameter.

The replicas' samples are folded into the batch dimension, so whatever treats each sample by itself (activations,
pooling, residual additions, the model's own code) runs unchanged on S*B samples. In place of its parameters the model
holds :class:`PerReplica` objects. PyTorch hands them to :data:`FORMS` by the ``__torch_function__`` protocol, which
knows the stacked form of an operation, or refuses by name: a parameter can't be used in a wrong way without notice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from svag_fast.replicas.errors import NotReplicable


def split(x: Tensor, replicas: int) -> Tensor:
    """[S*B, ...] to [S, B, ...]: row s*B + b is sample b of replica s."""
    if x.dim() == 0 or x.shape[0] % replicas:
        raise NotReplicable(f"a tensor of shape {list(x.shape)} is no batch of {replicas} replicas")
    return x.reshape(replicas, x.shape[0] // replicas, *x.shape[1:])


def channels(x: Tensor, replicas: int) -> Tensor:
    """[S*B, C, ...] to [B, S*C, ...]."""
    by_sample = split(x, replicas).transpose(0, 1)
    return by_sample.reshape(by_sample.shape[0], replicas * x.shape[1], *x.shape[2:])


def samples(y: Tensor, replicas: int) -> Tensor:
    """[B, S*C, ...] to [S*B, C, ...]."""
    return y.reshape(y.shape[0], replicas, y.shape[1] // replicas, *y.shape[2:]).transpose(0, 1).flatten(0, 1)


class PerReplica:
    """In the model, the place of a parameter or buffer of which there are S.

    Args:
        home: the module that holds the stacked tensor [S, ...].
        key: its name there.
        name: its name in the model, for messages.
    """

    def __init__(self, home: nn.Module, key: str, name: str) -> None:
        self.home, self.key, self.name = home, key, name

    @property
    def stacked(self) -> Tensor:
        """[S, ...]."""
        tensor = self.home._parameters[self.key] if self.key in self.home._parameters else self.home._buffers[self.key]
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> torch.Size:
        """Of one replica's tensor."""
        return self.stacked.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """As the tensor's."""
        return self.stacked.dtype

    @property
    def device(self) -> torch.device:
        """As the tensor's."""
        return self.stacked.device

    def add_(self, count: int) -> PerReplica:
        """What BatchNorm does with its number of batches."""
        if not isinstance(count, int):
            raise NotReplicable(f"add_ on {self.name} has no stacked form but for integers")
        self.stacked.add_(count)
        return self

    def __float__(self) -> float:
        values = set(self.stacked.flatten().tolist())
        if self.stacked.dim() != 1 or len(values) != 1:
            raise NotReplicable(f"float() of {self.name}, which differs between replicas")
        return float(values.pop())

    def __bool__(self) -> bool:
        raise NotReplicable(f"the truth of {self.name} was asked for: it differs between replicas")

    def __add__(self, other: Any) -> Tensor:
        return _elementwise(torch.add, self, other)

    def __sub__(self, other: Any) -> Tensor:
        return _elementwise(torch.sub, self, other)

    def __mul__(self, other: Any) -> Tensor:
        return _elementwise(torch.mul, self, other)

    def __truediv__(self, other: Any) -> Tensor:
        return _elementwise(torch.div, self, other)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise NotReplicable(f".{attribute} of {self.__dict__.get('name', 'a parameter')} has no stacked form")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        form = FORMS.get(func)
        if form is None:
            names = sorted({x.name for x in tree_leaves((args, kwargs)) if isinstance(x, PerReplica)})
            raise NotReplicable(f"{getattr(func, '__name__', func)}({', '.join(names)}) has no stacked form")
        return form(*args, **(kwargs or {}))


def _stacked(*operands: Any) -> list[Any]:
    """The stacked tensors of what must be parameters, or absent."""
    for x in operands:
        if x is not None and not isinstance(x, PerReplica):
            raise NotReplicable("a tensor that is no parameter is in the place of one: no stacked form")
    return [None if x is None else x.stacked for x in operands]


def _batch(*operands: Any) -> None:
    """Refuse a parameter in the place of samples."""
    for x in operands:
        if not isinstance(x, Tensor):
            raise NotReplicable(f"{getattr(x, 'name', x)} is in the place of samples: no stacked form")


def _against(x: Tensor, stacked: Tensor, trailing: int = 0) -> Tensor:
    """A stacked parameter [S, ...] shaped so that it meets [S, B, ...] as one replica's meets its samples.

    Its own dimensions are x's last ones, but for `trailing` more.
    """
    if stacked.dim() == x.dim() and stacked.shape[1] == 1 and not trailing:
        return stacked  # its first dimension, of size 1, is the samples'
    ones = x.dim() - 1 - stacked.dim() - trailing
    if ones < 0:
        raise NotReplicable(f"a parameter {list(stacked.shape[1:])} would widen samples {list(x.shape[2:])}")
    S = stacked.shape[0]
    return stacked.reshape(S, 1, *(1,) * ones, *stacked.shape[1:], *(1,) * trailing)


def _elementwise(op: Callable[..., Tensor], a: Any, b: Any, **options: Any) -> Tensor:
    """An arithmetic operation of samples and a parameter, broadcast as in one replica."""
    parameter, x = (a, b) if isinstance(a, PerReplica) else (b, a)
    if not isinstance(x, Tensor) or options.get("out") is not None:
        raise NotReplicable(f"{op.__name__}({parameter.name}, ...) has a stacked form for samples only")
    (stacked,) = _stacked(parameter)
    x = split(x, len(stacked))
    p = _against(x, stacked)
    return (op(p, x, **options) if isinstance(a, PerReplica) else op(x, p, **options)).flatten(0, 1)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, trailing: int = 0) -> Tensor:
    """x * weight + bias."""
    S = len(weight if weight is not None else cast(Tensor, bias))
    x = split(x, S)
    w = None if weight is None else _against(x, weight, trailing)
    b = None if bias is None else _against(x, bias, trailing)
    if w is not None and b is not None:
        return torch.addcmul(b, x, w).flatten(0, 1)
    return (x * w if w is not None else x + cast(Tensor, b)).flatten(0, 1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[S*B, ..., in] by weights [S, out, in] and biases [S, out]."""
    x = split(x, len(weight))
    if x.dim() < 3:
        raise NotReplicable("a matrix product needs rows [B, ..., features]")
    rows, matrix = x.flatten(1, -2), weight.transpose(1, 2)
    out = torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, matrix)
    return out.view(x.shape[0] * x.shape[1], *x.shape[2:-1], weight.shape[1])


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    _batch(input)
    return _product(input, *_stacked(weight, bias))


def _matmul(input: Any, other: Any) -> Tensor:
    _batch(input)
    (w,) = _stacked(other)
    if w.dim() != 3:
        raise NotReplicable(f"matmul with {other.name} has a stacked form for matrices only")
    return _product(input, w.transpose(1, 2))


def _grouped(
    func: Callable[..., Tensor], input: Any, weight: Any, bias: Any = None, *positional: Any, **options: Any
) -> Tensor:
    """S convolutions as one of S times the groups."""
    _batch(input)
    w, b = _stacked(weight, bias)
    transposed = func in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    options.update(zip(names if transposed else ("stride", "padding", "dilation", "groups"), positional, strict=False))
    if input.dim() != w.dim() - 1:
        raise NotReplicable(f"a convolution by {weight.name} has a stacked form for batches only")
    options["groups"] = options.get("groups", 1) * len(w)
    out = func(channels(input, len(w)), w.flatten(0, 1), None if b is None else b.flatten(), **options)
    return samples(out, len(w))


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    _batch(input)
    w, b = _stacked(weight, bias)
    return _affine(F.group_norm(input, num_groups, None, None, eps), w, b, input.dim() - 2)


def _layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    _batch(input)
    w, b = _stacked(weight, bias)
    return _affine(F.layer_norm(input, list(normalized_shape), None, None, eps), w, b)


def _rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    _batch(input)
    (w,) = _stacked(weight)
    return _affine(F.rms_norm(input, list(normalized_shape), None, eps), w, None)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """A replica's channels are channels of its own, so its statistics are too."""
    _batch(input)
    stacked = _stacked(running_mean, running_var, weight, bias)
    S = next(len(x) for x in stacked if x is not None)
    mean, var, w, b = (None if x is None else x.view(-1) for x in stacked)
    return samples(F.batch_norm(channels(input, S), mean, var, w, b, training, momentum, eps), S)


def _prelu(input: Any, weight: Any) -> Tensor:
    _batch(input)
    (w,) = _stacked(weight)
    return torch.where(input > 0, input, _affine(input, w, None, max(0, input.dim() - 2)))


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _batch(input)
    (table,) = _stacked(weight)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotReplicable(f"embedding({weight.name}) with max_norm, scale_grad_by_freq or sparse has no stacked form")
    S, V = table.shape[:2]
    index = split(input, S)
    offsets = V * torch.arange(S, device=index.device).reshape(S, *(1,) * (index.dim() - 1))
    # What is out of range must not read a neighbour's row: it becomes out of range for all.
    out = F.embedding(torch.where((index < 0) | (index >= V), S * V, index + offsets), table.flatten(0, 1))
    if padding_idx is not None:
        out = torch.where((index == padding_idx % V).unsqueeze(-1), out.detach(), out)
    return out.flatten(0, 1)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    *,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **separate: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`torch.nn.functional.multi_head_attention_forward` of [T, S*B, E]."""
    _batch(query, key, value)
    if use_separate_proj_weight or bias_k is not None or bias_v is not None or add_zero_attn or query.dim() != 3:
        raise NotReplicable(
            f"attention({out_proj_weight.name}) has a stacked form for batches, without kdim, vdim, add_bias_kv and "
            "add_zero_attn"
        )
    weight, bias, out_weight, out_bias = _stacked(in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    N, E = query.shape[1], embed_dim_to_check
    biases = (None,) * 3 if bias is None else bias.split(E, 1)
    q, k, v = (
        _product(x.transpose(0, 1), w, b).view(N, x.shape[0], num_heads, E // num_heads).transpose(1, 2)
        for x, w, b in zip((query, key, value), weight.split(E, 1), biases, strict=True)
    )  # [N, heads, T, E / heads]
    mask = attn_mask
    if mask is not None and mask.dim() == 3:
        mask = mask.view(N, num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = key_padding_mask.view(N, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    shares = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(E // num_heads)
        shares = (scores if mask is None else scores + mask).softmax(-1)
        met = shares @ v
    else:
        met = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None)
    out = _product(met.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1)
    return out, shares.mean(1) if shares is not None and average_attn_weights else shares


def _tensors(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._buffers.values()]


def coupled(model: nn.Module) -> str | None:
    """Name a BatchNorm that holds no tensor, which no form can tell from what treats each sample by itself."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not any(t is not None for t in _tensors(module)):
            return (
                f"{path} is a {type(module).__name__} without parameters and running statistics, which would mix the "
                "replicas' samples"
            )
    return None


FORMS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    torch.prelu: _prelu,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
}
"""The stacked form of each operation that may meet a parameter."""

for _name in ("add", "sub", "mul", "div"):
    for _func in (getattr(torch, _name), getattr(Tensor, _name)):
        FORMS[_func] = functools.partial(_elementwise, getattr(torch, _name))
for _func in (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
):  # fmt: skip
    FORMS[_func] = functools.partial(_grouped, _func)
