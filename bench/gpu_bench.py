"""The kernels on a GPU against what a user would write; `make gpu-report` runs it and checks the targets.

python bench/gpu_bench.py ROWS.json     all groups, at most a minute each; prints a table, writes its rows
python bench/gpu_bench.py --dry ROWS.json     the same code on a CPU: tiny sizes, Triton under the interpreter
python bench/gpu_bench.py --profile     one launch of each kernel on 60 M parameters, for a profiler

Contenders run in alternation. "ms" is a call as the host makes it, "GPU ms" the same with the host far ahead, so
without what launching costs; both from CUDA events, medians. On a CPU "ms" is wall-clock time and means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from test_sample_norms import CONTENDERS, Setting
from test_step import LR, WEIGHT_DECAY, L, Lists, preresnet32, vgg16
from test_weight_grad import Layer

import svag_fast
from svag_fast.ops import svag_step_, weight_grad_and_sq_norms, weight_grad_triton
from svag_fast.ops.backends import BACKENDS
from svag_fast.ops.layer_product import layer_product

Row = dict[str, Any]
Target = Callable[[], Any]
AHEAD = 20_000_000  # cycles that the GPU sleeps while the host queues work: about 10 ms
SECONDS = 12.0  # for one group's rounds
LAYERS = ["16-16, 32x32", "64-64, 8x8", "64-64, 32x32", "256-256, 8x8", "512-512, 4x4", "512-512, 2x2"]
PEERS = ("vmap 32", "expanded weights", "opacus ghost", "opacus hooks", "backpack")


def alternate(contenders: dict[str, Target], rounds: int, *, on_gpu: bool, ahead: bool) -> dict[str, Row]:
    """Time the contenders in alternation; return a row each, or one that says why it can't."""
    rows: dict[str, Row] = {}
    for name, target in contenders.items():
        try:
            target()
            target()
            rows[name] = {"contender": name}
        except (Exception, pytest.skip.Exception) as error:
            rows[name] = {"contender": name, "skipped": str(error).splitlines()[0] if str(error) else repr(error)}
    running = {name: target for name, target in contenders.items() if "skipped" not in rows[name]}
    times: dict[tuple[str, str], list[float]] = {}
    until = time.perf_counter() + SECONDS
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > until:
            break
        for name, target in running.items():
            if not on_gpu:
                start = time.perf_counter()
                target()
                times.setdefault((name, "ms"), []).append((time.perf_counter() - start) * 1e3)
                continue
            for column in ("ms", "GPU ms") if ahead else ("ms",):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                if column == "GPU ms":
                    torch.cuda._sleep(AHEAD)
                first.record()
                target()
                last.record()
                torch.cuda.synchronize()
                times.setdefault((name, column), []).append(first.elapsed_time(last))
    for (name, column), values in times.items():
        rows[name][column] = median(values)
    return rows


def ours(lists: Lists, backend: str) -> Target:
    if reason := BACKENDS[backend].why_unavailable():
        return _refusing(reason)

    def step() -> Any:
        return svag_step_(
            lists.params, lists.grads1, lists.grads2, lr=LR, l=L, weight_decay=WEIGHT_DECAY, backend=backend
        )

    return step


def _refusing(reason: str) -> Target:
    def refuse() -> None:
        raise RuntimeError(reason)

    return refuse


def apex(lists: Lists) -> Target:
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        return _refusing(str(error))
    optimizer = FusedSGD(lists.leaves, lr=LR, weight_decay=WEIGHT_DECAY)
    return lambda: optimizer.step()


def update(name: str, shapes: list[tuple[int, ...]], device: str) -> list[Row]:
    """The update and the four statistics."""
    lists = Lists(shapes, device)
    lists.give_gradients()
    source, copy = lists.flat[0], torch.empty_like(lists.flat[0])
    contenders: dict[str, Target] = {
        "ours, cuda": ours(lists, "cuda"),
        "ours, triton": ours(lists, "triton"),
        "copy": lambda: copy.copy_(source),
        "SGD(fused=True), one gradient": lists.fused_sgd,
        "apex FusedSGD, one gradient": apex(lists),
        "torch._foreach": lists.foreach,
        "torch.compile": lists.compiled,
        "eager PyTorch": lists.eager,
    }
    with torch.no_grad():
        rows = alternate(contenders, 30, on_gpu=device == "cuda", ahead=True)
    for contender, row in rows.items():
        moved = {"copy": 8, "ours, cuda": 16, "ours, triton": 16}.get(contender)
        if moved and "GPU ms" in row:
            row["GB/s"] = moved * source.numel() / row["GPU ms"] / 1e6
    return [{"group": f"update, {name}", **row} for row in rows.values()]


