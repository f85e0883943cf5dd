"""What each GPU kernel is asked, and by how much it may be off: the cases of tests/support/gpu_checks.py.

A case yields errors as shares of their bounds: above 1 the kernel is wrong. What a kernel is asked, and what it should
answer, is formed on the CPU in float64, so that the device runs little else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from draws import BF16, DTYPES, F32, F64
from layer_cases import CONVOLUTION, LINEAR, STEP, make, step_by_two_ops
from torch import Tensor, nn

from svag_fast import SVAG, per_sample_sq_norms, svag_coefficients, use_backend
from svag_fast.ops import (
    StepStats,
    svag_adaptive_step_,
    svag_replicas_step_,
    svag_step_,
    svag_step_per_sample_,
    svag_weight_step_,
    weight_grad_and_sq_norms,
)
from svag_fast.ops.weight_grad.op import unchecked_weight_grads
from svag_fast.ops.weight_grad.shapes import layer_product

Shares = Iterator[tuple[str, float]]

# Around packs, blocks of 1024 and spans of 4096 and 8192; empty and one-element tensors.
SHAPES = [(0,), (1,), (), (3,), (17, 5), (1023,), (4097,), (8193,), (8, 3, 3, 3)]
LR, DECAY = 0.3, 0.02
EPS = 2.0**-23
PRODUCT_EPS = {"ieee": 2.0**-22, "tf32": 2.0**-10}  # of a product's terms; that of two halves is exact in float32

LAYERS: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    **{f"linear, {name}": (*case, {}) for name, case in LINEAR.items()},
    **CONVOLUTION,
    "many chunks": ([64, 16, 8, 8], [16, 16, 3, 3], {"padding": 1}),
    "one chunk": ([4, 512, 4, 4], [512, 512, 3, 3], {"padding": 1}),
}


def draw(dtype: torch.dtype, seed: int, shapes: Iterable[tuple[int, ...]] = SHAPES, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


def on(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device, copy=True) for t in tensors]


def share(found: list[Tensor], exact: list[Tensor], bounds: list[Tensor]) -> float:
    """The largest error over its bound; inf for a NaN."""
    worst = 0.0
    for f, e, b in zip(found, exact, bounds, strict=True):
        if f.numel():
            ratio = (f.cpu().double() - e).abs() / b
            worst = max(worst, float(ratio.nan_to_num(nan=math.inf).max()))
    return worst


def norm_share(found: Tensor, exact: Tensor, bound: float) -> float:
    error = float((found.cpu().double() - exact).norm())
    return error / bound if error == error else math.inf


def stepped(x: Tensor, g1: Tensor, g2: Tensor | None, l: float) -> Tensor:
    """The formula in float64."""
    c1, c2 = svag_coefficients(l)
    combined = c1 * g1.double() + (c2 * g2.double() if g2 is not None and c2 else 0.0)
    return x.double() - LR / l * (combined + DECAY * x.double())


def rounding(x: Tensor, device: torch.device) -> float:
    """A param's rounding to its dtype, of its value: half a unit, but the interpreter cuts off a bfloat16."""
    return torch.finfo(x.dtype).eps * (1.0 if x.dtype == BF16 and device.type == "cpu" else 0.5)


def step_bounds(start: list[Tensor], exact: list[Tensor], device: torch.device, sums: int = 4) -> list[Tensor]:
    """One rounding to the param's dtype, and ``sums`` of the arithmetic's."""
    return [
        e.abs() * rounding(x, device) + sums * (2.0**-52 if x.dtype == F64 else EPS) * (e.abs() + 1)
        for x, e in zip(start, exact, strict=True)
    ]


