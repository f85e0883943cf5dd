"""What `pair_pass` can't serve is refused by name, and leaves parameters, gradients and the model as they were."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svag_fast import SVAG, pair_pass
from svag_fast.optim.grad_watch import hooks_on

B = 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def svag(model):
    return SVAG(model.parameters(), lr=0.1, l=2)


X, Y = torch.randn(2 * B, 4, dtype=torch.float64), torch.arange(2 * B) % 3


def losses_of(out):
    return F.cross_entropy(out, Y, reduction="none")


def tied_to(layer):
    other = nn.Linear(5, 3).double()
    other.weight = layer.weight
    return other


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


AT_THE_START = {
    "another optimizer": (lambda m: (m, torch.optim.SGD(m.parameters(), lr=0.1)), {}, TypeError, "SGD.*svag_loss"),
    "a trainer's wrapper": (lambda m: (m, Wrapper(svag(m))), {}, TypeError, r"Wrapper.*\.optimizer"),
    "no module": (lambda m: (m.forward, svag(m)), {}, TypeError, "torch.nn.Module"),
    "unknown way": (lambda m: (m, svag(m)), {"way": "fast"}, ValueError, "'fast'"),
    "norms jointly": (
        lambda m: (m.append(tied_to(m[2])), svag(m)),
        {"norms": True, "way": "joint"},
        TypeError,
        'norms of a layer without a rule.*used twice.*way="halves"',
    ),
    "fewer parameters than the model": (lambda m: (m, svag(m[0])), {}, ValueError, "the optimizer's parameters"),
    "more parameters than the model": (lambda m: (m[0], svag(m)), {}, ValueError, "the optimizer's parameters must"),
    "nothing trained": (
        lambda m: (m.requires_grad_(False), SVAG([torch.ones(1)], lr=0.1)),
        {},
        ValueError,
        "the model must be one with a trained parameter, got none",
    ),
}


@pytest.mark.parametrize(("make", "how", "error", "message"), AT_THE_START.values(), ids=AT_THE_START)
def test_refused_at_the_start(make, how, error, message):
    model = net()
    with pytest.raises(error, match=message), pair_pass(*make(model), **how):
        pass
    assert all("forward" not in vars(m) for m in model.modules())


def _loss_of_a_weight(model, pair):
    pair.backward(losses_of(model(X)) + model[0].weight.square().sum())


def _layer_used_directly(model, pair):
    pair.backward(losses_of(model(X)) + model[2](torch.tanh(model[0](X))).square().sum(1))


def _penalty(model, pair):
    x = X.clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    pair.backward(losses_of(out) + grad.square().sum(1))


def _no_grad(model, pair):
    with torch.no_grad():
        out = model(X)
    pair.backward(losses_of(out))


def _across(model, pair):
    out = model(X)
    pair.backward(losses_of(out) + (out @ out.T).sum(1))


IN_THE_PASS = {
    "mean loss": (lambda m, p: p.backward(losses_of(m(X)).mean()), ValueError, r"\[2B\].*got \[\]"),
    "losses by position": (lambda m, p: p.backward(m(X)), ValueError, r"\[2B\].*got \[6, 3\]"),
    "odd losses": (lambda m, p: p.backward(losses_of(m(X))[:5]), ValueError, r"got \[5\]"),
    "fewer losses than rows": (lambda m, p: p.backward(losses_of(m(X))[:4]), ValueError, "losses must be 6, as the"),
    "the model's input must be tensors whose first dimension is": (lambda m, p: p.backward(1.0), TypeError, "float"),
    "integers": (lambda m, p: (m(X), p.backward(Y)), TypeError, "real numbers"),
    "no call": (lambda m, p: p.backward(X.sum(1).requires_grad_()), ValueError, "losses must be of a model called"),
    "no gradient": (_no_grad, ValueError, "losses must be of a model called inside the context, with gradients,"),
    "detached": (lambda m, p: p.backward(losses_of(m(X).detach())), ValueError, "losses must be made with the"),
    "twice": (lambda m, p: [p.backward(x) for x in [losses_of(m(X))] * 2], ValueError, "since the last backward"),
    "odd rows": (lambda m, p: m(X[:5]), ValueError, "5 rows"),
    "no rows": (lambda m, p: m(X[:0]), ValueError, "0 rows"),
    "a penalty on a weight": (_loss_of_a_weight, RuntimeError, "have the model return"),
    "a layer used directly": (_layer_used_directly, RuntimeError, "have the model return"),
    "losses across the batches": (_across, RuntimeError, "losses depend on the model's outputs for the other"),
    "entered twice": (lambda m, p: pair_pass(m, p._run.optimizer).__enter__(), RuntimeError, "open"),
}


@pytest.mark.parametrize("way", ["joint", "halves"])
@pytest.mark.parametrize(("act", "error", "message"), IN_THE_PASS.values(), ids=IN_THE_PASS)
def test_refused_in_the_pass(act, error, message, way):
    model = net()
    optimizer = svag(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message), pair_pass(model, optimizer, way=way) as pair:
        act(model, pair)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())
    assert not any(map(hooks_on, model.parameters()))
    optimizer.zero_grad()
    with pair_pass(model, optimizer, way=way) as pair:  # and the next pass is served
        pair.backward(losses_of(model(X)))
    optimizer.step()


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_second_derivatives_are_refused(way):
    """Jointly by their name; by halves the model's output does not lead to its input."""
    model = net()
    message = "halves" if way == "joint" else "not have been used in the graph"
    with pytest.raises(RuntimeError, match=message), pair_pass(model, svag(model), way=way) as pair:
        _penalty(model, pair)


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_after_a_failed_backward_no_gradient_is_left(way):
    model = net()
    optimizer = svag(model)
    with pair_pass(model, optimizer, way=way) as pair:
        pair.backward(losses_of(model(X)))
        with pytest.raises(RuntimeError, match="have the model return"):
            _loss_of_a_weight(model, pair)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="no gradient is held"):
        optimizer.step()


