"""Layers that take their step in the backward pass end where the ordinary path does, with its statistics."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from pair_passes import CLASSES, B, assert_same_states, assert_same_stats, images, labels, one_pass, seeded, two_passes
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import SVAG, pair_pass

MODELS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False, padding_mode="reflect", padding=1),
        nn.Conv2d(4, 3, (1, 3), dilation=1, padding="same"),
        nn.Flatten(),
        nn.Linear(27, CLASSES),
    ),
    "others beside": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(36, 8), nn.LayerNorm(8), nn.GRU(8, 5, batch_first=True), Last(), nn.Linear(5, CLASSES)
    ),
    "nothing beside": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)
    ),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(68, CLASSES)),
    "recomputed": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 6), Recomputed(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, CLASSES)
    ),
}


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


class Recomputed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("l", [1, 2.5])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_same_as_two_passes(build, l):
    model, expected = seeded(build), seeded(build)
    groups = [
        [{"params": list(m.parameters())[:2], "lr": 0.3}, {"params": list(m.parameters())[2:]}]
        for m in (model, expected)
    ]
    optimizer = SVAG(groups[0], lr=0.1, l=l, weight_decay=1e-2, in_backward=True)
    reference = SVAG(groups[1], lr=0.1, l=l, weight_decay=1e-2)
    for _ in range(3):
        x, y = images(), labels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair = one_pass(model, optimizer, x, y)
        assert pair.way == "joint"
        for m in model.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                assert m.weight.grad is None
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)
    assert (optimizer.time, optimizer.effective_steps) == (reference.time, reference.effective_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype):
    """Weights of 16 bits take the ordinary step; under autocast float32 weights take theirs from 16-bit rows."""
    model = seeded(MODELS["convolutions"]).float()
    expected = copy.deepcopy(model)
    optimizer, reference = (
        SVAG(m.parameters(), lr=0.1, l=2, in_backward=k == 0) for k, m in enumerate((model, expected))
    )
    x, y = images().float(), labels()
    for m, o in ((model, optimizer), (expected, reference)):
        with pair_pass(m, o, way="joint") as pair:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses = F.cross_entropy(m(x), y, reduction="none")
            pair.backward(losses)
    # Under autocast the ordinary path's gradients are rounded to bfloat16 where a library makes them.
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-2, 1e-3)
    torch.testing.assert_close(optimizer.step().raw, reference.step().raw, rtol=rtol, atol=atol)
    assert model[0].weight.grad is None
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    low, same = model.bfloat16(), copy.deepcopy(model)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2, in_backward=k == 0) for k, m in enumerate((low, same)))
    for m, o in ((low, optimizer), (same, reference)):
        one_pass(m, o, x.bfloat16(), y, way="joint")
        o.step()
    assert low[0].weight.grad is not None
    assert all(torch.equal(p, q) for p, q in zip(low.parameters(), same.parameters(), strict=True))


def test_norms_come_out_of_the_same_product():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, CLASSES)))
    expected = copy.deepcopy(model)
    x, y = images(), labels()
    pair = one_pass(model, SVAG(model.parameters(), lr=0.1, l=2, in_backward=True), x, y, norms=True)
    plain = one_pass(expected, SVAG(expected.parameters(), lr=0.1, l=2), x, y, norms=True)
    torch.testing.assert_close(pair.norms.total, plain.norms.total, rtol=1e-9, atol=0)


def test_by_halves_and_by_hand_gradients_are_stored_as_ever():
    build = MODELS["convolutions"]
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (
        SVAG(model.parameters(), lr=0.1, l=2, in_backward=True),
        SVAG(expected.parameters(), lr=0.1, l=2),
    )
    x, y = images(), labels()
    one_pass(model, optimizer, x, y, way="halves")
    assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
    assert_same_stats(two_passes(model, optimizer, x, y), two_passes(expected, reference, x, y))
    assert_same_states(model, expected)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def svag(model, **options):
    return SVAG(model.parameters(), lr=0.1, l=2, in_backward=True, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"momentum": 0.9}, "momentum must be 0"),
        ({"maximize": True}, "maximize must be False"),
        ({"capturable": True}, "capturable must be False"),
        ({"compensated": True}, "compensated must be False"),
        ({"replicas": 2}, "replicas must be None"),
        ({"backend": "cuda"}, "backend must be auto"),
    ],
)
def test_options_that_such_a_step_does_not_have_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        SVAG([torch.zeros(2, 2)], lr=0.1, l=2, in_backward=True, **options)


def test_a_flag_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="in_backward must be a bool, got 1"):
        SVAG([torch.zeros(2, 2)], lr=0.1, in_backward=1)


class Twice(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first, self.other = nn.Linear(72, 72), nn.Linear(72, 72)
        self.last = nn.Linear(72, CLASSES)
        self.between = self.other if tied else self.first
        if tied:
            self.other.weight = self.first.weight

    def forward(self, x):
        return self.last(self.between(torch.tanh(self.first(x.flatten(1)))))


def _shared(model, pair_of):
    model = Twice(True).double()
    with pair_of(model, svag(model)):
        pass


def _twice(model, pair_of):
    model = Twice(False).double()
    with pair_of(model, svag(model)) as pair:
        pair.backward(F.cross_entropy(model(images()), labels(), reduction="none"))


def _two_calls(model, pair_of):
    with pair_of(model, svag(model)):
        model(images())
        model(images())


def _penalty(model, pair_of):
    with pair_of(model, svag(model)) as pair:
        pair.backward(F.cross_entropy(model(images()), labels(), reduction="none") + model[1].weight.square().sum())


def _clipped(model, pair_of):
    svag(model).clip_grad_norm_(1.0)


def _scaled(model, pair_of):
    svag(model).unscale_(torch.amp.GradScaler("cpu"))


def _stepped_by_a_scaler(model, pair_of):
    optimizer, scaler = svag(model), torch.amp.GradScaler("cpu", init_scale=1.0)
    F.cross_entropy(model(images()[:B]), labels()[:B]).backward()
    optimizer.hold_gradient()
    scaler.scale(F.cross_entropy(model(images()[:B]), labels()[:B])).backward()
    scaler.step(optimizer)


REFUSED = {
    "a shared weight": (_shared, ValueError, "where parameters are shared.*first.weight and other.weight"),
    "a layer called twice": (_twice, RuntimeError, r"first \(Linear\) must be used once.*in_backward"),
    "two calls of the model": (_two_calls, RuntimeError, "must be used once"),
    "a penalty on a weight": (_penalty, RuntimeError, "have the model return"),
    "clipping": (_clipped, RuntimeError, "clip_grad_norm_ needs gradients"),
    "unscaling": (_scaled, RuntimeError, "a GradScaler needs gradients"),
    "a scaler's step": (_stepped_by_a_scaler, RuntimeError, "a GradScaler needs gradients"),
}


@pytest.mark.parametrize(("act", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_a_weight_has_moved(act, error, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(error, match=message):
            act(model, pair_pass)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_between_the_backward_pass_and_the_step_nothing_can_be_taken_back():
    model = net()
    optimizer = svag(model)
    x, y = images(), labels()
    with pair_pass(model, optimizer) as pair:
        pair.backward(F.cross_entropy(model(x), y, reduction="none"))
        after = copy.deepcopy(model.state_dict())
        for refused in (optimizer.zero_grad, optimizer.discard_gradient):
            with pytest.raises(RuntimeError, match="call step"):
                refused()
        losses = F.cross_entropy(model(x), y, reduction="none")
        with pytest.raises(RuntimeError, match="nothing to accumulate to"):
            pair.backward(losses)
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())
    assert float(optimizer.step().raw[0]) > 0
    optimizer.zero_grad()


def test_an_error_in_the_backward_pass_says_what_it_leaves():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.first, self.last = [], nn.Linear(72, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.last(Fails.apply(x) if self.fails else x)

    model = Net().double()
    optimizer = svag(model)
    one_pass(model, optimizer, images(), labels())
    optimizer.step()
    model.fails.append(1)  # no flag, which would have the pass checked again
    with pytest.raises(RuntimeError, match="of different steps"):
        one_pass(model, optimizer, images(), labels())
    assert all(p.grad is None for p in model.parameters())


def test_the_rate_is_the_one_at_the_backward_pass():
    model, expected = net(), net()
    optimizer, reference = svag(model), SVAG(expected.parameters(), lr=0.1, l=2)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, reference)]
    for _ in range(3):
        x, y = images(), labels()
        one_pass(model, optimizer, x, y)
        optimizer.step()
        two_passes(expected, reference, x, y)
        for schedule in schedules:
            schedule.step()
        assert_same_states(model, expected)
    again = svag(net())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["in_backward"] is True