def stats_share(stats: StepStats, params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None) -> float:
    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((s.double() * t.double()).sum()) for s, t in zip(a, b, strict=True))

    second = grads2 or [torch.zeros_like(g) for g in grads1]
    sq1, sq2, inner, weight = dot(grads1, grads1), dot(second, second), dot(grads1, second), dot(params, params)
    exact = torch.tensor([sq1, sq2, inner, weight, 1.0], dtype=F64)
    # The inner product's terms cancel: its error is that of its terms.
    bound = 1e-6 * torch.tensor([sq1, sq2 or sq1, max(sq1, sq2), weight, 1e-3], dtype=F64)
    return share([stats.raw], [exact], [bound])


def step(
    device: torch.device,
    backend: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    l: float,
    *,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    scale: float = 1.0,
    second: bool = True,
) -> Shares:
    start, grads1 = draw(dtypes[0], 0, shapes), draw(dtypes[1], 1, shapes, scale)
    grads2 = draw(dtypes[1], 2, shapes, scale) if second else None
    params = on(device, start)
    stats = svag_step_(
        params, on(device, grads1), grads2 and on(device, grads2), lr=LR, l=l, weight_decay=DECAY, backend=backend
    )
    exact = [
        stepped(x, a, grads2[i] if grads2 else None, l) for i, (x, a) in enumerate(zip(start, grads1, strict=True))
    ]
    yield "params", share(params, exact, [b * scale for b in step_bounds(start, exact, device)])
    yield "statistics", stats_share(stats, start, grads1, grads2)


def scaled_step(device: torch.device, backend: str, dtypes: tuple[torch.dtype, torch.dtype], found_inf: bool) -> Shares:
    """As ``scaler.step`` leaves it to the optimizer: the kernel takes the scale out, or lets the step be."""
    start, grads1, grads2 = draw(dtypes[0], 0), draw(dtypes[1], 1), draw(dtypes[1], 2)
    params = [nn.Parameter(p) for p in on(device, start)]
    optimizer = SVAG(params, lr=LR, l=4, weight_decay=DECAY, backend=backend)
    for grads in (grads1, grads2):
        if params[0].grad is not None:
            optimizer.hold_gradient()
        for p, g in zip(params, on(device, grads), strict=True):
            p.grad = g.to(p.dtype) * 1024
    vars(optimizer).update(
        grad_scale=torch.tensor(1024.0, device=device), found_inf=torch.tensor(float(found_inf), device=device)
    )
    stats = optimizer.step()
    yield "finite", 0.0 if bool(stats.finite.cpu()) != found_inf else math.inf
    if found_inf:
        same = all(torch.equal(a.detach().cpu(), b) for a, b in zip(params, start, strict=True))
        yield "params left alone", 0.0 if same else math.inf
        return
    seen = [p.grad for p in params if p.grad is not None]
    same = all(torch.equal(a.cpu(), b.to(a.dtype)) for a, b in zip(seen, grads2, strict=True))
    yield "gradient divided in memory", 0.0 if same else math.inf
    exact = [stepped(x, a, b, 4) for x, a, b in zip(start, grads1, grads2, strict=True)]
    yield "params", share([p.detach() for p in params], exact, step_bounds(start, exact, device))
    yield "statistics", stats_share(stats, start, grads1, grads2)


def compensated_step(device: torch.device, backend: str, dtype: torch.dtype, bad: float | None) -> Shares:
    """Kahan's sum keeps what rounding the param loses; an inf or a nan leaves everything as it was."""
    start, kept = draw(dtype, 0), draw(F32, 3, scale=1e-4)
    grads1, grads2 = draw(F32, 1), draw(F32, 2)
    if bad is not None:
        grads2[-1].view(-1)[17] = bad
    params, compensation = on(device, start), on(device, kept)
    stats = svag_step_(
        params, on(device, grads1), on(device, grads2), lr=LR, l=64, weight_decay=DECAY, compensation=compensation,
        skip_nonfinite=True, backend=backend,
    )  # fmt: skip
    yield "finite", 0.0 if bool(stats.finite.cpu()) == (bad is None) else math.inf
    before = [x.double() + e.double() for x, e in zip(start, kept, strict=True)]
    if bad is not None:
        same = all(torch.equal(a.cpu(), b) for a, b in zip([*params, *compensation], [*start, *kept], strict=True))
        yield "params left alone", 0.0 if same else math.inf
        return
    exact = [stepped(x, a, b, 64) for x, a, b in zip(before, grads1, grads2, strict=True)]
    found = [x.cpu().double() + e.cpu().double() for x, e in zip(params, compensation, strict=True)]
    c1, c2 = map(abs, svag_coefficients(64))
    bounds = [  # of the decrement's terms, and of what is kept: up to a unit of the param
        4
        * EPS
        * (LR / 64 * (c1 * a.abs() + c2 * b.abs() + DECAY * x.abs()) + k.abs() + torch.finfo(dtype).eps * x.abs())
        for x, a, b, k in zip(before, grads1, grads2, kept, strict=True)
    ]
    yield "params and what was kept", share(found, exact, bounds)


