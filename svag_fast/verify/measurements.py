"""The product's own measurements: every estimator over all batches of a small data set, every norm against a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast.noise import estimators as noise
from svag_fast.noise.running import RunningNoise
from svag_fast.ops import backends, weight_grad_and_sq_norms
from svag_fast.ops.step_stats import StepStats
from svag_fast.sample_norms.context import per_sample_sq_norms
from svag_fast.verify.check import Check, Outcome, SuiteSettings, exact_check, one_thread

SOURCE = "Section 5"
TOLERANCE = 1e-11
SAMPLES, B = 5, 2


def estimators(settings: SuiteSettings) -> Outcome:
    """Means over all batches, with and without replacement, are G, N and Tr Σ_1 of the data, to rounding."""
    outcome = Outcome()
    data = _sample_grads(settings.seed)
    for replacement in (True, False):
        # Five samples in batches of two: few enough that a mean over all batches is a sum, with no error but rounding.
        truth = _truth(data, replacement)
        population = None if replacement else SAMPLES
        how = "with replacement" if replacement else "distinct samples"
        batches = [data[list(indices)] for indices in _draws(replacement)]
        means = [g.mean(0) for g in batches]
        # Every pair, also of a batch with itself: the two are independent, so it has the same probability.
        pairs = list(itertools.product(range(len(means)), repeat=2))
        found = {
            "from_sample_norms": _mean(
                noise.from_sample_norms(g.square().sum(1), g.mean(0).square().sum(), population=population)
                for g in batches
            ),
            "from_two_batches": _mean(
                noise.from_two_batches(*_products(means[i], means[j]), batch_size=B, population=population)
                for i, j in pairs
            ),
            "from_two_batches_of_samples": _mean(
                noise.from_two_batches_of_samples(
                    torch.cat([batches[i], batches[j]]).square().sum(1),
                    *_products(means[i], means[j]),
                    population=population,
                )
                for i, j in pairs
            ),
            "from_batches, M = 2": _mean(
                noise.from_batches(
                    torch.stack([means[i] @ means[i], means[j] @ means[j]]),
                    ((means[i] + means[j]) / 2).square().sum(),
                    batch_size=B,
                    population=population,
                )
                for i, j in pairs
            ),
            "BatchMoments, M = 3": _mean(_moments(means, chosen, population) for chosen in _triples(len(means))),
        }
        for name, values in found.items():
            outcome.checks += _compare(f"{name}, {how}", values, truth)
    outcome.checks += _compare("from_two_batches, two halves of one draw", _halves(data), _truth(data, False))
    outcome.checks += _running_noise(data)
    return outcome


@one_thread()
def norms(settings: SuiteSettings) -> Outcome:
    """`per_sample_sq_norms` on every kind of layer against one backward pass a sample; and the op on each backend."""
    outcome = Outcome()
    for name, (model, inputs) in _nets(settings.seed).items():
        outcome.checks += _net_checks(name, model.double(), inputs)
    outcome.checks += _op_checks(settings.seed)
    return outcome


def _sample_grads(seed: int) -> Tensor:
    """Per-sample gradients [n, d] with a mean that is neither small nor large against their spread."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, dtype=torch.float64, generator=generator, device="cpu").exp() + 0.3


def _truth(data: Tensor, replacement: bool) -> tuple[float, float, float]:
    """G, N_B and Tr Σ_1 by their definitions."""
    mean = data.mean(0)
    one = float((data - mean).square().sum(1).mean())
    n = len(data)
    return float(mean @ mean), one / B * (1.0 if replacement else (n - B) / (n - 1)), one


def _draws(replacement: bool) -> Iterable[tuple[int, ...]]:
    samples = range(SAMPLES)
    return itertools.product(samples, repeat=B) if replacement else itertools.permutations(samples, B)


