"""The step whose tensors C++ reads itself: the bits of Python's checks, for plain tensors; the rest is left to them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from draws import same_bits
from torch import Tensor, nn

import svag_fast
from svag_fast import _C, SVAG
from svag_fast.ops import step_call, svag_step_
from svag_fast.ops.adaptive_step import ADAPTIVE_STEP, AdaptiveOptions
from svag_fast.ops.step import SVAG_STEP
from svag_fast.ops.step_call import StepCall, StepLists, tensor_reader
from svag_fast.ops.step_options import StepOptions

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


def of(params: list[Tensor], grads1: list[Tensor], grads2: list[Tensor] | None) -> StepCall | None:
    lists = StepLists(params, grads1, grads2)
    return StepCall.by_reader(SVAG_STEP, lists, StepOptions.checked(**OPTIONS), backend="auto")


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
    lists_ = StepLists(params, grads1, grads2, None, buffers or None)
    step = StepCall.by_reader(SVAG_STEP, lists_, checked, backend="auto")
    assert step is not None
    written = [*params, *buffers]
    versions = [t._version for t in written]
    assert torch.equal(step(skip_nonfinite=False), stats.raw)
    assert all(torch.equal(t.detach(), e) for t, e in zip(written, [*expected, *expected_buffers], strict=True))
    assert [t._version for t in written] == [v + 1 for v in versions]


def test_one_gradient_at_l_1() -> None:
    params, grads1, _ = lists()
    expected = [p.detach() - 0.3 * g for p, g in zip(params, grads1, strict=True)]
    step = StepCall.by_reader(SVAG_STEP, StepLists(params, grads1, None), StepOptions.checked(0.3, 1), backend="cpu")
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


def drawn(count: int, dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(count)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compensation_is_read_too(dtype: torch.dtype, momentum: float) -> None:
    results = []
    options = StepOptions.checked(**OPTIONS, momentum=momentum)
    for make in (StepCall.by_reader, StepCall.by_checks):
        (params, grads1, grads2), kept = drawn(3, dtype), drawn(2, torch.float32)
        call = make(
            SVAG_STEP, StepLists(params, grads1, grads2, kept[0], kept[1] if momentum else None), options, backend="cpu"
        )
        assert call is not None
        assert (call.read is None) == (make == StepCall.by_checks)
        results.append([call(False), *params, *kept[0], *kept[1]])
    assert same_bits(*results)


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_and_rmsprop_are_read_too(dtype: torch.dtype, beta1: float | None) -> None:
    results = []
    options = AdaptiveOptions.checked(0.1, 4, beta1, 0.99, 1e-8, 0.1, False)
    for make in (StepCall.by_reader, StepCall.by_checks):
        params, grads1, grads2, first, second = drawn(5, dtype)
        second = [v.square_() for v in second]
        lists = StepLists(params, grads1, grads2, None if beta1 is None else first, second)
        call = make(ADAPTIVE_STEP, lists, options, extra=list(range(1, 1 + len(SHAPES))), backend="cpu")
        assert call is not None
        assert (call.read is None) == (make == StepCall.by_checks)
        results.append([call(False), *params, *first, *second])
    assert same_bits(*results)


def test_what_adam_does_not_take_is_left_to_the_checks() -> None:
    options = AdaptiveOptions.checked(0.1, 4, 0.9, 0.99, 1e-8, 0.1, False)
    for which in range(1, 5):
        tensors = drawn(5, torch.float64)
        tensors[which] = [t.float() for t in tensors[which]]
        steps = [1] * len(SHAPES)
        assert StepCall.by_reader(ADAPTIVE_STEP, StepLists(*tensors), options, extra=steps, backend="cpu") is None
    tensors = drawn(5, torch.float64)
    with pytest.raises(ValueError, match="steps"):
        StepCall.by_reader(ADAPTIVE_STEP, StepLists(*tensors), options, extra=[1], backend="cpu")


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


_Read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DLTensor))


class _ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("allocator", "from_object", "to_object")),
        ("read", _Read),
        ("stream", ctypes.c_void_p),
    ]


_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)


def test_tensors_of_one_cuda_device_are_read_and_of_two_devices_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stub that says of each tensor, which is on the CPU, that it were on a CUDA device."""
    name = b"dlpack_exchange_api"
    address = _pointer(("PyCapsule_GetPointer", ctypes.pythonapi))(Tensor.__dlpack_c_exchange_api__, name)  # type: ignore[attr-defined]
    real = _ExchangeApi.from_address(address)
    places: dict[int, tuple[int, int]] = {}

    def read(t: Tensor, out: Any) -> int:
        status = int(real.read(t, out))
        out[0].device_type, out[0].device_id = places.get(id(t), (2, 1))
        return status

    stub = _ExchangeApi(real.major, real.minor, None, None, None, None, _Read(read), None)
    capsule = _capsule(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(stub), name, None)
    reader = _C.TensorReader.of(capsule, [Tensor, nn.Parameter], Tensor.is_neg, Tensor.storage_offset)
    assert reader is not None
    monkeypatch.setattr(step_call, "tensor_reader", lambda: reader)
    for kept in (None, drawn(1, torch.float32)[0]):
        tensors = StepLists(*lists(torch.bfloat16), kept, None)
        options = StepOptions.checked(**OPTIONS)
        call = StepCall.by_reader(SVAG_STEP, tensors, options, backend="auto")
        assert call is not None
        assert call.read is not None
        described = StepCall.by_checks(SVAG_STEP, tensors, options, backend="auto").described()
        assert call.read.columns() == described.columns()
        for listed in tensors:
            for t in listed or []:
                for place in ((2, 0), (1, 0), (3, 1)):  # another GPU, the CPU, and what is neither (CUDA's host memory)
                    places[id(t)] = place
                    assert StepCall.by_reader(SVAG_STEP, tensors, options, backend="auto") is None
                del places[id(t)]


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
    whole = StepLists(params, grads1, grads2, None, buffers)
    step = functools.partial(StepCall.by_reader, SVAG_STEP, options=options, backend="auto")
    assert step(whole) is not None
    change(buffers, params)
    assert step(whole) is None


def test_another_backend_is_asked_for() -> None:
    tensors = lists()
    with svag_fast.use_backend("reference"):
        call = of(*tensors)
        assert call is not None
        assert call.backend.__name__ == "_reference"
    before = [p.detach().clone() for p in tensors[0]]
    expected = [svag_step_(before, *tensors[1:], **OPTIONS, backend="reference").raw, *before]
    assert same_bits([call(skip_nonfinite=False), *tensors[0]], expected)


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
    monkeypatch.setattr(step_call, "tensor_reader", lambda: None)
    assert same_bits(train(), expected)
