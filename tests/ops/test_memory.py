"""An address is where the values are: every op, at each of its tensors, gives the plain values' result or refuses.

Refused by name, with nothing written. What is tried: negated and conjugated views, expanded and strided tensors,
subclasses, tensors without memory (meta, fake, freed, zero tensors, inside vmap), other layouts and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from draws import same_bits
from op_calls import ARGUMENTS, CALLS, Tensors, copies
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svag_fast import SVAG, SVAGAdam
from svag_fast.ops import memory, philox_normal_, svag_step_
from svag_fast.ops.memory import address
from svag_fast.ops.weight_grad.op import unchecked_weight_grads
from svag_fast.ops.weight_grad.shapes import Geometry
from svag_fast.optim.two_batch import TwoBatchOptimizer

REFUSALS = (ValueError, TypeError)


class Subclass(Tensor):
    pass


def attempt(op: str, tensors: Tensors) -> list[Tensor] | Exception:
    """The op's results, or what it raised."""
    try:
        return CALLS[op].results(tensors)
    except Exception as error:
        return error


def negated(t: Tensor) -> Tensor:
    view = torch._neg_view(-t)
    assert view.is_neg()
    return view


def imaginary(t: Tensor) -> Tensor:
    """As autograd gives it: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def reordered(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def shifted(t: Tensor) -> Tensor:
    """In the midst of other memory."""
    return torch.cat([t.flatten()[:1], t.flatten(), t.flatten()[:1]])[1:-1].view(t.shape)


SAME_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "imaginary part": imaginary,
    "strided": strided,
    "reordered": reordered,
    "shifted": shifted,
    "subclass": lambda t: t.as_subclass(Subclass),
    "parameter": lambda t: nn.Parameter(t.clone()),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "inference": lambda t: _in_inference(t),
}


def _in_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("kind", SAME_VALUES)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_the_values_count_not_the_bytes(op: str, name: str, kind: str) -> None:
    call = CALLS[op]
    for dtype in (torch.float32, torch.float64)[: len(call.dtypes)] if "compensated" not in op else (torch.float32,):
        plain = call.make(dtype)
        if kind == "imaginary part" and dtype not in (torch.float32, torch.float64):
            continue
        tensors = copies(plain)
        tensors[name] = SAME_VALUES[kind](plain[name])
        before = {n: t.detach().clone() for n, t in tensors.items()}
        expected = call.results(copies(plain))
        found = attempt(op, tensors)
        if isinstance(found, Exception):
            assert isinstance(found, REFUSALS), found
            assert name in str(found)
            assert all(torch.equal(t, before[n]) for n, t in tensors.items())
            assert kind in ("negated", "imaginary part", "strided", "reordered")
            assert name in call.written
            continue
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.detach().as_subclass(Tensor), b, rtol=1e-5, atol=1e-5)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.shape[0] > 1 else t


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_expanded_tensors_are_read_as_their_values(op: str, name: str) -> None:
    call = CALLS[op]
    plain = call.make(torch.float32)
    plain[name] = expanded(plain[name]).clone()
    tensors = copies(plain)
    tensors[name] = expanded(plain[name])
    if name in call.written:
        with pytest.raises(REFUSALS, match=name):
            call.results(tensors)
        return
    for a, b in zip(call.results(tensors), call.results(copies(plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Wrapper(Tensor):
    """Its values are in another tensor, as DTensor's do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        wrapper.inner = inner
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: object) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., object], types: object, args: object = (), kwargs: object = None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


def freed(t: Tensor) -> Tensor:
    t = shifted(t)
    t.untyped_storage().resize_(0)
    return t


