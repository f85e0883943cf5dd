"""What replicas can't serve is refused by name, and leaves parameters, buffers and generators as they were."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
import threading

import numpy
import pytest
import torch
from torch import nn

import svag_fast
from svag_fast import Replicas
from svag_fast.replicas import NotReplicable, build
from svag_fast.replicas.generators import Generators


def linear():
    return nn.Linear(4, 2)


X = torch.randn(2, 3, 4)

SEEDS = {
    "none": ([], ValueError, "seeds must be one or more, got none"),
    "twice": ([3, 1, 3], ValueError, "seeds must be different, for replicas of one seed are one run, got 3 twice"),
    "many, twice": ([*range(100_000), 7], ValueError, "got 7 twice"),
    "negative": ([-1], ValueError, "integer >= 0"),
    "too large": ([2**63], ValueError, "<= "),
    "a bool": ([True], TypeError, r"seeds must be integers, one a replica, such as range\(16\), got \[True\]"),
    "a fraction": ([0.5], TypeError, "0.5"),
    "a number": (4, TypeError, r"range\(16\)"),
}


@pytest.mark.parametrize("name", SEEDS)
def test_seeds(name: str) -> None:
    seeds, error, message = SEEDS[name]
    with pytest.raises(error, match=message):
        Replicas(linear, seeds)


ARGUMENTS = {
    "a model": (linear(), {}, TypeError, "function that makes"),
    "no module": (lambda: 3, {}, TypeError, r"build_model's result must be a torch\.nn\.Module, got int"),
    "unknown engine": (linear, {"engine": "fast"}, ValueError, "'fast'"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    build_model, options, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        Replicas(build_model, range(2), **options)


class Holds(nn.Module):
    """Keeps something in an attribute, and does something with it in its forward pass."""

    def __init__(self, value=None, forward=lambda self, y: y):
        super().__init__()
        self.lin = linear()
        self.kept = value
        self.then = forward

    def forward(self, x):
        return self.then(self, self.lin(x))


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def closed_over(value):
    return lambda y: y * value


def ring(value):
    items = []
    items += [items, value]
    return items


def calls_itself():
    model = Holds()
    model.kept = lambda x: model.lin(x)  # of a copy of the model, this would still be the first one
    return model


def with_hook():
    model = linear()
    model.register_forward_hook(lambda *args: None)
    return nn.Sequential(model)


def complex_net():
    return nn.Linear(4, 2, dtype=torch.complex64)


def compiled():
    model = linear()
    model._compiled_call_impl = model.forward  # as model.compile() does, after seconds of importing the compiler
    return nn.Sequential(model)


MODELS = {
    "dropout": (lambda: nn.Sequential(linear(), nn.Dropout(0.1)), "1 is a Dropout that draws random numbers"),
    "dropout of attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention that draws"),
    "random slopes": (lambda: nn.Sequential(nn.RReLU()), "0 is a RReLU that draws"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "0 is a LazyLinear not yet initialised"),
    "complex": (complex_net, r"weight is torch\.complex64"),
    "hooks": (with_hook, "0 has hooks"),
    "compiled": (compiled, "0 is compiled"),
    "over processes": (lambda: nn.Sequential(nn.SyncBatchNorm(4)), "0 is a SyncBatchNorm"),
    "data parallel": (lambda: nn.DataParallel(linear()), "the model itself is a DataParallel"),
    "script": (lambda: torch.jit.script(linear()), "ScriptModule"),
    "a tensor that is no buffer": (lambda: Holds(torch.ones(2)), "kept is a Tensor outside"),
    "tensors in containers": (lambda: Holds({"a": [torch.ones(2)]}), "kept holds a Tensor outside"),
    "tensors in a queue": (lambda: Holds(collections.deque([torch.ones(2)])), "kept holds a Tensor outside"),
    "a tensor in a slot": (lambda: Holds(Slots(torch.ones(2))), "kept holds a Tensor outside"),
    "a tensor of a partial": (lambda: Holds(functools.partial(torch.mul, torch.ones(2))), "kept holds a Tensor"),
    "a tensor of a function": (lambda: Holds(closed_over(torch.ones(2))), "kept holds a Tensor outside"),
    "a tensor that is a default": (lambda: Holds(lambda y, by=X: y * by), "kept holds a Tensor outside"),
    "a tensor beside a lock": (lambda: Holds([threading.Lock(), torch.ones(2)]), "kept holds a Tensor outside"),
    "a tensor in a ring": (lambda: Holds(ring(torch.ones(2))), "kept holds a Tensor outside"),
    "the model in a function": (calls_itself, "kept holds a Holds outside"),
    "a module in a list": (lambda: Holds([linear()]), "kept holds a Linear outside"),
    "a generator": (lambda: Holds(torch.Generator()), "kept is a Generator outside"),
    "recurrent": (lambda: nn.LSTM(4, 4), "_flat_weights holds a Parameter outside"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build_model, message = MODELS[name]
    before = torch.get_rng_state()
    with pytest.raises(NotReplicable, match=message):
        Replicas(build_model, range(2))
    assert torch.equal(before, torch.get_rng_state())


PLAIN = {
    "a ring": lambda: ring(3),
    "a function that calls itself": lambda: recursive(3),
    "a method of its own": lambda: None,
}


def recursive(most):
    def descend(y, n=0):
        return y if n == most else descend(y, n + 1)

    return descend


@pytest.mark.parametrize("name", PLAIN)
def test_what_holds_no_tensor_and_stays_as_it_is_is_served(name: str) -> None:
    def build_model():
        model = Holds(PLAIN[name]())
        if name == "a method of its own":
            model.kept = model.lin.forward
        return model

    replicas = Replicas(build_model, range(2))
    assert torch.allclose(replicas(X)[1], replicas.unstack(1)(X[1]))


def alternating(*builders):
    cycle = itertools.cycle(builders)
    return lambda: next(cycle)()


same = linear()
shared = nn.Linear(4, 4)
DIFFERENT = {
    "width": (alternating(linear, lambda: nn.Linear(4, 3)), r"out_features is 2 at 0, 3 at 7"),
    "type": (alternating(nn.ReLU, nn.Tanh), r"the model itself is a torch.*ReLU at 0, .*Tanh at 7"),
    "dtype": (alternating(linear, lambda: linear().double()), r"weight is .*float32.*, .*float64"),
    "bias": (alternating(linear, lambda: nn.Linear(4, 2, bias=False)), r"bias is .*, absent at 7"),
    "more layers": (alternating(linear, lambda: nn.Sequential(linear())), "differ between seeds"),
    "frozen": (alternating(linear, lambda: linear().requires_grad_(False)), "weight is a trained parameter"),
    "an option": (alternating(lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)), "negative_slope is 0.1 at 0"),
    "mode": (alternating(linear, lambda: linear().eval()), "training is True at 0, False at 7"),
    "what is shared": (
        alternating(lambda: nn.Sequential(shared, shared), lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
        r"1.weight is .*first named 0.weight at 0, .*first named 1.weight",
    ),
    "a drawn number": (lambda: Holds(float(torch.rand(()))), "kept is 0"),
    "a drawn array": (lambda: Holds(torch.rand(2).numpy()), "kept is a ndarray with the digest .* at 0, a ndarray"),
    "a number in an object": (lambda: Holds(Slots(float(torch.rand(())))), "kept is a Slots with the digest"),
    "a number of a function": (lambda: Holds(closed_over(float(torch.rand(())))), "kept is a function with the digest"),
    "one model": (lambda: same, "same model twice"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_between_seeds(name: str) -> None:
    build_model, message = DIFFERENT[name]
    with pytest.raises(NotReplicable, match=message):
        Replicas(build_model, (0, 7))


def remember(self, y):
    self.kept = y.detach()
    return y


def count(self, y):
    self.kept += 1
    return y


def count_inside(self, y):
    self.kept[0] += 1
    return y


def append(self, y):
    self.kept.append(1.0)
    return y


IN_THE_FORWARD_PASS = {
    "random numbers": (
        lambda: Holds(None, lambda self, y: y + torch.rand_like(y)),
        "random numbers.* by the model itself .Holds",
    ),
    "Python's": (lambda: Holds(None, lambda self, y: y if random.random() < 2 else -y), "without random numbers"),
    "NumPy's": (lambda: Holds(None, lambda self, y: y if numpy.random.rand() < 2 else -y), "without random numbers"),
    "functional dropout": (lambda: Holds(None, lambda self, y: nn.functional.dropout(y)), "without random numbers"),
    "functional dropout inside": (
        lambda: nn.Sequential(nn.Linear(4, 4), Holds(None, lambda self, y: nn.functional.dropout(y))),
        r"drawn by 1 \(Holds\)$",
    ),
    "remembers": (lambda: Holds(None, remember), "kept is a Tensor outside"),
    "counts": (lambda: Holds(0, count), "changes kept"),
    "counts in an array": (lambda: Holds(numpy.zeros(1), count_inside), "changes kept"),
    "appends": (lambda: Holds([], append), "changes kept"),
    "needs values": (
        lambda: Holds(None, lambda self, y: y if y.sum() > 0 else y.mean(0)),
        "engine 'stacked'.*engine 'vmap'.*",
    ),
}


@pytest.mark.parametrize("name", IN_THE_FORWARD_PASS)
def test_what_shows_in_the_forward_pass(name: str) -> None:
    build_model, message = IN_THE_FORWARD_PASS[name]
    replicas = Replicas(build_model, range(2))
    values, generators = copy.deepcopy(replicas.state_dict()), Generators.now()
    with pytest.raises(NotReplicable, match=message):
        replicas(torch.cat([X, -X.abs()], 1))
    assert Generators.now() == generators
    for key, value in replicas.state_dict().items():
        assert value == values[key] if key == "_extra_state" else torch.equal(value, values[key])


INPUTS = {
    "another S": ((X[:1],), {}, r"the input must be \[S, B, \.\.\.\] with S = 2 replicas \(for one batch \[B,"),
    "one batch": ((X[0],), {}, r"the input must be \[S, B, \.\.\.\] with S = 2 replicas \(for one batch \[B,"),
    "one of several": ((X, torch.ones(3, 4)), {}, r"the input must be \[S, B, \.\.\.\] with S = 2 replicas \(for"),
    "no samples": ((torch.ones(2),), {}, r"the input must be \[S, B, \.\.\.\] with S = 2 replicas \(for one batch"),
    "a scalar for all": ((torch.ones(()),), {"shared": True}, "the input must be of a dimension of samples, got"),
    "nothing": ((), {}, "the replicas' input must be a tensor, got none"),
    "numbers": ((1.0,), {}, "the replicas' input must be a tensor, got none"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str) -> None:
    inputs, options, message = INPUTS[name]
    replicas = Replicas(linear, range(2))
    with pytest.raises(ValueError, match=message):
        replicas(*inputs, **options)
    with pytest.raises(ValueError, match=message):
        replicas.choose_engine(*inputs, **options)


def test_an_error_of_the_models_own_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Replicas(linear, range(2))(torch.ones(2, 3, 5))


@pytest.mark.parametrize("way", ["auto", "joint", "halves"])
def test_a_pair_pass_is_refused_even_where_its_shapes_would_fit(way: str) -> None:
    replicas = Replicas(linear, range(4))
    optimizer = svag_fast.SVAG(replicas.parameters(), lr=0.1, l=2)
    refused = pytest.raises(ValueError, match="call the replicas with each batch")
    with refused, svag_fast.pair_pass(replicas, optimizer, way=way):
        replicas(torch.ones(8, 4), shared=True)


def test_per_sample_norms_are_refused() -> None:
    replicas = Replicas(linear, range(2))
    with pytest.raises(svag_fast.UnsupportedModuleError), svag_fast.per_sample_sq_norms(replicas):
        replicas(X)


def test_what_doesnt_fit_into_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_memory", lambda device: 79)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: pytest.fail("memory was taken"))
    with pytest.raises(MemoryError, match=r"2 replicas need 0\.0 MiB .* cpu has 0\.0 MiB free"):
        Replicas(linear, range(2))


@pytest.mark.parametrize("s", [-1, 2, True, 0.0])
def test_numbers_of_no_replica(s: object) -> None:
    replicas = Replicas(linear, range(2))
    with pytest.raises((TypeError, ValueError), match="s must be an integer"):
        replicas.unstack(s)
    with pytest.raises((TypeError, ValueError), match="s must be an integer"):
        replicas.load_replica(s, linear().state_dict())
