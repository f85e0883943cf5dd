"""Rules compared with the gradient that autograd delivers: once for each layer, always where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svag_fast.ops.memory import has_memory
from svag_fast.sample_norms.tape import SampleGrads, row_sq_norms, sample_chunks

if TYPE_CHECKING:
    from svag_fast.sample_norms.rule import Scope


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
