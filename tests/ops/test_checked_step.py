"""The step whose tensors C++ reads itself: the op's own bits, for plain tensors alone; all else is left to the op."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from draws import same_bits
from torch import Tensor, nn

import svag_fast
from svag_fast import SVAG
from svag_fast.ops import checked_step, svag_step_
from svag_fast.ops.checked_step import CheckedStep, tensor_reader
from svag_fast.ops.step import StepOptions

pytestmark = pytest.mark.skipif(tensor_reader() is None, reason="this PyTorch has no DLPack exchange functions")

SHAPES = [(5, 4), (0,), (1,), (), (3, 2, 4, 4), (4097,), (2, 0, 3)]
OPTIONS = {"lr": 0.3, "l": 4.0, "weight_decay": 0.02}
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def lists(dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None) -> Lists:
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(3)]
    params, *grads = drawn
    grads = [[g.to(grad_dtype or dtype) for g in gs] for gs in grads]
    return [nn.Parameter(p) for p in params], grads[0], grads[1]


def of(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None) -> CheckedStep | None:
    return CheckedStep.of(params, grads1, grads2, StepOptions.checked(**OPTIONS), backend="auto")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        *((d, torch.float32) for d in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_it_is_the_op_to_the_bit(dtypes: tuple[torch.dtype, torch.dtype], momentum: float) -> None:
    params, grads1, grads2 = lists(*dtypes)
    for tensors in (params, grads1, grads2):
        tensors[4].data = tensors[4].data.to(memory_format=torch.channels_last)
    expected = [p.detach().clone() for p in params]
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    buffers = [p.detach().to(wide, copy=True) for p in params] if momentum else []
    expected_buffers = [v.clone() for v in buffers]
    options = {**OPTIONS, "momentum": momentum, "momentum_rule": "time", "maximize": True}
    stats = svag_step_(expected, grads1, grads2, momentum_buffers=expected_buffers or None, **options)
    checked = StepOptions.checked(**options)  # type: ignore[arg-type]
    step = CheckedStep.of(params, grads1, grads2, checked, momentum_buffers=buffers or None, backend="auto")
    assert step is not None
    written = [*params, *buffers]
    versions = [t._version for t in written]
    assert torch.equal(step(skip_nonfinite=False), stats.raw)
    assert all(torch.equal(t.detach(), e) for t, e in zip(written, [*expected, *expected_buffers], strict=True))
    assert [t._version for t in written] == [v + 1 for v in versions]


def test_one_gradient_at_l_1() -> None:
    params, grads1, _ = lists()
    expected = [p.detach() - 0.3 * g for p, g in zip(params, grads1, strict=True)]
    step = CheckedStep.of(params, grads1, None, StepOptions.checked(0.3, 1), backend="cpu")
    assert step is not None
    assert step(skip_nonfinite=False)[1] == 0
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_skip_nonfinite_leaves_everything() -> None:
    params, grads1, grads2 = lists()
    grads2[5][17] = torch.inf
    before = [p.detach().clone() for p in params]
    step = of(params, grads1, grads2)
    assert step is not None
    assert step(skip_nonfinite=True)[-1] == 0
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))


class Subclass(Tensor):
    pass


def _replace(which: int, i: int, new: Callable[[Tensor], object]) -> Callable[[Lists], None]:
    def change(tensors: Lists) -> None:
        tensors[which][i] = new(tensors[which][i])  # type: ignore[call-overload]

    return change


def _overlap(tensors: Lists) -> None:
    whole = torch.ones(6000)
    tensors[0][2], tensors[0][5] = nn.Parameter(whole[4096:4097]), nn.Parameter(whole[:4097])


NOT_PLAIN = {
    "missing gradient": _replace(1, 0, lambda t: None),
    "missing second gradient": _replace(2, 5, lambda t: None),
    "sparse": _replace(1, 0, lambda t: t.to_sparse()),
    "sparse rows": _replace(2, 0, lambda t: t.to_sparse_csr()),
    "another layout": _replace(2, 0, lambda t: t.to_mkldnn()),
    "another shape": _replace(1, 0, lambda t: t.flatten()),
    "shorter": _replace(2, 5, lambda t: t[:-1]),
    "another order in memory": _replace(1, 0, lambda t: t.T.contiguous().T),
    "strided gradient": _replace(2, 5, lambda t: t.repeat_interleave(2)[::2]),
    "broadcast gradient": _replace(1, 5, lambda t: t[:1].expand(4097)),
    "dtype of a param": _replace(0, 0, lambda t: t.to(torch.int32)),
    "dtype of a gradient": _replace(1, 0, lambda t: t.double()),
    "two dtypes of gradients": _replace(2, 0, lambda t: t.bfloat16()),
    "complex": _replace(0, 0, lambda t: t.to(torch.complex64)),
    "eight bits": _replace(1, 0, lambda t: t.to(torch.float8_e5m2)),
    "no data": _replace(0, 0, lambda t: t.to("meta")),
    "a subclass": _replace(0, 0, lambda t: t.detach().as_subclass(Subclass)),
    "not a tensor": _replace(1, 0, lambda t: t.numpy()),
    "param with gaps": _replace(0, 5, lambda t: torch.zeros(2 * 4097)[::2]),
    "overlapping params": _overlap,
    "fewer gradients": lambda tensors: tensors[1].clear(),
    "fewer second gradients": lambda tensors: tensors[2].clear(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_what_is_not_plain_is_left_to_the_op(change: Callable[[Lists], None]) -> None:
    tensors = lists()
    change(tensors)
    assert of(*tensors) is None


BAD_BUFFERS = {
    "fewer": lambda buffers, params: buffers.pop(),
    "dtype": lambda buffers, params: buffers.__setitem__(0, buffers[0].double()),
    "shape": lambda buffers, params: buffers.__setitem__(0, buffers[0].flatten()),
    "order in memory": lambda buffers, params: buffers.__setitem__(0, buffers[0].T.contiguous().T),
    "a param's memory": lambda buffers, params: buffers.__setitem__(5, params[5].data),
    "another buffer's memory": lambda buffers, params: buffers.__setitem__(2, buffers[5][:1]),
}


@pytest.mark.parametrize("change", BAD_BUFFERS.values(), ids=BAD_BUFFERS.keys())
def test_buffers_that_do_not_fit_are_left_to_the_op(change: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    params, grads1, grads2 = lists()
    buffers = [torch.zeros_like(p) for p in params]
    options = StepOptions.checked(**OPTIONS, momentum=0.9)
    step = functools.partial(CheckedStep.of, params, grads1, grads2, options, backend="auto")
    assert step(momentum_buffers=buffers) is not None
    change(buffers, params)
    assert step(momentum_buffers=buffers) is None
    assert step(momentum_buffers=None) is None


def test_another_backend_is_asked_for() -> None:
    tensors = lists()
    with svag_fast.use_backend("reference"):
        assert of(*tensors) is None
    assert of(*tensors) is not None


def test_the_optimizer_takes_the_same_steps_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[Tensor]:
        params, grads1, grads2 = lists()
        opt = SVAG(params, lr=0.1, l=3, weight_decay=0.1)
        for _ in range(3):
            for grads, then in ((grads1, opt.hold_gradient), (grads2, opt.step)):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                then()
        return [p.detach() for p in params]

    expected = train()
    monkeypatch.setattr(checked_step, "tensor_reader", lambda: None)
    assert same_bits(train(), expected)
