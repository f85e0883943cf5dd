"""The GPU kernels' times against the copy and matrix rates measured beside them; needs torch alone, and tests/ beside.

PYTHONPATH=tests/support:tests:bench python bench/gpu/gpu_bench.py ROWS     the most important first; JSON lines
... --cpu                                           the same code on a CPU: tiny sizes, Triton under the interpreter
... --profile                                       one launch of each kernel, for a profiler

A kernel is captured into a CUDA graph and its replays are timed by CUDA events: no launch by Python, copy from the host
or synchronisation is in a time. Before each replay the L2 cache is written over. What can't be captured is called by
the host, which is far ahead of the device; the column "timed by" says so. Medians; "spread" is the distance of the 10th
and 90th percentiles over the median. The floor of a kernel is its bytes at the measured copy rate, or its operations at
the measured matrix rate of its precision, whichever is longer; "of peak" is the floor over the time.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import CONVOLUTIONS, mlp, preresnet32, preresnet32_shapes, vgg16, vgg16_shapes
from gpu_cases import products
from gpu_checks import on_host
from gpu_stopwatch import Report, Target
from plain_steps import eager, foreach
from torch import Tensor, nn

import svag_fast
from svag_fast.ops import svag_step_, svag_step_per_sample_
from svag_fast.ops.backends import BACKENDS
from svag_fast.ops.step import SVAG_STEP, StepOptions, step_coefficients
from svag_fast.ops.step_call import Scaler, StepCall, StepLists
from svag_fast.ops.weight_grad import triton as weight_grad_triton
from svag_fast.ops.weight_grad.shapes import LayerProduct, layer_product

LR, L, WEIGHT_DECAY = 1e-6, 4, 5e-4
B = 128
_TIMED = ("16-16, 32x32", "64-64, 8x8", "64-64, 32x32", "256-256, 8x8", "512-512, 4x4", "512-512, 2x2")
LAYERS = {name: CONVOLUTIONS[name][:4] for name in _TIMED}  # all of stride 1
TINY_LAYERS = {"4-8, 6x6": (4, 8, 6, 3)}


def rates(report: Report, tiny: bool) -> None:
    """This device's copy and matrix rates, with which everything after is compared."""
    source = torch.randn(1 << (16 if tiny else 28), device=report.device)
    target = torch.empty_like(source)
    row = report.time("peak", "copy", lambda: target.copy_(source), moved=8 * source.numel())
    report.bytes_a_us = row["MB"] * 1e6 / row["us"]
    one = torch.zeros(1, device=report.device)
    report.time("peak", "one element set: the least that is seen", one.zero_)
    for precision, n in (("float32", 4096), ("tf32", 8192), ("bfloat16", 8192)):
        n = 64 if tiny else n
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        a, b, c = (torch.randn(n, n, device=report.device).to(dtype) for _ in range(3))
        with products(precision):
            row = report.time("peak", f"{precision} products", partial(torch.mm, a, b, out=c), operations=2 * n**3)
        if "us" in row:
            report.matrix[precision] = 2 * n**3 / row["us"]


