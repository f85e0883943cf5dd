"""Both halves of a batch through one BatchNorm are what two passes in order give, statistics included."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import svag_fast
from svag_fast.nn import CoupledSamples, PairBatchNorm1d, PairBatchNorm2d, PairBatchNorm3d, pair_, unpair_

KINDS = {
    1: (nn.BatchNorm1d, PairBatchNorm1d),
    2: (nn.BatchNorm2d, PairBatchNorm2d),
    3: (nn.BatchNorm3d, PairBatchNorm3d),
}
SHAPES = {"1d": (1, ()), "1d, length": (1, (5,)), "2d": (2, (3, 5)), "2d, one pixel": (2, (1, 1)), "3d": (3, (2, 1, 3))}
OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "no momentum": {"momentum": 0.0},
}
C = 3


def twins(dims, **options):
    """The same layer in both kinds, with weights and running statistics that aren't the initial ones."""
    plain_kind, pair_kind = KINDS[dims]
    generator = torch.Generator().manual_seed(0)
    plain = plain_kind(C, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *(b for b in plain.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    pair = pair_kind(C, dtype=torch.float64, **options)
    pair.load_state_dict(plain.state_dict())
    return plain, pair


def halves(rows, extra, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * rows, C, *extra, generator=generator, dtype=torch.float64) * 2 + 1
    b = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), b


def two_passes(plain, x, b, *, second_counts=True):
    """Outputs and gradients of one half after the other; without the second's trace in the buffers if asked."""
    rows = len(x) // 2
    first = plain(x[:rows])
    before = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    second = plain(x[rows:])
    out = torch.cat([first, second])
    grads = torch.autograd.grad(out, [x, *plain.parameters()], b)
    if not second_counts:
        for name, buffer in before.items():
            plain.get_buffer(name).copy_(buffer)
    return out, grads


def assert_same(plain, pair, x, b, **how):
    expected, expected_grads = two_passes(plain, x, b, **how)
    out = pair(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(torch.autograd.grad(out, [x, *pair.parameters()], b), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(pair.get_buffer(name), buffer, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("second_counts", [True, False], ids=["l > 1", "l = 1"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dims", "extra"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [2, 7])
def test_outputs_gradients_and_running_statistics_are_those_of_two_passes_in_order(
    rows, dims, extra, options, second_counts
):
    plain, pair = twins(dims, **options)
    pair.second_updates = second_counts
    for seed in (1, 2):  # the second time from the first one's statistics
        x, b = halves(rows, extra, seed)
        assert_same(plain, pair, x, b, second_counts=second_counts)


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_is_served_and_kept(dims):
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    plain, pair = twins(dims)
    x, b = halves(4, (4, 2) if dims == 2 else (2, 3, 2))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    assert_same(plain, pair, x, b)
    assert pair(x).is_contiguous(memory_format=memory_format)


def test_the_halves_do_not_see_each_other():
    _, pair = twins(2)
    x, _ = halves(3, (2, 2))
    other = torch.cat([x[:3], x[3:] * 5 - 1])
    assert torch.equal(pair(x)[:3], pair(other)[:3])
    assert not torch.equal(pair(x)[3:], pair(other)[3:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_evaluation_mode_is_plain_batchnorm_of_any_number_of_rows(options):
    plain, pair = twins(2, **options)
    x = torch.randn(5, C, 2, 2, dtype=torch.float64)
    assert torch.equal(pair.eval()(x), plain.eval()(x))


def test_without_eps_a_constant_channel_is_zero_and_the_rest_as_with_the_least_eps():
    _, pair = twins(2, eps=0.0)
    plain, _ = twins(2, eps=1e-300)
    x, b = halves(3, (2, 2))
    assert_same(plain, pair, x, b)
    x = x.detach().clone()
    x[:3, 1] = 7.0  # of the first batch alone
    x.requires_grad_()
    out = pair(x)
    (grad,) = torch.autograd.grad(out, x, b)
    assert torch.equal(out[:3, 1], pair.bias[1].expand(3, 2, 2))
    assert torch.equal(grad[:3, 1], torch.zeros(3, 2, 2, dtype=torch.float64))
    assert bool(grad.isfinite().all())
    assert float(grad[3:, 1].abs().min()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_half_precision_inputs_keep_their_dtype_as_under_autocast(dtype, eps):
    plain, pair = nn.BatchNorm2d(C, eps=1e-5), PairBatchNorm2d(C, eps=eps)
    x = torch.randn(6, C, 4, 4, dtype=dtype)
    out, expected = pair(x), torch.cat([plain(x[:3]), plain(x[3:])])
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(pair.running_var, plain.running_var, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(3, C, 2, 2), (2, C, 1, 1), (4, C, 2), (4, C + 1, 2, 2)])
def test_what_is_no_pair_of_batches_is_refused_and_leaves_no_trace(shape):
    _, pair = twins(2)
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        pair(torch.randn(shape, dtype=torch.float64))
    if shape[1] == C:
        assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


# ---- pair_ and unpair_


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    ).double()


def test_pair_swaps_in_place_and_back_and_keeps_everything_else():
    model = net()
    hooked = []
    handle = model[1].register_forward_hook(lambda *_: hooked.append(1))
    state, params = model.state_dict(), list(model.parameters())
    assert pair_(model) is model
    assert type(model[1]) is PairBatchNorm2d
    assert type(model[5]) is PairBatchNorm1d
    assert list(model.state_dict()) == list(state)
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    model(x)
    assert hooked == [1]
    handle.remove()
    net().load_state_dict(model.state_dict(), strict=True)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(other(x), model(x))
    assert unpair_(model) is model
    assert type(model[1]) is nn.BatchNorm2d
    assert "second_updates" not in vars(model[1])
    assert type(pair_(nn.BatchNorm3d(2))) is PairBatchNorm3d  # the root itself


def test_a_paired_net_takes_both_batches_as_two_passes_do():
    plain, model = net(), pair_(net(), second_updates=False)
    assert_same(plain, model, *_images(), second_counts=False)
    pair_(model)
    assert_same(plain, model, *_images())


def _images():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(10, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(10, 2, generator=generator, dtype=torch.float64)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


REFUSED = {
    "synchronised": (nn.SyncBatchNorm(4), "SyncBatchNorm.*all processes"),
    "subclass": (OwnNorm(4), "OwnNorm.*of its own"),
    "lazy": (nn.LazyBatchNorm2d(), "LazyBatchNorm2d.*run the model once"),
    "instance norm that tracks": (
        nn.InstanceNorm2d(4, track_running_stats=True),
        "InstanceNorm2d.*track_running_stats",
    ),
    "softmax over the samples": (nn.Softmax(dim=0), "Softmax.*dim=0"),
    "flattened samples": (nn.Flatten(0), "Flatten.*start_dim=0"),
    "data parallel": (nn.DataParallel(nn.Identity()), "DataParallel.*Distributed"),
    "scripted": (torch.jit.trace(nn.Identity(), torch.zeros(1)), "TorchScript"),
}


@pytest.mark.parametrize(("module", "message"), REFUSED.values(), ids=REFUSED)
def test_what_couples_the_samples_otherwise_is_refused_by_name_and_nothing_is_changed(module, message):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "inner": nn.Sequential(nn.ReLU(), module)})
    with pytest.raises(CoupledSamples, match=r"inner\.1 .*" + message):
        pair_(model)
    assert type(model["norm"]) is nn.BatchNorm2d


def test_all_that_is_refused_is_named():
    with pytest.raises(CoupledSamples, match=r"(?s)0 \(SyncBatchNorm\).*\n.*1 \(Softmax\)"):
        pair_(nn.Sequential(nn.SyncBatchNorm(2), nn.Softmax(0)))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        pair_([nn.BatchNorm2d(2)])


def test_instance_norm_without_running_statistics_is_no_obstacle():
    pair_(nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Softmax(dim=1), nn.GLU()))


# ---- what people run it under


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_each_batch_once(reentrant):
    """Plain BatchNorm updates its running statistics again in the recomputation; here the batch counts once."""
    plain, model = net(), pair_(net())
    x, b = _images()
    expected, expected_grads = two_passes(plain, x, b)
    out = checkpoint(model, x, use_reentrant=reentrant)
    out.backward(b)
    torch.testing.assert_close(out, expected)
    for p, grad in zip([x, *model.parameters()], expected_grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


def test_the_compiler_takes_it_whole():
    """backend="aot_eager" traces forward and backward as inductor would, without a C++ compiler's seconds."""
    plain, model = net(), pair_(net())
    model[1].momentum = plain[1].momentum = 0.3
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, b = _images()
    expected, expected_grads = two_passes(plain, x, b)
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(torch.autograd.grad(out, [x, *model.parameters()], b), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)
    torch.compiler.reset()


def test_autocast_gives_what_two_passes_under_autocast_give():
    plain, model = net().float(), pair_(net()).float()
    x = torch.randn(8, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(x), torch.cat([plain(x[:4]), plain(x[4:])])
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_svag_loss_over_a_paired_net_is_the_two_batch_gradient():
    plain, model = net(), pair_(net())
    x, _ = _images()
    y = torch.arange(10) % 2
    losses = nn.functional.cross_entropy(model(x.detach()), y, reduction="none")
    svag_fast.svag_loss(losses, 4).backward()
    loss1 = nn.functional.cross_entropy(plain(x[:5].detach()), y[:5])
    loss2 = nn.functional.cross_entropy(plain(x[5:].detach()), y[5:])
    svag_fast.svag_loss(loss1, loss2, 4).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
