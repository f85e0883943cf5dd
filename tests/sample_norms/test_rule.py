"""Normalisations, embeddings and rules of one's own: per-sample norms equal a loop of single-sample passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_norm_nets import randn
from sample_norm_oracle import check
from torch import nn

from svag_fast import UnsupportedModuleError, by_vmap, per_sample_sq_norms, register_rule
from svag_fast.sample_norms import rule as sample_norm_rules


def affine(module):
    """Weights that are not all ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def evaluated(module, x):
    """With running statistics of some data, in evaluation mode."""
    module.double()(x)
    return module.eval()


LAYERS = {
    "group norm": (nn.GroupNorm(2, 6), (3, 6, 4, 5)),
    "group norm of rows": (nn.GroupNorm(3, 6), (3, 6)),
    "group norm in 3 dimensions": (nn.GroupNorm(1, 6), (3, 6, 2, 3, 2)),
    "layer norm": (nn.LayerNorm(6), (3, 5, 6)),
    "layer norm of rows": (nn.LayerNorm(6), (3, 6)),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (3, 5, 6)),
    "layer norm over two": (nn.LayerNorm((5, 6)), (3, 4, 5, 6)),
    "rms norm": (nn.RMSNorm(6), (3, 5, 6)),
    "rms norm with eps": (nn.RMSNorm((5, 6), eps=0.1), (3, 5, 6)),
    "instance norm": (nn.InstanceNorm1d(6, affine=True), (3, 6, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(6, affine=True), (3, 6, 4, 5)),
    "instance norm 3d": (nn.InstanceNorm3d(6, affine=True), (3, 6, 2, 3, 2)),
    "instance norm with statistics": (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (3, 6, 4, 5)),
    "prelu": (nn.PReLU(), (3, 6, 5)),
    "prelu by channel": (nn.PReLU(6), (3, 6, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_with_small_parameters(layer, shape):
    """Trap: over positions, the norm of the sum counts, not the sum of norms."""
    check(affine(layer), randn(*shape) + 0.5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (3, 6)), (nn.BatchNorm2d, (3, 6, 4, 5)), (nn.BatchNorm3d, (3, 6, 2, 3, 2))],
)
def test_batch_norm_in_evaluation_mode(kind, shape):
    check(evaluated(affine(kind(6)), 2 * randn(*shape) + 1), randn(*shape))


def test_instance_norm_by_running_statistics():
    check(
        evaluated(affine(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)), 2 * randn(3, 6, 4, 5) + 1),
        randn(3, 6, 4, 5),
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=3))
def test_group_norm_of_generated_shapes(batch, groups, per_group, positions):
    x = randn(batch, groups * per_group, *positions, 2)
    check(affine(nn.GroupNorm(groups, groups * per_group, eps=0.1)), x)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4)])
def test_embedding_with_repeated_indices(shape, padding_idx):
    """Few words, so that most come up twice in a sample; the padding word has no gradient."""
    index = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0))
    index.view(-1)[0] = 0  # a sample of padding alone would have no gradient at all
    check(nn.Embedding(4, 6, padding_idx=padding_idx), index.clamp(max=1) if padding_idx and len(shape) == 1 else index)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_that_are_refused(option):
    with pytest.raises(UnsupportedModuleError, match=rf"the model \(Embedding\).*{next(iter(option))}"):
        per_sample_sq_norms(nn.Embedding(5, 6, **option)).__enter__()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 6), st.integers(1, 5))
def test_embedding_of_generated_shapes(batch, positions, words, width):
    index = torch.randint(0, words, (batch, *positions), generator=torch.Generator().manual_seed(words))
    check(nn.Embedding(words, width), index)


