"""A replica is the model alone: outputs, gradients, running statistics and paths, whatever runs beside it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from replica_nets import NETS, VMAP_ONLY, B
from torch import nn
from torch.utils._pytree import tree_leaves

from svag_fast import SVAG, Replicas
from svag_fast.replicas import NotReplicable, stacked

SEEDS = (5, 0, 11)
ROUNDING = 1e-12  # of the largest value, in float64


def close(got, want):
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * scale, equal_nan=True)


def alone(net, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return net.model()


def scalar(out):
    """A loss that every output has part in, the same for a replica and for the model alone."""
    return sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in tree_leaves(out))


def check_replicas(net, engine, *, shared, training):
    replicas = Replicas(net.model, SEEDS, engine=engine)
    replicas.train(training)
    x = net.inputs(B) if shared else net.inputs(len(SEEDS), B)
    if x.is_floating_point():
        x.requires_grad_()
    for _ in range(2):  # running statistics move twice
        out = replicas(x, shared=shared)
    sum(scalar([y[s] for y in tree_leaves(out)]) for s in range(len(SEEDS))).backward()
    input_grads = []
    for s, seed in enumerate(SEEDS):
        model = alone(net, seed)
        model.train(training)
        own = (x if shared else x[s]).detach().clone()
        if own.is_floating_point():
            own.requires_grad_()
        for _ in range(2):
            want = model(own)
        scalar(want).backward()
        input_grads.append(own.grad)
        for got, single in zip(tree_leaves(out), tree_leaves(want), strict=True):
            close(got[s], single)
        grads = dict(replicas.stacked.named_parameters())
        for name, p in model.named_parameters():
            assert (grads[name].grad is None) == (p.grad is None), name
            if p.grad is not None:
                close(grads[name].grad[s], p.grad)
        buffers = dict(replicas.stacked.named_buffers())
        for name, b in model.named_buffers():
            close(buffers[name][s], b)
    if x.is_floating_point():
        close(x.grad, sum(input_grads) if shared else torch.stack(input_grads))
    return replicas


@pytest.mark.parametrize("name", NETS)
def test_stacked_replicas_are_the_models_alone(name: str) -> None:
    for training, shared in ((True, False), (False, True)):
        assert check_replicas(NETS[name], "stacked", shared=shared, training=training).engine == "stacked"


@pytest.mark.parametrize("name", ["mlp", "conv1d", "own parameters", "untracked batch norm", "digits net"])
def test_vmapped_replicas_are_the_models_alone(name: str) -> None:
    for training, shared in ((True, False), (False, True)):
        assert check_replicas(NETS[name], "vmap", shared=shared, training=training).engine == "vmap"


@pytest.mark.parametrize("name", VMAP_ONLY)
def test_what_the_stacked_engine_cant_serve_is_named_and_vmap_is_right(name: str) -> None:
    net, reason = VMAP_ONLY[name]
    with pytest.raises(NotReplicable, match=reason):
        Replicas(net.model, SEEDS, engine="stacked")(net.inputs(len(SEEDS), B))
    with pytest.warns(UserWarning, match=f"(?s){reason}.*slower"):
        replicas = check_replicas(net, "auto", shared=False, training=True)
    assert replicas.engine == "vmap"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "svag_fast")  # said once
        replicas(net.inputs(len(SEEDS), B))


def path(net, model_or_replicas, batches, make_optimizer, lead):
    """Ten steps on one's own batches."""
    optimizer = make_optimizer(model_or_replicas.parameters())
    for x1, x2 in batches:
        optimizer.zero_grad()
        for which, x in enumerate((x1, x2)):
            out = model_or_replicas(x)
            (out.square() * 0.5 + out).mean(tuple(range(lead, out.dim()))).sum().backward()
            if which == 0 and isinstance(optimizer, SVAG):
                optimizer.hold_gradient()
            elif which == 0:
                optimizer.zero_grad()
        stats = optimizer.step()
    return stats


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "SVAG": lambda params: SVAG(params, lr=0.05, l=4, weight_decay=0.01),
}