def _products(g1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return g1 @ g1, g2 @ g2, g1 @ g2


def _triples(count: int) -> Iterable[tuple[int, ...]]:
    """Three batches by an orthogonal array: every pair of batches stands in any two places equally often.

    The estimates are of second degree in the batches, so that their mean is the one over all ``count ** 3`` triples.
    """
    return ((i, j, (i + j) % count) for i in range(count) for j in range(count))


def _moments(means: Sequence[Tensor], chosen: tuple[int, ...], population: int | None) -> noise.NoiseEstimate:
    moments = noise.BatchMoments()
    for i in chosen:
        moments.add([means[i]])
    return moments.estimate(batch_size=B, population=population)


def _mean(estimates: Iterable[noise.NoiseEstimate]) -> tuple[float, float, float]:
    rows = []
    for grad, batch, sample in estimates:
        assert sample is not None, "the batch size is given"
        rows.append(torch.stack([grad, batch, sample]))
    G, N, one = torch.stack(rows).mean(0).tolist()
    return G, N, one


def _halves(data: Tensor) -> tuple[float, float, float]:
    estimates = []
    for indices in itertools.permutations(range(SAMPLES), 2 * B):
        g1, g2 = data[list(indices[:B])].mean(0), data[list(indices[B:])].mean(0)
        estimates.append(noise.from_two_batches(*_products(g1, g2), batch_size=B, population=SAMPLES, disjoint=True))
    return _mean(estimates)


def _running_noise(data: Tensor) -> list[Check]:
    """A RunningNoise that takes each pair of batches once holds the data's own G, N and N/G."""
    running = RunningNoise()
    means = [data[list(indices)].mean(0) for indices in _draws(True)]
    for g1, g2 in itertools.product(means, repeat=2):
        raw = torch.stack(
            [
                *_products(g1, g2),
                torch.tensor(2.0, dtype=torch.float64, device="cpu"),
                torch.tensor(1.0, dtype=torch.float64, device="cpu"),
            ]
        ).double()
        running.update(StepStats(raw, True))
    G, N, _ = _truth(data, True)
    found = {"G": running.grad_sq_norm.mean / G, "N": running.noise_trace.mean / N, "N/G": running.nsr.mean * G / N}
    return [
        exact_check(SOURCE, f"RunningNoise over all pairs of batches: {name}", abs(ratio - 1), TOLERANCE)
        for name, ratio in found.items()
    ]


def _compare(name: str, found: Sequence[float], truth: Sequence[float]) -> list[Check]:
    return [
        exact_check(SOURCE, f"{name}: mean {which} over all batches", abs(mine / right - 1), TOLERANCE)
        for which, mine, right in zip(("G", "N", "Tr Σ_1"), found, truth, strict=True)
    ]


class _Words(nn.Module):
    """Embedding, attention and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        # One parameter used twice: the norm of the sum isn't the sum of the norms.
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, 7]."""
        x = self.words(tokens)
        out: Tensor = self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        return out


def _nets(seed: int) -> dict[str, tuple[nn.Module, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    # Modules draw their weights from the global stream, which is the caller's.
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    images = torch.randn(4, 4, 6, 5, dtype=torch.float64, generator=generator, device="cpu")
    nets: dict[str, tuple[nn.Module, Tensor]] = {
        "MLP": (
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
            torch.randn(4, 5, dtype=torch.float64, generator=generator, device="cpu"),
        ),
        "rows of positions": (
            nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2)),
            torch.randn(4, 3, 5, dtype=torch.float64, generator=generator, device="cpu"),
        ),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(4, 8, 3, padding=1),
                nn.GroupNorm(2, 8),
                nn.ReLU(),
                nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding=2, groups=2, bias=False),
                nn.PReLU(6),
                nn.Flatten(),
            ),
            images,
        ),
        "tied embedding and attention": (_Words(), torch.randint(7, (4, 5), generator=generator, device="cpu")),
    }
    torch.set_rng_state(torch_state)
    return nets


def _net_checks(name: str, model: nn.Module, inputs: Tensor) -> list[Check]:
    def loss(x: Tensor) -> Tensor:
        output: Tensor = model(x)
        # Not linear in the output, so that each sample has output gradients of its own.
        return output.sin().flatten(1).sum(1).mean()

    parameters = list(model.parameters())
    alone = []
    for i in range(len(inputs)):
        grads = torch.autograd.grad(loss(inputs[i : i + 1]), parameters)
        alone.append([g.square().sum() for g in grads])
    each = torch.tensor(alone, dtype=torch.float64, device="cpu").T
    plain = torch.autograd.grad(loss(inputs), parameters)
    with per_sample_sq_norms(model) as measured:
        loss(inputs).backward()  # type: ignore[no-untyped-call]
    off = max(
        float(((measured[n] - e).abs() / e.max()).max())
        for (n, _), e in zip(model.named_parameters(), each, strict=True)
    )
    total = float((measured.total / each.sum(0) - 1).abs().max())
    grad_off = max(
        float((p.grad - g).abs().max() / g.abs().max())
        for p, g in zip(parameters, plain, strict=True)
        if p.grad is not None
    )
    checks = [
        (f"{name}: |g_i|² of each parameter against one backward pass a sample", off),
        (f"{name}: the samples' total", total),
        (f"{name}: .grad is autograd's", grad_off),
    ]
    return [exact_check("Section 2", title, value, TOLERANCE) for title, value in checks]


def _op_checks(seed: int) -> list[Check]:
    """weight_grad_and_sq_norms: gradient, norms, segments of Linear and Conv2d against autograd, sample by sample."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    weights, segments = draw(5), [0, 1, 1, 0, 1]
    geometry = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    cases: dict[str, tuple[Tensor, Tensor, tuple[int, ...], dict[str, int], Callable[[Tensor, Tensor], Tensor]]] = {
        "Linear": (draw(5, 3, 4), draw(5, 3, 6), (6, 4), {}, F.linear),
        "Conv2d": (
            draw(5, 4, 7, 6),
            draw(5, 6, 4, 3),
            (6, 2, 3, 3),
            geometry,
            lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 2),
        ),
    }
    checks = []
    for name, (x, b, shape, options, apply) in cases.items():
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True, device="cpu")
        rows = [torch.autograd.grad((apply(x[i : i + 1], weight) * b[i : i + 1]).sum(), weight)[0] for i in range(5)]
        own = torch.stack(rows)
        # Gradients written out sample by sample: the definition, by nothing of ours.
        weighted = own * weights.reshape(-1, *[1] * len(shape))
        parts = torch.stack([weighted[[i for i in range(5) if segments[i] == s]].sum(0).flatten() for s in (0, 1)])
        for backend in backends.BACKENDS:
            if backends.why_not("weight_grad_and_sq_norms", backend, [x, b]) is not None:
                continue
            found = weight_grad_and_sq_norms(
                x, b, shape, weights=weights, segments=segments, backend=backend, **options
            )
            assert found.segment_gram is not None
            for part, mine, right in (
                ("Σ w_i g_i", found.grad, weighted.sum(0)),
                ("|g_i|²", found.sq_norms, own.flatten(1).square().sum(1)),
                ("segments' inner products", found.segment_gram, parts @ parts.T),
            ):
                off = float((mine - right).abs().max() / right.abs().max())
                title = f"weight_grad_and_sq_norms, {backend}, {name}: {part}"
                checks.append(exact_check("Section 2", title, off, TOLERANCE))
    return checks
