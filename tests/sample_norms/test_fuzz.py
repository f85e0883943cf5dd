"""Every layer with a rule, on every kind of tensor, against autograd: `.grad` of parameters and input, and norms."""

import itertools
import random

import pytest
import torch
from torch import nn

from svag_fast import by_vmap, per_sample_sq_norms, register_rule
from svag_fast.sample_norms import rule as sample_norm_rules

B = 3


class Scale(nn.Module):
    """A layer that only `by_vmap` serves: y = weight * x + shift."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.weight * x + self.shift


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr(sample_norm_rules, "_RULES", dict(sample_norm_rules._RULES))
    register_rule(Scale)(by_vmap)


# How to make the layer, and the shapes of inputs with B samples.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), [(B, 6), (B, 5, 6), (B, 2, 3, 6)]),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), [(B, 6), (B, 5, 6)]),
    "wide linear": (lambda: nn.Linear(40, 24), [(B, 40), (B, 9, 40)]),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), [(B, 6, 7)]),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), [(B, 6, 5, 4)]),
    "conv2d, groups, stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False), [(B, 6, 5, 4)]),
    "conv2d, reflected": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), [(B, 6, 5, 4)]),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, padding=1), [(B, 6, 3, 4, 3)]),
    "embedding": (lambda: nn.Embedding(7, 6, padding_idx=2), [(B,), (B, 5)]),
    "layer norm": (lambda: nn.LayerNorm(6), [(B, 6), (B, 5, 6)]),
    "rms norm": (lambda: nn.RMSNorm(6, eps=0.01), [(B, 6), (B, 5, 6)]),
    "group norm": (lambda: nn.GroupNorm(2, 6), [(B, 6), (B, 6, 4), (B, 6, 5, 4)]),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), [(B, 6, 5, 4)]),
    "batch norm": (lambda: nn.BatchNorm2d(6).eval(), [(B, 6, 5, 4)]),
    "prelu": (lambda: nn.PReLU(), [(B,), (B, 6), (B, 6, 4)]),
    "prelu by channel": (lambda: nn.PReLU(6), [(B, 6), (B, 6, 4)]),
    "attention": (lambda: Itself(), [(B, 5, 6)]),
    "by vmap": (lambda: Scale(), [(B, 6), (B, 5, 6)]),
}


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t):
    out = t.new_zeros([2 * n + 1 for n in t.shape])[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return out.copy_(t)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def same_rows(t):
    """Zero stride over the samples."""
    return t[:1].expand(t.shape) if len(t) else t


def same_columns(t):
    """Zero stride over the last dimension."""
    return t[..., :1].expand(t.shape) if t.numel() else t


def negative_bit(t):
    """Memory that holds -t."""
    if not t.is_floating_point() or t.dtype in (torch.bfloat16, torch.float16):
        return t  # no complex type of this precision to make it from
    out = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert out.is_neg()
    return out


def conjugate_bit(t):
    """Memory that holds the conjugate of t."""
    return t.conj().resolve_conj().conj() if t.is_complex() else t


MEMORY = {
    f.__name__: f
    for f in (
        torch.Tensor.contiguous,
        transposed,
        sliced,
        channels_last,
        same_rows,
        same_columns,
        negative_bit,
        conjugate_bit,
    )
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64]
COMPLEX = {name for name in LAYERS if "linear" in name or "conv" in name} | {"by vmap", "rms norm"}
TOLERANCE = {torch.float64: 1e-11, torch.complex128: 1e-11, torch.float32: 2e-5, torch.complex64: 2e-5}


def make_input(shape, layer, dtype, memory):
    if isinstance(layer, nn.Embedding):
        return MEMORY[memory](torch.randint(0, 7, shape))
    return MEMORY[memory](torch.randn(shape, dtype=torch.float64).to(dtype)).detach().requires_grad_()


def plainly(t):
    """Dense, without bits."""
    return t.resolve_neg().resolve_conj().contiguous()


def close(ours, theirs, dtype, name, atol=1e-30):
    """Relative to the largest element."""
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    rtol = TOLERANCE.get(dtype, 0.2)
    torch.testing.assert_close(
        ours, theirs, rtol=rtol, atol=rtol * scale + atol, msg=lambda m: f"{name}: {m}", check_stride=False
    )


def against_autograd(layer, x, b, context):
    """One pass with and one without the context, and one for each sample in double precision."""
    x_plain, x_ours = (x.detach().requires_grad_(x.requires_grad) for _ in range(2))
    layer(x_plain).backward(b)
    plain = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    with per_sample_sq_norms(layer, loss_reduction="sum", **context) as norms:
        layer(x_ours).backward(b)
        total = norms.total
    for (name, p), expected in zip(layer.named_parameters(), plain, strict=True):
        assert p.grad.dtype == expected.dtype
        close(p.grad, expected, p.dtype, name)
    if x.requires_grad:
        close(x_ours.grad, x_plain.grad, x.dtype, "input")
    if not len(x):
        assert total.shape == (0,)
        return
    wide = layer.to(torch.promote_types(next(layer.parameters()).dtype, torch.float64))
    names, parameters = zip(*wide.named_parameters(), strict=True)
    expected = []
    for i in range(len(x)):
        row = plainly(x[i : i + 1].detach())
        out = wide(row if isinstance(layer, nn.Embedding) else row.to(parameters[0].dtype))
        grads = torch.autograd.grad(out, parameters, plainly(b[i : i + 1].to(out.dtype)))
        expected.append([g.abs().double().square().sum() for g in grads])
    for name, column in zip(names, torch.tensor(expected).double().T, strict=True):
        size = float(b.abs().double().square().sum())  # an input of equal columns leaves nothing of a normalised one
        close(norms[name], column, b.dtype, f"norms of {name}", size * TOLERANCE.get(b.dtype, 0.05) ** 2)


KINDS = [(name, dtype) for name in LAYERS for dtype in DTYPES if not (dtype.is_complex and name not in COMPLEX)]
PAIRS = list(itertools.product(MEMORY, MEMORY))


def on_memory(name, dtype, pairs):
    torch.manual_seed(0)
    build, shapes = LAYERS[name]
    for (of_input, of_grad), shape in zip(pairs, itertools.cycle(shapes)):
        layer = build().to(dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64))
        x = make_input(shape, layer, dtype, of_input)
        with torch.no_grad():
            shape_out = layer(x).shape
        b = MEMORY[of_grad](torch.randn(shape_out, dtype=torch.float64).to(dtype))
        against_autograd(layer, x, b, {"check": of_input == "sliced"})


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_gradients_and_norms_on_all_kinds_of_tensors(name, dtype):
    """Trap: kernels that read memory as if it were dense, or its bits as if they were the values."""
    rng = random.Random(f"{name} {dtype}")
    on_memory(name, dtype, [("contiguous", "same_rows"), ("negative_bit", "negative_bit"), rng.choice(PAIRS)])


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_gradients_and_norms_on_every_pair_of_kinds(name, dtype):
    on_memory(name, dtype, PAIRS)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_in_any_memory_order(name):
    torch.manual_seed(0)
    build, shapes = LAYERS[name]
    for memory, dtype in itertools.product((transposed, sliced, channels_last), (torch.float64, torch.float32)):
        layer = build().to(dtype)
        for p in layer.parameters():
            p.data = memory(torch.randn(p.shape, dtype=dtype))
        x = make_input(shapes[-1], layer, dtype, "contiguous")
        b = torch.randn_like(layer(x).detach())
        against_autograd(layer, x, b, {})


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batches_and_empty_dimensions(name):
    """Traps: Poisson sampling draws no sample; a sequence of no tokens."""
    if name == "instance norm":
        pytest.skip("PyTorch itself refuses an empty batch")
    build, shapes = LAYERS[name]
    for shape in shapes:
        empty = [(0, *shape[1:])]
        if len(shape) == 3 and name in {"linear", "layer norm", "rms norm", "embedding", "by vmap"}:
            empty.append((B, 0, shape[-1]))
        if name == "embedding" and len(shape) == 2:
            empty.append((B, 0))
        for some in empty:
            layer = build().double()
            x = make_input(some, layer, torch.float64, "contiguous")
            b = torch.randn_like(layer(x).detach())
            against_autograd(layer, x, b, {})