def momentum_step(
    device: torch.device,
    backend: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    l: float,
    *,
    rule: str = "time",
    bad: float | None = None,
) -> Shares:
    """Heavy ball: the bracket moves a buffer, and the buffer the params."""
    exact_dtype, momentum = F64 if dtypes[0] == F64 else F32, 0.9
    start, kept = draw(dtypes[0], 0), draw(exact_dtype, 3)
    grads1, grads2 = draw(dtypes[1], 1), draw(dtypes[1], 2)
    if bad is not None:
        grads2[-1].view(-1)[17] = bad
    params, buffers = on(device, start), on(device, kept)
    stats = svag_step_(
        params, on(device, grads1), on(device, grads2), lr=LR, l=l, weight_decay=DECAY, momentum_buffers=buffers,
        momentum=momentum, momentum_rule=rule, skip_nonfinite=bad is not None, backend=backend,
    )  # fmt: skip
    yield "finite", 0.0 if bool(stats.finite.cpu()) == (bad is None) else math.inf
    if bad is not None:
        same = all(torch.equal(a.cpu(), b) for a, b in zip([*params, *buffers], [*start, *kept], strict=True))
        yield "params left alone", 0.0 if same else math.inf
        return
    # It counts in the params' arithmetic, as in torch.
    mu, rate = float(torch.tensor(momentum, dtype=exact_dtype)), LR / l
    if rule == "time":
        mu, rate = 1 - (1 - mu) / l, LR / l**2
    (c1, c2), eps = svag_coefficients(l), 2.0**-52 if exact_dtype == F64 else EPS
    found: dict[str, list[Tensor]] = {"v": [], "v bound": [], "x": [], "x bound": []}
    for x, v, a, b in zip(*([t.double() for t in ts] for ts in (start, kept, grads1, grads2)), strict=True):
        new = mu * v + c1 * a + c2 * b + DECAY * x
        bound = 4 * eps * (mu * v.abs() + abs(c1) * a.abs() + abs(c2) * b.abs() + DECAY * x.abs() + 1e-30)
        found["v"].append(new)
        found["v bound"].append(bound)
        found["x"].append(x - rate * new)
        found["x bound"].append(rate * bound)
    yield "buffers", share(buffers, found["v"], found["v bound"])
    bounds = [a + b for a, b in zip(found["x bound"], step_bounds(start, found["x"], device), strict=True)]
    yield "params", share(params, found["x"], bounds)
    yield "statistics", stats_share(stats, start, grads1, grads2)