class Scale(nn.Module):
    """y = weight * x + shift, weight [C], x [B, T, C]; with a parameter that a rule may forget."""

    def __init__(self, width=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.weight * x + self.shift


@pytest.fixture
def rules(monkeypatch):
    """The table, put back afterwards."""
    monkeypatch.setattr(sample_norm_rules, "_RULES", dict(sample_norm_rules._RULES))


@pytest.mark.usefixtures("rules")
def test_a_rule_of_ones_own():
    model = nn.Sequential(nn.Linear(6, 6), Scale(), nn.Tanh(), Scale())
    with pytest.raises(UnsupportedModuleError, match=r"1 \(Scale\): no rule for it.*register_rule\(Scale\)"):
        per_sample_sq_norms(model).__enter__()

    @register_rule(Scale)
    def scale(module, inputs, output_grad):
        return {"weight": (output_grad * inputs[0]).sum(1), "shift": output_grad.sum(1)}

    check(model, randn(3, 5, 6))


@pytest.mark.usefixtures("rules")
def test_by_vmap_is_a_rule_without_a_formula():
    register_rule(Scale, nn.Bilinear)(by_vmap)
    check(nn.Sequential(nn.Linear(6, 6), Scale(), nn.Tanh(), Scale()), randn(3, 5, 6))
    check(nn.Bilinear(4, 5, 3), randn(3, 4), randn(3, 5))


@pytest.mark.usefixtures("rules")
def test_a_rule_that_forgets_a_parameter_is_named():
    register_rule(Scale)(lambda module, inputs, output_grad: {"weight": (output_grad * inputs[0]).sum(1)})
    model = Scale()
    with per_sample_sq_norms(model), pytest.raises(ValueError, match=r"the rule's shift for Scale must be \[B,"):
        model(torch.ones(2, 3, 6)).sum().backward()


@pytest.mark.usefixtures("rules")
def test_a_rule_of_the_wrong_shape_is_named():
    register_rule(Scale)(lambda module, inputs, output_grad: {"weight": output_grad, "shift": output_grad})
    model = Scale()
    with per_sample_sq_norms(model), pytest.raises(ValueError, match=r"the rule's weight for Scale must be \[B,"):
        model(torch.ones(2, 3, 6)).sum().backward()


@pytest.mark.usefixtures("rules")
def test_rules_get_few_samples_at_a_time_where_gradients_are_large(monkeypatch):
    """No buffer of all samples' gradients: at most the allowed number of elements."""
    monkeypatch.setattr("svag_fast.sample_norms.tape._CHUNK_ELEMENTS", 12)
    seen = []

    @register_rule(Scale)
    def scale(module, inputs, output_grad):
        seen.append((len(inputs[0]), len(output_grad)))
        return {"weight": (output_grad * inputs[0]).sum(1), "shift": output_grad.sum(1)}

    check(Scale(), randn(5, 2, 6))
    norms, checked_once = seen[:3], seen[3:]
    assert norms == checked_once == [(2, 2), (2, 2), (1, 1)]


@pytest.mark.usefixtures("rules")
def test_a_module_of_several_outputs_needs_more_than_a_rule():
    class Pair(Scale):
        def forward(self, x):
            return super().forward(x), x

    register_rule(Pair)(by_vmap)
    model = Pair()
    with per_sample_sq_norms(model), pytest.raises(TypeError, match="returns one tensor"):
        model(torch.ones(2, 3, 6))
    assert isinstance(model.weight, nn.Parameter)


def test_register_rule_refuses_what_is_no_module_type():
    with pytest.raises(ValueError, match="module_types must be one class or more, got none"):
        register_rule()
    with pytest.raises(TypeError, match=r"module_types must be classes derived from torch\.nn\.Module, got 3"):
        register_rule(3)


def between(module, x, change):
    """The norms where `change` comes between forward and backward pass, and those without it."""
    module = module.double()
    target = randn(*module(x).shape)
    out = []
    for act in (lambda module: None, change):
        with per_sample_sq_norms(module, loss_reduction="sum") as norms:
            output = module(x)
            act(module)
            (output * target).sum().backward()
            out.append(norms.total)
    return out


CHANGES = {
    "groups": (nn.GroupNorm(2, 6), (3, 6, 4), lambda m: setattr(m, "num_groups", 3)),
    "group norm's eps": (nn.GroupNorm(2, 6), (3, 6, 4), lambda m: setattr(m, "eps", 1.0)),
    "layer norm's eps": (nn.LayerNorm(6), (3, 5, 6), lambda m: setattr(m, "eps", 1.0)),
    "rms norm's eps": (nn.RMSNorm(6), (3, 5, 6), lambda m: setattr(m, "eps", 1.0)),
    "evaluation mode": (nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (3, 6, 4), nn.Module.eval),
    "training mode": (nn.InstanceNorm1d(6, affine=True, track_running_stats=True).eval(), (3, 6, 4), nn.Module.train),
    "statistics": (
        nn.InstanceNorm1d(6, affine=True, track_running_stats=True).eval(),
        (3, 6, 4),
        lambda m: m.running_var.mul_(4.0),
    ),
    "other statistics": (
        nn.BatchNorm1d(6).eval(),
        (3, 6, 4),
        lambda m: setattr(m, "running_var", m.running_var * 4),
    ),
    "padding index": (nn.Embedding(7, 6), None, lambda m: setattr(m, "padding_idx", 1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_backward_pass_goes_by_the_options_of_its_forward_pass(name):
    """Trap: options read in the backward pass, after `eval()`, `train()` or an update of the running statistics."""
    module, shape, change = CHANGES[name]
    x = torch.tensor([[0, 1, 1], [2, 3, 1], [5, 5, 6]]) if shape is None else randn(*shape)
    expected, got = between(affine(module), x, change)
    torch.testing.assert_close(got, expected)
    with per_sample_sq_norms(module, loss_reduction="sum") as norms:  # and the next pass by the new ones
        module(x).square().sum().backward()
    each = [torch.autograd.grad(module(x[i : i + 1]).square().sum(), list(module.parameters())) for i in range(3)]
    torch.testing.assert_close(norms.total, torch.stack([sum(g.square().sum() for g in row) for row in each]))
