"""What all samples share (position embeddings, relative biases), and first dimensions that are not the samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast import per_sample_sq_norms
from svag_fast.sample_norms import tables

T = 4


def check(model, *inputs, samples=None):
    """Norms of every parameter against one backward pass a sample, `.grad` and output against the plain model."""
    torch.manual_seed(1)
    model = model.double()
    B = len(inputs[0])
    given = [x.dim() > 0 and len(x) == B for x in inputs] if samples is None else samples
    target = torch.randn_like(model(*inputs))

    def loss(inputs, target):
        return (model(*inputs) * target).sum()

    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = []
    for i in range(B):
        row = [x[i : i + 1] if has else x for x, has in zip(inputs, given, strict=True)]
        grads = torch.autograd.grad(loss(row, target[i : i + 1]), parameters, allow_unused=True)
        expected.append([0.0 if g is None else float(g.square().sum()) for g in grads])
    plain = torch.autograd.grad(loss(inputs, target), parameters, allow_unused=True)
    output = model(*inputs)
    for _ in range(2):  # the second pass goes by what the first has found out
        model.zero_grad()
        with per_sample_sq_norms(model, loss_reduction="sum", check=True) as norms:
            ours = model(*inputs)
            assert torch.equal(ours, output) or torch.allclose(ours, output, rtol=1e-12, atol=1e-14)
            (ours * target).sum().backward()
        for name, column in zip(names, torch.tensor(expected).double().reshape(B, len(names)).T, strict=True):
            torch.testing.assert_close(norms[name], column.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
        for name, p, g in zip(names, model.parameters(), plain, strict=True):
            if g is not None:
                torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(7, 6), nn.Embedding(9, 6), nn.Linear(6, 7)
        self.register_buffer("positions", torch.arange(9)[None])
        self.register_buffer("waves", torch.sin(torch.arange(54.0)).reshape(9, 6))


class NanoGPT(Base):
    """nanoGPT: positions [T]."""

    def forward(self, words):
        return self.head(torch.tanh(self.wte(words) + self.wpe(torch.arange(words.shape[1]))))


class PositionsFirst(Base):
    def forward(self, words):
        return self.head(torch.tanh(self.wpe(torch.arange(words.shape[1])) + self.wte(words)))


class GPT2(Base):
    """transformers' GPT-2: positions [1, T], made inside."""

    def forward(self, words):
        positions = torch.arange(words.shape[-1], dtype=torch.long, device=words.device).unsqueeze(0)
        x = self.wte(words)
        return self.head(torch.tanh(x + self.wpe(positions).to(x.device)))


class Bert(Base):
    """transformers' BERT: a buffer of positions [1, T], added in place."""

    def forward(self, words):
        x = self.wte(words) * 1
        x += self.wpe(self.positions[:, : words.shape[1]])
        return self.head(F.layer_norm(x, (6,)))


class Unsqueezed(Base):
    def forward(self, words):
        return self.head(self.wte(words) * (1 + self.wpe(torch.arange(words.shape[1])).unsqueeze(0)))


class Given(Base):
    """Positions as an argument."""

    def forward(self, words, positions):
        return self.head(torch.tanh(self.wte(words) + self.wpe(positions)))


class WithWaves(Base):
    """A learned table plus a fixed one, then samples."""

    def forward(self, words):
        T = words.shape[1]
        return self.head(torch.tanh(self.wte(words) + (self.wpe(torch.arange(T)) + self.waves[:T])))


class EachPosition(Base):
    """A row of the table at a time: an expanded table would be read along the samples."""

    def forward(self, words):
        table, x = self.wpe(torch.arange(words.shape[1])), self.wte(words)
        return torch.stack([self.head(torch.tanh(x[:, t] + table[t])) for t in range(words.shape[1])], 1)


