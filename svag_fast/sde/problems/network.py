r"""A neural net and a data set as a :class:`~svag_fast.sde.Problem`: Gaussian noise without its covariance.

For n samples with gradients g_i of mean gbar, and xi_i i.i.d. N(0, 1) of mean xibar,

    v = (1/n) sum_i sqrt(n/B) (xi_i - xibar) g_i

has exactly the covariance of a batch of B drawn with replacement, ``Sigma = (1/B)(1/n) sum_i (g_i - gbar)(g_i -
gbar)^T``; without replacement it is multiplied by ``sqrt((n - B)/(n - 1))``. So ``grad L + v`` is one backward pass
over the data with sample weights ``1 + sqrt(n/B) (xi_i - xibar)``: no d x d matrix, and the full gradient for free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from svag_fast.numeric import integer
from svag_fast.sde.draws import Draws


class NetworkProblem:
    """The mean loss of a module over a data set, its state the flat vector of trainable parameters.

    Args:
        model: any module; its trainable parameters' values are taken from the state, the module itself is not changed
            (buffers are: BatchNorm's running statistics in :meth:`batch_grad`).
        loss_fn: ``loss_fn(outputs, targets)`` -> the losses of the samples, [b] (``reduction="none"``).
        inputs: [n, ...], on the model's device.
        targets: [n, ...].
        batch_size: B, the size of SGD's batch, 1 <= B <= n (without replacement B < n has noise).
        replacement: whether a batch may hold a sample twice.
        chunk_size: samples a pass, for passes over the whole data set.

    Raises:
        ValueError: sizes that don't fit; from the full-data methods also a model with BatchNorm in training mode,
            where a sample has no gradient of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        replacement: bool = True,
        chunk_size: int = 1024,
    ) -> None:
        batch_size = integer("batch_size", batch_size, least=1)
        chunk_size = integer("chunk_size", chunk_size, least=1)
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise ValueError(f"targets must be as many as the {len(inputs)} inputs, at least 1, got {len(targets)}")
        if batch_size < 1 or (not replacement and batch_size > len(inputs)):
            raise ValueError(f"batch_size must be from 1 to {len(inputs)}, got {batch_size}")
        self.model, self.loss_fn, self.inputs, self.targets = model, loss_fn, inputs, targets
        self.batch_size, self.replacement, self.chunk_size = batch_size, replacement, chunk_size
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model must be one with a trainable parameter, got none")

    @property
    def state_dim(self) -> int:
        """One: a state is a flat vector [P]."""
        return 1

    @property
    def noise_scale(self) -> float:
        """The factor of ``(xi_i - xibar)`` in a sample's weight: ``sqrt(n/B)``, times the one without replacement."""
        n = len(self.inputs)
        finite = 1.0 if self.replacement else math.sqrt((n - self.batch_size) / max(1, n - 1))
        return math.sqrt(n / self.batch_size) * finite

    def state(self) -> Tensor:
        """The module's present parameters as a flat vector [P], a copy."""
        return parameters_to_vector(self._parameters.values()).detach().clone()

    @torch.no_grad()
    def load(self, x: Tensor) -> None:
        """Write the state `x` into the module."""
        vector_to_parameters(x, self._parameters.values())

    def batch_grad(self, x: Tensor, weights: Sequence[float], draws: Draws) -> Tensor:
        """``sum_j weights[j] g_j(x)``; one pass over all batches, a pass each where BatchNorm couples their samples."""
        batches = [self._batch(draws) for _ in weights]
        factors = x.new_tensor(weights).div_(self.batch_size)
        if self._couples_samples():
            # A pass a batch: BatchNorm's statistics belong to one, and concatenated they would be normalised together.
            grads = [
                self._weighted_grad(x, batch, factor.expand(self.batch_size))
                for batch, factor in zip(batches, factors, strict=True)
            ]
            return torch.stack(grads).sum(0)
        return self._weighted_grad(x, torch.cat(batches), factors.repeat_interleave(self.batch_size))

    def mean_grad(self, x: Tensor) -> Tensor:
        """``grad L(x)`` over the whole data set."""
        return self._over_data(x, x.new_ones(1, len(self.inputs)))[0]

    def gaussian_grad(self, x: Tensor, noise_scale: float, draws: Draws) -> Tensor:
        """``grad L(x) + noise_scale Sigma^(1/2) z`` in one forward and backward pass over the data."""
        # A sample's weight is 1 for the full gradient, and its noise beside it: one backward pass gives both.
        return self._over_data(x, self.noise_weights(x, draws).mul_(noise_scale).add_(1)[None])[0]

    def mean_grad_and_noise(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """``grad L(x)`` and ``Sigma^(1/2) z`` from one forward pass."""
        noise = self.noise_weights(x, draws)
        grad, spread = self._over_data(x, torch.stack([torch.ones_like(noise), noise]))
        return grad, spread

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """``Hessian L(x) v`` by differentiating twice, chunk by chunk."""
        self._refuse_coupling()
        total = torch.zeros_like(x)
        for rows in self._chunks():
            parameters, losses = self._losses(x, self.inputs[rows], self.targets[rows])
            with torch.enable_grad():
                # Twice differentiated in a chunk at a time: the graph of all samples' gradients would fill the memory.
                grads = torch.autograd.grad(losses.sum() / len(self.inputs), parameters, create_graph=True)
                products = torch.autograd.grad(grads, parameters, self._split(v), materialize_grads=True)
            total += parameters_to_vector(products)
        return total

    def sample_grad(self, x: Tensor, index: int) -> Tensor:
        """The gradient [P] of one sample's loss."""
        self._refuse_coupling()
        return self._weighted_grad(x, torch.tensor([index], dtype=torch.int64, device=x.device), x.new_ones(1))

    def noise_weights(self, x: Tensor, draws: Draws) -> Tensor:
        """Fresh sample weights [n] whose weighted mean gradient has mean zero and covariance Sigma."""
        xi = draws.normal_(torch.empty(len(self.inputs), dtype=x.dtype, device=x.device))
        # Without their mean, or the full gradient would be part of the noise.
        return xi.sub_(xi.mean()).mul_(self.noise_scale)

    def _batch(self, draws: Draws) -> Tensor:
        if self.replacement:
            return draws.indices(len(self.inputs), (self.batch_size,))
        return draws.subsets(len(self.inputs), 1, self.batch_size)[0]

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.inputs), self.chunk_size):
            yield slice(start, start + self.chunk_size)

    def _couples_samples(self) -> bool:
        return any(isinstance(module, _BatchNorm) and module.training for module in self.model.modules())

    def _refuse_coupling(self) -> None:
        if self._couples_samples():
            raise ValueError(
                "model must be one whose samples have gradients of their own, got BatchNorm in training mode, which "
                "couples them; use GroupNorm for processes with Gaussian noise"
            )

    def _split(self, x: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters.values()]
        if x.shape != (sum(sizes),):
            raise ValueError(f"state must be of shape [{sum(sizes)}], the model's parameters, got {list(x.shape)}")
        return [part.view(p.shape) for part, p in zip(torch.split(x, sizes), self._parameters.values(), strict=True)]

    def _losses(self, x: Tensor, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Leaf parameters at the state x, and the samples' losses [b] with their graph."""
        with torch.enable_grad():
            parameters = [part.detach().requires_grad_() for part in self._split(x)]
            outputs = functional_call(self.model, dict(zip(self._parameters, parameters, strict=True)), (inputs,))
            losses = self.loss_fn(outputs, targets)
        if losses.shape != (len(inputs),):
            raise ValueError(
                f"loss_fn's result must be a loss a sample ({len(inputs)},), got shape {tuple(losses.shape)}"
            )
        return parameters, losses

    def _weighted_grad(self, x: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        parameters, losses = self._losses(x, self.inputs[rows], self.targets[rows])
        return parameters_to_vector(torch.autograd.grad(losses, parameters, factors, materialize_grads=True))

    def _over_data(self, x: Tensor, sample_weights: Tensor) -> Tensor:
        """``(1/n) sum_i sample_weights[k, i] g_i(x)`` for each row k: [k, P], the forward pass shared by the rows."""
        self._refuse_coupling()
        total = x.new_zeros(len(sample_weights), x.numel())
        factors = sample_weights / len(self.inputs)
        for rows in self._chunks():
            parameters, losses = self._losses(x, self.inputs[rows], self.targets[rows])
            for k, factor in enumerate(factors):
                keep = k + 1 < len(factors)
                grads = torch.autograd.grad(
                    losses, parameters, factor[rows].to(losses.dtype), retain_graph=keep, materialize_grads=True
                )
                total[k] += parameters_to_vector(grads)
        return total