def replicas_step(device: torch.device, backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> Shares:
    """Stacked replicas, each with its own l, and the params of its step alone; with a nan it stays as it was."""
    replicas, ls, bad = 4, [1, 4, 8, 65536], 2
    start, grads1, grads2 = (draw(dtypes[k > 0], k, [(replicas, *shape) for shape in SHAPES]) for k in range(3))
    grads2[-1][bad, 0] = math.nan
    params = on(device, start)
    stats = svag_replicas_step_(
        params, on(device, grads1), on(device, grads2), replicas=replicas, lr=LR, l=ls, weight_decay=DECAY,
        skip_nonfinite=True, backend=backend,
    )  # fmt: skip
    for s, l in enumerate(ls):
        rows = [[t[s].to(device, copy=True) for t in listed] for listed in (start, grads1, grads2)]
        own = svag_step_(*rows, lr=LR, l=l, weight_decay=DECAY, skip_nonfinite=True, backend=backend)
        # Triton sums in another order where a replica's part isn't aligned: float64 is below.
        statistics = ([stats.raw[s]], [own.raw]) if backend == "cuda" else ([], [])
        pairs = zip([*statistics[0], *(t[s] for t in params)], [*statistics[1], *rows[0]], strict=True)
        same = all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()]) for a, b in pairs)
        yield f"bits of replica {s} alone", 0.0 if same else math.inf
    finite = stats.finite.cpu().tolist() == [s != bad for s in range(replicas)]
    yield "finite", 0.0 if finite else math.inf
    for s, l in enumerate(ls):
        own = [[t[s] for t in listed] for listed in (start, grads1, grads2)]
        found = [t[s] for t in params]
        if s == bad:
            same = all(torch.equal(a.cpu(), b) for a, b in zip(found, own[0], strict=True))
            yield f"replica {s} left alone", 0.0 if same else math.inf
            continue
        exact = [stepped(*tensors, l) for tensors in zip(*own, strict=True)]
        yield f"params of replica {s}", share(found, exact, step_bounds(own[0], exact, device))
        yield f"statistics of replica {s}", stats_share(StepStats(stats.raw[s], True, True), *own)


def mixed_list(device: torch.device, backend: str, count: int) -> Shares:
    """A list of many tensors of mixed dtypes, views that are not aligned among them."""
    count = count if device.type == "cuda" else 20
    lists: tuple[list[Tensor], ...] = ([], [], [])
    for i in range(count):
        param, grad = DTYPES[i % len(DTYPES)]
        for k, dtype in enumerate((param, grad, grad)):
            lists[k].extend(draw(dtype, 3 * i + k, [(i % 77 + (603 if i % 3 else 3),)]))
    views = [[t[i % 3 :] for i, t in enumerate(on(device, ts))] for ts in lists]
    start = [[t[i % 3 :] for i, t in enumerate(ts)] for ts in lists]
    stats = svag_step_(*views, lr=LR, l=8, weight_decay=DECAY, backend=backend)
    exact = [stepped(x, a, b, 8) for x, a, b in zip(*start, strict=True)]
    yield "params", share(views[0], exact, step_bounds(start[0], exact, device))
    yield "statistics", stats_share(stats, *start)


def same_bits(device: torch.device, call: Callable[[torch.device], list[Tensor]]) -> Shares:
    """Twenty runs, on a GPU on three streams in turn."""
    streams = [torch.cuda.Stream() for _ in range(3)] if device.type == "cuda" else []
    results = []
    for i in range(20 if streams else 2):
        context: AbstractContextManager[Any] = contextlib.nullcontext()
        if streams:
            torch.cuda.synchronize()
            context = torch.cuda.stream(streams[i % 3])
        with context:
            results.append([t.cpu() for t in call(device)])
    same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    yield "bits of 20 runs", 0.0 if same else math.inf


def step_bits(backend: str, device: torch.device) -> list[Tensor]:
    params, grads1, grads2 = (on(device, draw(F32, seed, [*SHAPES, (300_000,)])) for seed in range(3))
    return [svag_step_(params, grads1, grads2, lr=LR, l=3, weight_decay=DECAY, backend=backend).raw, *params]


def per_sample_bits(device: torch.device) -> list[Tensor]:
    shapes = [*SHAPES, (30_000,)]
    params = on(device, draw(F32, 0, shapes))
    grads1, grads2 = (on(device, draw(F32, seed, [(16, *s) for s in shapes])) for seed in (1, 2))
    norms1, norms2, stats = svag_step_per_sample_(params, grads1, grads2, lr=LR, l=3, backend="cuda")
    assert norms2 is not None
    return [norms1, norms2, stats.raw, *params]


