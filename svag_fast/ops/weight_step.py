"""The whole SVAG step of a Linear or Conv2d layer in one pass: its gradient never reaches memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svag_fast.ops.backends import implements, select
from svag_fast.ops.checks import check_params, tensor
from svag_fast.ops.library import register_op
from svag_fast.ops.memory import check_apart, mark_written, spans
from svag_fast.ops.step import svag_step_
from svag_fast.ops.step_options import StepOptions, constant_coefficients, options_scalars, step_scalars
from svag_fast.ops.step_stats import StepStats, rounding
from svag_fast.ops.weight_grad import cpu as weight_grad_cpu
from svag_fast.ops.weight_grad import triton as weight_grad_triton
from svag_fast.ops.weight_grad.op import reference as reference_product
from svag_fast.ops.weight_grad.shapes import Geometry, LayerProduct, layer_product, sum_dtype


def svag_weight_step_(
    weight: Tensor,
    inputs: Tensor,
    output_grads: Tensor,
    *,
    segments: Tensor | Sequence[int],
    lr: float,
    l: float,
    weight_decay: float = 0.0,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, StepStats]:
    """Take a layer's SVAG step in place from the rows of both batches, and measure the noise.

    With g1 and g2 the means of the samples' gradients b_iᵀ a_i over segments 0 and 1,
    ``weight -= (lr/l) * (c1*g1 + c2*g2 + weight_decay*weight)`` (paper, equation 5). Where a tile of g1 and g2 is
    finished it takes its step: the gradient is not stored. Equal to :func:`weight_grad_and_sq_norms` of each segment
    followed by :func:`svag_step_`, to rounding. On the CPU the same bits come out for any number of threads.

    Args:
        weight: [d, p] (Linear) or [O, C / groups, k_h, k_w] (Conv2d), float32 or float64 as the sums are; any strides.
        inputs, output_grads: both batches' rows, as in :func:`weight_grad_and_sq_norms`. The output gradients are
            those of each sample's own loss (of a sum, not a mean): the means are taken here.
        segments: [B], 0 for the first batch's samples and 1 for the second's. All 0 only at ``l = 1``. As in
            :func:`weight_grad_and_sq_norms` a list spares a GPU's host the wait for a tensor's values.
        lr, l, weight_decay: as in :func:`svag_step_`.
        stride, padding, dilation, groups: as in :func:`weight_grad_and_sq_norms`.
        backend: "auto", "triton" (float32 weights), "cpu" or "reference".

    Returns:
        [B] float64, each sample's squared gradient norm, and the step's statistics.

    Raises:
        ValueError, TypeError: something doesn't fit; the message names it, and nothing was written.
        BackendError: the backend named can't serve the call.
    """
    options = StepOptions.checked(lr, l, weight_decay)
    options.check_held([tensor("weight", weight, written=True)])
    product = layer_product(
        inputs,
        output_grads,
        weight.shape,
        None,
        segments,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        both_batches=True,
    )
    try:
        check_params([weight])
        read = [*spans([product.inputs], "inputs"), *spans([product.output_grads], "output_grads")]
        check_apart(spans([weight], "weight"), read, elementwise=False)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("params[0]", "weight").replace("[0]", "")) from None
    if weight.dtype != sum_dtype(inputs):
        raise TypeError(
            f"weight must be {sum_dtype(inputs)}, in which gradients of {inputs.dtype} are formed, got {weight.dtype}"
        )
    if weight.device != inputs.device:
        raise ValueError(f"weight must be on {inputs.device}, as inputs is, got one on {weight.device}")
    _check_two_batches(product, options.l)
    geometry = product.geometry
    with torch.no_grad():
        sq_norms, raw = _op(
            weight,
            product.inputs,
            product.output_grads,
            product.segments,
            product.num_segments,
            *options[:3],
            list(geometry.stride),
            list(geometry.padding),
            list(geometry.dilation),
            geometry.groups,
            backend,
        )
    return sq_norms, StepStats(raw, product.num_segments == 2, rounding=rounding([weight]))


def _check_two_batches(product: LayerProduct, l: float) -> None:
    if product.num_segments > 2:
        raise ValueError(f"segments must be 0 (first batch) or 1 (second batch), got {product.num_segments - 1}")
    if product.num_segments < 2 and l != 1:
        raise ValueError(f"segments must be 1 for some sample, since a step at l = {l} needs a second batch, got none")


def _run(
    weight: Tensor,
    inputs: Tensor,
    output_grads: Tensor,
    segments: Tensor,
    num_segments: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    lr, l, weight_decay, *options, backend = rest
    # The sums of each segment's rows, divided by its size, are the batch's mean gradient.
    # Not by bincount, whose result's size a GPU's host waits for.
    sizes = (segments == torch.arange(num_segments, device=segments.device)[:, None]).sum(1)
    weights = (1 / sizes.to(sum_dtype(inputs)))[segments]
    product = LayerProduct(
        inputs, output_grads, list(weight.shape), weights, segments, num_segments, Geometry.of(*options)
    )
    step = select("svag_weight_step_", backend, [weight, inputs, output_grads])
    sq_norms, raw = step(weight, product, StepOptions(lr, l, weight_decay))
    mark_written([weight])
    return sq_norms, raw


def step_of_halves_(
    weight: Tensor,
    inputs: Tensor,
    output_grads: Tensor,
    geometry: Geometry,
    options: StepOptions,
    backend: str,
    *,
    norms: bool,
) -> tuple[Tensor | None, Tensor]:
    """:func:`svag_weight_step_` without its checks, of equal halves: for a backward pass that knows its layer.

    Rows of Linear must be [2B, T, p] and [2B, T, d]; the output gradients are of the batches' means. Returns each row's
    squared norm [2B] if asked, with the mean's factor in it, and the statistics as a vector.
    """
    step = select("svag_weight_step_", backend, [weight, inputs, output_grads])
    if step is _cpu and inputs.numel() and output_grads.numel():
        scalars = options_scalars(options)[:4]
        halves = weight_grad_cpu.step_of_halves(inputs, output_grads, geometry, weight, scalars, norms=norms)
        sq_norms, raw = halves[0], _raw(*halves[1:])
    else:
        rows = len(inputs)
        segments = torch.arange(rows, device=inputs.device).ge(rows // 2).long()
        weights = torch.ones(rows, dtype=sum_dtype(inputs), device=inputs.device)
        product = LayerProduct(inputs, output_grads, list(weight.shape), weights, segments, 2, geometry)
        sq_norms, raw = step(weight, product, options)
    mark_written([weight])
    return sq_norms, raw


def _fake(weight: Tensor, inputs: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape[0], dtype=torch.float64), weight.new_empty(5, dtype=torch.float64)


_op = register_op(
    "svag_weight_step_(Tensor(a!) weight, Tensor inputs, Tensor output_grads, Tensor segments, int num_segments, "
    "float lr, float l, float weight_decay, int[] stride, int[] padding, int[] dilation, int groups, str backend) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)


@implements("svag_weight_step_", "reference")
def _reference(weight: Tensor, product: LayerProduct, options: StepOptions) -> tuple[Tensor, Tensor]:
    assert product.segments is not None
    assert product.weights is not None
    sq_norms = weight.new_empty(product.inputs.shape[0], dtype=torch.float64)
    grads = []
    for s in range(product.num_segments):
        rows = (product.segments == s).nonzero().flatten()
        batch = LayerProduct(
            product.inputs[rows],
            product.output_grads[rows],
            product.weight_shape,
            product.weights[rows],
            None,
            0,
            product.geometry,
        )
        grad, sq_norms[rows], _ = reference_product(batch)
        grads.append([grad])
    grads2 = grads[1] if len(grads) == 2 else None
    raw: Tensor = svag_step_([weight], grads[0], grads2, **options._asdict(), backend="reference").raw
    return sq_norms, raw


@implements("svag_weight_step_", "cpu")
def _cpu(weight: Tensor, product: LayerProduct, options: StepOptions) -> tuple[Tensor, Tensor]:
    if product.inputs.numel() == 0 or product.output_grads.numel() == 0:
        result: tuple[Tensor, Tensor] = _reference(weight, product, options)
        return result
    sq_norms, gram, weight_sq_norm = weight_grad_cpu.direct_step(product, weight, options_scalars(options)[:4])
    return sq_norms, _raw(gram, weight_sq_norm)


def _raw(gram: Tensor, weight_sq_norm: Tensor) -> Tensor:
    """The statistics from the CPU's inner products of one or two segments."""
    (first, *rest), *others = gram.tolist()
    inner, second = (rest[0], others[0][1]) if rest else (0.0, 0.0)
    # A float32 gradient's squares can't overflow in float64: the norms are finite where the gradients are.
    finite = float(math.isfinite(first) and math.isfinite(second))
    return torch.tensor([first, second, inner, float(weight_sq_norm), finite], dtype=torch.float64, device="cpu")


@implements("svag_weight_step_", "triton", weight_grad_triton.why_not)
def _triton(weight: Tensor, product: LayerProduct, options: StepOptions) -> tuple[Tensor, Tensor]:
    coefficients = constant_coefficients(step_scalars(*options), weight.device)
    return weight_grad_triton.direct_step(product, weight, coefficients)
