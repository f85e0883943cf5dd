"""The weight gradient of Linear and Conv2d together with every sample's own squared norm, in one pass.

For a layer with input rows a_i [T, p] (a convolution's windows) and output gradients b_i [T, d] of sample i:

    grad = Σ_i w_i b_iᵀ a_i          sq_norms[i] = |b_iᵀ a_i|²

No [B, d, p] buffer is made, and each sample's product is formed once: squared, then added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svag_fast.ops.backends import implements, select
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import has_memory
from svag_fast.ops.weight_grad import cpu as weight_grad_cpu
from svag_fast.ops.weight_grad import triton as weight_grad_triton
from svag_fast.ops.weight_grad.shapes import Geometry, LayerProduct, grad_format, in_sum_dtype, layer_product, sum_dtype

# Samples whose gradients the reference holds at a time.
_REFERENCE_CHUNK = 8


class WeightGrad(NamedTuple):
    """What :func:`weight_grad_and_sq_norms` returns.

    Attributes:
        grad: Σ_i w_i g_i, of the weight's shape; float64 for float64 inputs, else float32; channels_last where the
            inputs of a convolution are.
        sq_norms: [B] float64, |g_i|² of each sample's own, unweighted gradient g_i.
        segment_gram: [S, S] float64, inner products of the segments' weighted gradients, or None without segments.
    """

    grad: Tensor
    sq_norms: Tensor
    segment_gram: Tensor | None


def weight_grad_and_sq_norms(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: Sequence[int],
    *,
    weights: Tensor | None = None,
    segments: Tensor | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> WeightGrad:
    """Return the weighted weight gradient and each sample's squared gradient norm, from one pass.

    Spec: "Per sample squared norms" under the estimators of Tr Σ; a sample's gradient is summed over its positions.

    Args:
        inputs: the layer's input: Linear [B, *, p]; Conv2d [B, C, H, W], contiguous or channels_last.
        output_grads: gradient of the loss in the layer's output: [B, *, d]; [B, O, H_out, W_out]. For a mean loss
            they carry its 1/B, and every squared norm its 1/B².
        weight_shape: [d, p] for Linear; [O, C / groups, k_h, k_w] for Conv2d.
        weights: [B], w_i of the sum; ones if None. They don't enter ``sq_norms``.
        segments: [B] integers >= 0 that put each sample into a segment; S is the largest plus one. Given as a tensor
            on a GPU it is read back once; give a list to avoid that. S is at most 4096.
        stride, padding, dilation, groups: of the convolution, as in :func:`torch.nn.functional.conv2d`; padding also
            "valid" or "same", always with zeros. They must be left alone for Linear.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        :class:`WeightGrad`. Sums are formed in float32 for float32 and half-precision inputs, in float64 for float64.
        On the CPU they have the same bits for any number of threads, but for ``grad`` and ``segment_gram`` of a Linear
        layer that PyTorch's own matrix product serves (few positions a sample for its width): that product groups its
        sums by the number of threads.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or options that don't fit each other; the message names the argument.
        BackendError: the backend named can't serve the call.
    """
    product = layer_product(
        inputs,
        output_grads,
        weight_shape,
        weights,
        segments,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    geometry = product.geometry
    grad, sq_norms, gram = _op(
        product.inputs,
        product.output_grads,
        product.weight_shape,
        product.weights,
        product.segments,
        product.num_segments,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.groups,
        backend,
    )
    return WeightGrad(grad, sq_norms, None if segments is None else gram)


def unchecked_weight_grad(
    inputs: Tensor, output_grads: Tensor, weight_shape: Sequence[int], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return ``grad`` and ``sq_norms`` without the op's checks and dispatch: for a backward pass that knows its layer.

    Rows of Linear must be [B, T, p] and [B, T, d]. For small layers the checks would cost more than the kernel.
    """
    (grad,), sq_norms = unchecked_weight_grads(inputs, output_grads, weight_shape, geometry, 1)
    assert sq_norms is not None
    return grad, sq_norms


