"""What a model does may change with its flags: what was found out about its samples holds for as long as they do."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from svag_fast import SVAG, pair_pass, per_sample_sq_norms
from svag_fast.sample_norms.structure import Switches

MIXED = "depend on other rows"
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Mixing(nn.Module):
    """Mixes its samples in training mode, or where told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.how = "not"

    def forward(self, x: Tensor) -> Tensor:
        """As x, through the layer."""
        x = torch.tanh(self.layer(x))
        return x if self.how == "not" and not self.training else x + 0.5 * x.roll(1, 0)


def begin(model: Mixing, by: str) -> None:
    if by == "training":
        model.train()
    else:
        model.how = "rolled"


def norms_pass(model: nn.Module) -> None:
    model(X).square().sum(1).mean().backward()


@pytest.mark.parametrize("by", ["training", "how"])
@pytest.mark.parametrize("given", [False, True])
def test_norms_of_a_model_that_mixes_from_later_on_are_refused(by: str, given: bool) -> None:
    model = Mixing().eval()
    some = {"parameters": list(model.parameters())} if given else {}
    for _ in range(2):
        with per_sample_sq_norms(model, **some) as norms:
            norms_pass(model)
        assert norms.total.shape == (6,)
    begin(model, by)
    with pytest.raises(ValueError, match=MIXED), per_sample_sq_norms(model, **some):
        norms_pass(model)


@pytest.mark.parametrize("by", ["training", "how"])
def test_so_are_those_within_one_context(by: str) -> None:
    model = Mixing().eval()
    with per_sample_sq_norms(model) as norms:
        norms_pass(model)
        assert norms.total.shape == (6,)
        begin(model, by)
        with pytest.raises(ValueError, match=MIXED):
            norms_pass(model)


def test_another_model_with_the_same_layer_is_looked_at_itself() -> None:
    model, mixing = Mixing().eval(), Mixing()
    mixing.layer = model.layer
    with per_sample_sq_norms(model):
        norms_pass(model)
    with pytest.raises(ValueError, match=MIXED), per_sample_sq_norms(mixing):
        norms_pass(mixing)


@pytest.mark.parametrize("by", ["training", "how"])
@pytest.mark.parametrize("one_context", [False, True])
@pytest.mark.filterwarnings("ignore:pair_pass takes this model")
def test_a_pair_of_a_model_that_mixes_from_later_on_is_taken_by_halves(by: str, one_context: bool) -> None:
    model = Mixing().eval()
    opt, alone = SVAG(model.parameters(), lr=0.0, l=2), copy.deepcopy(model)
    with contextlib.ExitStack() as open_contexts:
        for k in range(4):
            if k == 2:
                begin(model, by)
                begin(alone, by)
            if k == 0 or not one_context:
                open_contexts.close()
                pair = open_contexts.enter_context(pair_pass(model, opt))
            pair.backward(model(X).square().sum(1))
            (second,) = torch.autograd.grad(alone(X[3:]).square().sum(1).mean(), alone.layer.weight)
            torch.testing.assert_close(model.layer.weight.grad, second)
            opt.step()
            assert pair.way == ("joint" if k < 2 else "halves")


def test_switches_are_flags_and_words() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    switches = Switches(model)
    model[0].counter = 1
    model.train()
    model[1].inplace = False
    assert not switches.changed()
    for change in (lambda: model[1].train(False), lambda: setattr(model[1], "inplace", True)):
        change()
        assert switches.changed()
        switches = Switches(model)
    model[1].inplace = torch.zeros(3)
    assert switches.changed()
    switches = Switches(model)
    del model[1].training
    assert switches.changed()
