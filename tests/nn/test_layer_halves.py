"""A layer without a rule goes half by half inside of a joint pass, alone; where that isn't sound all the model does."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from pair_passes import CLASSES, B, assert_same_states, assert_same_stats, images, labels, one_pass, seeded, two_passes
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import SVAG, pair_pass
from svag_fast.nn import CoupledSamples


class First(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


class Last(nn.Module):
    """The last state of a recurrent layer, of the last of its levels."""

    def forward(self, x):
        return x[1][-1]


class Scale(nn.Module):
    """A parameter of its own around a layer, both used directly, with a value that all samples share."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.scale = nn.Linear(width, width), nn.Parameter(torch.randn(width))

    def forward(self, x, *, shift=None):
        x = torch.tanh(F.linear(x, self.inner.weight)) + self.inner(x) * self.scale
        return x if shift is None else {"out": x + torch.cat([shift, shift, shift]).mean(0)}


class Custom(nn.Module):
    """A layer without a rule, called twice, once with a keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(72, 6), Scale(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.scale(self.first(x.flatten(1)))
        return self.last(self.scale(x, shift=torch.arange(12.0, dtype=x.dtype).view(2, 6))["out"])


class Running(nn.Module):
    """A normalisation of one's own, of a whole batch, with a running mean and a counter of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.zeros(6))
        self.batches = 0

    def forward(self, x):
        mean = x.mean(0)
        self.batches += 1
        self.mean.lerp_(mean.detach(), 1 / self.batches)
        return (x - mean) * self.gain


class Sequences(nn.Module):
    """Recurrent cells and a recurrent layer with times first and a state that is given."""

    def __init__(self):
        super().__init__()
        self.cell, self.layer = nn.GRUCell(12, 5), nn.GRU(12, 5, num_layers=2, bidirectional=True)
        self.last = nn.Linear(15, CLASSES)

    def forward(self, x):
        x = x.reshape(len(x), 6, 12)
        state = x.new_zeros(len(x), 5)
        for k in range(6):
            state = self.cell(x[:, k], state)
        out, last = self.layer(x.transpose(0, 1), state.expand(4, -1, -1).contiguous())
        return self.last(torch.cat([out[2], last[0]], 1))


WITHOUT_RULE = {
    "attention": (
        lambda: nn.Sequential(
            nn.Flatten(2),
            nn.TransformerEncoderLayer(36, 2, 8, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(72, 3),
        ),
        "1.self_attn (MultiheadAttention)",
    ),
    "recurrent": (lambda: nn.Sequential(nn.Flatten(2), nn.GRU(36, 4, batch_first=True), First()), "1 (GRU)"),
    "last state": (lambda: nn.Sequential(nn.Flatten(2), nn.GRU(36, 4, 2, batch_first=True), Last()), "1 (GRU)"),
    "cells": (Sequences, "cell (GRUCell), layer (GRU)"),
    "a parameter around a layer": (Custom, "scale (Scale)"),
    "of a whole batch": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 6), Running(), nn.Linear(6, CLASSES)),
        "2 (Running)",
    ),
    "parametrised": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, bias=False)),
            nn.Flatten(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(48, 8)),
            nn.Tanh(),
            nn.utils.parametrizations.weight_norm(nn.Linear(8, CLASSES), dim=None),
        ),
        "0 (ParametrizedConv2d), 2 (ParametrizedLinear), 4 (ParametrizedLinear)",
    ),
}


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize(("build", "named"), WITHOUT_RULE.values(), ids=WITHOUT_RULE)
def test_a_layer_without_a_rule_goes_half_by_half_alone_and_is_named_once(build, named, rows):
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2.5) for m in (model, expected))
    for k in range(3):
        x, y = torch.randn(2 * rows, 2, 6, 6, dtype=torch.float64), torch.arange(2 * rows) % CLASSES
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair = one_pass(model, optimizer, x, y)
        assert [f"slower: {named}. (Said once" in str(w.message) for w in caught] == [True] * (k == 0)
        assert pair.way == "joint"
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)
    assert all("forward" not in vars(m) for m in model.modules())


class Parts(nn.Module):
    """A first layer, something between, and a last one."""

    def __init__(self, between, call=None):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(72, 6), between, nn.Linear(6, CLASSES)
        self.norm = nn.BatchNorm1d(6)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x):
        return self.last(self.call(self.between, torch.tanh(self.norm(self.first(x.flatten(1))))))


class Own(nn.Module):
    """A layer without a rule: a parameter and what is done with it."""

    def __init__(self, does, *inner):
        super().__init__()
        self.gain, self.does, self.inner = nn.Parameter(torch.ones(6)), does, nn.Sequential(*inner)

    def forward(self, *args):
        return self.does(self, *args)


def with_table(rows):
    """A layer called with a tensor that all samples share and that has as many rows as there are samples."""
    table = torch.randn(rows, 6, dtype=torch.float64)
    return Parts(Own(lambda m, x, t: m.gain * (torch.softmax(x @ t.T, 1) @ t)), lambda layer, x: layer(x, table))


def set_from_outside(layer, x):
    layer.mask = x.sigmoid()
    return layer(x)


def picked(layer, x):
    """An expert: of some samples alone."""
    which = (x.detach().sum(1) > 0).nonzero().flatten()
    return x.index_add(0, which, layer(x[which]))


def cached(layer, x):
    with nn.utils.parametrize.cached():
        return layer(x)


