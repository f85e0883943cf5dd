"""A model that was measured before: what an earlier context found is used again only where all is as it was."""

import gc
import weakref

import pytest
import torch
from torch import nn

from svag_fast import UnsupportedModuleError, per_sample_sq_norms, register_rule
from svag_fast.sample_norms import plan


class Scale(nn.Module):
    """A layer whose rule the tests give."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return x * self.weight


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def total(net, x, **how):
    with per_sample_sq_norms(net, loss_reduction="sum", **how) as norms:
        net(x).square().sum().backward()
    return norms.total


def expected(net, x):
    rows = [torch.autograd.grad(net(one[None]).square().sum(), list(net.parameters())) for one in x]
    return torch.stack([sum(g.double().square().sum() for g in row) for row in rows])


def entered_before():
    net, x = build(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(total(net, x), expected(net, x), rtol=1e-5, atol=0)
    return net, x


def test_a_model_that_is_as_it_was_is_not_looked_through_again(monkeypatch):
    net, x = entered_before()
    first = total(net, x)
    monkeypatch.setattr(plan.Survey, "__init__", lambda *_: pytest.fail("looked through again"))
    assert torch.equal(total(net, x), first)


def test_what_is_kept_of_a_model_keeps_neither_it_nor_its_parameters_alive():
    """Trap: a layer that refers to the model, as by a hook that is the model's method, keeps it if anything keeps the
    layer."""
    net, x = entered_before()
    net[0].register_forward_hook(lambda *_, net=net: None)
    net[0].weight.register_hook(lambda grad, net=net: None)
    total(net, x)
    alive = [weakref.ref(net), weakref.ref(net[2].weight)]
    kept = len(plan._FOUND)
    del net
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len(plan._FOUND) < kept


def test_a_graph_of_an_earlier_context_is_no_use_in_a_later_one():
    """Its layers deliver to the context that they were called in, so a later one can't know their norms."""
    net, x = entered_before()
    with per_sample_sq_norms(net):
        loss = net(x).square().sum()
    with per_sample_sq_norms(net) as norms:
        (loss + net(x).square().sum()).backward()
        with pytest.raises(RuntimeError, match="from outside its own module's forward"):
            _ = norms.total


def test_a_rule_that_was_registered_since_is_used():
    @register_rule(Scale)
    def wrong(module, inputs, output_grad):
        return {"weight": 3 * output_grad * inputs[0]}

    net, x = nn.Sequential(Scale()), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="do not add up"):
        total(net, x)

    @register_rule(Scale)
    def right(module, inputs, output_grad):
        return {"weight": output_grad * inputs[0]}

    torch.testing.assert_close(total(net, x), expected(net, x), rtol=1e-5, atol=0)


def patch_the_instance(net, monkeypatch):
    net[0].forward = lambda x: x @ net[0].weight.T


def patch_a_subclass(net, monkeypatch):
    monkeypatch.setattr(Narrow, "forward", lambda self, x: 2 * x @ self.weight.T)


def reparametrise(net, monkeypatch):
    nn.utils.parametrizations.weight_norm(net[0])


def change_the_class(net, monkeypatch):
    net[0].__class__ = Other


class Narrow(nn.Linear):
    """As Linear."""


class Other(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [patch_the_instance, patch_a_subclass, reparametrise, change_the_class])
def test_what_can_not_be_served_any_more_is_refused(change, monkeypatch):
    net, x = build(), torch.randn(4, 3)
    net[0] = Narrow(3, 3)
    total(net, x)
    change(net, monkeypatch)
    with pytest.raises(UnsupportedModuleError, match=r"^0"):
        total(net, x)


def test_options_that_a_rule_refuses_are_refused_on_entry():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(4, 3)
    total(net, x)
    net.train()
    with pytest.raises(UnsupportedModuleError, match=r"1 \(BatchNorm1d\).*couples"):
        per_sample_sq_norms(net).__enter__()
    net.eval()
    torch.testing.assert_close(total(net, x), expected(net, x), rtol=1e-5, atol=0)


def test_other_arguments_are_other_contexts():
    net, x = entered_before()
    all_of_it = total(net, x)
    assert torch.equal(total(net, x, batch_size=4), all_of_it)
    torch.testing.assert_close(total(net, x, check=True), all_of_it)
    assert (total(net, x, parameters=[net[0].weight]) < all_of_it).all()
    assert torch.equal(total(net, x), all_of_it)


def test_a_name_that_changed_is_the_new_one():
    net, x = entered_before()
    net.add_module("last", net._modules.pop("2"))
    with per_sample_sq_norms(net) as norms:
        net(x).sum().backward()
    assert list(norms) == ["0.weight", "0.bias", "last.weight", "last.bias"]


def test_a_layer_of_a_served_model_is_refused_though_it_was_measured_before():
    net, x = entered_before()
    total(net[0], x)
    with per_sample_sq_norms(net), pytest.raises(UnsupportedModuleError, match="served already"):
        per_sample_sq_norms(net[0]).__enter__()
    torch.testing.assert_close(total(net, x), expected(net, x), rtol=1e-5, atol=0)
