"""The context of per-sample norms: whole nets, ways of using it, what it refuses, and that it leaves no trace."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from sample_norm_oracle import check, loop, loss_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from svag_fast import UnsupportedModule, per_sample_sq_norms
from svag_fast.experiments import models
from svag_fast.noise import estimators as noise


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def image_batch(size=4):
    return randn(size, 2, 6, 6), torch.arange(size) % 3


class Block(nn.Module):
    """A transformer block with tied in- and output embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1 = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2 = nn.RMSNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.mlp(self.norm2(x)))


def block():
    torch.manual_seed(0)
    return Block()


def mlp():
    return nn.Sequential(nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


NETS = {
    "preresnet": lambda: (models.preresnet(8, "gn", generator=torch.Generator().manual_seed(0)), randn(3, 3, 16, 16)),
    "vgg": lambda: (models.vgg(11, "gn", generator=torch.Generator().manual_seed(0)), randn(2, 3, 32, 32)),
    "digits": lambda: (models.digits_net(generator=torch.Generator().manual_seed(0)), randn(5, 1, 8, 8)),
    "mlp": lambda: (mlp(), randn(6, 10)),
    "transformer block": lambda: (block(), torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))),
    "affine convolutions": lambda: (small_net(), randn(4, 2, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_whole_nets_against_vmap_of_grad(net):
    """Norms of every parameter and of all together, and the batch's gradient, in float64."""
    model, x = net()
    model.double()
    with torch.no_grad():
        target = randn(*model(x).shape)
    parameters = dict(model.named_parameters())

    def loss(weights, row, t):
        return loss_of(torch.func.functional_call(model, weights, (row[None],)), t[None])

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        {n: p.detach() for n, p in parameters.items()}, x, target
    )
    with per_sample_sq_norms(model) as norms:
        loss_of(model(x), target).backward()
    for name, row in rows.items():
        torch.testing.assert_close(norms[name], row.square().flatten(1).sum(1), rtol=1e-10, atol=1e-20)
        torch.testing.assert_close(parameters[name].grad, row.mean(0), rtol=1e-10, atol=1e-14)
    total = torch.stack([row.square().flatten(1).sum(1) for row in rows.values()]).sum(0)
    torch.testing.assert_close(norms.total, total, rtol=1e-10, atol=0)


def test_transformer_block_with_tied_embeddings():
    """Trap: tied parameters. The embedding is looked up and multiplied by: the cross term of the two counts."""
    torch.manual_seed(0)
    model = Block()
    norms = check(model, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(norms["head.weight"], norms["embed.weight"], rtol=0, atol=0)
    assert "head.weight" in norms
    assert list(norms).count("embed.weight") == 1


def test_transformer_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    check(layer, randn(3, 5, 8))
    check(layer.eval(), randn(3, 5, 8))


class Twice(nn.Module):
    """One convolution used at two sizes, one linear layer used three times, one norm twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm(self.conv(F.avg_pool2d(self.norm(self.conv(x)), 2)))
        x = x.flatten(2)
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return x


def test_a_module_used_more_than_once_has_cross_terms():
    """Trap: a module called twice in one forward pass."""
    torch.manual_seed(0)
    check(Twice(), randn(3, 2, 4, 4))


def test_cross_terms_are_formed_a_few_samples_at_a_time(monkeypatch):
    monkeypatch.setattr("svag_fast.sample_norms.tape._CHUNK_ELEMENTS", 20)
    torch.manual_seed(0)
    check(Twice(), randn(5, 2, 4, 4))


def test_two_modules_with_one_parameter():
    """Trap: tied parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    check(model, randn(3, 4))


def test_attention_used_twice_has_cross_terms():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            y = self.attention(x, x, x)[0]
            return self.attention(x, y, y)[0]

    torch.manual_seed(0)
    check(Model(), randn(3, 5, 4))


def test_bias_over_positions_is_the_norm_of_the_sum():
    """Trap: Σ|b_t|² or |b bᵀ|² for a bias. Output gradients +1 and -1 cancel."""
    model = nn.Linear(1, 1)
    signs = torch.tensor([[[1.0], [-1.0]], [[1.0], [1.0]]])
    with per_sample_sq_norms(model, loss_reduction="sum") as norms:
        (model(torch.ones(2, 2, 1)) * signs).sum().backward()
    assert norms["bias"].tolist() == [0, 4]


def test_mean_and_sum_losses_give_the_same_norms():
    """Trap: a mean loss puts 1/B² into every squared norm."""
    x, y = image_batch()
    model = small_net()
    totals = []
    for reduction in ("mean", "sum"):
        with per_sample_sq_norms(model, loss_reduction=reduction) as norms:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
        totals.append(norms.total)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


def test_a_weighted_loss_puts_its_weights_squared_into_the_norms():
    """Trap: with SVAG's weights c1/B and c2/B in the loss, divide by their squares (at l = 1, c2 = 0)."""
    model = small_net()
    x, y = image_batch()
    weights = torch.tensor([1.5, 1.5, -0.5, -0.5], dtype=torch.float64) / 2
    with per_sample_sq_norms(model, loss_reduction="sum") as weighted:
        (weights * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
    with per_sample_sq_norms(model) as norms:
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(weighted.total / weights**2, norms.total, rtol=1e-12, atol=0)


def test_no_buffer_of_all_samples_gradients():
    """No tensor made in the backward pass has B x d elements, for the weight of any layer kind."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    model = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.Flatten(),
        nn.Linear(256, 200),
    )
    x = torch.randn(32, 8, 4, 4)
    with per_sample_sq_norms(model):
        loss = model(x).square().mean()
        with Largest() as largest:
            loss.backward()
    assert 0 < largest.size < 32 * model[3].weight.numel() / 2


def test_squared_norms_are_never_negative():
    """Trap: a Gram sum that rounds to below zero. Output gradients that cancel all but exactly, many positions."""
    model = nn.Conv2d(1, 1, 3, padding=1)
    signs = torch.ones(2, 1, 32, 32)
    signs[..., ::2] = -1
    with per_sample_sq_norms(model) as norms:
        (model(torch.ones(2, 1, 32, 32)) * signs).sum().backward()
    assert (norms.total >= 0).all()


def test_float32_norms_are_as_good_as_single_sample_float32_passes():
    """Error against float64 at most twice that of a loop of float32 passes."""
    model = models.preresnet(8, "gn", generator=torch.Generator().manual_seed(0))
    x = randn(4, 3, 16, 16)
    cotangents = randn(4, 10)
    _, single = loop(model, [x.float()], cotangents.float())
    with per_sample_sq_norms(model) as norms:
        loss_of(model(x.float()), cotangents.float()).backward()
    _, exact = loop(model.double(), [x], cotangents)
    ours, theirs = ((v - exact).abs().max() / exact.max() for v in (norms.total, single.double()))
    assert ours <= 2 * theirs + 1e-7, (ours, theirs)


def test_noise_estimate_from_norms_and_gradient_equals_the_covariance():
    """Tr Σ₁ of the batch's own samples, as the estimators take it."""
    x, y = image_batch(5)
    model = small_net()
    with per_sample_sq_norms(model) as norms:
        F.cross_entropy(model(x), y).backward()
    batch = sum(p.grad.square().sum() for p in model.parameters())
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(F.cross_entropy(model(x[i, None]), y[i, None]), list(model.parameters()))
            ]
        )
        for i in range(5)
    ]
    expected = torch.stack(rows).var(0).sum()
    torch.testing.assert_close(
        noise.from_sample_norms(norms.total, batch).sample_noise_trace, expected, rtol=1e-10, atol=0
    )


