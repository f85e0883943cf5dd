"""What went wrong with per-sample gradients elsewhere, by public bug reports: here the right value, or a clear refusal.

Each case is named by its report. The oracle: one backward pass a sample, in float64.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import UnsupportedModuleError, by_vmap, per_sample_sq_norms, register_rule
from svag_fast.sample_norms import rule as rules

B, T, C = 5, 5, 6  # as many positions as samples: nothing tells them apart by their number


@pytest.fixture(autouse=True)
def _own_rules(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


class Net(nn.Module):
    """Layers by name, and a function of them and of the inputs as the forward."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def rows(*shape):
    return torch.randn(B, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss(output):
    return (output * output.detach().cos() + output.square()).flatten(1).sum(1).mean()


def expected(net, *inputs):
    parameters = [p for p in net.parameters() if p.requires_grad]
    norms = []
    for i in range(B):
        grads = torch.autograd.grad(loss(net(*(x[i : i + 1] for x in inputs))), parameters, allow_unused=True)
        norms.append(sum(g.square().sum() for g in grads if g is not None))
    return torch.stack(norms)


def attend(net, x):
    """Self-attention by hand over the second dimension."""
    q, k, v = net.qkv(x).chunk(3, -1)
    return net.out(torch.softmax(q @ k.mT, -1) @ v)


def attention(**more):
    return {"qkv": nn.Linear(C, 3 * C), "out": nn.Linear(C, C), **more}


def each_layer(net, x):
    """One normalisation used behind every layer, as decoders do that return what is between."""
    out = []
    for layer in (net.a, net.b, net.c):
        x = torch.tanh(layer(x))
        out.append(net.norm(x))
    return torch.stack(out, 1)


def residual(net, x):
    y = net.conv(x).relu_()
    out = net.norm(net.again(y))
    out += y
    return out.relu_()


def tied():
    net = Net(lambda net, w: net.head(torch.tanh(net.words(w))), words=nn.Embedding(7, C), head=nn.Linear(C, 7))
    net.head.weight = net.words.weight
    return net


class LinearLike(nn.Module):
    """A linear layer that uses its weight twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))
        self.bias = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight, self.bias)


class Nested(nn.Module):
    """A layer with a rule by vmap around a layer that has a rule of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(C, C)
        self.scale = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return self.inner(x) * self.scale


class BertLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def vmap_of(*kinds):
    register_rule(*kinds)(by_vmap)


words = torch.randint(0, 7, (B, T), generator=torch.Generator().manual_seed(0))

RIGHT = {
    "opacus 751: a bias behind positions": (lambda: Net(attend, **attention()), rows(T, C)),
    "opacus 413: tied parameters": (tied, words),
    "opacus 578: one normalisation used behind each layer": (
        lambda: Net(each_layer, a=nn.Linear(C, C), b=nn.Linear(C, C), c=nn.Linear(C, C), norm=nn.LayerNorm(C)),
        rows(T, C),
    ),
    "opacus 694: words that come again, a dimension of one": (
        lambda: Net(lambda net, w: net.words(w), words=nn.Embedding(7, C, padding_idx=0)),
        words[:, :, None] % 3,
    ),
    "opacus 645: heads of which one is used": (
        lambda: Net(lambda net, x: net.heads[1](net.body(x)), body=nn.Linear(C, C), heads=nn.ModuleList(
            nn.Linear(C, k) for k in (2, 3, 4))),
        rows(C),
    ),
    "opacus 511: a linear-like layer by vmap": (lambda: (vmap_of(LinearLike), Net(
        lambda net, x: net.one(torch.tanh(net.two(x))), one=LinearLike(), two=LinearLike()))[1], rows(C)),
    "opacus 445: a layer by vmap around another": (lambda: (vmap_of(Nested), nn.Sequential(
        Nested(), nn.Tanh(), Nested()))[1], rows(T, C)),
    "opacus 100: a normalisation by hand": (lambda: (vmap_of(BertLayerNorm), Net(
        lambda net, x: net.norm(net.a(x)), a=nn.Linear(C, C), norm=BertLayerNorm()))[1], rows(T, C)),
    "backpack 318: in-place functions and a residual": (
        lambda: Net(residual, conv=nn.Conv2d(2, 4, 3, padding=1), again=nn.Conv2d(4, 4, 3, padding=1),
                    norm=nn.GroupNorm(2, 4)),
        rows(2, 5, 4),
    ),
    "pytorch 80953: a grouped 3-D convolution": (
        lambda: nn.Conv3d(4, 8, 2, stride=1, padding=2, groups=2), rows(4, 3, 4, 4)),
    "functorch 381: writing into a layer's output": (
        lambda: Net(lambda net, x: net.b(net.a(x).index_add_(1, torch.tensor([0]), x[:, :1])), a=nn.Linear(C, C),
                    b=nn.Linear(C, 2)),
        rows(C),
    ),
    "opacus 650: attention that turns its input": (
        lambda: Net(lambda net, x: net.head(net.layers(x)), head=nn.Linear(C, 3), layers=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True), 2)),
        rows(T, C),
    ),
    "gc-dpr 12: a checkpointed tower": (
        lambda: Net(lambda net, x: net.b(checkpoint(lambda h: torch.tanh(net.a(h)), x, use_reentrant=False)),
                    a=nn.Linear(C, C), b=nn.Linear(C, C)),
        rows(T, C).requires_grad_(),
    ),
}  # fmt: skip

