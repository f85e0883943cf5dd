"""Forward, backward and all per-sample squared gradient norms, against the plain forward and backward, and the peers.

Run: `python -m pytest bench/test_sample_norms.py --benchmark-only -k preresnet32`. Each contender runs in alternation
with ours, in its better memory format; ratio = contender / ours, so `plain` at >= 1 means that the norms cost nothing.
Targets: `plain` >= 1.00 on PreResNet-32 and VGG-16, >= 0.95 on the MLP, >= 0.91 on the digits net, and every peer > 1;
peak memory of ours <= 1.25 of plain.

| contender | norms from | weight gradients in the same pass |
| --- | --- | --- |
| plain | none: the floor | yes |
| ours | the weight-gradient product itself | yes |
| loop | single-sample passes | no (their sum is) |
| vmap 16, 32, 128 | torch.func vmap(grad), in chunks | yes, by a mean |
| expanded weights | torch's own call_for_per_sample_grads | yes, by a mean |
| opacus hooks | GradSampleModule: all B gradients stored | yes |
| opacus ghost | GradSampleModuleFastGradientClipping: norms alone | yes |
| backpack | BatchL2Grad | yes |
| torchjd | the diagonal of Engine.compute_gramian | no |
| mixed ghost | rule 2T² <= pd a layer, written here: unfold, then Gram or direct | yes |
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import digits, mlp, preresnet32, vgg16
from torch import Tensor, nn

from svag_fast import per_sample_sq_norms

Step = Callable[[], Any]


# name: net, input shape, batch size, memory format in which the plain step is fastest, rounds, threads
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, torch.memory_format, int, int]] = {
    "preresnet32": (preresnet32, (3, 32, 32), 128, torch.contiguous_format, 4, 2),
    "preresnet32-last": (preresnet32, (3, 32, 32), 128, torch.channels_last, 4, 2),
    "vgg16": (vgg16, (3, 32, 32), 128, torch.contiguous_format, 2, 2),
    "vgg16-last": (vgg16, (3, 32, 32), 128, torch.channels_last, 2, 2),
    "mlp": (mlp, (784,), 128, torch.contiguous_format, 10, 2),
    "digits8": (digits, (1, 8, 8), 8, torch.contiguous_format, 300, 1),
    "digits128": (digits, (1, 8, 8), 128, torch.contiguous_format, 60, 1),
}


class Setting:
    """A net with one batch, and each contender's step on it: forward, backward, norms."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.device = device
        self.build, shape, B, self.memory_format, self.rounds, threads = NETS[name]
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(B, *shape, generator=generator).to(device)
        self.x = x.to(memory_format=self.memory_format) if x.dim() == 4 else x
        self.y = torch.randint(0, 10, (B,), generator=generator).to(device)
        self.model = self.fresh()

    def fresh(self) -> nn.Module:
        model = self.build().to(self.device)
        return model.to(memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]

    def backward(self, model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(self.x), self.y).backward()

    def plain(self) -> Step:
        return lambda: self.backward(self.model)

    def ours(self) -> Step:
        """The context is entered and left each time."""

        def step() -> Tensor:
            with per_sample_sq_norms(self.model) as norms:
                self.backward(self.model)
            return norms.total

        return step

    def loop(self) -> Step:
        parameters = list(self.model.parameters())

        def step() -> Tensor:
            rows = []
            for i in range(len(self.y)):
                loss = F.cross_entropy(self.model(self.x[i : i + 1]), self.y[i : i + 1])
                rows.append(_squares(torch.autograd.grad(loss, parameters)))
            return torch.stack(rows)

        return step

    def vmap(self, chunk: int) -> Step:
        model, parameters = self.model, {n: p.detach() for n, p in self.model.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

        def step() -> Tensor:
            norms, grads = [], {n: torch.zeros_like(p) for n, p in parameters.items()}
            for x, y in zip(self.x.split(chunk), self.y.split(chunk), strict=True):
                rows = per_sample(parameters, x, y)
                norms.append(sum(g.flatten(1).square().sum(1) for g in rows.values()))
                for n, g in rows.items():
                    grads[n] += g.sum(0)
            return torch.cat(norms)

        return step

    def expanded_weights(self) -> Step:
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        model = self.fresh()

        def step() -> Tensor:
            for p in model.parameters():
                p.grad_sample = None  # type: ignore[attr-defined]
            F.cross_entropy(call_for_per_sample_grads(model, loss_reduction="mean")(self.x), self.y).backward()
            for p in model.parameters():
                p.grad = p.grad_sample.mean(0)  # type: ignore[attr-defined]
            return sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters())  # type: ignore[attr-defined]

        return step

    def opacus_hooks(self) -> Step:
        grad_sample = pytest.importorskip("opacus.grad_sample")
        model = grad_sample.GradSampleModule(self.fresh())

        def step() -> Tensor:
            for p in model.parameters():
                p.grad_sample = None  # type: ignore[attr-defined]
            self.backward(model)
            return sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters())  # type: ignore[attr-defined]

        return step

    def opacus_ghost(self) -> Step:
        module = pytest.importorskip("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
        model = module.GradSampleModuleFastGradientClipping(self.fresh(), max_grad_norm=1.0, use_ghost_clipping=True)

        def step() -> Tensor:
            self.backward(model)
            return model.get_norm_sample() ** 2

        return step

    def backpack(self) -> Step:
        backpack = pytest.importorskip("backpack")
        extensions = pytest.importorskip("backpack.extensions")
        model = backpack.extend(self.fresh())

        def step() -> Tensor:
            model.zero_grad()
            with backpack.backpack(extensions.BatchL2Grad()):
                F.cross_entropy(model(self.x), self.y).backward()
            return sum(p.batch_l2 for p in model.parameters()) * len(self.y) ** 2

        return step

    def torchjd(self) -> Step:
        autogram = pytest.importorskip("torchjd.autogram")
        model = self.fresh()
        engine = autogram.Engine(model, batch_dim=0)

        def step() -> Tensor:
            losses = F.cross_entropy(model(self.x), self.y, reduction="none")
            return engine.compute_gramian(losses).diagonal()

        return step

    def mixed_ghost(self) -> Step:
        model = self.fresh()
        norms: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda m, args, out: _ghost_hook(m, args[0], out, norms))

        def step() -> Tensor:
            norms.clear()
            self.backward(model)
            return torch.stack(norms).sum(0) * len(self.y) ** 2

        return step