def test_a_gradient_held_by_hand_and_a_pair_do_not_mix():
    model = net()
    optimizer = svag(model)
    losses_of(model(X)).mean().backward()
    optimizer.hold_gradient()
    with pytest.raises(RuntimeError, match="held already"), pair_pass(model, optimizer):
        pass
    with pytest.raises(RuntimeError, match="held already"):
        optimizer.hold_pair({})
    optimizer.discard_gradient()
    with pair_pass(model, optimizer) as pair:
        pair.backward(losses_of(model(X)))
    with pytest.raises(RuntimeError, match="held already"), pair_pass(model, optimizer):
        pass
    with pytest.raises(RuntimeError, match="held already"):
        optimizer.hold_gradient()
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(lambda: losses_of(model(X)).mean())
    optimizer.step()


def test_what_is_handed_to_the_optimizer_is_checked():
    model = net()
    optimizer = svag(model)
    with pytest.raises(ValueError, match="not the optimizer's"):
        optimizer.hold_pair({nn.Parameter(torch.ones(2)): torch.ones(2)})
    with pytest.raises(ValueError, match=r"\[2\] of a parameter \[5, 4\]"):
        optimizer.hold_pair({model[0].weight: torch.ones(2)})


class Odd(nn.Module):
    """What a model may return that has no place for two batches."""

    def __init__(self, returned):
        super().__init__()
        self.inner, self.returned = nn.Linear(4, 3).double(), returned

    def forward(self, x):
        return self.returned(self.inner(x))


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


_CALLS = itertools.count(1)
RETURNED = {
    "a scalar": (lambda x: x.sum(), X, r"the first dimension of each output must be the samples \(a loss inside the"),
    "another first dimension": (lambda x: x.T[:2], X, r"the first dimension of each output must be the samples \(a"),
    "another value for each": (lambda x: (x, float(x.detach().sum())), X, "the model's outputs must be tensors"),
    "another build for each": (lambda x: (x,) * next(_CALLS), X, "the model's outputs must be built the same for"),
}


@pytest.mark.parametrize(("returned", "x", "message"), RETURNED.values(), ids=RETURNED)
def test_outputs_without_samples_are_refused(returned, x, message):
    model = Odd(returned)
    with pytest.raises(ValueError, match=message), pair_pass(model, svag(model), way="halves"):
        model(x)


class KeepsLoss(nn.Module):
    """A layer that keeps a loss of its own, of all rows, as a mixture of experts balances its load."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.balance = x.mean(0).square().sum()
        return self.last(x)


@pytest.mark.parametrize(
    ("way", "message"), [("joint", r"by way of first \(Linear\)"), ("halves", "have the model return")]
)
def test_a_loss_that_a_layer_keeps_is_refused(way, message):
    model = KeepsLoss()
    optimizer = svag(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message), pair_pass(model, optimizer, way=way) as pair:
            pair.backward(losses_of(model(X)) + model.balance)


def test_a_scalar_beside_the_outputs_is_refused_jointly_too():
    model = Odd(lambda x: (x, x.square().mean()))
    with pytest.raises(TypeError, match=r"returns \[\]"), pair_pass(model, svag(model), way="joint"):
        model(X)
    with (
        pytest.raises(ValueError, match=r"the first dimension of each output must be the samples \(a loss inside"),
        pytest.warns(UserWarning, match="one after the other"),
        pair_pass(model, svag(model)),
    ):
        model(X)


def test_tensors_hidden_in_inputs_are_refused():
    class Takes(nn.Linear):
        def forward(self, x, box=None):
            return super().forward(x + box.tensor)

    model = Takes(4, 3).double()
    with pytest.raises(ValueError, match="the model's input must be"), pair_pass(model, svag(model), way="halves"):
        model(X, Box(X))
    with pytest.raises(ValueError, match="the model's input must be"), pair_pass(model, svag(model), way="halves"):
        model(x=None)


def test_losses_of_an_earlier_backward_pass_are_refused_where_pytorch_kept_nothing_for_it():
    model = nn.Linear(4, 1).double()
    optimizer = svag(model)
    for again in (False, True):  # the first pass is looked at, and goes another way
        with pair_pass(model, optimizer) as pair:
            losses = model(X).squeeze(1)
            pair.backward(losses)
            model(X)
            if again:
                with pytest.raises(RuntimeError, match="gone through already: call the model again"):
                    pair.backward(losses)
        optimizer.discard_gradient()
