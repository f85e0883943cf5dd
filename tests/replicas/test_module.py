"""Replicas as a torch.nn.Module: state, copies, devices and modes; single replicas out and in; memory; engines."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from replica_nets import NETS, B
from torch import nn

import svag_fast
from svag_fast import Replicas
from svag_fast.replicas import NotReplicable, stacked
from svag_fast.replicas import module as replicas_module

SEEDS = (5, 0, 11)
NET = NETS["batch norm"]


def make(engine="stacked", seeds=SEEDS, name="batch norm"):
    return Replicas(NETS[name].model, seeds, engine=engine)


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_replica_has_the_parameters_of_its_seed_and_generators_stay() -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state()
    replicas = make()
    assert torch.equal(before, torch.get_rng_state())
    for s, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        assert same(replicas.unstack(s), NET.model())


def test_generators_stay_where_building_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        Replicas(lambda: nn.Linear(2, int(torch.rand(1)) // 0), range(2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NETS)
def test_stacked_tensors_have_the_models_names_order_and_options(name: str) -> None:
    replicas, model = make(name=name), NETS[name].model()
    got = {key.removeprefix("stacked."): p for key, p in replicas.named_parameters()}
    want = dict(model.named_parameters())
    assert list(got) == list(want)
    for key, p in want.items():
        assert got[key].shape == (3, *p.shape)
        assert isinstance(got[key], nn.Parameter)
        assert got[key].requires_grad == p.requires_grad
    buffers = {key.removeprefix("stacked."): b.shape for key, b in replicas.named_buffers()}
    assert buffers == {key: (3, *b.shape) for key, b in model.named_buffers()}


def test_a_shared_parameter_is_stacked_once_and_stays_shared() -> None:
    replicas = make(name="tied")
    assert len(list(replicas.parameters())) == 1
    model = replicas.unstack(1)
    assert model.out.weight is model.table.weight


def test_an_unstacked_model_is_a_copy() -> None:
    replicas = make().eval()
    model = replicas.unstack(1)
    assert type(model) is nn.Sequential
    assert not any(m.training for m in model.modules())
    model[0].weight.data.zero_()
    assert replicas.unstack(1)[0].weight.abs().min() > 0
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


def test_load_replica_takes_an_ordinary_models_state() -> None:
    replicas, model = make(), NET.model()
    model(NET.inputs(B))
    kept = replicas.unstack(0)
    replicas.load_replica(1, model.state_dict())
    assert same(replicas.unstack(1), model)
    assert same(replicas.unstack(0), kept)
    wrong = {**model.state_dict(), "0.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        replicas.load_replica(1, wrong)
    assert same(replicas.unstack(1), model)


def test_apply_takes_each_replicas_modules_one_by_one() -> None:
    def draw(module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)

    replicas, models = make(), [make().unstack(s) for s in range(3)]
    torch.manual_seed(3)
    assert replicas.apply(draw) is replicas
    torch.manual_seed(3)
    assert all(same(replicas.unstack(s), model.apply(draw)) for s, model in enumerate(models))


def test_apply_of_more_than_values_is_refused_and_nothing_is_written() -> None:
    def spoil(module):
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()
            module.weight.requires_grad_(False)

    replicas, before = make(), make()
    with pytest.raises(NotReplicable, match=r"must change values alone: 0.weight is a trained parameter"):
        replicas.apply(spoil)
    assert same(replicas.stacked, before.stacked)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_a_copy_is_whole_and_apart(way) -> None:
    replicas, x = make("auto"), NET.inputs(3, B)
    replicas(x)
    copied = way(replicas)
    assert copied.engine == replicas.engine
    assert torch.equal(copied(x), replicas(x))
    before = replicas.eval()(x)
    for p in copied.parameters():
        p.data.zero_()
    assert not copied.eval()(x).equal(before)
    assert replicas(x).equal(before)


def test_a_saved_state_brings_back_the_bits_and_the_engine() -> None:
    replicas, x = make("auto"), NET.inputs(3, B)
    replicas(x)
    replicas._set("vmap", "for the test")
    file = io.BytesIO()
    torch.save(replicas.state_dict(), file)
    file.seek(0)
    fresh = make("auto", seeds=(7, 8, 9))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert (fresh.engine, fresh.why) == ("vmap", "as in the saved state")
    assert torch.equal(fresh(x), replicas(x))
    named = make("stacked")
    named.load_state_dict(replicas.state_dict())
    assert named.engine == "stacked"


def test_modes_and_dtypes_reach_every_layer() -> None:
    replicas, x = make(), NET.inputs(3, B)
    replicas.eval()(x)
    assert replicas.stacked.get_submodule("1").num_batches_tracked.tolist() == [0, 0, 0]
    replicas.train()(x)
    counts = replicas.stacked.get_submodule("1").num_batches_tracked
    assert counts.tolist() == [1, 1, 1]  # the trial left no trace
    replicas.float()
    assert replicas(x.float()).dtype == torch.float32
    assert replicas.unstack(0)[0].weight.dtype == torch.float32
    assert replicas.to("meta").stacked.get_submodule("0").weight.is_meta


def test_a_layer_that_was_built_in_evaluation_mode_stays_in_it() -> None:
    def build_model():
        model = NET.model()
        model[1].eval()
        return model

    replicas = Replicas(build_model, SEEDS)
    replicas(NET.inputs(3, B))
    assert replicas.training
    assert not replicas.unstack(0)[1].training
    assert replicas.stacked.get_submodule("1").num_batches_tracked.tolist() == [0, 0, 0]


def test_inference_mode_and_no_grad_may_come_first() -> None:
    x = NET.inputs(3, B)
    for mode in (torch.inference_mode, torch.no_grad):
        replicas = make("auto")
        with mode():
            assert not replicas(x).requires_grad
        replicas(x).sum().backward()
        assert all(p.grad is not None for p in replicas.parameters())


def test_without_gradients_the_trial_forms_none_and_with_them_it_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas, x = make(name="mlp"), NETS["mlp"].inputs(3, B)
    form = stacked.FORMS[nn.functional.linear]
    monkeypatch.setitem(stacked.FORMS, nn.functional.linear, lambda *args: form(*args).detach())
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        assert replicas(x).shape == (3, B, 3)
    assert not kept
    with pytest.raises(NotReplicable, match="gradient"):
        replicas(x)


def test_the_trial_leaves_no_gradient_and_no_statistics() -> None:
    replicas = make("auto")
    before = copy.deepcopy(replicas.stacked.state_dict())
    why = replicas.choose_engine(NET.inputs(3, B))
    assert why == replicas.why
    assert all(p.grad is None for p in replicas.parameters())
    assert all(torch.equal(v, before[k]) for k, v in replicas.stacked.state_dict().items())


@pytest.mark.parametrize(("times", "best"), [((1.0, 0.5), "vmap"), ((1.0, 0.9), "stacked"), ((1.0, 2.0), "stacked")])
def test_the_measured_engine_is_said(monkeypatch: pytest.MonkeyPatch, times, best) -> None:
    measured = iter(times)
    monkeypatch.setattr(replicas_module, "measure", lambda *args, **options: next(measured))
    replicas = make("auto")
    assert replicas.engine == "auto"
    replicas(NET.inputs(3, B))
    assert replicas.engine == best
    assert replicas.why.startswith(f"{best}; a forward and backward pass took: stacked 1000.00 ms, vmap")
    assert f"engine='{best}'" in repr(replicas)


def test_another_mode_is_tried_again_and_may_change_the_engine() -> None:
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 2)

        def forward(self, x):
            y = self.lin(x)
            return y if self.training else y - y.mean(0)

    replicas, x = Replicas(Modes, SEEDS), torch.randn(3, B, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replicas(x)
    replicas._set("stacked", "whatever was measured")
    with pytest.warns(UserWarning, match="outputs differ"):
        out = replicas.eval()(x)
    assert replicas.engine == "vmap"
    for s in range(3):
        torch.testing.assert_close(out[s], replicas.unstack(s)(x[s]))


def test_an_empty_batch_is_no_trial() -> None:
    class Centred(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y - y.sum(0)

    replicas = Replicas(lambda: Centred(4, 2), SEEDS, engine="stacked")
    assert replicas(torch.ones(3, 0, 4)).shape == (3, 0, 2)
    with pytest.raises(NotReplicable, match="couples samples"):
        replicas(torch.ones(3, 2, 4))


@pytest.mark.parametrize("engine", ["stacked", "vmap"])
def test_autocast_is_each_replicas_own(engine: str) -> None:
    replicas = Replicas(lambda: NETS["mlp"].model().float(), SEEDS, engine=engine)
    x = NETS["mlp"].inputs(3, B).float()
    assert replicas(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = replicas(x)
        for s in range(3):
            want = replicas.unstack(s)(x[s])
            assert out.dtype == want.dtype == torch.bfloat16
            assert (out[s] - want).abs().max() <= 0.03 * want.abs().max()


def test_no_parameters_and_no_samples() -> None:
    assert Replicas(nn.Tanh, range(2))(torch.ones(2, 3)).shape == (2, 3)
    for engine in ("stacked", "vmap"):
        assert make(engine, name="mlp")(torch.ones(3, 0, 6).double()).shape == (3, 0, 3)


def test_memory_is_said_from_one_model() -> None:
    made = []

    def build_model():
        made.append(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).requires_grad_(False)))
        return made[-1]

    memory = svag_fast.Replicas.memory_needed(build_model, 10)
    assert len(made) == 1
    assert memory.parameters == 10 * 4 * (6 * 5 + 5 + 10 + 12)
    assert memory.gradients == 10 * 4 * (6 * 5 + 5 + 10)
    assert memory.buffers == 10 * (4 * 10 + 8)
    assert memory.activations == 0
    assert memory.total == sum(memory)
    with_batch = svag_fast.Replicas.memory_needed(build_model, 10, torch.ones(32, 6))
    least = 10 * 4 * 32 * (6 + 5)  # the input of the first layer and of the normalisation
    assert least <= with_batch.activations <= 3 * least
    assert str(memory) == "0.0 MiB (parameters 0.0 MiB, gradients 0.0 MiB, buffers 0.0 MiB)"