class RelativeBias(nn.Module):
    """T5: an embedding of [T, T] buckets, permuted to [1, heads, T, T] and added to the scores."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.k, self.bias = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(9, 2)

    def forward(self, words):
        B, T = words.shape
        x = self.embed(words)
        q, k = (f(x).view(B, T, 2, 3).transpose(1, 2) for f in (self.q, self.k))
        distance = (torch.arange(T)[:, None] - torch.arange(T)[None]).clamp(-4, 4) + 4
        scores = q @ k.transpose(2, 3)
        scores += self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        return scores.softmax(-1).transpose(1, 2).flatten(2)


class RelativeKeys(nn.Module):
    """Shaw: queries times embedded distances."""

    def __init__(self):
        super().__init__()
        self.embed, self.distance = nn.Embedding(7, 6), nn.Embedding(9, 6)

    def forward(self, words):
        return torch.tanh(self.embed(words)) @ self.distance(torch.arange(words.shape[1])).mT


class ContinuousBias(nn.Module):
    """Swin v2: a small net on a table of coordinates [1, T, 2]; also through a normalisation."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 6))
        self.register_buffer("coordinates", torch.linspace(-1, 1, 18).reshape(1, 9, 2))

    def forward(self, words):
        return torch.sigmoid(self.embed(words) + self.net(self.coordinates[:, : words.shape[1]]))


class ClassToken(nn.Module):
    """A learned token before each sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.token, self.head = nn.Embedding(7, 6), nn.Embedding(1, 6), nn.Linear(6, 3)

    def forward(self, words):
        token = self.token(torch.zeros(1, 1, dtype=torch.long)).expand(len(words), -1, -1)
        return self.head(torch.cat([token, self.embed(words)], 1).tanh())


class Recurrent(nn.Module):
    """A state that starts at zero, [B, d]: a constant, but one row a sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, words):
        x, h = self.embed(words), torch.zeros(words.shape[0], 6, dtype=torch.float64)
        for t in range(words.shape[1]):
            h = torch.tanh(x[:, t] + self.hidden(h))
        return self.head(h)


class Labelled(nn.Module):
    """A label for each sample, [B]."""

    def __init__(self):
        super().__init__()
        self.embed, self.label, self.mix = nn.Embedding(7, 6), nn.Embedding(8, 6), nn.Linear(6, 6)

    def forward(self, words, labels):
        return torch.tanh(self.embed(words) + self.mix(self.label(labels))[:, None])


class RawPlusTable(nn.Module):
    """Data that has not been through a layer, plus a table."""

    def __init__(self):
        super().__init__()
        self.wpe, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(x + self.wpe(torch.arange(x.shape[1]))))


class Prior(nn.Module):
    """A convolution and a normalisation of a fixed image [1, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.image, self.prior = nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
        self.register_buffer("grid", torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6).sin())

    def forward(self, x):
        return torch.tanh(self.image(x) * self.prior(self.grid))


def words(B, length=T):
    return torch.randint(0, 7, (B, length), generator=torch.Generator().manual_seed(B))


ON_WORDS = [
    NanoGPT,
    PositionsFirst,
    GPT2,
    Bert,
    Unsqueezed,
    WithWaves,
    EachPosition,
    RelativeBias,
    RelativeKeys,
    ContinuousBias,
    ClassToken,
    Recurrent,
]


@pytest.mark.parametrize("B", [T, 3, 1, 0])
@pytest.mark.parametrize("net", ON_WORDS)
def test_tables_have_each_samples_own_norms(net, B):
    """Trap: rows taken for samples by their number, where T == B; refused at every other B."""
    torch.manual_seed(0)
    check(net(), words(B))


def test_a_model_works_where_the_number_of_positions_becomes_the_batch_size():
    torch.manual_seed(0)
    net = NanoGPT()
    for B, length in ((3, 5), (5, 5), (2, 6), (6, 6)):
        check(net, words(B, length))


@pytest.mark.parametrize("B", [T, 3])
def test_positions_as_an_argument(B):
    torch.manual_seed(0)
    check(Given(), words(B), torch.arange(T), samples=[True, False])
    check(Given(), words(B), torch.arange(T)[None], samples=[True, B == 1])
    check(Given(), words(B), torch.arange(T).expand(B, -1), samples=[True, True])


@pytest.mark.parametrize("B", [T, 3])
def test_one_label_a_sample(B):
    torch.manual_seed(0)
    check(Labelled(), words(B), torch.arange(B) % 8)


@pytest.mark.parametrize("B", [T, 3])
def test_a_table_that_meets_raw_data(B):
    torch.manual_seed(0)
    check(RawPlusTable(), torch.randn(B, T, 6, dtype=torch.float64))


@pytest.mark.parametrize("B", [1, 3])
def test_layers_on_a_fixed_image(B):
    torch.manual_seed(0)
    net = Prior()
    net.prior[0] = nn.Conv2d(1, 4, 3, padding=1)
    check(net, torch.randn(B, 2, 6, 6, dtype=torch.float64))


def test_a_checkpointed_table():
    torch.manual_seed(0)
    net = NanoGPT().double()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, words):
            return checkpoint(self.net, words, use_reentrant=False)

    check(Checkpointed(), words(T))


def total(net, *inputs, **options):
    with per_sample_sq_norms(net, **options) as norms:
        net(*inputs).square().mean().backward()
        return norms.total


class Folded(Base):
    """Samples and positions folded into the first dimension."""

    def forward(self, words):
        return self.head(self.wte(words).flatten(0, 1))


class FoldedWords(Base):
    def forward(self, words):
        return self.head(self.wte(words.flatten()).view(*words.shape, 6))


class TimeFirst(Base):
    def forward(self, words):
        return self.head(self.wte(words).transpose(0, 1))


class ThroughSoftmax(Base):
    """The table normalised over its positions, then mixed by a function that nobody follows."""

    def forward(self, words):
        return torch.einsum("btd,sd->bts", self.wte(words), self.wpe(torch.arange(words.shape[1])).softmax(0))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Folded, r"the first dimension of head \(Linear\)'s input must be the model's 3 samples \(not samples"),
        (FoldedWords, r"the first dimension of wte \(Embedding\)'s input must be the model's 3 samples \(not"),
        (TimeFirst, r"the first dimension of head \(Linear\)'s input must be the model's 3 samples \(not samples"),
    ],
)
def test_rows_that_are_no_samples_are_refused_in_the_forward_pass(net, message):
    with pytest.raises(ValueError, match=message):
        total(net(), words(3))


class Centred(Base):
    """Each sample minus the batch's mean."""

    def forward(self, words):
        x = self.wte(words)
        return self.head(x - x.mean(0))


