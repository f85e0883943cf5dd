"""Numbers, lists and options of every op: what fits is taken, whatever its type; what doesn't is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from svag_fast import SVAG, svag_loss
from svag_fast.ops import (
    AffineStep,
    affine_walk_,
    philox_normal_,
    svag_adaptive_step_,
    svag_coefficients,
    svag_step_,
    svag_step_per_sample_,
    svag_weight_step_,
    weight_grad_and_sq_norms,
)
from svag_fast.ops.step import SVAG_STEP
from svag_fast.ops.step_call import StepCall, StepLists
from svag_fast.ops.step_options import StepOptions
from svag_fast.sde import processes
from svag_fast.sde.laws import Gaussian
from svag_fast.sde.problems.affine import AffineProblem
from svag_fast.sde.simulate import simulate

ADAPTIVE = {"steps": [1], "lr": 0.1, "l": 4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def ones(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.ones(5, dtype=dtype)]


def step(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return svag_step_(ones(dtype), ones(dtype), ones(dtype), **{"lr": 0.1, "l": 4, **options})


def adaptive(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    lists = [ones(dtype) for _ in range(5)]
    return svag_adaptive_step_(*lists, **{**ADAPTIVE, **options})


def per_sample(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    grads1, grads2 = ([torch.ones(3, 5, dtype=dtype)] for _ in range(2))
    return svag_step_per_sample_(ones(dtype), grads1, grads2, **{"lr": 0.1, "l": 4, **options})


def weight_step(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    tensors = (torch.ones(s, dtype=dtype) for s in ((2, 3), (4, 3), (4, 2)))
    return svag_weight_step_(*tensors, **{"segments": [0, 1, 0, 1], "lr": 0.1, "l": 4, **options})


def weight_grad(**options: Any) -> Any:
    shape = options.pop("weight_shape", [8, 6, 3, 3])
    return weight_grad_and_sq_norms(torch.ones(4, 6, 5, 5), torch.ones(4, 8, 3, 3), shape, **options)


def normals(**options: Any) -> Any:
    return philox_normal_(torch.zeros(64), **{"key": (1, 2), **options})


def walk(**options: Any) -> Any:
    step = options.pop("step", None) or AffineStep(1.0, 0.0, 0.0, options.pop("spread", 1.0))
    return affine_walk_(torch.zeros(64), step, options.pop("steps", 2), **{"key": (1, 2), **options})


def optimizer(dtype: torch.dtype = torch.float32, **options: Any) -> None:
    p = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    opt = SVAG([p], **{"lr": 0.1, "l": 4, **options})
    for then in (opt.hold_gradient, opt.step):
        p.grad = torch.ones(5, dtype=dtype)
        then()
    assert p.isfinite().all()


def checked(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    checked = StepOptions.checked(**{"lr": 0.1, "l": 4, **options})
    lists = StepLists(ones(dtype), ones(dtype), ones(dtype))
    return StepCall.by_reader(SVAG_STEP, lists, checked, backend="auto")


STEPS = {
    "svag_step_": step,
    "svag_adaptive_step_": adaptive,
    "svag_step_per_sample_": per_sample,
    "svag_weight_step_": weight_step,
    "SVAG": optimizer,
    "StepCall": checked,
}

NOT_INTEGERS = [1.5, "1", None, [1], 1 + 0j, float("nan")]
INTEGERS = [np.int64(1), np.uint8(1), True, torch.tensor(1)]


def _integer_places() -> dict[str, Callable[[Any], Any]]:
    return {
        "key": lambda v: normals(key=(v, 2)),
        "first": lambda v: normals(first=v * 64 if isinstance(v, (int, np.integer, torch.Tensor)) else v),
        "draw": lambda v: normals(draw=v),
        "steps": lambda v: walk(steps=v),
        "threads": lambda v: walk(threads=v) if v is not None else walk(threads="1"),
        "steps[0]": lambda v: adaptive(steps=[v]),
        "segments[3]": lambda v: weight_grad(segments=[0, 1, 0, v]),
        "stride": lambda v: weight_grad(stride=v),
        "dilation[1]": lambda v: weight_grad(dilation=(1, v)),
        "groups": lambda v: weight_grad(groups=v),
        "weight_shape[0]": lambda v: weight_grad(weight_shape=[8 * v if isinstance(v, np.int64) else v, 6, 3, 3]),
    }


@pytest.mark.parametrize("place", _integer_places())
def test_what_is_no_integer_is_refused_by_name(place: str) -> None:
    call = _integer_places()[place]
    for value in NOT_INTEGERS:
        if place in ("stride",) and value == [1]:
            continue  # a list of one: another error
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        assert place.split("[")[0] in str(caught.value)
        assert "incompatible function arguments" not in str(caught.value)


@pytest.mark.parametrize("place", _integer_places())
def test_any_kind_of_integer_is_taken(place: str) -> None:
    if place == "weight_shape[0]":
        weight_grad(weight_shape=np.array([8, 6, 3, 3]))
        return
    for value in INTEGERS:
        _integer_places()[place](value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normals(key=1), "key must be .*, got 1"),
        (lambda: normals(key=((1, 2), 3)), r"key\[0\] must be an integer, got \(1, 2\)"),
        (lambda: normals(key=(1, 2, 3)), "key must be"),
        (lambda: normals(key=(-1, 2)), "key must be"),
        (lambda: normals(key=(2**32, 2)), "key must be"),
        (lambda: normals(draw=2**64), "draw must be"),
        (lambda: normals(first=2**70), "first must be"),
        (lambda: walk(steps=2**80), "steps must be"),
        (lambda: walk(threads=2**40), "threads must be"),
        (lambda: walk(step=(1, 2, 3, 4)), "step must be .*, got a tuple"),
        (lambda: AffineStep("1", 0, 0, 0), r"keep must be a number, got '1' \(str\)"),  # type: ignore[arg-type]
        (lambda: AffineStep(1, 0, 0, 0, weights=[[1.0]]), r"weights\[0\] must be"),  # type: ignore[arg-type,list-item]
        (lambda: AffineStep(1, 0, 0, 0, weights=1.0), "weights must be .*, got 1.0"),  # type: ignore[arg-type]
        (lambda: adaptive(steps=[[1]]), r"steps\[0\] must be an integer, got \[1\]"),
        (lambda: adaptive(steps=1), "steps must be .*, got 1"),
        (lambda: adaptive(beta1="a"), r"beta1 must be a number, got 'a' \(str\)"),
        (lambda: adaptive(eps=None), "Invalid epsilon value: None"),
        (lambda: weight_grad(segments=[[0], [1], [0], [1]]), r"segments\[0\] must be an integer, got \[0\]"),
        (lambda: weight_grad(segments=1), "segments must be .*, got 1"),
        (lambda: weight_grad(padding=[[1], 1]), r"padding\[0\] must be an integer, got \[1\]"),
        (lambda: weight_grad(weight_shape=8), "weight_shape must be .*, got 8"),
        (lambda: weight_grad(weight_shape=[8.9, 6, 3, 3]), r"weight_shape\[0\] must be an integer, got 8.9"),
        (lambda: svag_step_(torch.ones(5), ones(), ones(), lr=0.1, l=4), "params must be .*, got a tensor"),
        (lambda: svag_step_(ones(), 1.0, ones(), lr=0.1, l=4), "grads1 must be .*, got a float"),  # type: ignore[arg-type]
        (lambda: svag_step_([ones()], ones(), ones(), lr=0.1, l=4), r"params\[0\] must be a tensor, got a list"),  # type: ignore[list-item]
        (lambda: svag_coefficients("a"), r"l must be a number, got 'a' \(str\)"),  # type: ignore[arg-type]
        (lambda: processes.SGDProcess("a"), r"lr must be a number, got 'a' \(str\)"),  # type: ignore[arg-type]
    ],
)
def test_lists_and_ranges_are_checked(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("option", ["lr", "l", "weight_decay"])
@pytest.mark.parametrize("name", STEPS)
def test_a_steps_scalars_are_numbers(name: str, option: str) -> None:
    if name == "SVAG":
        return  # its own checks
    for value in (
        "a",
        "0.1",
        b"1",
        None,
        [1.0],
        1j,
        np.complex64(1),
        np.str_("1"),
        True,
        np.bool_(True),
        torch.ones(2),
    ):
        with pytest.raises(TypeError, match=r"must be a number, got|\(expected a number\)"):
            STEPS[name](**{option: value})
    for value in (np.float32(2.0), np.int64(2), torch.tensor(2.0)):
        STEPS[name](**{option: value})


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("lr", (-0.1, math.nan), "Invalid learning rate: {} \\(expected a finite number >= 0\\)"),
        ("l", (0.5, 0, math.nan, math.inf), "l must be a finite number >= 1, got {}"),
        ("weight_decay", (-0.1, math.nan), "Invalid weight_decay value: {} \\(expected a finite number >= 0\\)"),
    ],
    ids=["lr", "l", "weight_decay"],
)
@pytest.mark.parametrize("name", STEPS)
def test_a_steps_scalars_are_in_range(name: str, option: str, values: Sequence[float], message: str) -> None:
    for value in values:
        # An optimizer looks at its groups' l, which must agree, before it looks at the range.
        expected = "l must be a finite number" if name == "SVAG" and option == "l" else message.format(value)
        with pytest.raises(ValueError, match=expected):
            STEPS[name](**{option: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_what_the_params_arithmetic_cannot_hold_is_refused(name: str, dtype: torch.dtype) -> None:
    if name == "svag_adaptive_step_":
        with pytest.raises(ValueError, match=r"^l must be smaller at beta1 = 0\.9, .* got 1e\+?\d+"):
            adaptive(dtype, l=1e300)
    refused = [{"l": 1e308}, {"l": math.inf}, {"lr": math.inf}]
    if dtype == torch.float32:
        refused += [{"l": 1e300}, {"l": 1e60}, {"lr": 1e39}, {"weight_decay": 1e39}, {"lr": 1e-20, "l": 1e30}]
    for options in refused:
        with pytest.raises(ValueError, match=r"^l must be|Invalid (learning rate|weight_decay value)"):
            STEPS[name](dtype, **options)
    if name != "svag_adaptive_step_":  # there the decay rates round to 1 long before
        STEPS[name](dtype, l=1e37)


def test_float64_params_take_a_huge_l() -> None:
    params = ones(torch.float64)
    svag_step_(params, ones(torch.float64), ones(torch.float64), lr=0.1, l=1e300)
    assert params[0].isfinite().all()


def test_a_decay_rate_that_is_1_in_float32_is_refused() -> None:
    def momentum(dtype: torch.dtype, **options: Any) -> Any:
        return step(dtype, momentum_buffers=[torch.zeros(5, dtype=dtype)], **options)

    for call, name, options in (
        (adaptive, "beta2", {"beta2": 0.999, "l": 65536}),
        (adaptive, "beta1", {"beta1": 0.99, "beta2": 0.5, "l": 1e6}),
        (momentum, "momentum", {"momentum": 0.9, "l": 1e7}),
        (optimizer, "momentum", {"momentum": 0.9, "l": 1e7}),
    ):
        with pytest.raises(ValueError, match=f"l must be smaller at {name} = .* is 1 in float32"):
            call(torch.float32, **options)
        call(torch.float64, **options)
    momentum(torch.float32, momentum=0.9, l=1e7, momentum_rule="fixed")


def test_the_losses_weights_are_finite_in_their_dtype() -> None:
    loss = torch.ones(())
    for dtype, l in ((torch.float16, 1e10), (torch.float32, 1e300)):
        with pytest.raises(ValueError, match=r"c1 = .* is infinite in torch\.float"):
            svag_loss(loss.to(dtype), loss.to(dtype), l)
    assert svag_loss(loss.double(), loss.double(), 1e300).isfinite()


def test_svag_loss_of_both_batches_losses_is_that_of_their_means() -> None:
    losses = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:, 0]
    losses.requires_grad_()
    expected = svag_loss(losses[:3].mean(), losses[3:].mean(), 2.5)
    for both in (svag_loss(losses, 2.5), svag_loss(losses, l=2.5), svag_loss(loss1=losses, l=2.5)):
        assert torch.equal(both, expected)
        weights = torch.autograd.grad(both, losses)[0]
        c1, c2 = svag_coefficients(2.5)
        torch.testing.assert_close(weights, torch.tensor([c1 / 3] * 3 + [c2 / 3] * 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4),), TypeError, r"\(losses, l\)"),
        ((torch.ones(5), 2), ValueError, r"got \[5\]"),
        ((torch.ones(0), 2), ValueError, r"got \[0\]"),
        ((torch.ones(()), 2), ValueError, r"got \[\]"),
        ((torch.ones(4, 2), 2), ValueError, r"got \[4, 2\]"),
        ((torch.ones(4), 0.5), ValueError, "0.5"),
        ((torch.ones(4), torch.ones(4)), TypeError, "l"),
    ],
)
def test_svag_loss_refuses_what_is_no_vector_of_both_batches(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        svag_loss(*arguments)


@pytest.mark.parametrize("process", [processes.SVAGProcess, processes.OneBatchSVAG])
def test_a_process_is_refused_where_its_numbers_are_infinite(process: Any) -> None:
    problem = AffineProblem(1.0, 0.5, 0.0, 1.0, law=Gaussian())
    for l in (1e300, 1e60):
        for trajectories in (None, 64):
            huge = process(0.1, l=l)
            x0 = torch.ones((), dtype=torch.float32)
            with pytest.raises(ValueError, match=r"finite in torch\.float32|above 0 in torch\.float32"):
                simulate(huge, problem, x0, huge.step_size, trajectories=trajectories)
    x = simulate(process(0.1, l=1e60), problem, torch.ones((), dtype=torch.float64), process(0.1, l=1e60).step_size)
    assert x.isfinite()


def test_a_walks_numbers_are_finite_in_its_dtype() -> None:
    with pytest.raises(ValueError, match=r"spread must be finite in torch\.float32, got 1e\+39"):
        walk(spread=1e39)


def test_sizes_in_a_convolution_cannot_overflow() -> None:
    for huge in (2**31, 2**40, 2**62, 2**70):
        with pytest.raises(ValueError, match="padding"):
            weight_grad(padding=huge, stride=huge)
    x, b = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 1, 1)
    expected = weight_grad_and_sq_norms(x, b, [4, 3, 3, 3], stride=5)
    for stride in (2**40, 2**70):  # one position, wherever the next would be
        found = weight_grad_and_sq_norms(x, b, [4, 3, 3, 3], stride=stride)
        assert torch.equal(found.grad, expected.grad)
    one = torch.randn(2, 4, 5, 5)
    found = weight_grad_and_sq_norms(x, one, [4, 3, 1, 1], dilation=2**70)
    assert torch.equal(found.grad, weight_grad_and_sq_norms(x, one, [4, 3, 1, 1]).grad)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding_wider_than_memory_costs_none(backend: str) -> None:
    x, b = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    pad = 2**24  # as much on each side would be gigabytes
    found = weight_grad_and_sq_norms(x, b, [4, 3, 3, 3], stride=pad, padding=pad, backend=backend)
    # The middle position alone sees the image: its corner.
    expected = torch.einsum("bo,bchw->ochw", b[:, :, 1, 1], x[:, :, :3, :3])
    torch.testing.assert_close(found.grad, expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_segments_is_bounded() -> None:
    for segments in ([0] * 3 + [10**9], torch.tensor([0, 0, 0, 4096]), [0] * 3 + [2**63]):
        with pytest.raises(ValueError, match="segments must be integers >= 0 and below 4096, got"):
            weight_grad(segments=segments)
    gram = weight_grad(segments=[0, 0, 0, 40]).segment_gram
    assert gram.shape == (41, 41)
    assert gram.count_nonzero() == 4