@pytest.mark.parametrize("engine", ["stacked", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_are_those_of_the_run_alone_and_of_any_company(optimizer: str, engine: str) -> None:
    for name in ("mlp", "batch norm"):
        net, seeds = NETS[name], (3, 1, 4, 0, 5)
        draws = [(net.inputs(5, 4, seed=2 * i), net.inputs(5, 4, seed=2 * i + 1)) for i in range(10)]
        many = Replicas(net.model, seeds, engine=engine)
        path(net, many, draws, OPTIMIZERS[optimizer], 1)
        for s in (0, 4):
            own = [(x1[s], x2[s]) for x1, x2 in draws]
            one = Replicas(net.model, [seeds[s]], engine=engine)
            path(net, one, [(x1[None], x2[None]) for x1, x2 in own], OPTIMIZERS[optimizer], 1)
            model = alone(net, seeds[s])
            start = copy.deepcopy(model.state_dict())
            path(net, model, own, OPTIMIZERS[optimizer], 0)
            assert any((start[k] != v).any() for k, v in model.state_dict().items())
            for key, value in model.state_dict().items():
                close(many.unstack(s).state_dict()[key], value)
                close(one.unstack(0).state_dict()[key], value)


def test_a_hundred_steps_of_svag_and_its_statistics() -> None:
    net = NETS["mlp"]
    draws = [(net.inputs(3, 4, seed=2 * i), net.inputs(3, 4, seed=2 * i + 1)) for i in range(100)]
    replicas = Replicas(net.model, SEEDS, engine="stacked")
    stats = path(net, replicas, draws, OPTIMIZERS["SVAG"], 1)
    traces, norms = [], []
    for s, seed in enumerate(SEEDS):
        model = alone(net, seed)
        single = path(net, model, [(x1[s], x2[s]) for x1, x2 in draws], OPTIMIZERS["SVAG"], 0)
        for p, q in zip(replicas.unstack(s).parameters(), model.parameters(), strict=True):
            close(p, q)
        traces.append(single.noise_trace)
        norms.append(single.grad_sq_norm)
    close(stats.noise_trace, sum(traces))  # over all replicas
    close(stats.grad_sq_norm, sum(norms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "batch norm", "digits net", "transformer"])
def test_lower_precision_errs_no_more_than_the_model_alone(name: str, dtype: torch.dtype) -> None:
    net = NETS[name]
    exact = Replicas(net.model, SEEDS, engine="stacked")
    low = Replicas(lambda: net.model().to(dtype), SEEDS, engine="stacked")
    x = net.inputs(len(SEEDS), B)
    out = low(x.to(dtype))
    assert out.dtype == dtype
    want = exact(x)
    alone_error = max(float((low.unstack(s)(x[s].to(dtype)) - want[s]).abs().max()) for s in range(len(SEEDS)))
    assert float((out - want).abs().max()) <= 2 * alone_error


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_none_and_one(rows: int) -> None:
    for name in ("mlp", "conv2d", "own parameters", "tied"):
        net, x = NETS[name], NETS[name].inputs(len(SEEDS), rows)
        replicas = Replicas(net.model, SEEDS, engine="stacked")
        for got, s in zip(replicas(x), range(len(SEEDS)), strict=True):
            close(got, replicas.unstack(s)(x[s]))


@pytest.mark.parametrize("engine", ["stacked", "vmap"])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "batch norm", "digits net", "transformer"])
def test_a_replica_that_diverged_leaves_its_neighbours_as_they_were(name: str, engine: str) -> None:
    net = NETS[name]
    kept, met = Replicas(net.model, SEEDS, engine=engine), Replicas(net.model, SEEDS, engine=engine)
    for p in met.parameters():
        p.data[1] = float("nan")
    x = net.inputs(len(SEEDS), B)
    for replicas in (kept, met):
        replicas(x).square().mean(tuple(range(1, replicas(x).dim()))).sum().backward()
    for p, q in zip(kept.parameters(), met.parameters(), strict=True):
        assert torch.equal(p.grad[::2], q.grad[::2])
    for b, c in zip(kept.buffers(), met.buffers(), strict=True):
        assert torch.equal(b[::2], c[::2])


def test_an_index_out_of_range_reads_no_neighbours_row() -> None:
    net = NETS["tied"]
    replicas = Replicas(net.model, SEEDS, engine="stacked")
    x = net.inputs(len(SEEDS), B)
    replicas(x)
    for bad in (7, -1):
        x[0, 0, 0] = bad
        with pytest.raises(IndexError):
            replicas(x)


def layer_norm(*args, **kwargs):
    return stacked._layer_norm(*args, **kwargs)


WRONG_FORMS = {
    "outputs": (lambda x, *a, **k: 1.001 * layer_norm(x, *a, **k), "its outputs differ from those of a model alone"),
    "gradients": (lambda x, *a, **k: layer_norm(x, *a, **k).detach(), "its gradient of 0.weight differs"),
    "neighbours": (lambda x, *a, **k: layer_norm(x, *a, **k) + 1e-12 * x.mean(0), "the model couples samples"),
}


@pytest.mark.parametrize("fault", WRONG_FORMS)
def test_the_trial_sees_a_wrong_form(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    form, reason = WRONG_FORMS[fault]
    monkeypatch.setitem(stacked.FORMS, F.layer_norm, form)
    with pytest.raises(NotReplicable, match=reason):
        Replicas(NETS["mlp"].model, SEEDS, engine="stacked")(NETS["mlp"].inputs(len(SEEDS), B))


def test_vmap_would_pass_over_a_padding_index() -> None:
    with pytest.raises(NotReplicable, match=r"table is an Embedding with options \(padding_idx"):
        Replicas(NETS["tied"].model, SEEDS, engine="vmap")(NETS["tied"].inputs(len(SEEDS), B))


def test_several_inputs_of_any_structure() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, parts, factor):
            return {"sum": self.lin(parts["a"]) * factor + parts["b"], "factor": factor}

    parts = {"a": torch.randn(3, B, 4), "b": torch.randn(3, B, 2)}
    for engine in ("stacked", "vmap"):
        replicas = Replicas(Two, SEEDS, engine=engine)
        out = replicas(parts, 2.0)
        assert out["factor"] == 2.0
        named = replicas(factor=2.0, parts=parts)
        assert torch.equal(named["sum"], out["sum"])
        for s in range(3):
            want = F.linear(parts["a"][s], replicas.unstack(s).lin.weight, replicas.unstack(s).lin.bias) * 2
            torch.testing.assert_close(out["sum"][s], want + parts["b"][s])


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_a_model_that_writes_into_its_input_is_served(engine: str) -> None:
    class Shifts(nn.Sequential):
        def forward(self, x):
            return super().forward(x.add_(1))

    x = torch.randn(3, B, 4)
    replicas = Replicas(lambda: Shifts(nn.Linear(4, 2)), SEEDS, engine=engine)
    for s, out in enumerate(replicas(x.clone())):
        torch.testing.assert_close(out, replicas.unstack(s)(x[s].clone()))
