"""Linear layers, convolutions and attention: the weight gradient is replaced by one that brings the norms along.

Their weight gradient is a sum of products b_iᵀ a_i, and `svag_fast.ops.weight_grad_and_sq_norms` squares each on its
way into the sum: no second pass over the data, and no per-sample gradient is stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast.ops.weight_grad.op import unchecked_weight_grad, unchecked_weight_grads
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.sample_norms import checks
from svag_fast.sample_norms.rule import Rule, Scope, in_full_precision, register
from svag_fast.sample_norms.tape import Use, row_sq_norms

_convolution_backward = torch.ops.aten.convolution_backward.default


class LinearProduct:
    """y_t = W a_t + c: weight b_iᵀ a_i = Σ_t b_t a_tᵀ; bias Σ_t b_t (the norm of the sum, not the sum of norms)."""

    geometry: Geometry | None = None  # of the product of images that it is, if it is one

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's forward."""
        return F.linear(x, weight, bias)

    def input_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient in the input x, of which only the shape matters."""
        return b @ weight

    def plain_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight alone, by operations that can be differentiated."""
        return b.flatten(0, -2).T @ x.flatten(0, -2)

    def weight_grad(
        self, b: Tensor, x: Tensor, shape: torch.Size, bias_sq_norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a weight of the given shape, and |g_i|² [B]; the bias's own are used where they are known."""
        if x.dim() == 2:  # one position: |b aᵀ|² = |b|²|a|², by fewer calls than the op's
            b_sq_norms = row_sq_norms(b) if bias_sq_norms is None else bias_sq_norms
            return b.T @ x, b_sq_norms * row_sq_norms(x)
        return unchecked_weight_grad(x.flatten(1, -2), b.flatten(1, -2), shape, Geometry())

    def sample_weight_grads(self, b: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The samples' own gradients of the weight, [B, *shape]."""
        return (
            torch.einsum("btd,btp->bdp", b.flatten(1, -2), x.flatten(1, -2))
            if b.dim() > 2
            else b[:, :, None] * x[:, None]
        )

    def sample_bias_grads(self, b: Tensor) -> Tensor:
        """The samples' own gradients of the bias, [B, d]."""
        return b.flatten(1, -2).sum(1) if b.dim() > 2 else b


LINEAR = LinearProduct()


class ConvProduct:
    """Convolution in 1, 2 or 3 dimensions with zero padding: a_i are the windows, group by group; bias Σ_t b_t.

    In 1 dimension: a 2-D convolution of height 1. In 3: a 2-D product for each depth tap k; the slices of depth that
    tap k meets are laid one below the other with zeros between, so that a sample's slices are summed before squaring.
    """

    def __init__(
        self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
    ) -> None:
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.geometry = Geometry(stride, padding, dilation, groups) if len(stride) == 2 else None  # type: ignore[arg-type]

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's forward."""
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        out: Tensor = convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return out

    def input_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient in the input x, of which only shape and memory format matter."""
        return self._backward(b, x, weight, 0)

    def plain_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight alone, by operations that can be differentiated."""
        return self._backward(b, x, weight, 1)

    def weight_grad(
        self, b: Tensor, x: Tensor, shape: torch.Size, bias_sq_norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a weight of the given shape, and |g_i|² [B]."""
        if self.geometry is not None:
            return unchecked_weight_grad(x, b, shape, self.geometry)
        if len(self.stride) == 3:
            return self._by_depth_taps(b, x, shape)
        flat = ConvProduct((1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)
        grad, sq_norms = flat.weight_grad(b[:, :, None], x[:, :, None], torch.Size((*shape[:2], 1, shape[2])))
        return grad.reshape(shape), sq_norms

    def sample_weight_grads(self, b: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The samples' own gradients of the weight, [B, *shape]."""
        weight = b.new_empty(1).expand(shape)
        rows = [self._one_weight_grad(b[i : i + 1], x[i : i + 1], weight) for i in range(b.shape[0])]
        return torch.stack(rows) if rows else b.new_zeros(0, *shape)

    def _one_weight_grad(self, b: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if not b.is_complex():
            return self._backward(b, x, weight, 1)
        # b = p + iq and x = u + iv: (p + iq)(u − iv), as the gradient is linear in b and in the conjugate of x.
        one = weight.real
        pu, qv, qu, pv = (
            self._backward(left, right, one, 1)
            for left, right in ((b.real, x.real), (b.imag, x.imag), (b.imag, x.real), (b.real, x.imag))
        )
        return torch.complex(pu + qv, qu - pv)

    def sample_bias_grads(self, b: Tensor) -> Tensor:
        """The samples' own gradients of the bias, [B, d]."""
        return b.flatten(2).sum(2)

    def _backward(self, b: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        """PyTorch's own gradient in the input (0) or the weight (1)."""
        no_output_padding = (0,) * len(self.stride)
        grads: list[Tensor] = _convolution_backward(
            b,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            no_output_padding,
            self.groups,
            (which == 0, which == 1, False),
        )
        return grads[which]

    def _by_depth_taps(self, b: Tensor, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        B, O, depth, height, width = b.shape
        (stride_d, stride_h, _), (dilation_d, dilation_h, _) = self.stride, self.dilation
        rows = x.shape[3] + 2 * self.padding[1]
        slot = -(-rows // stride_h)  # output rows that one slice of depth takes up, a few of them empty
        bottom = self.padding[1] + slot * stride_h - rows
        x = F.pad(x, (0, 0, self.padding[1], bottom, self.padding[0], self.padding[0]))
        b = F.pad(b, (0, 0, 0, slot - height)).reshape(B, O, depth * slot, width)
        b = b[:, :, : (depth * slot * stride_h - dilation_h * (shape[3] - 1) - 1) // stride_h + 1]
        flat = ConvProduct(self.stride[1:], (0, self.padding[2]), self.dilation[1:], self.groups)
        planes, total = [], torch.zeros(B, dtype=torch.float64, device=b.device)
        for tap in range(shape[2]):
            first = tap * dilation_d
            met = x[:, :, first : first + (depth - 1) * stride_d + 1 : stride_d].flatten(2, 3)
            grad, sq_norms = flat.weight_grad(b, met, torch.Size((*shape[:2], *shape[3:])))
            planes.append(grad)
            total = total + sq_norms
        return torch.stack(planes, 2), total


Product: TypeAlias = LinearProduct | ConvProduct


def weight_grads_of_halves(
    product: Product, b: Tensor, x: Tensor, weight: Tensor, *, norms: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The weight's gradient of each half of the rows, and each row's squared norm if asked."""
    geometry = product.geometry
    if geometry is not None and (norms or not b.is_cuda):
        return unchecked_weight_grads(x, b, weight.shape, geometry, 2, norms=norms)
    rows = b.shape[0] // 2
    halves = zip(torch.split(b, rows), torch.split(x, rows), strict=True)
    if not norms:
        return [product.plain_weight_grad(b_half, x_half, weight) for b_half, x_half in halves], None
    both = [product.weight_grad(b_half, x_half, weight.shape) for b_half, x_half in halves]
    return [grad for grad, _ in both], torch.cat([sq_norms for _, sq_norms in both])


class Call(Protocol):
    """One use of a layer in a forward pass: what computes it, and who takes its gradients in the backward pass."""

    @property
    def product(self) -> Product:
        """What computes it."""

    def grads(self, ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of :class:`ProductLayer`'s four inputs, of which autograd passes on what is not None.

        ``ctx`` has the input and the weight as saved tensors, and ``dtypes``, of the input and the bias before casts.
        """


class ProductLayer(torch.autograd.Function):
    """A layer whose call forms its gradients: the one place where a product's weight gradient is replaced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        """The layer's output, of which `call` forms the gradients."""
        output = call.product.output(x, weight, bias)
        if output._is_view():  # of what PyTorch makes on the way: nobody could change it in place behind a function
            output = output.data
        low = x if x.dtype == output.dtype else x.to(output.dtype)  # what the layer saw under autocast
        # Without a weight gradient nothing of x is needed but its shape.
        ctx.save_for_backward(low if ctx.needs_input_grad[1] else low.new_empty(1).expand(x.shape), weight)
        ctx.call = call
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        """What `call` says."""
        grads: tuple[Tensor | None, ...] = ctx.call.grads(ctx, b)
        return grads


class _Call(NamedTuple):
    """One whose uses are delivered to the recorder; `direct`: weight and bias are the parameters themselves, not parts
    of an alias."""

    product: Product
    scope: Scope
    weight_use: Use | None
    bias_use: Use | None
    direct: bool

    def grads(self, ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        return _grads_with_graph(ctx, b) if torch.is_grad_enabled() else _grads(ctx, b)


def _grads(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
    with in_full_precision(b):
        x, weight = ctx.saved_tensors
        product, scope, weight_use, bias_use, direct = ctx.call
        x_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        x_grad = weight_grad = bias_grad = bias_sq_norms = None
        if b.is_neg():
            b = b.resolve_neg()  # the kernels read memory
        if x.is_neg():
            x = x.resolve_neg()
        if wants_bias and not scope.recorder.paused:
            sample_rows = product.sample_bias_grads(b)
            bias_sq_norms = row_sq_norms(sample_rows)
            bias_grad = sample_rows.sum(0, dtype=bias_dtype)
            if bias_use is not None:
                bias_use.deliver(bias_sq_norms, lambda rows: sample_rows[rows], bias_grad if direct else None)
        if wants_x:
            x_grad = _cast(product.input_grad(b, x, _cast(weight, b.dtype)), x_dtype)
        if wants_weight and not scope.recorder.paused:
            shape = weight.shape
            weight_grad, sq_norms = product.weight_grad(b, x, shape, bias_sq_norms)
            weight_grad = _cast(weight_grad, weight.dtype)
            if weight_use is not None:
                own_grads = functools.partial(_own_grads, product, b, x, shape)
                weight_use.deliver(sq_norms, own_grads, weight_grad if direct else None)
                if scope.to_check(weight_use.key[0], b):
                    checks.check_product(scope, product.output, weight_use.key[0], weight_grad, b, x)
                    if scope.check:
                        checks.check_norms(scope, weight_use.key[0], sq_norms, own_grads)
    return x_grad, weight_grad, bias_grad, None


def _own_grads(product: Product, b: Tensor, x: Tensor, shape: torch.Size, rows: slice) -> Tensor:
    return product.sample_weight_grads(b[rows], x[rows], shape)


def _grads_with_graph(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
    """The same with a graph of the backward pass (create_graph=True): the norms beside PyTorch's own gradients, which
    may be differentiated again."""
    with torch.no_grad():
        ours = _grads(ctx, b)
    x_dtype, bias_dtype = ctx.dtypes
    x, weight = ctx.saved_tensors
    scope = ctx.call.scope
    if not x_dtype == x.dtype == b.dtype == weight.dtype:
        return _once(scope.label, ours)  # what autocast casts has no graph of its own
    b = scope.recorder.watch_second(b, scope.label)
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    product = ctx.call.product
    rows = product.sample_bias_grads(b) if wants_bias else None
    return (
        product.input_grad(b, x, weight) if wants_x else None,
        _same_value(product.plain_weight_grad(b, x, weight), ours[1]) if wants_weight else None,
        None if rows is None else _same_value(rows.sum(0, dtype=bias_dtype), ours[2]),
        None,
    )


def _same_value(grad: Tensor, value: Tensor | None) -> Tensor:
    """A gradient by another way, with the bits of the one that was announced to the parameter's hook."""
    assert value is not None
    return _Valued.apply(grad, value)  # type: ignore[no-untyped-call, no-any-return]


class _Valued(torch.autograd.Function):
    """The second tensor, with the derivatives of the first."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Once(torch.autograd.Function):
    """Tensors that can't be differentiated. `anchor`: so that they always have a graph to say so."""

    @staticmethod
    def forward(ctx: Any, label: str, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.label = label
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"second derivatives through {ctx.label} under autocast can't be taken inside per_sample_sq_norms: take "
            "them outside of the context"
        )


def _once(label: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    leaf = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    return _Once.apply(label, leaf, *grads)  # type: ignore[no-untyped-call, no-any-return]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class _Linear(Rule):
    """See LinearProduct."""

    knows = frozenset({"weight", "bias"})
    any_rows = True

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _only_input(*args, **kwargs)
        if x.dim() < 2:
            raise ValueError(f"{scope.label} got {list(x.shape)}: per-sample norms need inputs [B, ..., in_features]")
        weight = module.weight
        if x.dtype.is_complex or weight.dtype.is_complex:
            return super().run(scope, module, args, kwargs)
        call = _Call(LINEAR, scope, scope.use("weight"), scope.use("bias"), True)
        return _apply(x, weight, module.bias, call)

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        return _sample_grads(LINEAR, module, inputs[0], output_grad)


def _sample_grads(product: Product, module: Any, x: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """For complex layers, whose weight gradient stays PyTorch's: Σ_t b_t conj(a_t)ᵀ."""
    weight = product.sample_weight_grads(b, x if isinstance(product, ConvProduct) else x.conj(), module.weight.shape)
    return {"weight": weight, "bias": product.sample_bias_grads(b)}


class _Conv(Rule):
    """See ConvProduct; other padding than with zeros is made first, and autograd takes it back."""

    knows = frozenset({"weight", "bias"})

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _only_input(*args, **kwargs)
        dims = len(module.kernel_size)
        if x.dim() != dims + 2:
            raise ValueError(f"{scope.label} got {list(x.shape)}: per-sample norms need inputs [B, C, ...], batched")
        weight = module.weight
        try:
            plan = conv_plan(module, weight)
        except ValueError as error:
            raise ValueError(f"{scope.label}: {error}") from None
        if x.dtype.is_complex or weight.dtype.is_complex:
            return super().run(scope, module, args, kwargs)
        call = _Call(plan.product, scope, scope.use("weight"), scope.use("bias"), True)
        return _apply(plan.padded(x), weight, module.bias, call)

    def sample_grads(self, module: Any, inputs: tuple[Any, ...], output_grad: Tensor) -> Mapping[str, Tensor]:
        plan = conv_plan(module, module.weight)
        return _sample_grads(plan.product, module, plan.padded(inputs[0]), output_grad)


def _conv_options(module: Any, weight: Tensor) -> tuple[Any, ...]:
    """What PyTorch's forward of a convolution reads: of the module as it is now, and of the weight's shape."""
    mode = module.padding_mode
    pad = None if mode == "zeros" else tuple(module._reversed_padding_repeated_twice)
    options = (weight.shape, module.stride, module.padding, module.dilation, module.groups, mode, pad)
    if list in map(type, options):
        return tuple(tuple(option) if isinstance(option, list) else option for option in options)
    return options


def conv_plan(module: Any, weight: Tensor) -> _ConvPlan:
    """Return how a convolution, with its options as they are now and this weight, is a product.

    Raises:
        ValueError: PyTorch's forward takes no such padding.
    """
    return _ConvPlan.of(_conv_options(module, weight))


class _ConvPlan(NamedTuple):
    """The product, and what F.pad has to do before it, if anything."""

    product: ConvProduct
    pad: tuple[int, ...] | None = None
    mode: str = "constant"

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(options: tuple[Any, ...]) -> _ConvPlan:
        """For these options of a convolution."""
        shape, stride, padding, dilation, groups, mode, pad = options
        kernel = shape[2:]
        stride, dilation, nothing = _each(stride, kernel), _each(dilation, kernel), (0,) * len(kernel)
        if pad is not None:
            return _ConvPlan(ConvProduct(stride, nothing, dilation, groups), pad, mode)
        if padding == "valid":
            padding = nothing
        if not isinstance(padding, str):
            return _ConvPlan(ConvProduct(stride, _each(padding, kernel), dilation, groups))
        if padding != "same" or max(stride) > 1:
            raise ValueError(f"PyTorch's forward takes no padding {padding!r} with stride {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if all(t % 2 == 0 for t in total):
            return _ConvPlan(ConvProduct(stride, tuple(t // 2 for t in total), dilation, groups))
        both = tuple(side for t in reversed(total) for side in (t // 2, t - t // 2))
        return _ConvPlan(ConvProduct(stride, nothing, dilation, groups), both)

    def padded(self, x: Tensor) -> Tensor:
        """The input with the padding that the product does not make."""
        return x if self.pad is None else F.pad(x, self.pad, mode=self.mode)


def _each(option: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """An option for each dimension, given as one number or as many."""
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * len(kernel) if len(values) == 1 else values


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    out: Tensor = ProductLayer.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
    return out


def _only_input(input: Tensor) -> Tensor:
    return input


class _Attention(Rule):
    """softmax(q kᵀ/√d + mask) v between projections that are linear layers, each with its own rows of the weight."""

    knows = frozenset({"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

    def refusal(self, module: Any) -> str | None:
        if not module.batch_first:
            return "the samples must come first: build it with batch_first=True"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn are not supported"
        return None

    def run(self, scope: Scope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._attend(scope, module, *args, **kwargs)

    def _attend(
        self,
        scope: Scope,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise ValueError(f"{scope.label} got a query {list(query.shape)}: per-sample norms need [B, T, embed_dim]")
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            rows = [x.shape[0] for x in (query, key, value)]
            raise ValueError(f"{scope.label}: query, key and value must have the samples first, got {rows} of them")
        if query.dtype.is_complex:
            raise TypeError(f"{scope.label}: complex inputs are not supported, got {query.dtype}")
        if is_causal and attn_mask is None:
            raise ValueError(f"{scope.label}: is_causal needs attn_mask, as in torch.nn.MultiheadAttention")
        q, k, v = (self._heads(module, x) for x in self._projections(scope, module, (query, key, value)))
        mask = _merged_mask(attn_mask, key_padding_mask, q.dtype, module.num_heads)
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return module.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def _projections(self, scope: Scope, module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        E = module.embed_dim
        parts = [(0, E), (E, 2 * E), (2 * E, 3 * E)]
        packed = None if module.in_proj_weight is None else scope.alias(module, "in_proj_weight")
        bias = None if module.in_proj_bias is None else scope.alias(module, "in_proj_bias")
        out = []
        for x, part, name in zip(inputs, parts, ("q_proj_weight", "k_proj_weight", "v_proj_weight"), strict=True):
            rows = slice(*part)
            if packed is not None:
                weight, weight_use = packed[rows], scope.use("in_proj_weight", part)
            else:
                weight, weight_use = scope.alias(module, name), scope.use(name)
            bias_use = scope.use("in_proj_bias", part)
            part_bias = None if bias is None else bias[rows]
            out.append(_apply(x, weight, part_bias, _Call(LINEAR, scope, weight_use, bias_use, False)))
        return out

    def _heads(self, module: Any, x: Tensor) -> Tensor:
        """[B, T, E] -> [B, heads, T, E/heads]."""
        return x.reshape(*x.shape[:2], module.num_heads, x.shape[2] // module.num_heads).transpose(1, 2)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, heads: int
) -> Tensor | None:
    """One additive mask that broadcasts to [B, heads, L, S]: -inf where a boolean mask is True."""

    def additive(mask: Tensor) -> Tensor:
        return (
            mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
        )

    merged = None
    if attn_mask is not None:
        merged = additive(attn_mask)
        if merged.dim() == 3:
            merged = merged.reshape(-1, heads, *merged.shape[1:])
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


register(_Linear(), nn.Linear)
register(_Conv(), nn.Conv1d, nn.Conv2d, nn.Conv3d)
register(_Attention(), nn.MultiheadAttention)
