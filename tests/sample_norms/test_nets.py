"""Per-sample norms of whole nets, of modules used more than once, in other precisions and memory formats."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sample_norm_nets import Block, block, image_batch, mlp, randn, small_net
from sample_norm_oracle import check, loop, loss_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svag_fast import per_sample_sq_norms
from svag_fast.experiments import models

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