def unchecked_weight_grads(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: Sequence[int],
    geometry: Geometry,
    parts: int,
    *,
    norms: bool = True,
) -> tuple[Sequence[Tensor], Tensor | None]:
    """As :func:`unchecked_weight_grad`, with the gradient of each of so many equal parts of the batch by itself.

    With ``norms=False`` the squared norms may be left out, where that is faster.
    """
    operands = (inputs, output_grads)
    # A fake tensor has no address: plain PyTorch makes fakes of it.
    plain = inputs.device.type == "cpu" and type(inputs) is type(output_grads) is Tensor  # as a rule
    plain = plain or (has_memory(inputs) and has_memory(output_grads))
    function = select("weight_grad_and_sq_norms", "auto" if plain else "reference", operands)
    if function is _cpu:
        served = weight_grad_cpu.direct_parts(inputs, output_grads, weight_shape, geometry, parts, norms=norms)
        if served is not None:
            return served
        inputs, output_grads = in_sum_dtype(inputs, output_grads)
    rows, shape = len(inputs) // parts, list(weight_shape)
    if parts == 2 and function is weight_grad_triton.serve:
        halves = weight_grad_triton.serve_halves(LayerProduct(inputs, output_grads, shape, None, None, 0, geometry))
        if halves is not None:
            return halves
    results = []
    for x, b in zip(torch.split(inputs, rows), torch.split(output_grads, rows), strict=True):
        results.append(function(LayerProduct(x, b, shape, None, None, 0, geometry)))
    return [grad for grad, *_ in results], torch.cat([sq_norms for _, sq_norms, _ in results])


def sample_grads(inputs: Tensor, output_grads: Tensor, weight_shape: Sequence[int], geometry: Geometry) -> Tensor:
    """Return g_i = b_iᵀ a_i for every sample, [B, *weight_shape]: the formula that all else is tested against."""
    if len(weight_shape) == 2:
        return torch.einsum("btd,btp->bdp", output_grads, inputs)
    B, G = inputs.shape[0], geometry.groups
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    windows = F.unfold(inputs, (weight_shape[2], weight_shape[3]), dilation, padding, stride)
    a = windows.reshape(B, G, -1, windows.shape[-1])
    b = output_grads.reshape(B, G, -1, windows.shape[-1])
    return torch.einsum("bgot,bgpt->bgop", b, a).reshape(B, *weight_shape)


@implements("weight_grad_and_sq_norms", "reference")
def reference(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, a few samples' gradients at a time."""
    inputs, output_grads, weight_shape, weights, segments, num_segments, geometry = product
    B, dtype = inputs.shape[0], sum_dtype(inputs)
    w = inputs.new_ones(B, dtype=dtype) if weights is None else weights.to(dtype)
    # [S, B]: w_i where sample i is in segment s.
    numbers = torch.arange(num_segments, dtype=torch.int64, device=w.device)
    members = w[None] if segments is None else w * (numbers[:, None] == segments)
    sums = inputs.new_zeros((len(members), *weight_shape), dtype=dtype)
    sq_norms = inputs.new_zeros(B, dtype=torch.float64)
    if sums.numel() and output_grads.numel():
        for start in range(0, B, _REFERENCE_CHUNK):
            some = slice(start, start + _REFERENCE_CHUNK)
            g = sample_grads(inputs[some].to(dtype), output_grads[some].to(dtype), weight_shape, geometry).flatten(1)
            sq_norms[some] = g.double().square().sum(1)
            sums += (members[:, some] @ g).view_as(sums)
    flat = sums.flatten(1).double()
    gram = flat @ flat.T if segments is not None else flat.new_zeros(0, 0)
    grad = sums.sum(0).contiguous(memory_format=grad_format(inputs, weight_shape))
    return grad, sq_norms, gram


@implements("weight_grad_and_sq_norms", "cpu")
def _cpu(product: LayerProduct) -> tuple[Tensor, Tensor, Tensor]:
    empty = product.inputs.numel() == 0 or product.output_grads.numel() == 0
    return reference(product) if empty else weight_grad_cpu.serve(product)


def _run(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: list[int],
    weights: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, backend = rest
    product = LayerProduct(inputs, output_grads, weight_shape, weights, segments, num_segments, Geometry.of(*options))
    function = select("weight_grad_and_sq_norms", backend, [inputs, output_grads])
    result: tuple[Tensor, Tensor, Tensor] = function(product)
    return result


def _fake(
    inputs: Tensor,
    output_grads: Tensor,
    weight_shape: list[int],
    weights: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = inputs.new_empty(weight_shape, dtype=sum_dtype(inputs))
    S = num_segments if segments is not None else 0
    return (
        grad.contiguous(memory_format=grad_format(inputs, weight_shape)),
        inputs.new_empty(inputs.shape[0], dtype=torch.float64),
        inputs.new_empty((S, S), dtype=torch.float64),
    )


_op = register_op(
    "weight_grad_and_sq_norms(Tensor inputs, Tensor output_grads, SymInt[] weight_shape, Tensor? weights, "
    "Tensor? segments, int num_segments, int[] stride, int[] padding, int[] dilation, int groups, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)


implements("weight_grad_and_sq_norms", "triton", weight_grad_triton.why_not)(weight_grad_triton.serve)
