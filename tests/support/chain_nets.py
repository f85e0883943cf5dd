"""Chain nets for the tests of the fused replicas: every kind of layer, odd sizes, frozen parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svag_fast import svag_coefficients
from svag_fast.experiments.models import build_model
from svag_fast.replicas.chain import Chain, chain_of
from svag_fast.replicas.sampling import batch_indices


def mlp(eps: float = 1e-12) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64, bias=False), nn.LayerNorm(64, eps=eps, elementwise_affine=False), nn.ReLU()]
    head = nn.Linear(64, 10, bias=False)
    head.weight.requires_grad_(False)
    return nn.Sequential(*layers, head)


def odd() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.GroupNorm(5, 5), nn.GELU())
    return nn.Sequential(
        first,
        nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False),
        nn.LayerNorm([7, 3, 4]),
        nn.Tanh(),
        nn.Conv2d(7, 18, 1, stride=2),
        nn.GroupNorm(3, 18),
        nn.ReLU(),
        nn.Identity(),
        nn.Conv2d(18, 6, 3, stride=(1, 2), padding=1),
        nn.ReLU(),
        nn.AvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(6, 13),
        nn.GELU("tanh"),
        nn.Linear(13, 3),
    )


def flat() -> nn.Module:
    layers = [nn.Conv2d(3, 20, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(700, 9), nn.LayerNorm(9)]
    return nn.Sequential(*layers, nn.Linear(9, 1000))


def two_classes() -> nn.Module:
    layers = [nn.Flatten(), nn.GELU(), nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 33), nn.GroupNorm(3, 33), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(33, 2, bias=False))


def partly_frozen() -> nn.Module:
    model = odd()
    for name, p in model.named_parameters():
        p.requires_grad_(
            name not in ("0.0.weight", "0.0.bias", "0.1.weight", "2.bias", "4.weight", "8.bias", "15.weight")
        )
    return model


def norms_first() -> nn.Module:
    layers = [nn.GroupNorm(1, 3), nn.ReLU(), nn.AvgPool2d(2, stride=1), nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def digits_net() -> nn.Module:
    return build_model("digits-net", in_channels=1, num_classes=10, seed=torch.initial_seed())


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "digits-net": (digits_net, (1, 8, 8)),
    "odd": (odd, (2, 5, 7)),
    "flat": (flat, (3, 5, 7)),
    "two classes": (two_classes, (2, 3)),
    "partly frozen": (partly_frozen, (2, 5, 7)),
    "norms first": (norms_first, (3, 4, 3)),
}


class Case:
    """Some models of one net, and data."""

    def __init__(self, name: str, replicas: int = 3, samples: int = 60) -> None:
        build, shape = NETS[name]
        self.models: list[nn.Module] = []
        for seed in range(replicas):
            torch.manual_seed(seed)
            self.models.append(build())
        self.chain: Chain = chain_of(self.models[0])
        flats = [self.chain.flatten(model) for model in self.models]
        self.weights = torch.stack([flat.weights for flat in flats])
        self.frozen = torch.stack([flat.frozen for flat in flats])
        self.inputs = torch.randn(samples, *shape)
        self.outputs = self.models[0](self.inputs[:1]).shape[1]
        self.labels = torch.randint(self.outputs, (samples,))


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The gradient of the mean loss: cross-entropy of classes, squared error of floats."""
    model = copy.deepcopy(model).to(dtype)
    out = model(inputs.to(dtype))
    loss = F.mse_loss(out, targets.to(dtype)) if targets.is_floating_point() else F.cross_entropy(out, targets)
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])


def plain_run(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, seed: int, batch_size: int, l: float, lr: float,
    weight_decay: float, steps: tuple[int, ...],
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """SVAG in plain PyTorch and float64. At each of `steps`: it, the weights, the means so far of RunMeans' figures."""
    model, inputs = copy.deepcopy(model).double(), inputs.double()
    params = [p for p in model.parameters() if p.requires_grad]
    c1, c2 = svag_coefficients(l)
    sums = torch.zeros(6, dtype=torch.float64)
    for step in range(steps[-1]):
        grads = []
        for batch in (1, 2):
            some = batch_indices(seed, step, batch, batch_size, len(inputs))
            loss = F.cross_entropy(model(inputs[some]), labels[some])
            sums[batch - 1] += loss.detach()
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
        x = torch.cat([p.detach().flatten() for p in params])
        sums[2:] += torch.stack([grads[0] @ grads[0], grads[1] @ grads[1], grads[0] @ grads[1], x @ x])
        x -= lr / l * (c1 * grads[0] + c2 * grads[1] + weight_decay * x)
        with torch.no_grad():
            for p, value in zip(params, x.split([p.numel() for p in params]), strict=True):
                p.copy_(value.view_as(p))
        if step + 1 in steps:
            yield step + 1, x, sums / (step + 1)