def running(m, x):
    """A mean over the batches so far, which the next batch sees."""
    m.mean = x.detach().mean(0) + getattr(m, "mean", 0)
    return (x - m.mean) * m.gain


def packed(layer, x):
    x = x.reshape(len(x), 3, 2)
    sequence = nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True)
    return layer(sequence)[1][0][-1]


UNSOUND = {
    "a shared value with as many rows": (lambda: with_table(2 * B), "can't be told by their number of rows"),
    "what a parent sets": (
        lambda: Parts(Own(lambda m, x: x * m.gain * m.mask[: len(x)]), set_from_outside),
        "samples are coupled",
    ),
    "picked samples": (lambda: Parts(nn.Linear(6, 6), picked), "between.*its rows are not the samples"),
    "picked samples without a rule": (lambda: Parts(Own(lambda m, x: m.gain * x), picked), "between.*its rows are not"),
    "a weight that is made once": (
        lambda: Parts(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), cached),
        "original.*its rows are not the samples",
    ),
    "batch norm inside": (
        lambda: Parts(Own(lambda m, x: m.inner(x) * m.gain, nn.BatchNorm1d(6))),
        "inner.*is inside of between",
    ),
    "a scalar beside": (
        lambda: Parts(Own(lambda m, x: (x * m.gain, x.mean())), lambda layer, x: layer(x)[0]),
        r"returns \[\]",
    ),
    "a state that the next batch sees": (lambda: Parts(Own(running)), "samples are coupled"),
    "packed sequences": (lambda: Parts(nn.LSTM(2, 6, batch_first=True), packed), "PackedSequence"),
    "used from outside too": (
        lambda: Parts(Own(lambda m, x: x * m.gain), lambda layer, x: layer(x) * layer.gain),
        "used outside of its own layer",
    ),
}


@pytest.mark.parametrize(("build", "reason"), UNSOUND.values(), ids=UNSOUND)
def test_where_that_is_not_sound_the_model_goes_by_halves(build, reason):
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2.5) for m in (model, expected))
    for k in range(2):
        x, y = images(), labels()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair = one_pass(model, optimizer, x, y)
        assert [str(w.message)[:60] for w in caught] == [
            "pair_pass takes this model's batches one after the other, whi"[:60]
        ] * (k == 0)
        assert pair.way == "halves"
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)
    with pytest.raises(CoupledSamples, match=f"(?s){reason}"):
        one_pass(model, SVAG(model.parameters(), lr=0.1, l=2), x, y, way="joint")


def test_a_shared_value_is_told_from_two_samples_of_a_batch():
    model, expected = seeded(lambda: with_table(4)), seeded(lambda: with_table(4))
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2.5) for m in (model, expected))
    expected.call = model.call
    x, y = images()[:4], labels()[:4]
    with pytest.warns(UserWarning, match="can't be told by their number of rows"):
        assert one_pass(model, optimizer, x, y).way == "halves"
    assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))


def test_what_only_a_later_pass_shows_is_refused():
    model = seeded(lambda: with_table(2 * B))
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    x, y = torch.cat([images(), images()]), labels().repeat(2)
    with pytest.warns(UserWarning, match=r"between \(Own\)"):
        assert one_pass(model, optimizer, x, y).way == "joint"
    optimizer.step()
    with pytest.raises(CoupledSamples, match="number of rows"):
        one_pass(model, optimizer, images(), labels())
    model.call = lambda layer, x: layer(x, x[:1], x)
    with pytest.raises(CoupledSamples, match="not as in the first pass"):
        one_pass(model, optimizer, x, y)


def test_a_loss_that_such_a_layer_keeps_is_refused():
    def keeps(m, x):
        m.kept = (x * m.gain).square().mean()
        return x * m.gain

    model = seeded(lambda: Parts(Own(keeps)))
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    with warnings.catch_warnings(), pair_pass(model, optimizer) as pair:
        warnings.simplefilter("ignore")
        losses = F.cross_entropy(model(images()), labels(), reduction="none")
        assert pair.way == "joint"
        with pytest.raises(RuntimeError, match=r"one batch's losses depend on the other batch by way of"):
            pair.backward(losses + model.between.kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward_pass(reentrant):
    def build():
        return Parts(Scale(6), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))

    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2.5) for m in (model, expected))
    for _ in range(2):
        x, y = images(), labels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert one_pass(model, optimizer, x, y).way == ("halves" if reentrant else "joint")  # which hides layers
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)


def test_a_look_at_the_model_leaves_no_trace_in_it():
    model = seeded(WITHOUT_RULE["of a whole batch"][0])
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    with pytest.warns(UserWarning, match="without a rule"):
        one_pass(model, optimizer, images(), labels())
    assert model[2].batches == 2  # one for each batch


def test_random_layers_inside_draw_for_each_half():
    """The gradients are those of the numbers that were drawn: of the losses' own graph."""
    model = seeded(lambda: Parts(Own(lambda m, x: m.inner(x) * m.gain, nn.Dropout(0.5))))
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    x, y = images(), labels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            torch.manual_seed(3)
            with pair_pass(model, optimizer) as pair:
                pair.backward(F.cross_entropy(model(x), y, reduction="none"))
            first, second = optimizer._pair.first()[2], model.between.gain.grad
            optimizer.discard_gradient()
    torch.manual_seed(3)
    for half, got in ((slice(None, B), first), (slice(B, None), second)):
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x[half]), y[half]), model.between.gain)
        torch.testing.assert_close(got, grad)
