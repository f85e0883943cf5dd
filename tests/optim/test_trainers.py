"""SVAG behind the wrappers of trainers: by their mechanism here, with the trainers themselves in the nightly run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svag_fast import SVAG, SVAGAdam


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def batch(k: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(k))


def plain(optimizer: Any = SVAG) -> tuple[list[Tensor], float]:
    """Three steps without any trainer."""
    model = net()
    opt = optimizer(model.parameters(), lr=0.1, l=4)
    for k in range(3):
        opt.zero_grad()
        model(batch(2 * k)).square().mean().backward()
        opt.hold_gradient()
        model(batch(2 * k + 1)).square().mean().backward()
        opt.step()
    return [p.detach() for p in model.parameters()], float(opt.stats.noise_trace)


def same(model: nn.Module, expected: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


class CopiesDict:
    """Lightning's and Fabric's mechanism: an object of a class made on the fly, with a copy of the ``__dict__``."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (CopiesDict, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step(closure=closure if closure is not None else lambda: None)


@pytest.mark.parametrize("optimizer", [SVAG, SVAGAdam])
def test_a_wrapper_that_copies_the_dict_holds_for_the_optimizer(optimizer: Any) -> None:
    expected, noise = plain(optimizer)
    model = net()
    opt: Any = CopiesDict(optimizer(model.parameters(), lr=0.1, l=4))
    opt._optimizer.load_state_dict(opt._optimizer.state_dict())  # what it holds in stays the same object
    opt.param_groups = opt._optimizer.param_groups
    for k in range(3):
        opt.zero_grad()
        model(batch(2 * k)).square().mean().backward()
        opt.hold_gradient()
        model(batch(2 * k + 1)).square().mean().backward()
        stats = opt.step()
    assert same(model, expected)
    assert stats is opt.stats is opt._optimizer.stats
    assert float(stats.noise_trace) == noise


def test_a_scheduler_that_patches_step_counts_ours() -> None:
    model = net()
    opt = SVAG(model.parameters(), lr=0.1, l=2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    model(batch(0)).sum().backward()
    opt.hold_gradient()
    model(batch(1)).square().sum().backward()
    opt.step()
    assert opt._opt_called
    schedule.step()


@pytest.mark.nightly
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, noise = plain()
    model = net()
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = accelerator.prepare(model, SVAG(model.parameters(), lr=0.1, l=4))
    for k in range(3):
        opt.zero_grad()
        accelerator.backward(model(batch(2 * k)).square().mean())
        opt.optimizer.hold_gradient()
        accelerator.backward(model(batch(2 * k + 1)).square().mean())
        opt.step()
    assert same(model, expected)
    assert float(opt.optimizer.stats.noise_trace) == noise


@pytest.mark.nightly
def test_fabric() -> None:
    lightning_fabric = pytest.importorskip("lightning_fabric")
    expected, noise = plain()
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    model = net()
    model, opt = fabric.setup(model, SVAG(model.parameters(), lr=0.1, l=4))
    for k in range(3):
        opt.zero_grad()
        fabric.backward(model(batch(2 * k)).square().mean())
        opt.hold_gradient()
        fabric.backward(model(batch(2 * k + 1)).square().mean())
        opt.step()
    assert same(model, expected)
    assert float(opt.stats.noise_trace) == noise


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_lightnings_manual_optimisation() -> None:
    pl = pytest.importorskip("pytorch_lightning")
    expected, noise = plain()

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = net()

        def training_step(self, k: Tensor, _: int) -> None:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.net(batch(2 * int(k))).square().mean())
            opt.hold_gradient()
            self.manual_backward(self.net(batch(2 * int(k) + 1)).square().mean())
            opt.step()
            self.noise = float(opt.stats.noise_trace)

        def configure_optimizers(self) -> Any:
            return SVAG(self.parameters(), lr=0.1, l=4)

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(3), batch_size=1))
    assert same(module.net, expected)
    assert module.noise == noise
