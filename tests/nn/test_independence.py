"""Whether samples are independent in a model is found by changing one, and the place where coupling begins is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svag_fast import check_independence


class Free(nn.Module):
    """A module whose forward is a function of the input."""

    def __init__(self, function):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.inner(x))


INDEPENDENT = {
    "linear": nn.Linear(4, 4),
    "dropout": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)),
    "in place": nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "layer norm": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
    "frozen batch norm": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval()),
    "noise": Free(lambda x: x + torch.randn(x.shape[1])),
}


@pytest.mark.parametrize("model", INDEPENDENT.values(), ids=INDEPENDENT)
def test_independent_samples_are_found_independent(model):
    answer = check_independence(model, torch.randn(6, 4))
    assert answer, answer.reason
    assert answer.module is None


COUPLED = {
    "batch norm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), "1", "1 (BatchNorm1d)"),
    "not affine": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), "1", "1 (BatchNorm1d)"),
    "no running statistics": (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False).eval()), "0", "BatchNorm1d"),
    "softmax": (nn.Sequential(nn.Linear(4, 4), nn.Softmax(0), nn.Linear(4, 4)), "1", "1 (Softmax)"),
    "mean": (nn.Sequential(nn.ReLU(), Free(lambda x: x - x.mean(0))), "1", "1 (Free)"),
    "detached": (Free(lambda x: x / x.detach().abs().max()), "", "the model (Free)"),
    "one way": (Free(lambda x: x.cumsum(0)), "", "the model (Free)"),
    "neighbour": (Free(lambda x: x + x.roll(1, 0)), "", "the model (Free)"),
    "attention over samples": (
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0)),
        "1.self_attn",
        "self_attn",
    ),
}


@pytest.mark.parametrize(("model", "place", "named"), COUPLED.values(), ids=COUPLED)
def test_coupled_samples_are_found_and_the_module_where_it_begins_is_named(model, place, named):
    answer = check_independence(model, torch.randn(6, 4))
    assert (bool(answer), answer.module) == (False, place)
    assert named in answer.reason


@pytest.mark.parametrize("seed", range(20))
def test_a_maximum_over_the_batch_is_found_whichever_sample_has_it(seed):
    torch.manual_seed(seed)
    assert not check_independence(Free(lambda x: x / x.detach().abs().max()), torch.randn(6, 4))


def test_coupling_between_modules_is_put_into_the_forward_around_them():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.second(x - x.mean(0))

    answer = check_independence(nn.Sequential(nn.Identity(), Centred()), torch.randn(5, 4))
    assert (bool(answer), answer.module) == (False, "1")
    assert "in the forward of 1, before 1.second (Linear)" in answer.reason


def test_coupling_behind_weights_that_start_at_zero_is_found():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x + self.norm(x)

    model = Residual()
    assert check_independence(model, torch.randn(6, 4)).module == "norm"
    assert torch.equal(model.norm.weight, torch.zeros(4))


def test_an_inner_dimension_that_only_happens_to_be_as_long_is_no_coupling():
    class PositionsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.mix = nn.Linear(6, 6)

        def forward(self, x):  # [6, 6, 4]: samples, positions
            y = self.norm(x.transpose(0, 1))
            return self.mix(y.permute(1, 2, 0)).transpose(1, 2)

    assert check_independence(PositionsFirst(), torch.randn(6, 6, 4))


def test_indices_are_changed_into_other_valid_indices():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    assert check_independence(model, torch.tensor([[0, 1], [2, 3], [4, 4]]))
    model.append(nn.BatchNorm1d(2))
    assert check_independence(model, torch.tensor([[0, 1], [2, 3], [4, 4]])).module == "3"


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = torch.randn(6, 4)
    before, state, copy = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state(), x.clone()
    check_independence(model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return x * self.calls[0]


REFUSED = {
    "evaluation": (nn.Linear(4, 4).eval(), torch.randn(3, 4), ValueError, "evaluation mode"),
    "one sample": (nn.Linear(4, 4), torch.randn(1, 4), ValueError, "two samples"),
    "equal integers": (nn.Embedding(4, 2), torch.zeros(3, dtype=torch.long), ValueError, "could be changed"),
    "no samples in the output": (Free(lambda x: x.sum()), torch.randn(3, 4), ValueError, "the model's outputs must"),
    "keeps something": (nn.Sequential(Counts()), torch.randn(3, 4), RuntimeError, r"two runs.*0 \(Counts\)"),
    "no module": (lambda x: x, torch.randn(3, 4), TypeError, "Module"),
}


@pytest.mark.parametrize(("model", "x", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(model, x, error, message):
    with pytest.raises(error, match=message):
        check_independence(model, x)
