"""Norms that are not the samples' gradient norms are refused: second derivatives, wrong rules, changed gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svag_fast import by_vmap, per_sample_sq_norms, register_rule
from svag_fast.noise import estimators as noise
from svag_fast.sample_norms import rule as sample_norm_rules
from svag_fast.sample_norms.layers import conv, linear


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 1.0, -2.0]))

    def forward(self, x):
        return self.weight * x


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr(sample_norm_rules, "_RULES", dict(sample_norm_rules._RULES))


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "linear last": lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2)),
    "norm": lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False), nn.Tanh()),
    "norm last": lambda: nn.Sequential(nn.Tanh(), nn.LayerNorm(3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2, padding=1), nn.GroupNorm(1, 2), nn.Softplus(), nn.Conv1d(2, 1, 1)
    ),
    "plane": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 1, (1, 3))),
    "by vmap": lambda: nn.Sequential(Scale(), nn.Tanh()),
}


def inputs():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def penalty(net, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope.square().sum()


def hessian_vector(net, x):
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(net(x).square().sum(), parameters, create_graph=True)
    return sum(g.sum() for g in grads)


@pytest.mark.parametrize("second", [penalty, hessian_vector])
@pytest.mark.parametrize("name", NETS)
def test_second_derivatives_have_the_right_gradient_and_no_norms(name, second):
    """Traps: norms of the first derivative alone; a gradient that lacks what goes through the replaced backward."""
    register_rule(Scale)(by_vmap)
    torch.manual_seed(0)
    net, x = NETS[name]().double(), inputs()
    second(net, x).backward()
    plain = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    with per_sample_sq_norms(net, loss_reduction="sum") as norms:
        second(net, x).backward()
        with pytest.raises(RuntimeError, match=r"second derivatives went through .* \(.*\)"):
            _ = norms.total
    for p, expected in zip(net.parameters(), plain, strict=True):
        assert (p.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(p.grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_backward_pass_alone_does_no_harm():
    net, x = NETS["linear"]().double(), inputs()
    with per_sample_sq_norms(net, loss_reduction="sum") as norms:
        net(x).square().sum().backward(create_graph=True)
        graph = norms.total
        norms.reset()
        net.zero_grad()
        net(x).square().sum().backward()
        torch.testing.assert_close(norms.total, graph, rtol=1e-12, atol=0)


def test_second_derivatives_under_autocast_are_refused():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), inputs().float().requires_grad_()
    with per_sample_sq_norms(net), torch.autocast("cpu", torch.bfloat16):
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivatives through \d \(Linear\) under autocast"):
            slope.square().sum().backward()


WRONG = {
    "twice": lambda module, inputs, b: {"weight": 2 * b * inputs[0]},
    "another sign": lambda module, inputs, b: {"weight": -b * inputs[0]},
    "without the input": lambda module, inputs, b: {"weight": b},
    "of the batch": lambda module, inputs, b: {"weight": (b * inputs[0]).sum(0).expand_as(b)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_rule_is_found_out_on_its_first_use(rule, dtype):
    register_rule(Scale)(rule)
    net, x = nn.Sequential(Scale(), nn.Tanh()).to(dtype), inputs().to(dtype)
    for options in ({}, {}, {"check": True}):
        with per_sample_sq_norms(net, **options) as norms:
            net(x).square().sum().backward()
            with pytest.raises(RuntimeError, match=r"0 \(Scale\): the rule's .* of weight do not add up"):
                _ = norms.total


def test_a_rule_that_becomes_wrong_is_found_out_on_demand():
    """A hook that changes the gradient of the layer's output after the rule has seen it."""
    net, x = nn.LayerNorm(3).double(), inputs()
    with per_sample_sq_norms(net) as norms:
        net(x).square().sum().backward()
        assert norms.total.shape == (4,)
    net.register_forward_hook(lambda module, args, output: output.register_hook(lambda g: 2 * g) and None)
    with per_sample_sq_norms(net, check=True) as norms:
        net(x).square().sum().backward()
        with pytest.raises(RuntimeError, match="a hook changed the gradient"):
            _ = norms.total


def test_each_rule_is_checked_once_where_nothing_is_asked():
    calls = []

    @register_rule(Scale)
    def scale(module, inputs, b):
        calls.append(len(b))
        return {"weight": b * inputs[0]}

    net, x = nn.Sequential(Scale(), nn.Tanh()).double(), inputs()
    for expected in (2, 1, 1):  # norms, and the sum the first time
        calls.clear()
        with per_sample_sq_norms(net):
            net(x).square().sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(4, 4, 1)])
def test_a_wrong_weight_gradient_never_reaches_the_parameter(layer, monkeypatch):
    net, x = layer.double(), inputs()[None].expand(2, 4, 3)

    def wrong(inputs, output_grads, shape, geometry):
        return torch.ones(shape, dtype=torch.float64), torch.ones(len(inputs), dtype=torch.float64)

    for module in (conv, linear):
        monkeypatch.setattr(module, "unchecked_weight_grad", wrong)
    with per_sample_sq_norms(net), pytest.raises(RuntimeError, match="its weight gradient is not the one that PyTorch"):
        net(x).square().sum().backward()
    assert net.weight.grad is None