POSITIONS_FIRST = r"depend on other rows of .*positions first.*batch_first=False.*Give the model"


def attend_first(net, x):
    """Self-attention over the first dimension."""
    q, k, v = net.qkv(x).transpose(0, 1).chunk(3, -1)
    return net.out((torch.softmax(q @ k.mT, -1) @ v).transpose(0, 1))


def with_mean(net, x):
    return net.a(torch.cat([x, torch.tanh(net.b(x)).mean(0, keepdim=True).expand(B, -1)], 1))


def contrast(net, x, y):
    return net.a(x) @ net.b(y).T


REFUSED = {
    "opacus 158: positions first": (lambda: Net(attend_first, **attention()), rows(T, C), POSITIONS_FIRST),
    "opacus 158: fewer positions than samples": (
        lambda: Net(attend_first, **attention()), rows(T, C)[:4], POSITIONS_FIRST),
    "opacus 158: positions first, pooled before the last layer": (
        lambda: Net(lambda net, x: net.head(attend_first(net, x).mean(0)), **attention(head=nn.Linear(C, 3))),
        rows(T, C), POSITIONS_FIRST),
    "opacus 158: fewer positions, pooled at the end": (
        lambda: Net(lambda net, x: attend_first(net, x).mean(0), **attention()), rows(T, C)[:4], POSITIONS_FIRST),
    "positions first, each by itself, pooled": (
        lambda: Net(lambda net, x: torch.tanh(net.a(x)).mean(0), a=nn.Linear(C, C)), rows(T, C), POSITIONS_FIRST),
    "fewer positions first, each by itself, pooled": (
        lambda: Net(lambda net, x: torch.tanh(net.a(x)).mean(0), a=nn.Linear(C, C)), rows(T, C)[:4],
        "the model's output must be of the 4 samples that its input's first dimension was taken"),
    "turned before the first layer and behind the last": (
        lambda: Net(lambda net, x: net.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(C, C)), rows(T, C),
        POSITIONS_FIRST),
    "opacus 158: the library's own attention, positions first": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 8), 1, enable_nested_tensor=False), rows(T, C),
        r"layers.0.self_attn .*the samples must come first: build it with batch_first=True"),
    "the same, frozen, below a head": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(C, 2, 8).requires_grad_(False), nn.Linear(C, 3)), rows(T, C),
        r"the input of 0\.self_attn \(MultiheadAttention\), which takes the samples second"),
    "backpack 270: a frozen recurrent layer, positions first": (
        lambda: Net(lambda net, x: net.head(net.lstm(x)[0]), lstm=nn.LSTM(C, C).requires_grad_(False),
                    head=nn.Linear(C, 3)),
        rows(T, C), r"the input of lstm \(LSTM\), which takes the samples second \(batch_first=False\), must be"),
    "backpack 270: with fewer positions": (
        lambda: Net(lambda net, x: net.head(net.lstm(x)[0]), lstm=nn.LSTM(C, C).requires_grad_(False),
                    head=nn.Linear(C, 3)),
        rows(T, C)[:4], r"the input of lstm \(LSTM\), which takes the samples second \(batch_first=False\), must be"),
    "functorch 296: the batch's mean beside each sample": (
        lambda: Net(with_mean, a=nn.Linear(2 * C, 3), b=nn.Linear(C, C)), rows(C),
        r"a \(Linear\): the rows 1, 3 of its input depend on other rows of b \(Linear\)'s output.*mixes the samples"),
    "functorch 1106: hooks under vmap": (
        lambda: Net(lambda net, x: torch.func.vmap(net.a)(x), a=nn.Linear(C, 2)), rows(C),
        r"under a transform of torch.func .*outside of the context"),
    "backpack 239: batch normalisation": (
        lambda: nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), rows(C), r"1 \(BatchNorm1d\).*couples the samples"),
    "backpack 219: a transposed convolution": (
        lambda: nn.Sequential(nn.Conv1d(C, 4, 1), nn.ConvTranspose1d(4, C, 1)), rows(C, 3),
        r"1 \(ConvTranspose1d\): transposed convolutions are not supported"),
    "opacus 100: a normalisation by hand without a rule": (
        lambda: Net(lambda net, x: net.norm(x), norm=BertLayerNorm()), rows(C),
        r"norm \(BertLayerNorm\): no rule for it, or teach it"),
    "opacus 246: words' characters folded into the samples": (
        lambda: Net(lambda net, w: net.letters(w.flatten(0, 1)).mean(1), letters=nn.Embedding(7, C)),
        words[:, :, None].expand(B, T, 2),
        r"the first dimension of letters \(Embedding\)'s input must be the model's 5 samples \(not"),
}  # fmt: skip


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("build", "x"), RIGHT.values(), ids=RIGHT.keys())
def test_reports_of_wrong_values(build, x, check):
    torch.manual_seed(0)
    net = build().double()
    for _ in range(2):  # the first pass of a model goes another way than the others
        with per_sample_sq_norms(net, check=check) as norms:
            loss(net(x)).backward()
            torch.testing.assert_close(norms.total, expected(copy.deepcopy(net), x), rtol=1e-10, atol=1e-20)