def test_each_backward_pass_appends_its_rows_and_gradients_accumulate():
    model = small_net()
    x, y = image_batch(5)
    plain = small_net()
    for rows in (slice(0, 2), slice(2, 5)):
        F.cross_entropy(plain(x[rows]), y[rows]).backward()
    with per_sample_sq_norms(model) as norms:
        for rows in (slice(0, 2), slice(2, 5)):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        halves = norms.total
        norms.reset()
        with pytest.raises(RuntimeError, match="no backward pass"):
            _ = norms.total
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(halves, norms.total, rtol=1e-12, atol=0)
    model.zero_grad()
    with per_sample_sq_norms(model):
        for rows in (slice(0, 2), slice(2, 5)):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_two_forward_passes_before_two_backward_passes():
    """The uses of the other graph are alive, but not part of the pass."""
    model = small_net()
    x, y = image_batch(5)
    with per_sample_sq_norms(model) as norms:
        losses = [F.cross_entropy(model(x[rows]), y[rows]) for rows in (slice(0, 2), slice(2, 5))]
        for loss in losses:
            loss.backward()
        apart = norms.total
        norms.reset()
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(apart, norms.total, rtol=1e-12, atol=0)


def test_a_retained_graph_gives_its_rows_again():
    torch.manual_seed(0)
    model = Twice().double()
    x = randn(3, 2, 4, 4)
    with per_sample_sq_norms(model) as norms:
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    first, second = norms.total.chunk(2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradient_is_handed_over_not_copied():
    """.grad is the very tensor of the backward pass where there was none: no further buffer of the weights' size."""
    model = nn.Linear(3, 2)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    with per_sample_sq_norms(model):
        model(torch.ones(2, 3)).sum().backward()
    assert model.weight.grad.data_ptr() == seen[0]


def test_frozen_parameters_cost_nothing_and_have_no_norms():
    model = small_net()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    norms = check(model, image_batch()[0])
    assert "0.weight" not in norms
    assert "0.bias" in norms


def test_only_the_parameters_asked_for():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as everything:
        F.cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with per_sample_sq_norms(model, parameters=[model[3].weight, model[1].bias]) as norms:
        F.cross_entropy(model(x), y).backward()
    assert list(norms) == ["1.bias", "3.weight"]
    torch.testing.assert_close(norms.total, everything["1.bias"] + everything["3.weight"], rtol=1e-12, atol=0)
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


def test_parts_without_gradient():
    """A part of the forward pass under no_grad, evaluation under no_grad in between, and an unused parameter."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2), "unused": nn.Linear(3, 3)}).double()
    x = randn(4, 3)
    with per_sample_sq_norms(model) as norms:
        with torch.no_grad():
            hidden = model["a"](x)
        model["b"](hidden).square().mean().backward()
        with torch.no_grad():
            model["b"](model["a"](x))
    assert norms["a.weight"].tolist() == [0] * 4
    assert norms["unused.bias"].tolist() == [0] * 4
    torch.testing.assert_close(norms.total, norms["b.weight"] + norms["b.bias"])
    assert model["a"].weight.grad is None


def test_in_place_relu_and_in_place_residual():
    """Trap: full backward hooks break with both."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(2, 2, 3, padding=1)
            self.conv2 = nn.Conv2d(2, 2, 3, padding=1)
            self.norm = nn.GroupNorm(1, 2)

        def forward(self, x):
            out = self.norm(self.conv2(F.relu(self.conv1(x), inplace=True)))
            out += x
            return F.relu(out, inplace=True)

    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual())
    check(model, randn(3, 2, 5, 5))


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4)])
def test_an_input_changed_in_place_is_detected(layer):
    with per_sample_sq_norms(layer):
        x = torch.ones(2, 4)
        loss = layer(x).square().sum()
        x.mul_(2)
        with pytest.raises(RuntimeError, match=r"in-?place operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Gradients within twice plain autocast's own error of the float64 ones, norms within 2 %; dtypes as in plain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    x, y = image_batch()
    with torch.autocast("cpu", dtype):
        F.cross_entropy(model(x.float()), y).backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with per_sample_sq_norms(model) as norms:
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
    ours = [p.grad for p in model.parameters()]
    wide = copy.deepcopy(model).double()
    wide.zero_grad(set_to_none=True)
    with per_sample_sq_norms(wide) as exact:
        F.cross_entropy(wide(x), y).backward()
    for a, b, p in zip(ours, plain, wide.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - p.grad).norm() <= 2 * (b - p.grad).norm() + 1e-6
    torch.testing.assert_close(norms.total, exact.total, rtol=0.02, atol=0)


def test_gradient_scaler_enters_squared():
    model = small_net()
    x, y = image_batch()
    totals = []
    for scale in (1.0, 256.0):
        with per_sample_sq_norms(model) as norms:
            (scale * F.cross_entropy(model(x), y)).backward()
        totals.append(norms.total / scale**2)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


def test_channels_last():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.to(memory_format=torch.channels_last)
    with per_sample_sq_norms(model) as last:
        F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
    torch.testing.assert_close(last.total, norms.total, rtol=1e-12, atol=0)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-14)
        assert p.grad.stride() == p.stride()


