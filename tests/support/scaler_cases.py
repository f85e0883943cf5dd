"""A step under a GradScaler, by whichever backend: what its kernel reads of the scaler, against unscale_ and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from draws import same_bits
from torch import Tensor, nn

from svag_fast import SVAG

SCALE = 2.0**10
# Around the blocks of all kernels; one empty, and one in channels_last.
SHAPES = [(0,), (1,), (17, 5), (4097,), (2, 3, 4, 4)]
OPTIONS: dict[str, dict[str, Any]] = {
    "l = 1": {"l": 1},
    "l = 4": {"l": 4, "weight_decay": 0.01},
    "momentum": {"l": 4, "momentum": 0.9},
    "compensated": {"l": 4, "compensated": True},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    params[-1] = params[-1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(p) for p in params]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale
        p.grad = torch.empty_like(p).copy_(g)


def make(opt: SVAG, params: list[nn.Parameter], held: bool, step: int, scale: float = SCALE) -> None:
    if held:
        give_gradients(params, 10 * step, scale)
        opt.hold_gradient()
    give_gradients(params, 10 * step + 1, scale)


def optimizer(params: list[nn.Parameter], backend: str, **options: Any) -> SVAG:
    return SVAG(params, lr=0.3, backend=backend, **options)


def check_as_unscaled_before(backend: str, dtype: torch.dtype, name: str, held: bool) -> None:
    """The same bits, in the parameters, their state, ``.grad`` and the statistics."""
    results = []
    for before in (False, True):
        params = parameters(dtype)
        opt, scaler = optimizer(params, backend, **OPTIONS[name]), torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for step in range(2):
            make(opt, params, held, step)
            versions = [p.grad._version for p in params]
            if before:
                opt.unscale_(scaler)
            scaler.step(opt)
            scaler.update()
            assert opt.stats is not None
            if not before:  # autograd is told that the gradients were written to
                assert all(p.grad._version > v for p, v in zip(params, versions, strict=True) if p.numel())
        state = [t for p in params for t in opt.state[p].values()]
        results.append([*(p.detach() for p in params), *(p.grad for p in params), *state, opt.stats.raw])
        assert opt.effective_steps == 2 / opt.l
    assert same_bits(*results)  # type: ignore[arg-type]


def check_found_inf_skips_the_step(backend: str, scaled: bool) -> None:
    """Though this process's gradients are finite: another's may not be."""
    params = parameters(torch.float32)
    opt = optimizer(params, backend, l=4, momentum=0.9, weight_decay=0.01)
    make(opt, params, True, 0, 1.0)
    opt.step()
    kept = [*(p.detach() for p in params), *(opt.state[p]["momentum_buffer"] for p in params)]
    start = [t.clone() for t in kept]
    make(opt, params, True, 1)
    opt.grad_scale, opt.found_inf = torch.tensor(SCALE) if scaled else None, torch.ones(())  # type: ignore[attr-defined]
    if not scaled:
        opt._pair.unscaled = True  # as optimizer.unscale_ leaves it
    stats = opt.step()
    assert same_bits(kept, start)
    assert not stats.finite
    assert opt.effective_steps == 0.25
    # The norms are those of the gradients that there were.
    generator, norm = torch.Generator().manual_seed(11), 0.0
    for p in params:
        norm += float(torch.randn(p.shape, generator=generator, dtype=torch.float64).square().sum())
    torch.testing.assert_close(float(stats.sq_norm2), norm * (1 if scaled else SCALE**2), rtol=1e-5, atol=0.0)


def check_an_inf_in_one_group_skips_all(backend: str, first: bool) -> None:
    params = parameters(torch.float32)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    opt, scaler = SVAG(groups, lr=0.3, l=4, backend=backend), torch.amp.GradScaler("cpu", init_scale=SCALE)
    start = [p.detach().clone() for p in params]
    scaler.scale(torch.ones(()))
    for batch in range(2):
        give_gradients(params, batch, SCALE)
        if (batch == 0) == first:
            assert params[2].grad is not None
            params[2].grad[3, 3] = torch.inf
        if batch == 0:
            opt.hold_gradient()
    scaler.step(opt)
    scaler.update()
    assert same_bits([p.detach() for p in params], start)
    assert scaler.get_scale() == SCALE / 2
    assert [group["steps"] for group in opt.param_groups] == [0, 0]


def check_another_layout(backend: str) -> None:
    """A gradient in another order of memory than its parameter's: the kernel takes a copy, ``.grad`` is divided too."""
    results: list[list[Tensor]] = []
    for scale in (SCALE, 1.0):
        params = parameters(torch.float32)
        opt, scaler = optimizer(params, backend, l=4), torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        make(opt, params, True, 0, scale)
        assert params[-1].grad is not None
        params[-1].grad = params[-1].grad.contiguous()
        scaler.step(opt)
        results.append([*(p.detach() for p in params), *(p.grad for p in params if p.grad is not None)])
    assert same_bits(*results)


def check_gradients_in_one_place(backend: str) -> None:
    """Two parameters with the same gradient: to divide it in the step would divide it twice, or half."""
    results: list[list[Tensor]] = []
    for scale in (SCALE, 1.0):
        params = [nn.Parameter(torch.ones(4097)) for _ in range(2)]
        opt, scaler = optimizer(params, backend, l=1), torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        params[0].grad = params[1].grad = torch.linspace(-1, 1, 4097) * scale
        scaler.step(opt)
        assert params[0].grad is not None
        results.append([*(p.detach() for p in params), params[0].grad])
    assert same_bits(*results)


CHECKS: dict[str, Callable[[str], None]] = {
    **{
        f"{name}, {dtype}, {'held' if held else 'one batch'}": (
            lambda backend, dtype=dtype, name=name, held=held: check_as_unscaled_before(backend, dtype, name, held)
        )
        for name in OPTIONS
        for dtype in DTYPES
        for held in ([False, True] if name == "l = 1" else [True])
        if not (name == "compensated" and dtype == torch.float64)
    },
    "found_inf": lambda backend: check_found_inf_skips_the_step(backend, True),
    "found_inf, unscaled": lambda backend: check_found_inf_skips_the_step(backend, False),
    "first gradient of a group": lambda backend: check_an_inf_in_one_group_skips_all(backend, True),
    "second gradient of a group": lambda backend: check_an_inf_in_one_group_skips_all(backend, False),
    "another layout": check_another_layout,
    "one gradient twice": check_gradients_in_one_place,
}
