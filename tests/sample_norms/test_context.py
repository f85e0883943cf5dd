"""The context of per-sample norms leaves no trace: exceptions, nesting, threads, memory, the user's own hooks."""

import contextlib
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from sample_norm_nets import image_batch, mlp, modes, randn, same_modes, small_net
from torch import nn

from svag_fast import UnsupportedModuleError, per_sample_sq_norms


def test_gradient_is_handed_over_not_copied():
    """.grad is the very tensor of the backward pass where there was none: no further buffer of the weights' size."""
    model = nn.Linear(3, 2)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    with per_sample_sq_norms(model):
        model(torch.ones(2, 3)).sum().backward()
    assert model.weight.grad.data_ptr() == seen[0]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("harmless", [lambda grad: None, lambda grad: grad, torch.clone])
def test_the_users_own_gradient_hooks_run_and_are_no_foreign_use(harmless, inside):
    model, seen = nn.Linear(3, 2), []

    def watch(grad):
        seen.append(grad)
        return harmless(grad)

    if not inside:
        model.weight.register_hook(watch)
    with per_sample_sq_norms(model) as norms:
        if inside:
            model.weight.register_hook(watch)
        model(torch.ones(2, 3)).sum().backward()
        model(torch.ones(2, 3)).sum().backward()
    assert norms["weight"].tolist() == pytest.approx([24, 24, 24, 24], rel=1e-6)
    assert (model.weight.grad == 4).all()
    assert len(seen) == 2


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", [lambda grad: 2 * grad, lambda grad: grad * (grad > 5), lambda grad: grad.mul_(2)])
def test_a_hook_that_changes_the_gradient_makes_the_norms_unknown(change, inside):
    """As one that masks all rows of an embedding but those of new words: norms would be of what isn't trained too."""
    model = nn.Linear(3, 2)
    if not inside:
        model.weight.register_hook(change)
    with per_sample_sq_norms(model) as norms:
        if inside:
            model.weight.register_hook(change)
        model(torch.ones(2, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="a hook on weight changed its gradient"):
            _ = norms.total
    assert torch.equal(model.weight.grad, change(torch.full((2, 3), 2.0)))
    with per_sample_sq_norms(model, parameters=[model.bias]) as norms:
        model(torch.ones(2, 3)).sum().backward()
    assert norms.total.tolist() == pytest.approx([8, 8], rel=1e-6)


@pytest.mark.parametrize("when", ["never", "forward", "backward", "between"])
def test_the_model_is_left_as_it_was(when):
    """No patched forward, no hook, the same parameter objects: also when an exception flies."""
    model = small_net()
    x, y = image_batch()
    before = modes(model)

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    handle = None
    with contextlib.suppress(StopError), per_sample_sq_norms(model):
        if when == "forward":
            with pytest.raises(RuntimeError):
                model(x[:, :1])
        loss = F.cross_entropy(model(x), y)
        if when == "backward":
            handle = model[1].weight.register_hook(stop)
        if when == "between":
            raise StopError
        loss.backward()
    if handle is not None:
        handle.remove()
    same_modes(before, modes(model))
    assert all(not p._backward_hooks for p in model.parameters())
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert "_LayerBackward" not in str(model(x).grad_fn)


def test_a_pass_cut_short_by_an_exception_does_not_count():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:

        def stop(grad):
            raise ValueError("stop")

        handle = model[0].weight.register_hook(stop)
        with pytest.raises(ValueError, match="stop"):
            F.cross_entropy(model(x), y).backward()
        handle.remove()
        with pytest.raises(RuntimeError, match="no backward pass"):
            _ = norms.total
        F.cross_entropy(model(x), y).backward()
        assert norms.total.shape == (4,)


def test_graphs_that_outlive_the_context_still_give_gradients():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no backward pass"):
        _ = norms.total


def test_one_context_inside_another():
    """On two models each has its own norms; on the same layers the inner one is refused, the outer one works."""
    one, two = small_net(), mlp().double()
    x, y = image_batch()
    with per_sample_sq_norms(one) as outer:
        with per_sample_sq_norms(two) as inner:
            (F.cross_entropy(one(x), y) + two(randn(4, 10)).square().mean()).backward()
        assert outer.total.shape == inner.total.shape == (4,)
        with pytest.raises(UnsupportedModuleError, match="leave the other per_sample_sq_norms context"):
            per_sample_sq_norms(one[3]).__enter__()
        outer.reset()
        F.cross_entropy(one(x), y).backward()
        assert outer.total.shape == (4,)
    context = per_sample_sq_norms(one)
    with context, pytest.raises(RuntimeError, match="already entered"):
        context.__enter__()


def test_a_context_can_be_entered_again():
    model = small_net()
    x, y = image_batch()
    context = per_sample_sq_norms(model)
    totals = []
    for _ in range(2):
        with context as norms:
            F.cross_entropy(model(x), y).backward()
        totals.append(norms.total)
    torch.testing.assert_close(*totals, rtol=0, atol=0)


def test_memory_of_the_graph_is_freed_with_it():
    model = small_net()
    x, y = image_batch()
    with per_sample_sq_norms(model) as norms:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        recorder = norms._recorder
        del loss
        gc.collect()
        assert not any(recorder.pending.values())
        assert recorder.open_pass is None


def test_threads_each_with_a_model_of_their_own():
    jobs = [(small_net(), *image_batch(4 + k)) for k in range(3)]
    expected, got = [], {}
    for model, x, y in jobs:
        with per_sample_sq_norms(model) as norms:
            F.cross_entropy(model(x), y).backward()
        expected.append(norms.total)

    def work(seed):
        model, x, y = jobs[seed]
        for _ in range(5):
            with per_sample_sq_norms(model) as norms:
                F.cross_entropy(model(x), y).backward()
        got[seed] = norms.total

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in range(3):
        torch.testing.assert_close(got[seed], expected[seed], rtol=1e-12, atol=0)
