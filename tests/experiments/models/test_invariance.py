"""The report of scale invariance: what holds, what doesn't, and which parameters are to blame."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svag_fast.experiments.models import build_model, scale_invariance_report
from svag_fast.experiments.models.invariance import report_of


def images(count, channels, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, channels, size, size, generator=generator, dtype=dtype)
    return x, torch.randint(10, (count,), generator=generator)


def token_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokens_and_targets():
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.roll(-1, 1)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("digits-mlp", 1, 8),
        ("digits-net", 1, 8),
        ("preresnet8-gn", 3, 32),
        ("preresnet14-bn", 3, 16),
        ("resnet8-gn", 3, 8),
        ("resnet14-bn", 3, 8),
        ("wrn10-1-bn", 3, 8),
        ("mlp32x24-gn", 1, 8),
        ("mlp32x8-bn", 1, 8),
        ("mlp32x8-ln", 1, 8),
        ("vgg11-gn", 3, 32),
        ("vgg11-bn", 1, 28),
    ],
)
def test_normalised_nets_are_scale_invariant_in_float64(name, channels, size):
    net = build_model(name, in_channels=channels, num_classes=10, pixels=size**2).double()
    before = state(net)
    report = scale_invariance_report(net, *images(3, channels, size))
    assert report.holds(1e-6), report
    assert report.breaking == ()
    assert str(report).startswith("scale-invariant: loss change ")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the report changed the model"


def test_the_gpt_of_that_form_is_scale_invariant():
    net = build_model("gpt2x12-ln", in_channels=None, num_classes=11, pixels=6).double()
    assert scale_invariance_report(net, *tokens_and_targets(), loss=token_loss).holds(1e-6)


BROKEN = {
    # The features grow with the last norm's parameters, and the logits with them and with the head's.
    "preresnet8-gn-plain": ["features.4.weight", "features.4.bias", "head.weight", "head.bias"],
    "preresnet14-bn-plain": ["features.7.weight", "features.7.bias", "head.weight", "head.bias"],
    "wrn10-1-gn-plain": ["features.4.weight", "features.4.bias", "head.weight", "head.bias"],
    "mlp16x16-ln-plain": ["features.5.weight", "features.5.bias", "head.weight", "head.bias"],
    # In the ordinary ResNet the stream is made of normalised branches: more than three modules.
    "resnet8-bn-plain": [
        *("features.1.weight", "features.1.bias"),
        *(f"features.{block}.norm2.{own}" for block in (3, 4, 5) for own in ("weight", "bias")),
        *("head.weight", "head.bias"),
    ],
    # Without norms every layer's scale counts.
    "mlp16x16-none": ["features.1.weight", "features.4.weight"],
    "preresnet8-none": None,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BROKEN)
def test_the_parameters_that_break_it_are_named(name, dtype):
    net = build_model(name, in_channels=3, num_classes=10).to(dtype)
    before, drawn = state(net), torch.get_rng_state()
    report = scale_invariance_report(net, *images(4, 3, 8, dtype))
    assert not report.holds(1e-3)
    assert [p.name for p in report.breaking] == (BROKEN[name] or [n for n, _ in net.named_parameters()])
    assert all(p.name in str(report) for p in report.breaking)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the report changed the model"
    assert torch.equal(drawn, torch.get_rng_state())


def test_figures_of_a_parameter_against_their_formulas():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    report = scale_invariance_report(net, x, y, scale=2.0)
    loss = F.cross_entropy(net(x), y)
    names = [n for n, _ in net.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(loss, list(net.parameters())), strict=True))
    weights, loss = {n: p.detach() for n, p in net.named_parameters()}, loss.detach()
    size = sum(g.square().sum() for g in grads.values()).sqrt() * sum(w.square().sum() for w in weights.values()).sqrt()
    assert [p.name for p in report.breaking] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    for p in report.breaking:
        torch.testing.assert_close(p.radial_gradient, float((grads[p.name] * weights[p.name]).sum() / size))
        with torch.no_grad():
            weights[p.name].mul_(2)
            torch.testing.assert_close(p.loss_change, float(abs(F.cross_entropy(net(x), y) / loss - 1)))
            weights[p.name].div_(2)


@pytest.mark.parametrize("target", ["2.bias", "0.bias"])
def test_a_bias_behind_the_norm_is_named_also_while_it_is_zero_and_one_before_it_breaks_nothing(target):
    torch.manual_seed(0)
    first = nn.Linear(5, 8, bias=target == "0.bias")
    net = nn.Sequential(first, nn.LayerNorm(8, 1e-12, False), nn.Linear(8, 3)).double()
    net[2].weight.requires_grad_(False)
    net[2].bias.requires_grad_(target == "2.bias")
    nn.init.zeros_(net[2].bias)
    report = scale_invariance_report(net, torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3)
    assert [p.name for p in report.breaking] == (["2.bias"] if target == "2.bias" else [])


def test_where_either_of_two_modules_would_do_the_first_is_named():
    """W (γ x̂ + β) + b before a norm: with all scaled its terms grow as c² and c, and without W, or γ and β, alike."""
    torch.manual_seed(0)
    body = [nn.Linear(5, 8, bias=False), nn.LayerNorm(8, 1e-12), nn.Linear(8, 8), nn.LayerNorm(8, 1e-12, False)]
    net = nn.Sequential(*body, nn.Linear(8, 3)).double()
    net[4].requires_grad_(False)
    batch = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    report = scale_invariance_report(net, *batch)
    assert [p.name for p in report.breaking] == ["1.weight", "1.bias"]
    net[1].requires_grad_(False)
    assert scale_invariance_report(net, *batch).holds(1e-6)
    net[1].requires_grad_(True)
    net[2].weight.requires_grad_(False)
    assert scale_invariance_report(net, *batch).holds(1e-6)


def test_a_regression_s_loss():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 8, bias=False), nn.LayerNorm(8, 1e-12, False), nn.Linear(8, 1)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    report = scale_invariance_report(body, x, y, loss=nn.MSELoss(reduction="none"))
    assert [p.name for p in report.breaking] == ["2.weight", "2.bias"]
    body[2].requires_grad_(False)
    assert scale_invariance_report(body, x, y, loss=F.mse_loss).holds(1e-6)


def test_a_language_model_s_loss():
    net = build_model("gpt1x12-ln-plain", in_channels=None, num_classes=11, pixels=6).double()
    report = scale_invariance_report(net, *tokens_and_targets(), loss=token_loss)
    assert {"token.weight", "position.weight", "head.weight", "norm.weight"} <= {p.name for p in report.breaking}


def test_random_layers_draw_the_same_numbers_each_time():
    net = build_model("mlp16-ln", in_channels=1, num_classes=10).double()
    net.features.append(nn.Dropout(0.5))
    assert scale_invariance_report(net, *images(3, 1, 8)).holds(1e-6)


def test_any_loss_of_the_model_itself():
    net = build_model("mlp16-ln", in_channels=1, num_classes=10).double()
    x, y = images(3, 1, 8)
    assert report_of(net, lambda m: F.cross_entropy(m(x), y, reduction="none")).holds(1e-6)
    penalised = report_of(net, lambda m: F.cross_entropy(m(x), y) + m.features[1].weight.square().sum())
    assert [p.name for p in penalised.breaking] == ["features.1.weight"]


def test_a_scale_that_is_not_positive_and_a_model_without_parameters_are_refused():
    with pytest.raises(ValueError, match="scale must be positive"):
        scale_invariance_report(nn.Linear(4, 2), torch.ones(1, 4), torch.zeros(1, dtype=torch.long), scale=0)
    with pytest.raises(ValueError, match="the model must be one with a trained parameter to scale, got none"):
        scale_invariance_report(nn.Flatten(), torch.ones(1, 4), torch.zeros(1, dtype=torch.long))


def test_the_nets_pages_code_prints_what_stands_below_it(capsys):
    """But for the figures, which another processor may round to others."""
    page = (Path(__file__).parents[3] / "docs/nets.md").read_text().partition("## Which parameters break it")[2]
    _, code, _, printed, _ = page.split("```")
    exec(compile(code.removeprefix("python"), "nets.md", "exec"), {})
    number = r"[+-]?\d[\d.e-]*"
    assert re.sub(number, "", capsys.readouterr().out) == re.sub(number, "", printed.lstrip("\n"))