def norms(net: str, device: str) -> list[Row]:
    """Forward, backward and every sample's norm against the plain forward and backward."""
    setting = Setting(net, device)
    targets: dict[str, Target] = {"ours": setting.ours(), "plain": setting.plain()}
    for peer in PEERS if device == "cuda" else PEERS[:1]:
        try:
            targets[peer] = CONTENDERS[peer](setting)
        except (Exception, pytest.skip.Exception) as error:
            targets[peer] = _refusing(str(error))
    with svag_fast.backend("auto" if device == "cuda" else "triton"):
        rows = alternate(targets, 20 if device == "cuda" else 1, on_gpu=device == "cuda", ahead=False)
    return [{"group": f"norms, {net}", **row} for row in rows.values()]


def layers(names: list[str], device: str) -> list[Row]:
    """The weight gradient with norms, as chosen and by each way, against PyTorch's without norms."""
    rows: list[Row] = []
    for name in names:
        layer = Layer(name)
        batch = slice(None if device == "cuda" else 2)
        layer.x, layer.dy, layer.weight = layer.x[batch].to(device), layer.dy[batch].to(device), layer.weight.to(device)

        def ours(layer: Layer = layer) -> Any:
            options = {"stride": layer.stride, "padding": layer.padding, "backend": "triton"}
            return weight_grad_and_sq_norms(layer.x, layer.dy, layer.weight.shape, **options)

        product = layer_product(layer.x, layer.dy, layer.weight.shape, stride=layer.stride, padding=layer.padding)
        targets: dict[str, Target] = {
            "ours, triton": ours,
            "the tiles": partial(weight_grad_triton.direct, product),
            "PyTorch's, products of rows": partial(weight_grad_triton.library, product),
            "PyTorch, no norms": layer.library,
        }
        found = alternate(targets, 20 if device == "cuda" else 1, on_gpu=device == "cuda", ahead=True)
        rows += [{"group": f"dW {name}", **row} for row in found.values()]
    return rows


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add contender / ours, by the host's time; ours is a group's first row, of those that ran."""
    ours: dict[str, float] = {}
    for row in rows:
        if "ms" in row and row["contender"].startswith("ours"):
            ours.setdefault(row["group"], row["ms"])
        if "ms" in row and row["group"] in ours:
            row["ratio"] = row["ms"] / ours[row["group"]]
    return rows


def profile() -> None:
    """One launch of each kernel, after one that compiled it."""
    lists = Lists([(60_000_000,)], "cuda")
    layer = Layer("128-128, 16x16")
    x, dy = layer.x.cuda(), layer.dy.cuda()
    for _ in range(2):
        for backend in ("cuda", "triton"):
            ours(lists, backend)()
        weight_grad_and_sq_norms(x, dy, layer.weight.shape, padding=1, backend="triton")
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", help="the file to write the rows to")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.profile:
        profile()
        return
    if arguments.dry:
        groups = [
            lambda: update("tiny", [(16, 3, 3, 3), (1000,)], "cpu"),
            lambda: norms("digits8", "cpu"),
            lambda: layers(["16-32, 1x1, stride 2"], "cpu"),
        ]
    else:
        sizes = {"preresnet32": preresnet32(), "vgg16": vgg16(), "60M": [(60_000_000,)]}
        groups = [lambda n=n, s=s: update(n, s, "cuda") for n, s in sizes.items()]
        groups += [lambda n=n: norms(n, "cuda") for n in ("preresnet32", "vgg16", "mlp")]
        groups += [lambda: layers(LAYERS, "cuda")]
    rows: list[Row] = []
    for group in groups:
        rows += group()
        torch._dynamo.reset()
        print(f"{len(rows)} rows", file=sys.stderr, flush=True)
        if arguments.rows is not None:
            unfinished = arguments.rows.with_suffix(".partial")
            unfinished.write_text(json.dumps(with_ratios(rows), indent=1) + "\n")
            unfinished.rename(arguments.rows)


if __name__ == "__main__":
    main()