def _squares(tensors: Any) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def _ghost_hook(module: nn.Module, x: Tensor, out: Tensor, norms: list[Tensor]) -> None:
    """The mixed ghost norm: Gram where 2T² <= pd, else the gradients themselves."""

    def on_grad(b: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            a = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
            b = b.flatten(2).transpose(1, 2)
        else:
            a, b = x.reshape(len(x), -1, x.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
        if 2 * a.shape[1] ** 2 <= a.shape[2] * b.shape[2]:
            norms.append(((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum((1, 2)))
        else:
            norms.append((b.transpose(1, 2) @ a).square().sum((1, 2)))
        if module.bias is not None:
            norms.append(b.sum(1).square().sum(1))

    x = x.detach()
    out.register_hook(on_grad)


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    "plain": Setting.plain,
    "mixed ghost": Setting.mixed_ghost,
    "opacus hooks": Setting.opacus_hooks,
    "opacus ghost": Setting.opacus_ghost,
    "backpack": Setting.backpack,
    "torchjd": Setting.torchjd,
    "expanded weights": Setting.expanded_weights,
    "vmap 16": lambda s: s.vmap(16),
    "vmap 32": lambda s: s.vmap(32),
    "vmap 128": lambda s: s.vmap(128),
    "loop": Setting.loop,
}


def _peak_mib(step: Step) -> float:
    """How far the process's resident memory rises during a step, from the kernel's own high-water mark."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("net", NETS)
def test_sample_norms(net: str, contender: str, benchmark: Any, contest: Any) -> None:
    benchmark.group = net
    setting = Setting(net)
    ours = setting.ours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = CONTENDERS[contender](setting)
        try:
            norms = target()
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
            pytest.skip(f"{contender} can't: {str(error).splitlines()[0]}")
        expected = ours()
        if isinstance(norms, Tensor):  # no speed of wrong results
            torch.testing.assert_close(norms.double(), expected, rtol=1e-3, atol=1e-6)
        contest(target, ours=ours, rounds=setting.rounds)
        benchmark.extra_info["peak_mib"] = _peak_mib(target)
        benchmark.extra_info["ours_peak_mib"] = _peak_mib(ours)
