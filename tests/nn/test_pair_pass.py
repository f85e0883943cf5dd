"""Both batches through a model in one call give the gradients, statistics and running statistics of two passes."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from pair_passes import CLASSES, B, assert_same_states, assert_same_stats, images, labels, one_pass, seeded, two_passes
from torch import nn

import svag_fast
from svag_fast import SVAG, SVAGAdam, SVAGRMSprop, pair_pass
from svag_fast.nn import joint


class Tied(nn.Module):
    """A layer used twice, and a weight under two modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(72, CLASSES, bias=False)
        self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.conv(torch.tanh(self.conv(x))).flatten(2)
        return self.last(self.second(torch.tanh(self.first(x))).flatten(1))


class Language(nn.Module):
    """Position embeddings: a value that all samples share, whose rows are no samples."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 6), nn.Embedding(6, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(self.words(x) + self.positions(torch.arange(x.shape[1]))).mean(1)


class ZeroBranch(nn.Module):
    """A residual branch of weight zero, behind which the samples are coupled."""

    def __init__(self):
        super().__init__()
        self.last, self.scale = nn.Linear(72, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        x = self.last(x.flatten(1))
        return x + self.scale(x - x.mean(0))


class Own(nn.Module):
    """A parameter of its own beside layers, as a class token."""

    def __init__(self):
        super().__init__()
        self.token, self.last = nn.Parameter(torch.randn(1, 2, 6)), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.last((x.flatten(2)[..., :6] * self.token).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.scale = nn.Linear(72, 5), nn.Linear(72, 5), nn.PReLU()

    def forward(self, x, other=None, *, bias):
        return {
            "logits": self.scale(self.left(x.flatten(1)) * self.right(other.flatten(1)))[:, :CLASSES] + bias,
            "n": 3,
        }


MODELS = {
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(4, momentum=None, affine=False),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
        nn.BatchNorm1d(CLASSES, track_running_stats=False),
    ),
    "other norms": lambda: nn.Sequential(
        nn.Conv2d(2, 4, (3, 1), padding="same", padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.ConvTranspose2d(4, 2, 2),
        nn.LayerNorm(7),
        nn.RMSNorm((7, 7)),
        nn.Flatten(),
        nn.Linear(98, CLASSES),
    ),
    "one and three dimensions": lambda: nn.Sequential(
        nn.Unflatten(2, (2, 3)),
        nn.Conv3d(2, 2, (2, 2, 3)),
        nn.BatchNorm3d(2),
        nn.Flatten(2),
        nn.Conv1d(2, 3, 3),
        nn.BatchNorm1d(3),
        nn.Linear(6, 2),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    ),
    "frozen parts": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3).requires_grad_(False),
        nn.BatchNorm2d(4).eval(),
        nn.Flatten(),
        nn.Linear(64, CLASSES).requires_grad_(True),
    ),
    "tied": Tied,
    "changes in place": lambda: nn.Sequential(
        *(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3), nn.LeakyReLU(inplace=True)),
        *(nn.Flatten(2), nn.Linear(16, 12), nn.LeakyReLU(inplace=True), nn.Conv1d(3, 2, 3), nn.ReLU(inplace=True)),
        *(nn.Unflatten(2, (1, 2, 5)), nn.Conv3d(2, 2, (1, 1, 3)), nn.LeakyReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(inplace=True), nn.Linear(8, CLASSES)),
    ),
}
BY_HALVES_ALONE = {
    "a value that all share": (Language, lambda: torch.randint(0, 7, (2 * B, 6)), "positions.*its rows are not the"),
    "a parameter of its own": (Own, images, "the model .Own. has parameters of its own"),
    "samples coupled inside a batch": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES), Centred()),
        images,
        "coupled",
    ),
    "coupled without gradient": (
        lambda: nn.Sequential(Scaled(), nn.Flatten(), nn.Linear(72, CLASSES)),
        images,
        "coupled",
    ),
    "instance norm that tracks": (
        lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(72, CLASSES)),
        images,
        "running statistics",
    ),
    "weight used elsewhere": (lambda: Elsewhere(), images, "used outside of its own layer"),
}


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Scaled(nn.Module):
    def forward(self, x):
        return x / x.detach().abs().max()


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(72, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.first(x.flatten(1)))
        return self.last(x) + self.last(torch.tanh(F.linear(x, self.first.weight[:, :8])))


@pytest.mark.parametrize("l", [1, 2.5])
@pytest.mark.parametrize("way", ["joint", "halves"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_pair_is_two_passes_in_order(build, way, l):
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (
        SVAG(m.parameters(), lr=0.1, l=l, weight_decay=1e-2, momentum=0.9) for m in (model, expected)
    )
    for _ in range(3):  # the first pass is verified, the second is not, the third starts from moved parameters
        x, y = images(), labels()
        pair = one_pass(model, optimizer, x, y, way=way)
        assert pair.way == way
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize(("build", "inputs", "reason"), BY_HALVES_ALONE.values(), ids=BY_HALVES_ALONE)
def test_what_cannot_go_jointly_goes_by_halves_and_says_so_once(build, inputs, reason):
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=3) for m in (model, expected))
    for k in range(2):
        x, y = inputs(), labels()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pair = one_pass(model, optimizer, x, y)
        said = [w for w in caught if "one after the other" in str(w.message)]
        assert len(said) == (k == 0)
        assert pair.way == "halves"
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)
    with pytest.raises(svag_fast.nn.CoupledSamples, match=f"(?s){reason}.*halves"):
        one_pass(model, SVAG(model.parameters(), lr=0.1, l=3), x, y, way="joint")
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("build", "inputs", "zero"),
    [(Language, lambda: torch.randint(0, 7, (2 * B, 6)), "last"), (ZeroBranch, images, "scale")],
)
def test_what_hides_behind_zeros_is_found_before_the_first_pass(build, inputs, zero):
    model, expected = seeded(build), seeded(build)
    for m in (model, expected):
        for p in m.get_submodule(zero).parameters():
            nn.init.zeros_(p)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=3) for m in (model, expected))
    for _ in range(3):
        x, y = inputs(), labels()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert one_pass(model, optimizer, x, y).way == "halves"
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)


def test_a_layer_that_the_outputs_do_not_show_is_not_taken_on_trust():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(72, CLASSES), nn.Linear(72, 2)

        def forward(self, x):
            self.other(x.flatten(1))
            return self.first(x.flatten(1))

    model = seeded(Model)
    with pytest.raises(svag_fast.nn.CoupledSamples, match=r"other \(Linear\).*can't be checked"):
        one_pass(model, SVAG(model.parameters(), lr=0.1, l=2), images(), labels(), way="joint")


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_keyword_inputs_shared_values_and_outputs_in_a_dict(way):
    model, expected = seeded(TwoInputs), seeded(TwoInputs)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    x, z, y, bias = images(), images(), labels(), torch.randn(CLASSES, dtype=torch.float64)
    with pair_pass(model, optimizer, way=way) as pair:
        out = model(x, other=z, bias=bias)
        assert out["n"] == 3
        pair.backward(F.cross_entropy(out["logits"], y, reduction="none"))
    for half in (slice(None, B), slice(B, None)):
        F.cross_entropy(expected(x[half], z[half], bias=bias)["logits"], y[half]).backward()
        if half.start is None:
            reference.hold_gradient()
    assert_same_stats(optimizer.step(), reference.step())
    assert_same_states(model, expected)


@pytest.mark.parametrize("way", ["joint", "halves"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 3), lambda: nn.BatchNorm1d(6), lambda: nn.LayerNorm(6)])
def test_a_model_may_be_a_single_layer(build, way):
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    for _ in range(2):
        x = torch.randn(2 * B, 6, dtype=torch.float64)
        with pair_pass(model, optimizer, way=way) as pair:
            pair.backward(model(x).exp().sum(1))
        expected(x[:B]).exp().sum(1).mean().backward()
        reference.hold_gradient()
        expected(x[B:]).exp().sum(1).mean().backward()
        assert_same_stats(optimizer.step(), reference.step())
        reference.zero_grad()
        assert_same_states(model, expected)


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_a_layer_that_is_frozen_between_steps_stays_where_it_is(way):
    model, expected = seeded(MODELS["batch norm"]), seeded(MODELS["batch norm"])
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=4) for m in (model, expected))
    for frozen in (False, True, True):
        for m in (model, expected):
            m[0].requires_grad_(not frozen)
        x, y = images(), labels()
        one_pass(model, optimizer, x, y, way=way)
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        reference.zero_grad()
        assert_same_states(model, expected)


@pytest.mark.parametrize(("kind", "more"), [(SVAGAdam, {}), (SVAGRMSprop, {"initial_square_avg": "measure"})])
def test_adaptive_optimizers_take_pairs(kind, more):
    build = MODELS["batch norm"]
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (kind(m.parameters(), lr=0.01, l=2, **more) for m in (model, expected))
    for _ in range(2):
        x, y = images(), labels()
        one_pass(model, optimizer, x, y)
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        # A bias before BatchNorm has no gradient but rounding (1e-17), which these divide by eps = 1e-8.
        assert_same_states(model, expected, atol=1e-9)


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_a_steps_gradients_are_not_kept_beside_what_the_next_forward_saves(way):
    model = seeded(MODELS["batch norm"])
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    x, y = images(), labels()
    for _ in range(2):
        with pair_pass(model, optimizer, way=way) as pair:
            pair.backward(F.cross_entropy(model(x), y, reduction="none"))
            F.cross_entropy(model(x), y, reduction="none")  # before the step they stay
        first = [weakref.ref(g) for g in optimizer._pair.first()]
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())
        with pair_pass(model, optimizer, way=way):
            model(x)
            assert all(p.grad is None for p in model.parameters())
            assert not any(ref() is not None for ref in first)


def test_layers_taken_together_have_the_bits_of_layers_taken_one_by_one(monkeypatch):
    found = []
    for most in (joint.DUE_BYTES, 2000, 0):  # all, some, one
        monkeypatch.setattr(joint, "DUE_BYTES", most)
        model = seeded(MODELS["other norms"])
        optimizer = SVAG(model.parameters(), lr=0.1, l=2)
        one_pass(model, optimizer, images(), labels(), way="joint")
        found.append([*optimizer._pair.first(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("which", ["its output", "the gradient of its output"])
def test_what_a_layers_gradients_are_to_be_formed_of_is_not_changed_before(which):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Identity(), nn.Linear(6, CLASSES))
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    seen, changes = [], False

    def see(module, inputs, output):
        seen[:] = [output.detach()]
        if output.requires_grad:
            output.register_hook(seen.append)

    def change(grad):
        if changes:
            seen[which == "the gradient of its output"].mul_(2)

    def wait(module, inputs, output):
        if output.requires_grad:
            output.register_hook(change)

    model[1].register_forward_hook(wait)
    model[2].register_forward_hook(see)
    for changes in (False, True):
        with pair_pass(model, optimizer, way="joint") as pair:
            losses = model(torch.randn(8, 6)).square().sum(1)
            if changes:
                with pytest.raises(RuntimeError, match="in-place operation in the backward pass"):
                    pair.backward(losses)
                assert all(p.grad is None for p in model.parameters())
            else:
                pair.backward(losses)
                optimizer.step()


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_accumulated_passes_add_up_in_both_gradients(way):
    build = MODELS["batch norm"]
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    batches = [(images(), labels()) for _ in range(3)]
    with pair_pass(model, optimizer, way=way) as pair:
        for x, y in batches:
            pair.backward(F.cross_entropy(model(x), y, reduction="none") / 3)
    sums = [[torch.zeros_like(p) for p in expected.parameters()] for _ in range(2)]
    for x, y in batches:
        for half, total in zip((slice(None, B), slice(B, None)), sums, strict=True):
            loss = F.cross_entropy(expected(x[half]), y[half]) / 3
            for g, more in zip(total, torch.autograd.grad(loss, list(expected.parameters())), strict=True):
                g += more
    for p, g1, g2 in zip(expected.parameters(), *sums, strict=True):
        p.grad = g1
        p.second = g2
    reference.hold_gradient()
    for p in expected.parameters():
        p.grad = p.second
    assert_same_stats(optimizer.step(), reference.step())
    assert_same_states(model, expected)


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_one_context_over_many_steps_clears_before_each(way):
    build = MODELS["batch norm"]
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    with pair_pass(model, optimizer, way=way) as pair:
        for k in range(3):
            x, y = images(), labels()
            pair.backward(F.cross_entropy(model(x), y, reduction="none"))
            if k == 1:
                optimizer.zero_grad()  # thrown away, both of them
                pair.backward(F.cross_entropy(model(x), y, reduction="none"))
                expected(x[:B]), expected(x[B:])
            assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
            with torch.no_grad():
                model.eval()(x[:3])  # evaluation inside, of any number of rows
                model.train()
    assert_same_states(model, expected)


def test_a_paired_model_and_a_plain_one_are_the_same():
    build = MODELS["batch norm"]
    for way in ("joint", "halves"):
        model, expected = svag_fast.nn.pair_(seeded(build)), seeded(build)
        optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=1) for m in (model, expected))
        x, y = images(), labels()
        one_pass(model, optimizer, x, y, way=way)
        assert type(model[1]) is svag_fast.nn.PairBatchNorm2d
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_clipping_is_each_gradient_by_its_own_norm_and_the_second_alone_is_refused(way):
    build = MODELS["other norms"]
    model, expected = seeded(build), seeded(build)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    x, y = images(), labels()
    one_pass(model, optimizer, x, y, way=way)
    norms = optimizer.clip_grad_norm_(0.1)
    two_passes(expected, reference, x, y, step=False)
    torch.testing.assert_close(norms, reference.clip_grad_norm_(0.1))
    assert_same_stats(optimizer.step(), reference.step())
    one_pass(model, optimizer, x, y, way=way)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="held one was not"):
        optimizer.step()


def test_gradients_are_cleared_before_and_left_after():
    model = seeded(MODELS["batch norm"])
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    x, y = images(), labels()
    one_pass(model, optimizer, x, y)
    second = [p.grad.clone() for p in model.parameters()]
    other = seeded(MODELS["batch norm"])
    F.cross_entropy(other(x[B:]), y[B:]).backward()
    for grad, p in zip(second, other.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("way", ["joint", "halves"])
def test_hooks_of_modules_see_their_calls(way):
    model = seeded(MODELS["batch norm"])
    rows = []
    model.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    one_pass(model, SVAG(model.parameters(), lr=0.1, l=2), images(), labels(), way=way)
    assert rows == [2 * B]


def test_gradient_hooks_see_each_batch():
    model = seeded(MODELS["other norms"])
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    with pytest.warns(UserWarning, match="gradient hooks"):
        pair = one_pass(model, optimizer, images(), labels())
    assert pair.way == "halves"
    assert len(seen) == 2
    assert torch.equal(seen[1], model[0].weight.grad)


# ---- per-sample norms


NORMED = {
    "convolutions and linear layers": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(2, 4, affine=False),
            nn.Conv2d(4, 2, (2, 3), stride=2, groups=2, bias=False),
            nn.Flatten(2),
            nn.Conv1d(2, 3, 2),
            nn.Tanh(),
            nn.Linear(5, 2),
            nn.Unflatten(2, (1, 1, 2)),
            nn.Conv3d(3, 2, 1),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        ),
        "joint",
    ),
    "affine norms": (MODELS["other norms"], "joint"),
    "by running statistics": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(64, CLASSES)),
        "joint",
    ),
    "tied": (Tied, "halves"),
}


@pytest.mark.parametrize("how", ["auto", "halves"])
@pytest.mark.parametrize(("build", "way"), NORMED.values(), ids=NORMED)
def test_norms_are_those_of_each_sample(build, way, how):
    model = seeded(build)
    if build is MODELS["other norms"]:
        model[4] = nn.Conv2d(4, 2, 2, padding=1).double()
    expected = copy.deepcopy(model)
    optimizer, reference = (SVAG(m.parameters(), lr=0.1, l=2) for m in (model, expected))
    for _ in range(2):
        x, y = images(), labels()
        pair = one_pass(model, optimizer, x, y, norms=True, way=how)
        assert pair.way == (way if how == "auto" else how)
        names = [name for name, _ in expected.named_parameters()]
        for i in range(2 * B):
            loss = F.cross_entropy(expected(x[i : i + 1]), y[i : i + 1])
            sq_norms = [float(g.square().sum()) for g in torch.autograd.grad(loss, list(expected.parameters()))]
            assert float(pair.norms.total[i]) == pytest.approx(sum(sq_norms), rel=1e-9)
            assert [float(pair.norms[name][i]) for name in names] == pytest.approx(sq_norms, rel=1e-9)
        assert_same_stats(optimizer.step(), two_passes(expected, reference, x, y))
        assert_same_states(model, expected)


def test_norms_of_a_layer_called_twice_are_left_to_the_halves():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(72, 72), nn.Linear(72, CLASSES)

        def forward(self, x):
            return self.last(self.layer(torch.tanh(self.layer(x.flatten(1)))))

    model = seeded(Twice)
    x, y = images(), labels()
    with pytest.warns(UserWarning, match="called twice"):
        pair = one_pass(model, SVAG(model.parameters(), lr=0.1, l=2), x, y, norms=True)
    assert pair.way == "halves"
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x[:1]), y[:1]), [model.layer.weight])
    assert float(pair.norms["layer.weight"][0]) == pytest.approx(float(grad.square().sum()), rel=1e-9)


def test_norms_of_accumulated_passes_are_appended_and_without_them_there_are_none():
    model = seeded(NORMED["convolutions and linear layers"][0])
    optimizer = SVAG(model.parameters(), lr=0.1, l=2)
    with pair_pass(model, optimizer, norms=True) as pair:
        for _ in range(2):
            pair.backward(F.cross_entropy(model(images()), labels(), reduction="none"))
    assert pair.norms.total.shape == (4 * B,)
    optimizer.step()
    with pytest.raises(RuntimeError, match="norms=True"):
        _ = one_pass(model, optimizer, images(), labels()).norms


def test_batchnorm_has_no_norms_and_the_model_is_left_alone():
    model = seeded(MODELS["batch norm"])
    with (
        pytest.raises(svag_fast.UnsupportedModuleError, match=r"1 \(BatchNorm2d\)"),
        pair_pass(model, SVAG(model.parameters(), lr=0.1, l=2), norms=True),
    ):
        pass
    assert all("forward" not in vars(m) for m in model.modules())


# ---- the choice


@pytest.mark.parametrize(("size", "way"), [(6, "joint"), (160, "halves")])
def test_auto_takes_small_inputs_jointly_and_large_ones_by_halves_without_a_word(size, way):
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pair_pass(model, SVAG(model.parameters(), lr=0.1, l=2)) as pair:
            pair.backward(model(torch.randn(8, 2, size, size)).square().sum(1))
    assert pair.way == way