def test_checkpointed_layers():
    """Recomputed layers are used once; the reentrant kind, which hides them in passes of its own, is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = randn(3, 4).requires_grad_()
    with per_sample_sq_norms(model) as norms:
        model(x).square().mean().backward()
    with per_sample_sq_norms(model) as again:
        checkpoint(model, x, use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(again.total, norms.total, rtol=1e-12, atol=0)
    with per_sample_sq_norms(model) as reentrant:
        checkpoint(model, x, use_reentrant=True).square().mean().backward()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            _ = reentrant.total


def test_autograd_grad_gives_norms_of_what_was_asked_for():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        torch.autograd.grad(F.cross_entropy(model(x), y), [model[5].weight])
    with per_sample_sq_norms(model) as everything:
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(norms.total, everything["5.weight"])


def test_norms_come_from_one_backward_pass_of_the_same_loss():
    """Each layer's backward runs once."""
    model = small_net()
    calls = []
    model[3].register_full_backward_hook(lambda *_: calls.append(1))
    model[2].inplace = False
    x, y = image_batch()
    with per_sample_sq_norms(model):
        F.cross_entropy(model(x), y).backward()
    assert calls == [1]


def test_the_users_own_gradient_hooks_run_and_are_no_foreign_use():
    model = nn.Linear(3, 2)
    model.weight.register_hook(lambda grad: 2 * grad)
    with per_sample_sq_norms(model) as norms:
        model(torch.ones(2, 3)).sum().backward()
    assert norms["weight"].tolist() == pytest.approx([24, 24], rel=1e-6)
    assert (model.weight.grad == 4).all()


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


