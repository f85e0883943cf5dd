"""Every public op as one call on named tensors, so that a property can be tried on each of them and each argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svag_fast.ops import (
    AffineStep,
    affine_walk_,
    norm_relu,
    philox_normal_,
    svag_adaptive_step_,
    svag_replicas_step_,
    svag_step_,
    svag_step_per_sample_,
    svag_weight_step_,
    weight_grad_and_sq_norms,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """An op's arguments, the names of those it writes, and the call, which returns the op's results."""

    make: Callable[[torch.dtype], Tensors]
    run: Callable[[Tensors, str], list[Tensor]]
    written: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def results(self, tensors: Tensors, backend: str = "auto") -> list[Tensor]:
        """What the op returns, then what it has written."""
        return [*self.run(tensors, backend), *(tensors[name] for name in self.written)]


def drawn(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def _step(t: Tensors, backend: str) -> list[Tensor]:
    lists = [t["params"]], [t["grads1"]], [t["grads2"]]
    kept = [t["compensation"]] if "compensation" in t else None
    return [svag_step_(*lists, lr=0.3, l=4, weight_decay=0.1, compensation=kept, backend=backend).raw]


def _momentum(t: Tensors, backend: str) -> list[Tensor]:
    lists = [t["params"]], [t["grads1"]], [t["grads2"]]
    options = {"momentum": 0.9, "momentum_buffers": [t["momentum_buffers"]], "backend": backend}
    return [svag_step_(*lists, lr=0.3, l=4, weight_decay=0.1, **options).raw]


def _replicas(t: Tensors, backend: str) -> list[Tensor]:
    lists = [t["params"]], [t["grads1"]], [t["grads2"]]
    options = {"momentum": 0.9, "momentum_buffers": [t["momentum_buffers"]], "backend": backend}
    return [svag_replicas_step_(*lists, replicas=3, lr=[0.3, 0.1, 0.2], l=4, **options).raw]


def _adaptive(t: Tensors, backend: str) -> list[Tensor]:
    lists = [t["params"]], [t["grads1"]], [t["grads2"]], [t["exp_avgs"]], [t["exp_avg_sqs"]]
    rates = {"lr": 0.3, "l": 4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    return [svag_adaptive_step_(*lists, steps=[3], **rates, backend=backend).raw]


def _adaptive_tensors(dtype: torch.dtype) -> Tensors:
    tensors = drawn(dtype, params=(3, 5), grads1=(3, 5), grads2=(3, 5), exp_avgs=(3, 5), exp_avg_sqs=(3, 5))
    tensors["exp_avg_sqs"].square_()
    return tensors


def _per_sample(t: Tensors, backend: str) -> list[Tensor]:
    step = svag_step_per_sample_([t["params"]], [t["grads1"]], [t["grads2"]], lr=0.3, l=4, backend=backend)
    assert step.sq_norms2 is not None
    return [step.sq_norms1, step.sq_norms2, step.stats.raw]


def _weight_step(padding: int) -> Callable[[Tensors, str], list[Tensor]]:
    def run(t: Tensors, backend: str) -> list[Tensor]:
        options = {"segments": [0, 1, 0, 1], "lr": 0.3, "l": 4, "weight_decay": 0.1, "backend": backend}
        norms, stats = svag_weight_step_(t["weight"], t["inputs"], t["output_grads"], padding=padding, **options)
        return [norms, stats.raw]

    return run


def _weight_grad(*shape: int) -> Callable[[Tensors, str], list[Tensor]]:
    def run(t: Tensors, backend: str) -> list[Tensor]:
        options = {"weights": t["weights"], "segments": [0, 1, 0, 1], "padding": int(len(shape) == 4)}
        found = weight_grad_and_sq_norms(t["inputs"], t["output_grads"], shape, **options, backend=backend)
        assert found.segment_gram is not None
        return [found.grad, found.sq_norms, found.segment_gram]

    return run


def _philox(t: Tensors, backend: str) -> list[Tensor]:
    return [philox_normal_(t["out"], key=(1, 2), draw=3, backend=backend)]


def _norm_relu(**units: int) -> Callable[[Tensors, str], list[Tensor]]:
    def run(t: Tensors, backend: str) -> list[Tensor]:
        return [norm_relu(t["x"], t["weight"], t["bias"], residual=t["residual"], **units, backend=backend)]

    return run


def _affine(t: Tensors, backend: str) -> list[Tensor]:
    return [affine_walk_(t["x"], AffineStep(0.9, 0.1, 0.2, 0.3, (1.5, -0.5)), 3, key=(1, 2), backend=backend)]


HALF = (torch.bfloat16, torch.float16)
CALLS = {
    "svag_step_": Call(
        lambda d: drawn(d, params=(3, 5), grads1=(3, 5), grads2=(3, 5)), _step, ("params",),
        (torch.float32, torch.float64, *HALF),
    ),
    "svag_step_ compensated": Call(
        lambda d: {**drawn(d, params=(3, 5), grads1=(3, 5), grads2=(3, 5)), "compensation": torch.zeros(3, 5)},
        _step, ("params", "compensation"), (torch.float32, *HALF),
    ),
    "svag_step_ momentum": Call(
        lambda d: drawn(d, params=(3, 5), grads1=(3, 5), grads2=(3, 5), momentum_buffers=(3, 5)),
        _momentum, ("params", "momentum_buffers"),
    ),
    "svag_replicas_step_": Call(
        lambda d: drawn(d, params=(3, 5), grads1=(3, 5), grads2=(3, 5), momentum_buffers=(3, 5)),
        _replicas, ("params", "momentum_buffers"),
    ),
    "svag_adaptive_step_": Call(_adaptive_tensors, _adaptive, ("params", "exp_avgs", "exp_avg_sqs")),
    "svag_step_per_sample_": Call(
        lambda d: drawn(d, params=(3, 5), grads1=(2, 3, 5), grads2=(4, 3, 5)), _per_sample, ("params",)
    ),
    "svag_weight_step_ Linear": Call(
        lambda d: drawn(d, weight=(6, 5), inputs=(4, 2, 5), output_grads=(4, 2, 6)), _weight_step(0), ("weight",)
    ),
    "svag_weight_step_ Conv2d": Call(
        lambda d: drawn(d, weight=(6, 3, 3, 3), inputs=(4, 3, 5, 4), output_grads=(4, 6, 5, 4)),
        _weight_step(1), ("weight",),
    ),
    "weight_grad_and_sq_norms Linear": Call(
        lambda d: drawn(d, inputs=(4, 2, 5), output_grads=(4, 2, 6), weights=(4,)), _weight_grad(6, 5), (),
        (torch.float32, torch.float64, *HALF),
    ),
    "weight_grad_and_sq_norms rows": Call(
        lambda d: drawn(d, inputs=(4, 5), output_grads=(4, 6), weights=(4,)), _weight_grad(6, 5), ()
    ),
    "weight_grad_and_sq_norms Conv2d": Call(
        lambda d: drawn(d, inputs=(4, 3, 5, 4), output_grads=(4, 6, 5, 4), weights=(4,)), _weight_grad(6, 3, 3, 3), (),
        (torch.float32, torch.float64, *HALF),
    ),
    "philox_normal_": Call(lambda d: drawn(d, out=(3, 5)), _philox, ("out",)),
    "norm_relu GroupNorm": Call(
        lambda d: drawn(d, x=(4, 6, 5, 3), weight=(6,), bias=(6,), residual=(4, 6, 5, 3)), _norm_relu(groups=2), ()
    ),
    "norm_relu BatchNorm": Call(
        lambda d: drawn(d, x=(4, 6, 5), weight=(6,), bias=(6,), residual=(4, 6, 5)), _norm_relu(segments=2), ()
    ),
    "affine_walk_": Call(lambda d: drawn(d, x=(3, 5)), _affine, ("x",)),
}  # fmt: skip

ARGUMENTS = [(op, name) for op, call in CALLS.items() for name in call.make(torch.float32)]


def copies(tensors: Tensors) -> Tensors:
    """The same values in memory of their own."""
    return {name: t.clone() for name, t in tensors.items()}