def layer_bits(case: str, device: torch.device) -> list[Tensor]:
    input_shape, shape, options = LAYERS[case]
    x, dy = on(device, list(make(input_shape, shape, dtype=F32, **options)))
    segments = [i % 2 for i in range(len(x))]
    grad, norms, gram = weight_grad_and_sq_norms(x, dy, shape, segments=segments, backend="triton", **options)
    assert gram is not None
    return [grad, norms, gram]


def per_sample_step(device: torch.device, dtype: torch.dtype, samples: tuple[int, int | None], l: float) -> Shares:
    start = draw(dtype, 0)
    grads = [None if B is None else draw(dtype, k, [(B, *s) for s in SHAPES]) for k, B in enumerate(samples, start=1)]
    assert grads[0] is not None
    params = on(device, start)
    ours = svag_step_per_sample_(
        params, on(device, grads[0]), grads[1] and on(device, grads[1]), lr=LR, l=l, weight_decay=DECAY, backend="cuda"
    )
    means = [None if g is None else [t.double().mean(0) for t in g] for g in grads]
    assert means[0] is not None
    exact = [
        stepped(x, a, means[1][i] if means[1] else None, l)
        for i, (x, a) in enumerate(zip(start, means[0], strict=True))
    ]
    yield "params", share(params, exact, step_bounds(start, exact, device, sums=16))
    for found, some in ((ours.sq_norms1, grads[0]), (ours.sq_norms2, grads[1])):
        if found is not None and some is not None:
            norms = torch.stack([g.double().square().reshape(len(g), -1).sum(1) for g in some if g.numel()]).sum(0)
            yield "samples' norms", share([found], [norms], [1e-6 * norms])
    yield "statistics", stats_share(ours.stats, start, means[0], means[1])


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Set whether float32 products may be rounded to tf32, matrix products and convolutions alike."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def weight_grad(
    device: torch.device,
    case: str,
    dtype: torch.dtype = F32,
    precision: str = "ieee",
    *,
    segments: int = 2,
    channels_last: bool = False,
) -> Shares:
    input_shape, shape, options = LAYERS[case]
    x, dy = make(input_shape, shape, dtype=dtype, **options)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    B = len(x)
    weights, of_samples = torch.linspace(-1.5, 2.0, B), [i % segments for i in range(B)]
    with products(precision):
        ours = weight_grad_and_sq_norms(
            *on(device, [x, dy]), shape, weights=weights.to(device), segments=of_samples, backend="triton", **options
        )
    exact = weight_grad_and_sq_norms(
        x.double(), dy.double(), shape, weights=weights, segments=of_samples, backend="reference", **options
    )
    # A product of T terms of size |a||b| is off by eps of each at most; the norms below bound the sum of those terms.
    scale = float((x.double().flatten(1).norm(dim=1) * dy.double().flatten(1).norm(dim=1)).sum()) + 1e-30
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    bound = 4 * PRODUCT_EPS[precision] * scale * taps**0.5
    yield "gradient", norm_share(ours.grad, exact.grad, 2 * bound)
    yield "samples' norms", norm_share(ours.sq_norms.cpu().sqrt(), exact.sq_norms.sqrt(), bound)
    assert ours.segment_gram is not None
    assert exact.segment_gram is not None
    gram_bound = 8 * bound * (float(exact.grad.norm()) + scale)
    yield "segments' products", norm_share(ours.segment_gram, exact.segment_gram, gram_bound)