def test_wrong_norms_are_found_out_on_demand(monkeypatch):
    right = linear.unchecked_weight_grad

    def wrong(*args):
        grad, sq_norms = right(*args)
        return grad, 1.1 * sq_norms

    net, x = nn.Linear(3, 3).double(), inputs()[None].expand(2, 4, 3)
    with per_sample_sq_norms(net, check=True) as norms:
        net(x).square().sum().backward()
        assert norms.total.shape == (2,)
    monkeypatch.setattr(linear, "unchecked_weight_grad", wrong)
    with per_sample_sq_norms(net, check=True) as norms:
        net(x).square().sum().backward()
        with pytest.raises(RuntimeError, match="the norms of weight are not those of the samples' own gradients"):
            _ = norms.total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_cancel_are_no_wrong_rule(dtype):
    """Behind a normalisation a bias has no gradient but rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3),
        nn.InstanceNorm2d(8, affine=True),
    ).to(dtype)
    x = torch.randn(8, 3, 16, 16).to(dtype)
    with per_sample_sq_norms(net, check=True) as norms:
        net(x).square().mean().backward()
        assert norms.total.shape == (8,)


# Weights of the samples in the loss.


def own_norms(net, x, losses):
    """|g_i|² of loss_i, by one backward pass each."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(losses(net(x))[i], list(net.parameters()))
        rows.append(sum(g.square().sum() for g in grads))
    return torch.stack(rows).double()


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), inputs(), torch.tensor([0, 2, 1, 2])


def test_class_weights():
    net, x, y = classifier()
    classes = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    weights = classes[y] / classes[y].sum()
    with per_sample_sq_norms(net, loss_reduction=weights) as norms:
        F.cross_entropy(net(x), y, weight=classes).backward()
        got = norms.total
        each = norms["0.weight"]
    torch.testing.assert_close(got, own_norms(net, x, lambda out: F.cross_entropy(out, y, reduction="none")))
    assert (each < got).all()


def test_ignored_samples_have_no_norm():
    net, x, y = classifier()
    own = own_norms(net, x, lambda out: F.cross_entropy(out, y, reduction="none"))
    y[1] = -100
    kept = (y != -100).double()
    with per_sample_sq_norms(net, loss_reduction=kept / kept.sum()) as norms:
        F.cross_entropy(net(x), y).backward()
        got = norms.total
    assert got[1].isnan()
    torch.testing.assert_close(got[kept > 0], own[kept > 0])


def language_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11)).double()
    words = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    targets = words.roll(-1, 1)
    for i, length in enumerate((7, 3, 5, 1)):
        targets[i, length:] = -100
    return net, words, targets


def sequence_losses(logits, targets):
    """Each sequence's mean over its own tokens, [B]."""
    tokens = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return tokens.sum(1) / (targets != -100).sum(1)


def test_a_language_models_token_mean():
    """Trap: the mean over all tokens weighs sequence i by n_i / Σ n, which is not 1/B."""
    net, words, targets = language_model()
    tokens = (targets != -100).sum(1)
    with per_sample_sq_norms(net, loss_reduction=tokens / tokens.sum()) as norms:
        F.cross_entropy(net(words).flatten(0, 1), targets.flatten()).backward()
        got = norms.total
    torch.testing.assert_close(got, own_norms(net, words, lambda out: sequence_losses(out, targets)))
    batch = sum(p.grad.square().sum() for p in net.parameters())
    estimate = noise.from_sample_norms(got, batch, weights=tokens / tokens.sum())
    assert estimate.sample_noise_trace > 0


def test_other_weights_in_the_next_step():
    net, x, y = classifier()
    own = own_norms(net, x, lambda out: F.cross_entropy(out, y, reduction="none"))
    with per_sample_sq_norms(net, loss_reduction=torch.full((4,), 0.25)) as norms:
        F.cross_entropy(net(x), y).backward()
        torch.testing.assert_close(norms.total, own)
        F.cross_entropy(net(x[:3]), y[:3]).backward()
        with pytest.raises(ValueError, match="loss_reduction must be the weights of the 7 samples of the backward"):
            _ = norms.total
        norms.reset(loss_reduction=torch.tensor([1 / 4] * 4 + [1 / 3] * 3))  # of both micro-batches
        for rows in (slice(4), slice(3)):
            F.cross_entropy(net(x[rows]), y[rows]).backward()
        torch.testing.assert_close(norms.total, torch.cat([own, own[:3]]), rtol=1e-6, atol=0)
        norms.reset(loss_reduction="sum")
        F.cross_entropy(net(x), y, reduction="sum").backward()
        torch.testing.assert_close(norms.total, own)
        with pytest.raises(ValueError, match="got 'none'"):
            norms.reset(loss_reduction="none")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 2), r"shape \[B\], got \[2, 2\]"),
        (torch.ones(2, dtype=torch.complex64), "real, constant weight.*complex64"),
        (torch.ones(2, requires_grad=True), "with a gradient"),
        ([1.0, 2.0], r"must be 'mean', 'sum' or a tensor of weights \[B\], got \[1.0, 2.0\]"),
        (torch.tensor([1.0, float("nan")]), "finite"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        per_sample_sq_norms(nn.Linear(2, 2), loss_reduction=weights)


def test_a_layer_that_is_not_heard_of_is_an_error():
    """Trap: its parameters' gradients arrived, and the total was without them."""
    net = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)).double()
    net[1].register_forward_hook(lambda module, args, output: output._backward_hooks.clear())
    with per_sample_sq_norms(net) as norms:
        net(inputs()).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"the gradient of 1\.bias arrived, but that of its layer's output was not"):
        _ = norms.total
