"""Linear, convolution and attention: per-sample norms equal a loop of single-sample passes, for every option."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_norm_nets import randn
from sample_norm_oracle import check
from torch import nn

from svag_fast import per_sample_sq_norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 3, 2)])
def test_linear_with_any_leading_dimensions(leading, bias):
    """Trap: inputs of 4 and more dimensions silently skipped. Trap: a bias over positions is the norm of the sum."""
    check(nn.Linear(5, 4, bias=bias), randn(3, *leading, 5))


CONVS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid", "stride": 2},
    "same circular": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_with_every_option(dims, options):
    """Traps: a Gram over all channels of a grouped convolution; padding modes; padding given as a string."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    check(kind(4, 8, 3, **options), randn(3, 4, *(9, 8, 7)[:dims]))


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_same_padding_of_an_even_kernel_is_uneven(dims, kernel):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    check(kind(2, 3, kernel, padding="same"), randn(2, 2, *(6,) * dims))


def test_convolution_options_differ_between_dimensions():
    check(nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), randn(3, 3, 7, 6))
    check(nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 3), padding=(1, 0, 2), dilation=(1, 2, 1)), randn(2, 2, 5, 7, 4))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_convolution_of_generated_shapes(data):
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    tuples = lambda low, high: data.draw(st.tuples(*(st.integers(low, high) for _ in range(dims))))  # noqa: E731
    kernel, stride, padding, dilation = tuples(1, 3), tuples(1, 3), tuples(0, 2), tuples(1, 2)
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, tuples(0, 4), strict=True))
    channels = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    check(
        kind(*channels, kernel, stride, padding, dilation, groups),
        randn(data.draw(st.integers(1, 3)), channels[0], *size),
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_linear_of_generated_shapes(leading, batch, inputs, outputs):
    check(nn.Linear(inputs, outputs), randn(batch, *leading, inputs))


class Attend(nn.Module):
    """MultiheadAttention with fixed options."""

    def __init__(self, *, mask=None, need_weights=False, self_attention=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.mask, self.need_weights, self.self_attention = mask, need_weights, self_attention

    def forward(self, query, key, value):
        if self.self_attention:
            key = value = query
        return self.attention(query, key, value, attn_mask=self.mask, need_weights=self.need_weights)[0]


CAUSAL = torch.ones(5, 5).triu(1).bool()
ATTENTIONS = {
    "self": {"self_attention": True},
    "self, weights": {"self_attention": True, "need_weights": True},
    "cross": {},
    "no bias": {"bias": False},
    "causal": {"self_attention": True, "mask": CAUSAL},
    "causal, weights": {"self_attention": True, "mask": CAUSAL, "need_weights": True},
    "additive mask": {"self_attention": True, "mask": randn(5, 5)},
    "other widths": {"kdim": 6, "vdim": 3},
}


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_multihead_attention_through_its_projections(options):
    model = Attend(**options)
    check(model, randn(3, 5, 8), randn(3, 7, options.get("kdim", 8)), randn(3, 7, options.get("vdim", 8)) + 1)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("heads_apart", [True, False])
def test_attention_masks_and_weights_equal_the_plain_module(need_weights, heads_apart):
    """A mask for each sample and head, a boolean padding mask, the weights, averaged over heads or not."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    query, memory = randn(3, 5, 8), randn(3, 7, 8)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    arguments = {
        "attn_mask": randn(6, 5, 7) > 1,
        "key_padding_mask": padding,
        "need_weights": need_weights,
        "average_attn_weights": not heads_apart,
    }
    plain = model(query, memory, memory, **arguments)
    with per_sample_sq_norms(model):
        ours = model(query, memory, memory, **arguments)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-12, atol=1e-14)
    if need_weights:
        torch.testing.assert_close(ours[1], plain[1], rtol=1e-12, atol=1e-14)
    else:
        assert ours[1] is plain[1] is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_draws_the_same_dropout_as_the_plain_module(need_weights):
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double()
    x = randn(3, 5, 8)
    torch.manual_seed(0)
    plain = model(x, x, x, need_weights=need_weights)[0]
    with per_sample_sq_norms(model):
        torch.manual_seed(0)
        ours = model(x, x, x, need_weights=need_weights)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


def test_empty_batch():
    for model, x in ((nn.Linear(3, 2), randn(0, 3)), (nn.Conv2d(2, 2, 3), randn(0, 2, 5, 5))):
        model.double()
        with per_sample_sq_norms(model) as norms:
            model(x).sum().backward()
        assert norms.total.shape == (0,)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Linear(3, 2), torch.ones(3), r"\[B, ..., in_features\]"),
        (nn.Conv1d(2, 2, 1), torch.ones(2, 4), "batched"),
        (nn.Conv2d(2, 2, 1), torch.ones(2, 4, 4), "batched"),
    ],
)
def test_inputs_without_a_sample_dimension_are_refused(model, x, message):
    with per_sample_sq_norms(model), pytest.raises(ValueError, match=message):
        model(x)


CHANGES = {
    "stride": {"stride": (2, 2)},
    "stride as one number": {"stride": 2},
    "stride as a list": {"stride": [2, 1]},
    "dilation and padding": {"dilation": (2, 2), "padding": (2, 1)},
    "padding": {"padding": (0, 2)},
    "padding as a name": {"padding": "same", "dilation": (1, 2)},
    "padding mode": {"padding_mode": "circular"},
    "padding mode and padding": {"padding_mode": "reflect", "_reversed_padding_repeated_twice": [2, 1, 0, 1]},
    "groups": {"groups": 2, "weight": torch.Size((4, 2, 3, 3))},
    "a larger kernel": {"padding": "same", "weight": torch.Size((4, 4, 5, 4))},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_convolution_has_the_options_of_the_moment(name):
    """Trap: a plan made once and kept. Output, gradient and norms of a long-lived context are the changed layer's."""
    conv, x = nn.Conv2d(4, 4, 3, padding=1).double(), randn(3, 4, 7, 6)
    with per_sample_sq_norms(conv, loss_reduction="sum") as norms:
        conv(x).square().sum().backward()
        for option, value in CHANGES[name].items():
            if option == "weight":
                conv.weight.grad, conv.weight.data = None, randn(*value)
            else:
                setattr(conv, option, value)
        conv.zero_grad()
        norms.reset()
        output = conv(x)
        output.square().sum().backward()
        total, grad = norms.total, conv.weight.grad
    torch.testing.assert_close(output, conv(x))
    rows = [torch.autograd.grad(conv(x[i : i + 1]).square().sum(), list(conv.parameters())) for i in range(3)]
    torch.testing.assert_close(total, torch.stack([sum(g.square().sum() for g in row) for row in rows]))
    torch.testing.assert_close(grad, sum(row[0] for row in rows))


def test_a_list_of_strides_that_is_changed_in_place():
    conv, x = nn.Conv1d(2, 3, 2).double(), randn(3, 2, 7)
    conv.stride = [1]
    with per_sample_sq_norms(conv):
        conv(x)
        conv.stride[0] = 2
        assert conv(x).shape == (3, 3, 3)


def test_options_that_a_convolution_of_pytorch_refuses_are_refused():
    conv, x = nn.Conv2d(2, 3, 3, padding="same").double(), randn(3, 2, 6, 6)
    with per_sample_sq_norms(conv):
        conv.stride = (2, 2)
        with pytest.raises(ValueError, match=r"the model \(Conv2d\): padding must be one that PyTorch's forward"):
            conv(x)
        conv.stride, conv.padding = (1, 1), "full"
        with pytest.raises(ValueError, match=r"the model \(Conv2d\): padding must be one that PyTorch's forward"):
            conv(x)


def test_attention_with_another_number_of_heads():
    """As PyTorch's, it goes by `num_heads` alone."""
    layer = nn.MultiheadAttention(6, 3, batch_first=True).double()
    x = randn(3, 4, 6)
    with per_sample_sq_norms(layer):
        layer(x, x, x)
        layer.num_heads = 2
        output, _ = layer(x, x, x)
    torch.testing.assert_close(output, layer(x, x, x)[0])


CHANGED_IN_PLACE = [
    (nn.Linear(5, 4), (3, 2, 5)),
    (nn.Linear(5, 4), (3, 5)),
    (nn.Conv1d(5, 4, 2), (3, 5, 4)),
    (nn.Conv2d(5, 4, 2), (3, 5, 4, 3)),
    (nn.Conv3d(2, 4, 2), (3, 2, 3, 3, 2)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
    (nn.LayerNorm(5), (3, 2, 5)),
    (nn.RMSNorm(5), (3, 2, 5)),
    (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    (nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 2)),
    (nn.InstanceNorm3d(4, affine=True), (3, 4, 2, 2, 3)),
    (nn.BatchNorm1d(4).eval(), (3, 4)),
    (nn.PReLU(), (3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CHANGED_IN_PLACE)
def test_outputs_may_be_changed_in_place(layer, shape):
    """Trap: PyTorch makes some of these outputs as views, whose hooks are lost where they are changed."""
    check(nn.Sequential(layer, nn.LeakyReLU(inplace=True)), randn(*shape))


def test_a_layer_with_a_frozen_weight_saves_its_input() -> None:
    """A checkpoint hands what its second forward pass saves to the graph of the first, by place and shape alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    with per_sample_sq_norms(model):
        hidden = model[0](torch.randn(5, 3))
        saved = model[1](hidden).grad_fn.saved_tensors
    assert torch.equal(saved[0], hidden)
