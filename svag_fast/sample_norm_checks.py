"""Rules held against the gradient that autograd delivers: once for each layer, always where it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svag_fast.ops.memory import has_memory
from svag_fast.sample_norm_tape import SampleGrads, hook, row_sq_norms, sample_chunks

if TYPE_CHECKING:
    from svag_fast.sample_norm_rules import Scope


def check_sum(
    scope: Scope, name: str, sums: dict[str, tuple[Tensor, Tensor]], like: Tensor, grad: Tensor | None
) -> None:
    """Hold PyTorch's gradient of a parameter against the sum of what the rule gives for the samples."""
    if name not in sums or grad is None:  # None: from a second derivative
        return
    total, size = sums.pop(name)
    with torch.no_grad():
        eps = torch.finfo(torch.promote_types(grad.dtype, like.dtype) if like.is_floating_point() else grad.dtype).eps
        if like.is_floating_point() or like.is_complex():
            eps = max(eps, torch.finfo(like.dtype).eps)
        error = (double(grad) - total).abs().max() if grad.numel() else size.new_zeros(())
        largest = total.abs().max() if grad.numel() else size.new_zeros(())
        # Half of the digits, and what rounding makes of sums that cancel: of a normalisation, which is formed in
        # float32 at least, amplified by up to 1/√ε = 316 where it is given equal values.
        rounding = 8 * (eps + 316 * min(eps, torch.finfo(torch.float32).eps))
        allowed = min(0.2, 30 * eps**0.5) * largest + rounding * size / max(1, grad.numel())
        if bool(error > allowed):
            scope.recorder.fail(
                f"{scope.label}: the rule's per-sample gradients of {name} do not add up to the gradient that autograd "
                f"delivers (off by {float(error):.3g}, of {float(largest):.3g}): the rule is wrong, or a hook changed "
                "the gradient of the layer's output"
            )
        else:
            scope.checked(name, like)


def check_norms(scope: Scope, name: str, sq_norms: Tensor, sample_grads: SampleGrads) -> None:
    """Hold norms against the samples' own gradients, formed."""
    if not has_memory(sq_norms):
        return
    norms = torch.cat([row_sq_norms(sample_grads(rows)) for rows in sample_chunks(len(sq_norms), sq_norms.numel())])
    eps = torch.finfo(sample_grads(slice(0, 1)).dtype).eps
    if not torch.allclose(norms, sq_norms, rtol=min(0.2, 100 * eps**0.5), atol=eps * float(norms.sum())):
        scope.recorder.fail(f"{scope.label}: the norms of {name} are not those of the samples' own gradients")


def largest(inputs: tuple[Tensor, ...]) -> Tensor | float:
    """The largest size of an element."""
    sizes = [x.abs().max().double() for x in inputs if x.numel() and (x.is_floating_point() or x.is_complex())]
    return torch.stack(sizes).max() if sizes else 0.0


def double(x: Tensor) -> Tensor:
    """In double precision, complex or not."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def check_product(scope: Scope, forward: Callable[..., Tensor], name: str, grad: Tensor, b: Tensor, x: Tensor) -> None:
    """Hold a weight gradient G against PyTorch's forward: ⟨G, v⟩ = ⟨b, f(x; v)⟩ for a pseudo-random v."""
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(grad.shape, generator=generator, dtype=torch.float64, device="cpu").to(grad.device)
    output = forward(x.double(), v, None)
    expected, got = (b.double() * output).sum(), (grad.double() * v).sum()
    eps = max(torch.finfo(dtype).eps for dtype in (grad.dtype, b.dtype))
    allowed = 64 * eps * (b.double().norm() * output.norm() + grad.double().norm() * v.norm())
    if bool((got - expected).abs() > allowed):
        raise RuntimeError(
            f"{scope.label}: its weight gradient is not the one that PyTorch's forward has (projected on one direction "
            f"{float(got):.6g}, expected {float(expected):.6g}); nothing was added to {name}.grad. Please report it"
        )
    scope.checked(name, b)


class LayerCall(NamedTuple):
    """A use of a layer in a pass through the model whose rows are checked."""

    scope: Scope
    inputs: list[Tensor]
    outputs: list[Tensor]


def check_rows(calls: list[LayerCall], outputs: list[Tensor], batch_size: int) -> None:
    """Row i of every layer's input, and of the model's output, must depend on row i alone of the layers before.

    One backward pass from one row of them all. It finds rows that only happen to be B (positions before the samples,
    tokens sorted by expert) and models that mix the samples.
    """
    row = batch_size // 2
    ends = {id(x): (x, f"{call.scope.label}: row {row} of its input") for call in calls for x in call.inputs}
    ends |= {id(x): (x, f"row {row} of the model's output") for x in outputs if id(x) not in ends}
    ends = {
        key: end
        for key, end in ends.items()
        if end[0].requires_grad and end[0].dim() > 0 and end[0].shape[0] == batch_size
    }
    if _mixes(calls, [x for x, _ in ends.values()], row) is not None:
        for x, name in ends.values():
            source = _mixes(calls, [x], row)
            if source is not None:
                raise ValueError(
                    f"{name} depends on other rows of {source}'s output than that one: its rows are not the "
                    f"{batch_size} samples (positions first, as with batch_first=False; tokens gathered), or the model "
                    "mixes the samples, which then have no gradients of their own. Give the model, and every layer, "
                    "the samples first; where as many positions as samples lie first in an output on purpose, begin "
                    "with another number of samples; for a model that mixes samples use "
                    "svag_fast.noise.from_two_batches"
                )
    made = [x for x in outputs if x.requires_grad]
    if made and all(x.dim() > 1 and all(size % batch_size for size in x.shape) for x in made):
        raise ValueError(
            f"the model made {list(made[0].shape)} of an input whose first dimension was taken for {batch_size} "
            "samples, which the output has not: give it the samples first, or pass batch_size=..."
        )


def _mixes(calls: list[LayerCall], ends: list[Tensor], row: int) -> str | None:
    """The first layer of whose output other rows than `row` come into that row of the ends."""
    if not ends:
        return None
    labels = {id(y): (y, call.scope.label) for call in calls for y in call.outputs if y.requires_grad}
    others: dict[int, Tensor] = {}

    def look(key: int, grad: Tensor) -> None:
        grad = grad.detach().nan_to_num()
        others[key] = grad[:row].count_nonzero() + grad[row + 1 :].count_nonzero()

    # Looked at on its way and let go: at once these gradients would take the memory of the whole pass. Where no input
    # has a gradient a way through the graph begins.
    hooks = [hook(y, functools.partial(look, key)) for key, (y, _) in labels.items()]
    begin = [y for call in calls if not any(x.requires_grad for x in call.inputs) for y in call.outputs]
    try:
        _backward(ends, row, [y for y in begin if y.requires_grad])
        _backward(ends, row, [y for key, (y, _) in labels.items() if key not in others])
    finally:
        for handle in hooks:
            handle.remove()
    if not others or not bool(torch.stack([count.cpu() for count in others.values()]).any()):
        return None
    return next(label for key, (_, label) in labels.items() if key in others and bool(others[key] > 0))


def _backward(ends: list[Tensor], row: int, begin: list[Tensor]) -> None:
    """Go back from one row of each of the ends, pseudo-randomly weighted; the graph stays."""
    if not begin:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    rows = [x[row] for x in ends]
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device, x.dtype) for x in rows
    ]
    torch.autograd.grad(rows, begin, weights, retain_graph=True, allow_unused=True)