class Experts(Base):
    """As many tokens as there are samples, gathered from all of them."""

    def forward(self, words):
        tokens = self.wte(words).flatten(0, 1)
        return self.head(tokens[:: words.shape[1]].roll(1, 0))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("net", [TimeFirst, Centred, Experts])
def test_rows_that_only_happen_to_be_the_batch_size_are_found_out(net, check):
    """Where B is T nothing but the dependence of the rows shows that they are no samples."""
    with pytest.raises(ValueError, match=r"head \(Linear\): the rows 1, 3 of its input depend on other rows of wte"):
        total(net(), words(T), check=check)


def test_a_table_that_can_not_be_followed_is_refused_with_its_layer():
    with pytest.raises(RuntimeError, match=r"wpe \(Embedding\) was given a value that.*3 samples.*'einsum'.*expand"):
        total(ThroughSoftmax(), words(3))


def test_a_table_as_the_models_output_is_no_loss():
    class Only(Base):
        def forward(self, words):
            self.wte(words)
            return self.wpe(torch.arange(words.shape[1]))

    with pytest.raises(RuntimeError, match=r"wpe \(Embedding\).*'backward'"):
        total(Only(), words(3))


def test_layers_called_without_the_model():
    """Indices [n] outside of the model's forward may be labels or positions."""
    net = Base()
    with per_sample_sq_norms(net), pytest.raises(ValueError, match=r"wpe \(Embedding\).*batch_size="):
        net.wpe(torch.arange(4))
    with per_sample_sq_norms(net, batch_size=3, loss_reduction="sum") as norms:
        h = torch.tanh(net.wte(words(3)) + net.wpe(torch.arange(4)))
        net.head(h).square().sum().backward()
        got = norms.total
    with per_sample_sq_norms(NanoGPT(), loss_reduction="sum") as norms:
        model = NanoGPT()
    model.load_state_dict(net.state_dict())
    with per_sample_sq_norms(model, loss_reduction="sum") as norms:
        model(words(3)).square().sum().backward()
        torch.testing.assert_close(got, norms.total)


def test_the_batch_size_may_be_given():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, edges, x):
            return self.linear(x) + edges.sum()

    net, edges, x = Graph(), torch.ones(2, 9), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match=r"linear \(Linear\).*2 samples .pass batch_size="):
        total(net, edges, x)
    assert total(net, edges, x, batch_size=4).shape == (4,)