class Lists:
    """A list's params and two gradients, and the ways to take a step on them."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.params, self.grads1, self.grads2 = ([torch.randn(s, device=device) for s in shapes] for _ in range(3))
        self.numbers = sum(p.numel() for p in self.params)

    def ours(self, backend: str, **options: Any) -> Target:
        _must_be_available(backend)
        coefficients = step_coefficients(LR, L, WEIGHT_DECAY, self.device, momentum=options.get("momentum", 0.0))
        return lambda: svag_step_(
            self.params, self.grads1, self.grads2, lr=LR, l=L, weight_decay=WEIGHT_DECAY, coefficients=coefficients,
            backend=backend, **options,
        )  # fmt: skip

    def compensated(self, backend: str) -> Target:
        return self.ours(backend, compensation=[torch.zeros_like(p) for p in self.params])

    def with_momentum(self, backend: str) -> Target:
        return self.ours(backend, momentum_buffers=[torch.zeros_like(p) for p in self.params], momentum=0.9)

    def scaled(self, backend: str) -> Target:
        """As under a GradScaler, whose own pass over the gradients isn't in it."""
        _must_be_available(backend)
        lists, options = StepLists(self.params, self.grads1, self.grads2), StepOptions(LR, L, WEIGHT_DECAY)
        call = StepCall.of(SVAG_STEP, lists, options, backend=backend)
        return partial(call, True, Scaler(*(torch.full((), x, device=self.device) for x in (0.0, 1.0))))

    def per_sample(self, samples: int) -> Target:
        _must_be_available("cuda")
        grads = [[torch.randn(samples, *s, device=self.device) for s in self.shapes] for _ in range(2)]
        return lambda: svag_step_per_sample_(self.params, *grads, lr=LR, l=L, weight_decay=WEIGHT_DECAY, backend="cuda")

    def plain(self, step: Callable[..., Any]) -> Target:
        return partial(step, self.params, self.grads1, self.grads2, lr=LR, l=L, weight_decay=WEIGHT_DECAY)

    def fused_sgd(self) -> Target:
        leaves = [nn.Parameter(p) for p in self.params]
        for p, g in zip(leaves, self.grads2, strict=True):
            p.grad = g
        return torch.optim.SGD(leaves, lr=LR, weight_decay=WEIGHT_DECAY, fused=True).step


def _must_be_available(backend: str) -> None:
    if reason := BACKENDS[backend].why_unavailable():
        raise RuntimeError(reason)


def _made(make: Callable[[], Target]) -> Target:
    """The target, or one that raises at its call what making it raised: a row is skipped, not the whole report."""
    try:
        return make()
    except Exception as error:
        reason = error

        def refuse() -> None:
            raise reason

        return refuse


def update(report: Report, name: str, shapes: list[tuple[int, ...]]) -> None:
    """The update and the four statistics, in one pass by ours."""
    lists, group = Lists(shapes, report.device), f"update, {name}"
    n, both = 4 * lists.numbers, ("cuda", "triton")  # bytes of the params alone
    ways: list[tuple[str, Callable[[], Target], int]] = [
        *((f"step, {b}", partial(lists.ours, b), 4 * n) for b in both),
        *((f"compensated, {b}", partial(lists.compensated, b), 6 * n) for b in both),
        *((f"skip_nonfinite, {b}", partial(lists.ours, b, skip_nonfinite=True), 6 * n) for b in both),
        *((f"under a GradScaler, {b}", partial(lists.scaled, b), 7 * n) for b in both),
        *((f"momentum, {b}", partial(lists.with_momentum, b), 6 * n) for b in both),
        ("SGD(fused=True), one gradient", lists.fused_sgd, 3 * n),
        ("torch._foreach", lambda: lists.plain(foreach), 0),
        ("eager PyTorch", lambda: lists.plain(eager), 0),
    ]
    with torch.no_grad():
        for kernel, make, moved in ways:
            report.time(group, kernel, _made(make), moved=moved)


def per_sample(report: Report, name: str, shapes: list[tuple[int, ...]], samples: int) -> None:
    """The step from per-sample gradients, each read once."""
    lists = Lists(shapes, report.device)
    target = _made(lambda: lists.per_sample(samples))
    moved = 4 * (2 * samples + 2) * lists.numbers
    report.time(f"per-sample step, {name}, {samples} + {samples}", "step, cuda", target, moved=moved)


def compiled(report: Report, name: str, shapes: list[tuple[int, ...]]) -> None:
    """torch.compile of the eager step; last, since compiling takes long."""
    lists = Lists(shapes, report.device)
    with torch.no_grad():
        report.time(f"update, {name}", "torch.compile", torch.compile(lists.plain(eager)), moved=16 * lists.numbers)


