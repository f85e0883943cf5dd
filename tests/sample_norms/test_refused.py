"""What the context of per-sample norms refuses, at entry or when a pass shows it."""

import pytest
import torch
import torch.nn.functional as F
from sample_norm_nets import modes, randn, same_modes
from sample_norm_oracle import check
from torch import nn

from svag_fast import UnsupportedModuleError, per_sample_sq_norms


def test_a_parameter_used_outside_its_module_is_found_out():
    """Otherwise its norms would silently lack a part."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)

        def forward(self, words):
            return F.linear(self.embed(words), self.embed.weight)

    model = Tied()
    words = torch.tensor([[0, 1], [2, 2]])
    with per_sample_sq_norms(model) as norms:
        model(words).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"embed.weight got a gradient from outside"):
            _ = norms.total
    plain = model.embed.weight.grad.clone()
    model.zero_grad()
    model(words).square().mean().backward()
    torch.testing.assert_close(plain, model.embed.weight.grad)


def test_a_shared_parameter_used_outside_as_well_is_found_out():
    model = nn.Linear(3, 3)
    with per_sample_sq_norms(model) as norms:
        h = model(model(torch.ones(2, 3)))
        (h.sum() + F.linear(h, model.weight).sum()).backward()
        with pytest.raises(RuntimeError, match="from outside"):
            _ = norms["weight"]


def test_a_penalty_on_the_weights_is_no_samples_gradient():
    """λ|w|²/2 in the loss can't be shared out among the samples."""
    model = nn.Linear(3, 2)
    with per_sample_sq_norms(model) as norms:
        (model(torch.ones(2, 3)).sum() + model.weight.square().sum()).backward()
        with pytest.raises(RuntimeError, match="weight got a gradient from outside"):
            _ = norms.total


def test_layers_must_agree_on_the_samples():
    """Tokens folded into the first dimension would pass for samples."""
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with per_sample_sq_norms(model) as norms:
        model[1](model[0](torch.ones(2, 5, 3)).flatten(0, 1)).sum().backward()
        with pytest.raises(RuntimeError, match=r"the first dimension must be the samples.*10 rows|rows.*10"):
            _ = norms.total


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OnlyAnotherName(nn.Linear):
    pass


def test_a_subclass_that_keeps_the_forward_is_served():
    """Trap: dispatch by exact type misses it."""
    check(OnlyAnotherName(3, 2), randn(2, 3))


def batch_norm_later():
    model = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 2, 1))
    return model.eval()


def lstm():
    return nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))


REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        r"1 \(BatchNorm2d\).*couples.*from_two_batches",
    ),
    "batch norm without parameters": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False)),
        r"1 \(BatchNorm2d\).*affine=False",
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False, track_running_stats=False)).eval(),
        r"1 \(BatchNorm1d\)",
    ),
    "synchronised batch norm": (lambda: nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), r"1 \(SyncBatchNorm\)"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 2, 3), r"the model \(ConvTranspose2d\): transposed"),
    "recurrent": (lstm, r"1 \(LSTM\): no rule.*register_rule\(LSTM\).*freeze"),
    "bare parameter": (lambda: nn.ParameterList([torch.zeros(2)]), r"the model \(ParameterList\): no rule"),
    "own forward": (lambda: OwnForward(2, 2), r"OwnForward\) overrides the forward of Linear"),
    "own convolution": (lambda: OwnConvForward(2, 2, 1), r"overrides the forward of Conv2d"),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), r"parameter 'weight_g'.*weight_norm"),
    "parametrisation": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), r"no rule|overrides"),
    "not initialised": (lambda: nn.LazyLinear(3), "weight is not initialised yet"),
    "samples second": (lambda: nn.MultiheadAttention(4, 2), r"batch_first=True"),
    "bias_kv": (lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), "add_bias_kv"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "hides its layers"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "hides its layers"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_be_served_is_refused_at_entry_and_left_alone(build, message):
    """Traps: BatchNorm without parameters; exact types; parameters that nobody looks at."""
    model = build()
    scripted = isinstance(model, torch.jit.ScriptModule)
    before = [] if scripted else modes(model)
    with pytest.raises(UnsupportedModuleError, match=message):
        per_sample_sq_norms(model).__enter__()
    if not scripted:
        same_modes(before, modes(model))


@pytest.mark.nightly
def test_a_compiled_model_is_refused():
    with pytest.raises(UnsupportedModuleError, match="hides its layers"):
        per_sample_sq_norms(torch.compile(nn.Linear(2, 2))).__enter__()


def test_frozen_or_left_out_layers_need_no_rule():
    model = nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose1d(3, 3, 1)).double()
    with per_sample_sq_norms(model, parameters=model[0].parameters()) as norms:
        model(randn(2, 3, 2)).square().mean().backward()
    model[1].requires_grad_(False)
    assert list(norms) == ["0.weight", "0.bias"]
    check(model, randn(2, 3, 2))


def test_batch_norm_put_into_training_mode_inside_is_refused():
    """Trap: it has no parameter of its own, so only its forward shows it."""
    model = batch_norm_later()
    with per_sample_sq_norms(model):
        model(torch.ones(2, 2, 3, 3))
        model.train()
        with pytest.raises(UnsupportedModuleError, match="BatchNorm2d"):
            model(torch.ones(2, 2, 3, 3))
    model(torch.ones(2, 2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "must be a torch.nn.Module, got int"),
        ({"loss_reduction": "none"}, ValueError, r"must be 'mean', 'sum' or a tensor of weights \[B\], got 'none'"),
        ({"parameters": [nn.Parameter(torch.zeros(1))]}, ValueError, "parameters must be the model's, got 1 others"),
        ({"parameters": []}, ValueError, "nothing to track"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        per_sample_sq_norms(**{"model": nn.Linear(2, 2), **arguments}).__enter__()


def test_a_name_that_is_not_tracked_is_a_key_error_with_the_names():
    model = nn.Linear(2, 2)
    with per_sample_sq_norms(model) as norms:
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(KeyError, match="tracked are weight, bias"):
        _ = norms["weigth"]
    assert len(norms) == 2
    assert "1 backward passes, 1 rows" in repr(norms)