@pytest.mark.parametrize(("value", "error"), [(2.0, TypeError), (True, TypeError), (-1, ValueError)])
def test_a_batch_size_that_is_none_is_refused(value, error):
    with pytest.raises(error, match=r"batch_size must be .* got"):
        per_sample_sq_norms(nn.Linear(2, 2), batch_size=value)


def test_inputs_in_containers():
    class Packed(Base):
        def forward(self, batch):
            return self.head(self.wte(batch["words"]) + self.wpe(torch.arange(T)))

    for B in (T, 3):
        torch.manual_seed(0)
        net = Packed().double()
        reference = NanoGPT().double()
        reference.load_state_dict(net.state_dict())
        with per_sample_sq_norms(net) as norms:
            net({"words": words(B)}).square().mean().backward()
        assert norms.total.shape == (B,)


class Uses(nn.Module):
    """One layer on the values that a function makes of the input and of what the samples share."""

    def __init__(self, layer, shared, values):
        super().__init__()
        self.layer, self.head, self.prompt = layer, nn.Linear(6, 3), nn.Embedding(9, 6)
        self.register_buffer("shared", shared)
        self.values = values

    def forward(self, x):
        return self.head(torch.tanh(sum(self.layer(value) for value in self.values(self, x)))).mean(1)


VALUES = {
    "samples": lambda net, x: [x],
    "samples that don't show it": lambda net, x: [x * 1],
    "samples and shared": lambda net, x: [x, net.shared],
    "shared and samples": lambda net, x: [net.shared, x],
    "samples that don't show it and shared": lambda net, x: [x * 1, net.shared],
    "samples twice": lambda net, x: [x, x * 1],
}
ON_VECTORS = VALUES | {"a value with a gradient": lambda net, x: [x, net.prompt(torch.arange(x.shape[1]))]}


def own_norms(net, x, parameters):
    rows = [torch.autograd.grad(net(x[i : i + 1]).square().sum(), parameters, allow_unused=True) for i in range(len(x))]
    return torch.stack([sum(g.square().sum() for g in row if g is not None) for row in rows])


@pytest.mark.parametrize("length", [T, T + 1])
@pytest.mark.parametrize("later", ON_VECTORS)
@pytest.mark.parametrize("first", ["samples", "samples that don't show it"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_what_a_layer_is_given_may_be_another_thing_in_each_pass(kind, first, later, length):
    """T = B positions look like samples: a layer that had samples only may yet be given a value that they share."""
    if kind is nn.Embedding and later not in VALUES:
        pytest.skip("indices have no gradient")
    torch.manual_seed(0)
    linear = kind is nn.Linear
    shared = torch.randn(length, 6) if linear else torch.arange(length)
    x = torch.randn(T, length, 6).double() if linear else torch.randint(9, (T, length))
    net = Uses(kind(9 - 3 * linear, 6), shared, None).double()
    tracked = [*net.layer.parameters(), *net.head.parameters()]  # the prompt is trained, and not tracked
    expected = {}
    for name in (first, later):
        net.values = ON_VECTORS[name]
        expected[name] = own_norms(net, x, tracked)
    for contexts in ((first, later, later), (later, first, later)):
        with per_sample_sq_norms(net, loss_reduction="sum", parameters=tracked) as norms:
            for name in contexts:
                net.values = ON_VECTORS[name]
                norms.reset()
                net(x).square().sum().backward()
                torch.testing.assert_close(norms.total, expected[name], rtol=1e-10, atol=1e-12)


def test_a_pass_is_followed_no_further_than_its_last_question(monkeypatch):
    """Inputs that don't show that they are samples (`x / 255`) cost little: the layers behind are not followed."""
    followed = []
    mark = tables.Provenance._mark
    monkeypatch.setattr(tables.Provenance, "_mark", lambda self, new: (followed.append(1), mark(self, new)))
    x = torch.randn(T, 5, 6).double()
    for values, most in (("samples", 0), ("samples that don't show it", 3)):
        net = Uses(nn.Linear(6, 6), torch.zeros(5, 6), VALUES[values]).double()
        net.prompt.requires_grad_(False)
        for _ in range(4):
            followed.clear()
            with per_sample_sq_norms(net) as norms:
                net(x).square().mean().backward()
            assert norms.total.shape == (T,)
        assert len(followed) <= most