def layer_tensors(layer: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, batch: int) -> Any:
    c, o, image, k = layer
    x, dy = torch.randn(batch, c, image, image, device=device), torch.randn(batch, o, image, image, device=device)
    return x.to(dtype), dy.to(dtype), torch.randn(o, c, k, k, device=device)


def layers(report: Report, names: dict[str, tuple[int, int, int, int]], precision: str) -> None:
    """The weight gradient with norms, as chosen and by each way, and the step in its place; PyTorch's without norms."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    batch = B if report.device.type == "cuda" else 2
    for name, (c, o, image, k) in names.items():
        x, dy, weight = layer_tensors((c, o, image, k), dtype, report.device, batch)
        options: dict[str, Any] = {"padding": k // 2}
        product = layer_product(x, dy, weight.shape, **options)
        both = layer_product(x, dy, weight.shape, torch.full((batch,), 2 / batch, device=report.device),
                             [i % 2 for i in range(batch)], **options)  # fmt: skip
        coefficients = step_coefficients(LR, L, WEIGHT_DECAY, report.device)
        ways: dict[str, Target] = {
            "gradient and norms": partial(weight_grad_triton.serve, product),
            "the tiles": partial(weight_grad_triton.direct, product),
            "the tiles, two segments": partial(weight_grad_triton.direct, both),
            "the tiles, stepping": partial(weight_grad_triton.direct_step, both, weight, coefficients),
            "PyTorch's, products of rows": partial(weight_grad_triton.library, product),
            "PyTorch, no norms": partial(_convolution_backward, product, weight.to(dtype)),
        }
        if dtype != torch.float32:
            del ways["PyTorch's, products of rows"]
        if weight_grad_triton.serve_halves(product) is not None:  # else the tiles are not chosen
            ways["both halves in one launch"] = partial(weight_grad_triton.serve_halves, product)
        operations = 2 * batch * image * image * weight.numel()
        moved = (x.numel() + dy.numel()) * x.element_size() + 4 * weight.numel()
        with products(precision), torch.no_grad():
            for way, target in ways.items():
                report.time(
                    f"dW {name}, {precision}", way, target, moved=moved, operations=operations, precision=precision
                )


def _convolution_backward(product: LayerProduct, weight: Tensor) -> Any:
    g = product.geometry
    options = (g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [False, True, False])
    return torch.ops.aten.convolution_backward(product.output_grads, product.inputs, weight, None, *options)


def norms(report: Report, name: str, net: nn.Module, image: tuple[int, ...], batch: int) -> None:
    """Forward, backward and every sample's norm against the plain forward and backward, as the host calls them."""
    net = net.to(report.device)
    x, y = torch.randn(batch, *image, device=report.device), torch.randint(0, 10, (batch,), device=report.device)

    def plain() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    def ours() -> Tensor:
        with svag_fast.per_sample_sq_norms(net) as found:
            plain()
        return found.total

    with svag_fast.use_backend("auto" if report.device.type == "cuda" else "triton"):
        for kernel, target in (("with norms", ours), ("plain", plain)):
            report.time(f"norms, {name}", kernel, target, as_called=True)