@pytest.mark.filterwarnings("ignore:.*was not called with .batch_first=True.")
@pytest.mark.parametrize(("build", "x", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_reports_of_values_that_are_none(build, x, message):
    torch.manual_seed(0)
    net = build().double()
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError, UnsupportedModuleError), match=message), per_sample_sq_norms(net):
            loss(net(x)).backward()


def test_a_contrastive_model_is_refused_and_its_towers_are_served():
    """Report: luyug/GC-DPR 12, gradients cached at the towers' outputs; there chunks of the samples follow."""
    torch.manual_seed(0)
    x, y = rows(C), rows(C).flip(0)
    net = Net(contrast, a=nn.Linear(C, 4), b=nn.Linear(C, 4)).double()
    with (
        per_sample_sq_norms(net),
        pytest.raises(ValueError, match=r"the rows 1, 3 of the model's output .*mixes the samples"),
    ):
        net(x, y)
    tower = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 4)).double()
    with torch.no_grad():
        cached = tower(x)
    cached.requires_grad_()
    F.cross_entropy(cached @ cached.T, torch.arange(B)).backward()
    with per_sample_sq_norms(tower, loss_reduction="sum") as norms:
        for some, grad in zip(x.split(2), cached.grad.split(2), strict=True):
            tower(some).backward(grad)
        ours = norms.total
    for i in range(B):
        grads = torch.autograd.grad(tower(x[i : i + 1]), list(tower.parameters()), cached.grad[i : i + 1])
        torch.testing.assert_close(ours[i], sum(g.square().sum() for g in grads), rtol=1e-10, atol=0.0)


def test_each_layers_rows_are_checked_once():
    """Once for a model, a pass for each bit of B, in whatever context; where new layers come, once more."""
    net = Net(attend, **attention()).double()
    times = []
    net.qkv.register_full_backward_hook(lambda *_: times.append(1))
    for expected_times in (4, 1, 1):  # B = 5 has 3 bits
        times.clear()
        with per_sample_sq_norms(net):
            loss(net(rows(T, C))).backward()
        assert len(times) == expected_times
    net.out = nn.Linear(C, C).double()
    times.clear()
    with per_sample_sq_norms(net):
        loss(net(rows(T, C))).backward()
    assert len(times) == 4


def test_a_graph_that_can_not_be_gone_back_through_twice_makes_the_norms_unknown():
    net = Net(
        lambda net, x: net.b(checkpoint(torch.tanh, net.a(x), use_reentrant=True)), a=nn.Linear(C, C), b=nn.Linear(C, 2)
    ).double()
    loss(net(rows(C))).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with per_sample_sq_norms(net) as norms:
        loss(net(rows(C))).backward()
        with pytest.raises(RuntimeError, match=r"rows of the model are its samples.*use_reentrant=False"):
            _ = norms.total
        outputs = net(rows(C))
        norms.reset()  # forgets the passes before, not what its forward pass could not tell
        loss(outputs).backward()
        with pytest.raises(RuntimeError, match="rows of the model are its samples"):
            _ = norms.total
        net.zero_grad()
        loss(net(rows(C))).backward()
    for p, grad in zip(net.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h.cumsum(0),
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: F.normalize(h) @ F.normalize(h).T,
    ],
)
def test_samples_mixed_behind_the_last_layer(mix, check):
    net = Net(lambda net, x: mix(net.a(x)), a=nn.Linear(C, 4)).double()
    with (
        per_sample_sq_norms(net, check=check),
        pytest.raises(ValueError, match="the rows 1, 3 of the model's output depend"),
    ):
        net(rows(C))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(
    "order",
    [
        lambda B: torch.arange(B).flip(0),  # keeps the middle in its place
        lambda B: torch.tensor([*range(1, B // 2), 0, *range(B // 2, B)] if B > 3 else [*range(B)][::-1]),
        lambda B: torch.arange(B).roll(1),
        lambda B: torch.tensor([k ^ 1 if (k ^ 1) < B else k for k in range(B)]),
    ],
    ids=["reversed", "first half turned", "rolled", "neighbours exchanged"],
)
def test_rows_in_another_order_than_the_models_input_are_found_out(order, batch_size, check):
    """Sorted before a layer (by length, by expert) and put back behind it: norms would be other samples'."""
    places = order(batch_size)
    net = Net(
        lambda net, x: net.b(torch.tanh(net.a(x[places])))[places.argsort()], a=nn.Linear(C, 4), b=nn.Linear(4, 2)
    )
    with per_sample_sq_norms(net.double(), check=check), pytest.raises(ValueError, match="in their order"):
        net(rows(C)[torch.arange(batch_size) % B])
