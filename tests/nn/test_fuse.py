"""fuse_: a model whose norms run with their ReLUs gives what it gave before; who looks at a layer sees it plain."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import svag_fast
from svag_fast.experiments.models import build_model
from svag_fast.nn import FusedSequential, fuse_, norm_then_relu, pair_, unfuse_
from svag_fast.nn import fuse as fuse_module

ROWS, C = 16, 8


@pytest.fixture(autouse=True)
def small_nets_are_fused(monkeypatch):
    monkeypatch.setattr(fuse_module, "FUSED_ELEMENTS", 1)


NORMS = {
    "gn": (lambda: nn.GroupNorm(4, C), (5, 6)),
    "gn, not affine": (lambda: nn.GroupNorm(2, C, affine=False), (5, 6)),
    "gn, no pixels": (lambda: nn.GroupNorm(2, C), ()),
    "bn 1d": (lambda: nn.BatchNorm1d(C), ()),
    "bn 1d, length": (lambda: nn.BatchNorm1d(C, momentum=None), (7,)),
    "bn 2d": (lambda: nn.BatchNorm2d(C, momentum=0.3), (5, 6)),
    "bn 2d, not affine": (lambda: nn.BatchNorm2d(C, affine=False), (5, 6)),
    "bn 2d, untracked": (lambda: nn.BatchNorm2d(C, track_running_stats=False), (5, 6)),
    "bn 3d": (lambda: nn.BatchNorm3d(C), (2, 3, 4)),
}


def net(norm):
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[norm][0](), nn.ReLU(inplace=True)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape) + 0.5)
    return model


def sample(norm, channels_last=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, C, *NORMS[norm][1], generator=generator, dtype=torch.float64) * 2 + 1
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_()


def is_fused(out):
    return "NormReLU" in type(out.grad_fn).__name__


def same(fused, plain, x, *, expect=True):
    """Two passes of each, and everything that they leave."""
    models = (fused, plain)
    for _ in range(2):
        outs = fused(x), plain(x)
        assert is_fused(outs[0]) is expect
        torch.testing.assert_close(*outs)
        cotangent = torch.randn(outs[0].shape, dtype=x.dtype)
        grads = [torch.autograd.grad(out, [x, *m.parameters()], cotangent) for out, m in zip(outs, models, strict=True)]
        torch.testing.assert_close(*grads)
    for one, other in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_outputs_gradients_and_statistics_stay(norm, channels_last):
    fused, plain = net(norm), net(norm)
    kind = type(fused[0]).__name__
    assert fuse_(fused) == [f"0 ({kind}) + 1 (ReLU)"]
    same(fused, plain, sample(norm, channels_last))
    fused.eval(), plain.eval()
    tracked = getattr(fused[0], "track_running_stats", False)
    same(fused, plain, sample(norm, channels_last), expect=not tracked)


@pytest.mark.parametrize("second_updates", [True, False])
@pytest.mark.parametrize("norm", [name for name in NORMS if name.startswith("bn")])
def test_pairs_are_fused_too(norm, second_updates):
    fused, plain = (pair_(net(norm), second_updates=second_updates) for _ in range(2))
    assert fuse_(fused)
    same(fused, plain, sample(norm))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_checkpoint_counts_a_batch_once(paired, last):
    models, x = (net("bn 2d"), net("bn 2d")), sample("bn 2d")
    for model in models:
        fuse_(model)
        if not last:  # the recomputation ends where all that was saved is there again
            model.append(nn.Sigmoid())
        if paired:
            pair_(model)
    checkpoint(models[0], x, use_reentrant=False).sum().backward()
    models[1](x).sum().backward()
    for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(one, other)


def test_state_dict_copies_and_back():
    model = nn.Sequential(nn.Conv2d(3, C, 3), *net("gn").float(), nn.Flatten())
    before, kinds = model.state_dict(), [type(m) for m in model]
    fuse_(model)
    assert list(model.state_dict()) == list(before)
    assert [type(m) for m in model] == kinds
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    out = model(x)
    assert type(model) is FusedSequential
    assert type(unfuse_(model)) is nn.Sequential
    torch.testing.assert_close(model(x), out)


def test_nested_containers_and_names():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.ReLU())})
    assert fuse_(model) == ["a.1.0 (BatchNorm1d) + a.1.1 (ReLU)"]
    assert type(model["a"]) is nn.Sequential
    assert fuse_(nn.Linear(2, 2)) == []
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        fuse_([])


class OwnNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OwnContainer(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(model):
    model[1].register_forward_hook(lambda *_: None)
    return model


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    return model


def patched(model):
    model[0].forward = lambda x: x * 1
    return model


LEFT = {
    "hooks": (lambda: hooked(net("gn")), "ReLU has hooks"),
    "parametrized": (lambda: parametrized(net("gn")), "ParametrizedGroupNorm is not one of torch's own kinds"),
    "patched": (lambda: patched(net("gn")), "GroupNorm has a forward of its own"),
    "own norm": (lambda: nn.Sequential(OwnNorm(2, C), nn.ReLU()).double(), "OwnNorm is not one"),
    "own container": (lambda: OwnContainer(*net("gn")), "their container is a OwnContainer"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone_is_said(case):
    make, reason = LEFT[case]
    model, x = make(), sample("gn")
    expected, kind = model(x), type(model)
    with pytest.warns(UserWarning, match=f"not fused:\n  .*{reason}"):
        assert fuse_(model) == []
    assert type(model) is kind
    assert torch.equal(model(x), expected)


def test_hooks_put_on_later_see_the_layers():
    model, plain, x = net("gn"), net("gn"), sample("gn")
    fuse_(model)
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    model(x)
    assert torch.equal(seen[0], plain[0](x))
    handle.remove()
    assert is_fused(model(x))
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out)):
        assert not is_fused(model(x))


def test_per_sample_norms_are_those_of_the_plain_model():
    found = []
    for change in (fuse_, unfuse_):
        model, x = net("gn"), sample("gn")
        change(model)
        with svag_fast.per_sample_sq_norms(model, check=True) as norms:
            model(x).square().sum((1, 2, 3)).mean().backward()
        found.append((norms.total, norms["0.weight"]))
        assert is_fused(model(x)) is (change is fuse_)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("way", ["joint", "halves"])
@pytest.mark.parametrize("norm", ["gn", "gn, not affine", "bn 2d", "bn 2d, not affine"])
def test_pair_pass_gives_what_it_gives_plain(norm, way):
    found = []
    for change in (fuse_, unfuse_):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(C, C, 1).double(), *net(norm), nn.Flatten(), nn.Linear(240, 3).double())
        change(model)
        optimizer = svag_fast.SVAG(model.parameters(), lr=0.1, l=2)
        for _ in range(2):
            with svag_fast.pair_pass(model, optimizer, way=way) as pair:
                logits = model(sample(norm).detach())
                pair.backward(F.cross_entropy(logits, torch.arange(ROWS) % 3, reduction="none"))
            stats = optimizer.step()
        found.append([stats.raw, *model.state_dict().values()])
    torch.testing.assert_close(*found)


def test_other_ways_to_run_see_plain_layers():
    model, x = net("gn"), sample("gn")
    expected = model(x)
    fuse_(model)
    with svag_fast.use_backend("reference"):
        assert not is_fused(model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_fused(model(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    values, tangents = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(values, expected)
    assert tangents.isfinite().all()
    assert copy.deepcopy(model).to("meta")(x.detach().to("meta")).is_meta


def test_few_activations_are_left_to_torch(monkeypatch):
    model, x = net("gn"), sample("gn")
    fuse_(model)
    monkeypatch.setattr(fuse_module, "FUSED_ELEMENTS", x.numel())
    assert is_fused(model(x))
    assert not is_fused(model(x[:-1]))


def test_torchs_refusals_stay():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm1d(C), nn.ReLU())
    fuse_(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model[:2](torch.ones(1, C, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.ones(2, C, 3))
    with pytest.raises(RuntimeError):
        model(torch.ones(4, C + 1, 3, 3))


def test_a_residual_is_added_before_the_relu():
    norm, x, residual = net("bn 2d")[0], sample("bn 2d"), sample("bn 2d").detach() * 0.7
    out = norm_then_relu(norm, x, residual=residual)
    assert is_fused(out)
    torch.testing.assert_close(out, torch.relu(net("bn 2d")[0](x) + residual))
    one = residual[:1]
    torch.testing.assert_close(norm_then_relu(norm, x, residual=one), torch.relu(norm(x) + one))


@pytest.mark.parametrize("name", ["digits-net", "preresnet8-gn", "preresnet8-bn", "preresnet8-none"])
def test_nets_of_the_runs_give_what_they_give_plain(name, monkeypatch):
    found = []
    for least in (1, 2**60):
        monkeypatch.setattr(fuse_module, "FUSED_ELEMENTS", least)
        model = build_model(name, in_channels=1, num_classes=10).double()
        x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with warnings.catch_warnings(action="error"):
            loss = F.cross_entropy(model(x), torch.arange(4))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters())), *model.buffers()])
    torch.testing.assert_close(*found)