def training_steps(report: Report, name: str, net: nn.Module, image: tuple[int, ...], batch: int) -> None:
    """A whole step of both batches as the host calls it, against SGD's on as many samples."""
    net = net.to(report.device)
    params = [p for p in net.parameters() if p.requires_grad]
    svag, sgd = svag_fast.SVAG(params, lr=LR, l=L), torch.optim.SGD(params, lr=LR, fused=report.device.type == "cuda")
    x = torch.randn(2 * batch, *image, device=report.device)
    y = torch.randint(0, 10, (2 * batch,), device=report.device)

    def pair(norms: bool) -> None:
        with svag_fast.pair_pass(net, svag, norms=norms) as pair:
            pair.backward(F.cross_entropy(net(x), y, reduction="none"))
        svag.step()

    def two_passes() -> None:
        svag.zero_grad()
        for which, rows in enumerate((slice(batch), slice(batch, None))):
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            if which == 0:
                svag.hold_gradient()
        svag.step()

    def plain() -> None:
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sgd.step()

    with svag_fast.use_backend("auto" if report.device.type == "cuda" else "triton"):
        for kernel, target in (
            ("pair_pass, norms", partial(pair, True)),
            ("pair_pass", partial(pair, False)),
            ("two passes", two_passes),
            ("SGD at 2B", plain),
        ):
            report.time(f"training step, {name}, B = {batch}", kernel, target, as_called=True)


def all_groups(report: Report) -> list[Callable[[], None]]:
    """What matters most first: a cut-off costs the comparisons, not the kernels."""
    one = {"64-64, 32x32": LAYERS["64-64, 32x32"]}
    return [
        partial(rates, report, tiny=False),
        partial(update, report, "60M", [(60_000_000,)]),
        partial(layers, report, LAYERS, "tf32"),
        partial(layers, report, LAYERS, "float32"),
        partial(update, report, "preresnet32", preresnet32_shapes()),
        partial(per_sample, report, "preresnet32", preresnet32_shapes(), 64),
        partial(update, report, "vgg16", vgg16_shapes()),
        lambda: training_steps(report, "preresnet32", preresnet32(), (3, 32, 32), 64),
        lambda: norms(report, "preresnet32", preresnet32(), (3, 32, 32), B),
        lambda: norms(report, "vgg16", vgg16(), (3, 32, 32), B),
        lambda: norms(report, "mlp", mlp(), (784,), B),
        partial(layers, report, one, "bfloat16"),
        partial(compiled, report, "60M", [(60_000_000,)]),
        partial(compiled, report, "preresnet32", preresnet32_shapes()),
    ]


def tiny_groups(report: Report) -> list[Callable[[], None]]:
    return [
        partial(rates, report, tiny=True),
        partial(update, report, "tiny", [(16, 3, 3, 3), (1000,)]),
        partial(per_sample, report, "tiny", [(16, 3, 3, 3)], 2),
        partial(layers, report, TINY_LAYERS, "float32"),
        lambda: training_steps(report, "tiny", nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 10)), (9,), 2),
        lambda: norms(report, "tiny", nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 10)), (9,), 2),
    ]


def profile(device: torch.device) -> None:
    """One launch of each kernel, after one that compiled it."""
    on_cpu = device.type == "cpu"
    lists, few = Lists([(1000 if on_cpu else 60_000_000,)], device), Lists([(1000 if on_cpu else 460_000,)], device)
    x, dy, weight = layer_tensors(
        (4, 8, 6, 3) if on_cpu else (128, 128, 16, 3), torch.float32, device, 2 if on_cpu else B
    )
    product = layer_product(x, dy, weight.shape, padding=1)
    targets = {
        "step, cuda": _made(lambda: lists.ours("cuda")),
        "step, triton": _made(lambda: lists.ours("triton")),
        "per-sample step": _made(lambda: few.per_sample(64)),
        "weight gradient": partial(weight_grad_triton.direct, product),
    }
    for name, target in targets.items():
        try:
            for _ in range(2):
                target()
        except RuntimeError as error:
            print(f"{name}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="the file to write the rows to")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = torch.device("cpu" if arguments.cpu else "cuda")
    with on_host("cuda") if arguments.cpu else contextlib.nullcontext():
        if arguments.profile:
            profile(device)
            return
        with arguments.rows.open("w") as file:
            report = Report(file, device)
            for group in tiny_groups(report) if arguments.cpu else all_groups(report):
                try:
                    group()
                except Exception as error:  # one group's must not cost the others
                    report.skip("a group", repr(error)[:300])
                if device.type == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