def modes(model):
    return [(dict(m.__dict__), dict(m._parameters), dict(m._forward_hooks)) for m in model.modules()]


def same_modes(before, after):
    for (d1, p1, h1), (d2, p2, h2) in zip(before, after, strict=True):
        assert d1.keys() == d2.keys()
        assert all(p1[k] is p2[k] for k in p1)
        assert h1 == h2


@pytest.mark.parametrize("when", ["never", "forward", "backward", "between"])
def test_the_model_is_left_as_it_was(when):
    """No patched forward, no hook, the same parameter objects: also when an exception flies."""
    model = small_net()
    x, y = image_batch()
    before = modes(model)

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    handle = None
    with contextlib.suppress(StopError), per_sample_sq_norms(model):
        if when == "forward":
            with pytest.raises(RuntimeError):
                model(x[:, :1])
        loss = F.cross_entropy(model(x), y)
        if when == "backward":
            handle = model[1].weight.register_hook(stop)
        if when == "between":
            raise StopError
        loss.backward()
    if handle is not None:
        handle.remove()
    same_modes(before, modes(model))
    assert all(not p._backward_hooks for p in model.parameters())
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert "_LayerBackward" not in str(model(x).grad_fn)


def test_a_pass_cut_short_by_an_exception_does_not_count():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:

        def stop(grad):
            raise ValueError("stop")

        handle = model[0].weight.register_hook(stop)
        with pytest.raises(ValueError, match="stop"):
            F.cross_entropy(model(x), y).backward()
        handle.remove()
        with pytest.raises(RuntimeError, match="no backward pass"):
            _ = norms.total
        F.cross_entropy(model(x), y).backward()
        assert norms.total.shape == (4,)


def test_graphs_that_outlive_the_context_still_give_gradients():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no backward pass"):
        _ = norms.total


def test_one_context_inside_another():
    """On two models each has its own norms; on the same layers the inner one is refused and the outer one goes on."""
    one, two = small_net(), mlp().double()
    x, y = image_batch()
    with per_sample_sq_norms(one) as outer:
        with per_sample_sq_norms(two) as inner:
            (F.cross_entropy(one(x), y) + two(randn(4, 10)).square().mean()).backward()
        assert outer.total.shape == inner.total.shape == (4,)
        with pytest.raises(UnsupportedModule, match="leave the other per_sample_sq_norms context"):
            per_sample_sq_norms(one[3]).__enter__()
        outer.reset()
        F.cross_entropy(one(x), y).backward()
        assert outer.total.shape == (4,)
    context = per_sample_sq_norms(one)
    with context, pytest.raises(RuntimeError, match="already entered"):
        context.__enter__()


def test_a_context_can_be_entered_again():
    model = small_net()
    x, y = image_batch()
    context = per_sample_sq_norms(model)
    totals = []
    for _ in range(2):
        with context as norms:
            F.cross_entropy(model(x), y).backward()
        totals.append(norms.total)
    torch.testing.assert_close(*totals, rtol=0, atol=0)


def test_memory_of_the_graph_is_freed_with_it():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        recorder = norms._recorder
        del loss
        gc.collect()
        assert not any(recorder.pending.values())
        assert recorder._pass is None


def test_threads_each_with_a_model_of_their_own():
    jobs = [(small_net(), *image_batch(4 + k)) for k in range(3)]
    expected, got = [], {}
    for model, x, y in jobs:
        with per_sample_sq_norms(model) as norms:
            F.cross_entropy(model(x), y).backward()
        expected.append(norms.total)

    def work(seed):
        model, x, y = jobs[seed]
        for _ in range(5):
            with per_sample_sq_norms(model) as norms:
                F.cross_entropy(model(x), y).backward()
        got[seed] = norms.total

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in range(3):
        torch.testing.assert_close(got[seed], expected[seed], rtol=1e-12, atol=0)


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
    with pytest.raises(UnsupportedModule, match=message):
        per_sample_sq_norms(model).__enter__()
    if not scripted:
        same_modes(before, modes(model))


@pytest.mark.nightly
def test_a_compiled_model_is_refused():
    with pytest.raises(UnsupportedModule, match="hides its layers"):
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
        with pytest.raises(UnsupportedModule, match="BatchNorm2d"):
            model(torch.ones(2, 2, 3, 3))
    model(torch.ones(2, 2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "must be a torch.nn.Module, got int"),
        ({"loss_reduction": "none"}, ValueError, r"must be 'mean', 'sum' or a tensor of weights \[B\], got 'none'"),
        ({"parameters": [nn.Parameter(torch.zeros(1))]}, ValueError, "1 of the 1 given parameters"),
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