def freed_whole(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


NO_VALUES: dict[str, Callable[[Tensor], object]] = {
    "meta": lambda t: t.to("meta"),
    "freed": freed,
    "freed, whole": freed_whole,
    "wrapper": Wrapper,
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "integers": lambda t: t.to(torch.int32),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "none": lambda t: None,
    "an array": lambda t: t.numpy(),
    "a number": lambda t: 1.0,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("kind", NO_VALUES)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_what_holds_no_values_is_refused_by_name(op: str, name: str, kind: str) -> None:
    call = CALLS[op]
    tensors = call.make(torch.float32)
    if len(tensors) == 1 and kind == "meta":
        return  # nothing is mixed: the op does nothing, in test_fake_tensors
    optional = ("weight", "bias", "residual") if op.startswith("norm_relu") else ("weights",)
    if name in optional and kind == "none":
        return  # its default
    before = copies(tensors)
    tensors[name] = NO_VALUES[kind](tensors[name])  # type: ignore[assignment]
    with pytest.raises(REFUSALS) as caught:
        call.results(tensors)
    assert name in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items() if n != name)


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_zero_tensor_is_zeros(op: str, name: str) -> None:
    call = CALLS[op]
    plain = call.make(torch.float32)
    plain[name] = torch.zeros_like(plain[name])
    tensors = {**copies(plain), name: torch._efficientzerotensor(plain[name].shape)}
    found = attempt(op, tensors)
    if isinstance(found, Exception):
        assert isinstance(found, REFUSALS), found
        assert name in call.written
        return
    for a, b in zip(found, call.results(copies(plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fake", [True, False], ids=["fake", "meta"])
@pytest.mark.parametrize("op", CALLS)
def test_fake_tensors_give_results_of_the_right_shape(op: str, fake: bool) -> None:
    call = CALLS[op]
    plain = call.make(torch.float32)
    mode = FakeTensorMode()
    tensors = {n: mode.from_tensor(t) if fake else t.to("meta") for n, t in plain.items()}
    for a, b in zip(call.results(tensors), call.results(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not memory.has_memory(a)


@pytest.mark.parametrize("op", CALLS)
def test_inside_a_fake_mode_real_tensors_crash_nothing(op: str) -> None:
    call = CALLS[op]
    tensors = call.make(torch.float32)
    expected = call.results(copies(tensors))
    before = copies(tensors)
    with FakeTensorMode():
        found = attempt(op, tensors)
    if isinstance(found, Exception):
        assert "fake" in str(found).lower()
        assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    else:
        assert all(not memory.has_memory(a) or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inside_a_fake_mode_the_checked_step_is_refused() -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = SVAG([p], lr=0.1)
    with FakeTensorMode(), pytest.raises(ValueError, match="raw must be a tensor with memory, got one on meta or"):
        optimizer.step()
    assert torch.equal(p, torch.ones(5))


@pytest.mark.parametrize("which", ["inputs", "output_grads"])
def test_the_unchecked_products_read_values_too(which: str) -> None:
    for shape, tensors in (
        ((6, 5), CALLS["weight_grad_and_sq_norms Linear"].make(torch.float32)),
        ((6, 3, 3, 3), CALLS["weight_grad_and_sq_norms Conv2d"].make(torch.float32)),
    ):
        geometry = Geometry(padding=(1, 1) if len(shape) == 4 else (0, 0))

        def products(t: Tensors, shape: tuple[int, ...] = shape, geometry: Geometry = geometry) -> list[Tensor]:
            grads, norms = unchecked_weight_grads(t["inputs"], t["output_grads"], shape, geometry, 2)
            return [*grads, norms]

        expected = products(tensors)
        for change in (negated, imaginary, strided):
            found = products({**tensors, which: change(tensors[which])})
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
        with pytest.raises(TypeError, match=which):
            products({**tensors, which: tensors[which].to(torch.complex64)})
        fakes = {n: FakeTensorMode().from_tensor(t) for n, t in tensors.items()}
        mode = FakeTensorMode()
        fakes = {n: mode.from_tensor(t) for n, t in tensors.items()}
        assert [t.shape for t in products(fakes)] == [t.shape for t in expected]


def test_in_vmap_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out must be a tensor with memory of its own, got none \(Cannot access"):
        torch.vmap(lambda t: philox_normal_(t, key=(1, 2)))(torch.zeros(2, 64))


@pytest.mark.parametrize("read", ["grads1", "grads2"])
def test_a_gradient_that_overlaps_a_param_is_refused(read: str) -> None:
    whole = torch.arange(9.0)
    for params, grads in (
        ([whole[:4], torch.ones(4)], [torch.ones(4), whole[2:6]]),
        ([whole[2:6]], [whole[:4]]),
        ([whole[2:6]], [whole[5:9]]),
    ):
        lists = {"grads1": [torch.ones(4) for _ in params], "grads2": [torch.ones(4) for _ in params], read: grads}
        before = whole.clone()
        with pytest.raises(ValueError, match=rf"{read}\[\d\] must be apart from params\[\d\]"):
            svag_step_(params, lists["grads1"], lists["grads2"], lr=0.1, l=4)
        optimizer = SVAG([nn.Parameter(p) for p in params], lr=0.1, l=4)
        for which in ("grads1", "grads2"):
            for p, g in zip(optimizer.param_groups[0]["params"], lists[which], strict=True):
                p.grad = g
            if which == "grads1":
                optimizer.hold_gradient()
        if read == "grads1":  # hold_gradient has copied it
            continue
        with pytest.raises(ValueError, match=r"in memory of its own|apart from"):
            optimizer.step()
        assert torch.equal(whole, before)


def test_a_gradient_may_be_its_own_param() -> None:
    for backend in ("cpu", "reference"):
        p = torch.arange(1.0, 6.0)
        svag_step_([p], [p], [torch.zeros(5)], lr=0.5, l=1, backend=backend)
        assert torch.equal(p, torch.arange(1.0, 6.0) / 2)


def test_state_that_overlaps_is_refused() -> None:
    call = CALLS["svag_step_ compensated"]
    tensors = call.make(torch.float32)
    tensors["compensation"] = tensors["params"]
    with pytest.raises(ValueError, match=r"compensation\[0\] must be in memory of its own, got some of"):
        call.results(tensors)
    call = CALLS["svag_adaptive_step_"]
    tensors = call.make(torch.float32)
    tensors["exp_avgs"] = tensors["exp_avg_sqs"]
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] must be in memory of its own, got some of exp_avgs\[0\]"):
        call.results(tensors)


TWO_BATCHES = [op for op, call in CALLS.items() if "grads2" in call.make(torch.float32)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", TWO_BATCHES)
def test_two_batches_gradients_in_the_same_memory_are_refused(op: str, backend: str) -> None:
    """N would be 0 of one batch, or wrong where they share a part."""
    for part in (slice(None), slice(1, None)):
        tensors = CALLS[op].make(torch.float32)
        whole = torch.randn(tensors["grads2"].numel() + 1)
        tensors["grads1"] = whole[part][: tensors["grads1"].numel()].view(tensors["grads1"].shape)
        tensors["grads2"] = whole[:-1].view(tensors["grads2"].shape)
        before = copies(tensors)
        with pytest.raises(ValueError, match=r"grads2\[0\] must be in memory of its own, as a second batch's"):
            CALLS[op].results(tensors, backend)
        assert all(torch.equal(t, before[n]) for n, t in tensors.items())


@pytest.mark.parametrize("op", TWO_BATCHES)
def test_two_batches_gradients_may_be_interleaved_slices(op: str) -> None:
    plain = CALLS[op].make(torch.float32)
    plain["grads1"] = plain["grads2"].flip(0).clone()
    both = torch.stack([plain["grads1"], plain["grads2"]], -1)
    expected = CALLS[op].results(copies(plain))
    found = CALLS[op].results({**copies(plain), "grads1": both[..., 0], "grads2": both[..., 1]})
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [SVAG, SVAGAdam])
def test_groups_that_share_memory_are_refused_before_any_steps(make: Callable[..., TwoBatchOptimizer]) -> None:
    whole = torch.arange(6.0)

    def opt(*params: Tensor) -> TwoBatchOptimizer:
        return make([{"params": [nn.Parameter(p)]} for p in params], lr=0.1, l=2)

    for params, grads1, grads2, message in (
        (
            (whole[:3], whole[2:5]),
            [torch.ones(3)] * 2,
            [torch.ones(3), torch.ones(3)],
            "params.* of group 1 must be in memory of its own, got some of params.* of group 0",
        ),
        (
            (torch.ones(3), torch.ones(3)),
            [whole[:3], torch.ones(3)],
            [torch.ones(3), whole[2:5]],
            "grads2.* of group 1 must be in memory of its own",
        ),
        (
            (whole[:3], torch.ones(3)),
            [torch.ones(3)] * 2,
            [torch.ones(3), whole[2:5]],
            "grads2.* of group 1 must be apart from params.* of group 0",
        ),
    ):
        optimizer = opt(*params)
        listed = [group["params"][0] for group in optimizer.param_groups]
        before = [p.detach().clone() for p in listed]
        for p, g in zip(listed, grads1, strict=True):
            p.grad = g
        optimizer.hold_gradient()
        optimizer._pair.grads = [[g] for g in grads1]  # hold_gradient copies what others see
        for p, g in zip(listed, grads2, strict=True):
            p.grad = g
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert all(torch.equal(p.detach(), b) for p, b in zip(listed, before, strict=True))


@pytest.mark.parametrize("kind", ["negated", "imaginary part"])
def test_the_optimizer_reads_gradients_as_their_values(kind: str) -> None:
    def train(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(n)) for n in (1, 7)]
        optimizer = SVAG(params, lr=0.5, l=4)
        for value, then in ((2.0, optimizer.hold_gradient), (3.0, optimizer.step)):
            for p in params:
                p.grad = change(torch.full_like(p, value))
            then()
        return [p.detach() for p in params]

    assert same_bits(train(SAME_VALUES[kind]), train(torch.clone))


def test_the_optimizer_refuses_a_param_that_is_a_negated_view() -> None:
    p = nn.Parameter(negated(torch.ones(4)))
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"params\[0\] must be a tensor with memory of its own, as resolve_neg\(\)"):
        SVAG([p], lr=0.1).step()
    assert torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("free", [freed, freed_whole])
def test_the_optimizer_refuses_freed_memory(free: Callable[[Tensor], Tensor]) -> None:
    for which in ("params[0]", "grads1[0]"):
        p = nn.Parameter(free(torch.ones(4)) if which == "params[0]" else torch.ones(4))
        p.grad = torch.ones(4) if which == "params[0]" else free(torch.ones(4))
        with pytest.raises(ValueError, match=f"{which[:-3]}.* must be a tensor with memory, got 4 elements whose"):
            SVAG([p], lr=0.1).step()


def test_an_empty_tensor_needs_no_memory() -> None:
    assert address(torch.empty(0), "t") == 0
