"""A chain is read whole or refused by path and class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from chain_nets import NETS, Case, odd
from torch import nn

from svag_fast import UnsupportedModuleError
from svag_fast.experiments.models import build_model
from svag_fast.replicas.chain import chain_of
from svag_fast.replicas.fused_layers import fused_layers


@pytest.mark.parametrize("name", NETS)
def test_flat_values_come_back_as_a_model(name: str) -> None:
    case = Case(name, replicas=2)
    for model in case.models:
        flat = case.chain.flatten(model)
        trained = [p.flatten() for p in model.parameters() if p.requires_grad]
        assert torch.equal(flat.weights, torch.cat(trained))
        back = case.chain.unflatten(*flat)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
        )
        assert torch.equal(back(case.inputs), model(case.inputs))
        assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_chain_keeps_nothing_of_the_model() -> None:
    model = odd()
    chain = chain_of(model)
    before = chain.initial().weights.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(chain.initial().weights, before)
    chain.unflatten(torch.zeros(chain.weight_count))
    assert torch.equal(chain.initial().weights, before)


def test_offsets_are_in_the_order_of_the_parameters() -> None:
    chain = chain_of(build_model("digits-net", in_channels=1, num_classes=10))
    assert [(p.name, p.trained, p.offset) for p in chain.parameters] == [
        ("features.0.weight", True, 0),
        ("features.3.weight", True, 144),
        ("features.6.weight", True, 144 + 4608),
        ("head", False, 0),
    ]
    assert (chain.weight_count, chain.frozen_count) == (13968, 320)


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*layers))


def with_hook() -> nn.Module:
    model = sequential(nn.Linear(4, 4))
    model[1][0].register_forward_hook(lambda *_: None)
    return model


def with_parameter_hook() -> nn.Module:
    model = sequential(nn.Linear(4, 4))
    model[1][0].bias.register_hook(lambda grad: grad)
    return model


def with_forward() -> nn.Module:
    model = sequential(nn.Linear(4, 4))
    model[1][0].forward = lambda x: x
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def tied_by_view() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach()[1:])
    return model


def applied_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def with_extra(kind: str) -> nn.Module:
    model = sequential(nn.ReLU())
    if kind == "buffer":
        model[1][0].register_buffer("count", torch.zeros(1))
    else:
        model[1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def transposed() -> nn.Module:
    model = sequential(nn.Linear(4, 3))
    model[1][0].weight = nn.Parameter(torch.randn(4, 3).t())
    return model


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another layer": (
        lambda: sequential(nn.Sigmoid()),
        r"1\.0 \(Sigmoid\).*expected one of Sequential, FusedSequential, FixedHeadNet",
    ),
    "a subclass": (lambda: sequential(Doubled(4, 4)), r"1\.0 \(Doubled\)"),
    "the model itself": (lambda: nn.LSTM(3, 4), r"the model \(LSTM\)"),
    "BatchNorm": (lambda: sequential(nn.BatchNorm1d(4)), r"1\.0 \(BatchNorm1d\)"),
    "Dropout in training": (lambda: sequential(nn.Dropout(0.1)), r"1\.0 \(Dropout\).*random"),
    "a lazy layer": (lambda: sequential(nn.LazyConv2d(4, 3)), r"1\.0 \(LazyConv2d\)"),
    "5x5": (lambda: sequential(nn.Conv2d(1, 2, 5, padding=2)), r"1\.0 \(Conv2d\).*kernel_size \(5, 5\)"),
    "1x3": (lambda: sequential(nn.Conv2d(1, 2, (1, 3), padding=(0, 1))), r"kernel_size \(1, 3\)"),
    "stride 3": (lambda: sequential(nn.Conv2d(1, 2, 3, stride=3, padding=1)), r"stride \(3, 3\)"),
    "no padding": (lambda: sequential(nn.Conv2d(1, 2, 3)), r"padding \(0, 0\), expected 1"),
    "padded 1x1": (lambda: sequential(nn.Conv2d(1, 2, 1, padding=1)), r"padding \(1, 1\), expected 0"),
    "reflected": (lambda: sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "padding_mode 'reflect'"),
    "groups": (lambda: sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2)), "2 groups"),
    "dilation": (lambda: sequential(nn.Conv2d(2, 2, 3, padding=1, dilation=2)), r"dilation \(2, 2\)"),
    "pool's padding": (lambda: sequential(nn.AvgPool2d(2, padding=1)), r"1\.0 \(AvgPool2d\).*no padding"),
    "pool's ceil_mode": (lambda: sequential(nn.AvgPool2d(2, ceil_mode=True)), "ceil_mode"),
    "pool to 2x2": (lambda: sequential(nn.AdaptiveAvgPool2d(2)), "output_size 2, expected 1"),
    "flattened samples": (lambda: sequential(nn.Flatten(0)), "dimensions 0 to -1"),
    "float64": (lambda: sequential(nn.Linear(4, 4).double()), r"1\.0 \(Linear\).*1\.0\.weight is torch.float64"),
    "half": (lambda: sequential(nn.Linear(4, 4).half()), "torch.float16"),
    "meta": (lambda: sequential(nn.Linear(4, 4, device="meta")), "meta"),
    "not contiguous": (transposed, r"1\.0\.weight has strides \[1, 3\]"),
    "a hook": (with_hook, r"1\.0 \(Linear\).*hooks"),
    "a parameter's hook": (with_parameter_hook, r"1\.0\.bias has hooks"),
    "a replaced forward": (with_forward, "forward was replaced"),
    "a parametrization": (
        lambda: sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        r"1\.0 \(ParametrizedLinear\).*parametrized",
    ),
    "a shared parameter": (tied, r"1\.weight shares memory with 0\.weight"),
    "overlapping memory": (tied_by_view, r"1\.weight shares memory with 0\.weight"),
    "a layer twice": (applied_twice, r"2\.weight shares memory with 0\.weight"),
    "a buffer": (lambda: with_extra("buffer"), r"1\.0 \(ReLU\).*buffer 1\.0\.count"),
    "an idle parameter": (lambda: with_extra("parameter"), r"1 \(Sequential\).*parameter 1\.scale"),
    "nothing to train": (lambda: sequential(nn.ReLU()).requires_grad_(False), "no trained parameter"),
    "no layer": (nn.Sequential, "no trained parameter"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_no_chain_is_refused_by_path_and_class(what: str) -> None:
    build, message = REFUSED[what]
    with pytest.raises(UnsupportedModuleError, match=message):
        chain_of(build())


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ([nn.Linear(4, 2)], (5,), r"0 \(Linear\)'s samples must be \[4\], got \[5\]"),
        ([nn.Linear(4, 2)], (1, 2, 2), r"0 \(Linear\)'s samples must be \[4\], got \[1, 2, 2\]"),
        ([nn.Linear(4, 2), nn.Conv2d(2, 2, 1)], (4,), r"1 \(Conv2d\)'s samples must be \[2, height, width\], got"),
        ([nn.Conv2d(2, 4, 1), nn.GroupNorm(1, 5)], (2, 3, 3), r"1 \(GroupNorm\)'s samples must be 5 channels, got"),
        ([nn.Conv2d(2, 4, 1), nn.LayerNorm(3)], (2, 3, 3), r"1 \(LayerNorm\)'s samples must be \[3\], got \[4, 3,"),
        ([nn.Conv2d(2, 4, 1), nn.AvgPool2d(4)], (2, 3, 3), r"1 \(AvgPool2d\)'s samples must be images of at least"),
        ([nn.Linear(4, 4), nn.AdaptiveAvgPool2d(1)], (4,), "1 .AdaptiveAvgPool2d."),
        ([nn.Conv2d(2, 4, 1)], (2, 3, 3), r"the chain's output must be a vector a sample, got the shape \[4, 3, 3\]"),
        ([nn.Linear(4, 4)], (2, 4), r"inputs must be vectors \[features\] or images \[channels, height, width\],"),
        ([nn.Conv2d(1, 4, 1)], (1, 0, 3), r"samples of \[1, 0, 3\]"),
        ([nn.Conv2d(1, 4, 1)], (1, 5000, 5000), r"0 \(Conv2d\)'s images must be of at most 16777216 values a"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_layer(
    layers: list[nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fused_layers(chain_of(nn.Sequential(*layers)), shape)


def test_another_model_or_vector_is_refused() -> None:
    chain = chain_of(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="model must be of the chain's layers and parameters, got others"):
        chain.flatten(nn.Sequential(nn.Linear(4, 4, bias=False)))
    with pytest.raises(ValueError, match=r"weights must be torch\.float32 \[20\], got torch\.float32 \[19\]"):
        chain.unflatten(torch.zeros(19))
    with pytest.raises(TypeError, match="model must be a module, got a function"):
        chain_of(lambda x: x)  # type: ignore[arg-type]