def weight_grad_halves(
    device: torch.device, case: str, dtype: torch.dtype = F32, *, precision: str = "ieee", channels_last: bool = False
) -> Shares:
    """Both batches side by side, each with a gradient of its own, in one launch."""
    (half, *rest), shape, options = LAYERS[case]
    x, dy = make([2 * half, *rest], shape, dtype=dtype, **options)
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    product = layer_product(x, dy, shape, **options)
    operands = on(device, [product.inputs, product.output_grads])
    with products(precision), use_backend("triton"):
        grads, sq_norms = unchecked_weight_grads(*operands, shape, product.geometry, 2)
    assert sq_norms is not None
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    for name, some in (("first", slice(half)), ("second", slice(half, None))):
        a, b = x[some].double(), dy[some].double()
        exact = weight_grad_and_sq_norms(a, b, shape, backend="reference", **options)
        scale = float((a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)).sum()) + 1e-30
        bound = 4 * PRODUCT_EPS[precision] * scale * taps**0.5
        yield f"{name} gradient", norm_share(grads[name == "second"], exact.grad, 2 * bound)
        yield f"{name} norms", norm_share(sq_norms[some].cpu().sqrt(), exact.sq_norms.sqrt(), bound)


def weight_step(device: torch.device, case: str, dtype: torch.dtype, l: float) -> Shares:
    input_shape, shape, options = LAYERS[case]
    x, dy = make(input_shape, shape, dtype=dtype, **options)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, segments = start.double(), torch.arange(len(x)) % 2
    weight = start.to(device, copy=True)
    with products("ieee"):
        norms, stats = svag_weight_step_(
            weight, *on(device, [x, dy]), segments=segments.tolist(), l=l, backend="triton", **STEP, **options
        )
    exact_norms, exact_stats = step_by_two_ops(exact, x.double(), dy.double(), segments, l=l, **options)
    yield "samples' norms", share([norms], [exact_norms], [1e-5 * exact_norms])
    largest = float(exact_stats.raw[:4].max())
    yield "statistics", share([stats.raw], [exact_stats.raw], [torch.full((5,), 1e-5 * largest, dtype=F64)])
    moved = STEP["lr"] / l * (2 * l) ** 0.5 * float(exact_stats.raw[:2].max()) ** 0.5
    bound = 1e-5 * moved + EPS * float(exact.abs().max())
    yield "weight", share([weight], [exact], [torch.full_like(exact, bound)])


def adaptive_step(device: torch.device, dtype: torch.dtype, adam: bool) -> Shares:
    """Adam and RMSprop have no GPU kernel: on a GPU they are plain PyTorch, compared with float64 all the same."""

    def run(where: torch.device, dtype: torch.dtype) -> list[Tensor]:
        params, grads1, grads2, first = (on(where, [t.to(dtype) for t in draw(F32, seed)]) for seed in range(4))
        second = [t.square() for t in first]
        steps, averages = [3] * len(params), first if adam else None
        svag_adaptive_step_(
            params, grads1, grads2, averages, second, steps=steps, lr=0.1, l=4, beta1=0.9, beta2=0.99, eps=1e-3,
            weight_decay=DECAY,
        )  # fmt: skip
        return [*params, *first, *second]

    exact = run(torch.device("cpu"), F64)
    eps = 2.0**-52 if dtype == F64 else EPS
    yield "params and moments", share(run(device, dtype), exact, [64 * eps * (e.abs() + 1) for e in exact])


def network_norms(device: torch.device) -> Shares:
    """What a user runs: forward, backward and every sample's norm, without a sign of the CPU's kernels."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(8 * 36, 5)).double()
    x, y, exact = torch.randn(6, 3, 6, 6, dtype=F64), torch.randint(0, 5, (6,)), []
    for i in range(6):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        exact.append(sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None))
    net = net.float().to(device)
    net.zero_grad()
    with (
        products("ieee"),
        use_backend("triton" if device.type == "cpu" else "auto"),
        per_sample_sq_norms(net) as norms,
    ):
        torch.nn.functional.cross_entropy(net(x.float().to(device)), y.to(device)).backward()
    squares = torch.tensor(exact, dtype=F64)
    yield "samples' norms", share([norms.total], [squares], [1e-3 * squares])
