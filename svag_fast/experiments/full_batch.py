r"""A run by the paper's processes on the full gradient: GD, and NGD (eq. 3), SGD with Gaussian noise in its place.

NGD's noise has the covariance Σ of SGD's batch gradient without anybody forming Σ. For n samples with gradients g_i,
B the batch size and ξ_i independent N(0, 1) of mean ξ̄,

    ∇L + v = (1/n) Σ_i w_i g_i,   w_i = 1 + f √(n/B) (ξ_i − ξ̄)

is one backward pass with weighted losses. f is 1 for batches drawn with replacement, and √((n − B)/(n − 1)) for
distinct samples. A step is ``x <- x - (lr/l) (grad + weight_decay x)``. At l > 1 the noise is √l times as large: then
NGD is the Euler-Maruyama scheme (eq. 16) of the SDE with time step lr/l, and GD the Euler scheme of gradient flow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.evaluation import checked_losses
from svag_fast.experiments.measured_run import RowMeans, own_seed
from svag_fast.experiments.random_state import OwnRandom
from svag_fast.experiments.task import Task
from svag_fast.experiments.task_run import TaskRun
from svag_fast.noise.estimators import NoiseEstimate
from svag_fast.numeric import must_be
from svag_fast.sample_norms.context import per_sample_sq_norms
from svag_fast.stats.sampling import noise_factor

CHUNK = 512  # samples that pass through the net at once


class FullBatchTraining(TaskRun):
    """A run in progress by GD or NGD; see the module. It resumes to the bit, as SVAG's runs do.

    G and N of a row are those of the full data at the row's last weights ("full_gradient"): exact, but for one moment.
    They are left out where a layer has no rule for its samples' norms.

    Args:
        config: the run, of process "gd" or "ngd".
        task: what it trains; a data set means the config's net on it.

    Raises:
        TypeError, ValueError: what is wrong with the task, by name; samples that are coupled by BatchNorm; random
            numbers in its training, such as of an augmentation or Dropout, under which there is no full gradient.
        TaskError: its own code failed.
    """

    sums = ("loss", "weight_sq_norms")

    def __init__(self, config: RunConfig, task: Task | Dataset) -> None:
        super().__init__(config, task)
        if self.task.augment is not None:
            raise ValueError(must_be("augment", f"None where process is {config.process}", "a function"))
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    must_be(
                        "model",
                        f"one without BatchNorm where process is {config.process}, which needs each sample's own "
                        "gradient: take GroupNorm, as the paper does",
                        f"{name or 'the model'}, a {type(module).__name__}",
                    )
                )
        population = len(self.train_data)
        distinct = population if config.sampling == "distinct" else None
        noise = noise_factor(config.batch_size, distinct) if config.process == "ngd" else 0.0
        self.spread = math.sqrt(noise * config.l * population / config.batch_size)
        self.factor = noise_factor(config.batch_size, distinct) / config.batch_size
        self.optimizer = torch.optim.SGD(self.params, lr=config.lr, weight_decay=config.weight_decay)
        # On the CPU, so that a run has the same noise on every device.
        self.noise = torch.Generator("cpu").manual_seed(own_seed(config, "noise of NGD"))
        self.elapsed = 0.0
        if self.random is not None:
            self._refuse_randomness(self.random)
        self.start()

    def _refuse_randomness(self, random: OwnRandom) -> None:
        before = random.state_dict()
        with self.task_code(), torch.no_grad():
            self.task.losses(self.model, self.train_data.part(range(min(2, len(self.train_data)))))
        if not random.stands_at(before):
            raise ValueError(
                must_be(
                    "model",
                    f"one that draws no random numbers where process is {self.config.process}",
                    "one that does, such as Dropout",
                )
            )

    def sample_weights(self) -> Tensor:
        """Fresh weights [n] of the samples' losses: 1 of GD's, of mean 1 in NGD's."""
        count = len(self.train_data)
        if not self.spread:
            return torch.ones(count, dtype=torch.float64, device="cpu")
        xi = torch.randn(count, generator=self.noise, dtype=torch.float64, device="cpu")
        # Without their mean, or the full gradient would be part of the noise.
        return 1 + self.spread * (xi - xi.mean())

    def gradient(self, weights: Tensor) -> Tensor:
        """Leave (1/n) Σ w_i g_i in the parameters' `.grad`; return the loss that it is the gradient of."""
        count = len(self.train_data)
        self.optimizer.zero_grad()
        shares = (weights / count).to(self.config.device)
        total = torch.zeros((), dtype=torch.float64, device=self.config.device)
        for numbers in self.train_data.slices(CHUNK, None):
            losses = self._losses(numbers)
            weighted = (losses * shares[numbers.start : numbers.stop].to(losses.dtype)).sum()
            torch.autograd.backward(weighted)
            total += weighted.detach()
        return total

    def _losses(self, numbers: range) -> Tensor:
        return checked_losses(self.task.losses(self.model, self.train_data.part(numbers)), len(numbers))

    def take_step(self) -> None:
        """One step on all of the data."""
        config = self.config
        self.optimizer.param_groups[0]["lr"] = config.lr_at(self.step) / config.l
        with self.task_code():
            loss = self.gradient(self.sample_weights())
        # Of the weights that the gradient is of, as SVAG's rows have it.
        squares = [p.detach().double().square().sum() for p in self.params]
        self.weight_sq_norms += torch.stack(squares).sum()
        self.loss += loss
        self.optimizer.step()
        self.elapsed += config.lr_at(self.step) / config.l
        self.step += 1
        self.steps_summed += 1

    def clear_sums(self) -> None:
        """Begin a new row's means."""
        self.steps_summed = 0
        self.loss, self.weight_sq_norms = torch.zeros(2, dtype=torch.float64, device=self.config.device)

    def row_means(self) -> RowMeans:
        """Return the means over the steps since the last row, and G and N as they are now."""
        count = self.steps_summed
        samples = len(self.train_data) * count
        return RowMeans(float(self.loss) / count, self.full_noise(), float(self.weight_sq_norms) / count, samples)

    def full_noise(self) -> NoiseEstimate | None:
        """G and N of the weights as they are now, from all samples; None without a rule for each layer's norms."""
        if not self.has_sample_norms:
            return None
        sq_norms = torch.zeros((), dtype=torch.float64, device=self.config.device)
        count = len(self.train_data)
        self.optimizer.zero_grad()
        for numbers in self.train_data.slices(CHUNK, None):
            with per_sample_sq_norms(self.model, loss_reduction="sum") as norms:
                torch.autograd.backward(self._losses(numbers).sum())
                sq_norms += norms.total.sum()
        grads = [p.grad for p in self.params if p.grad is not None]
        G = torch.stack([g.double().square().sum() for g in grads]).sum() / count**2
        trace = sq_norms / count - G
        return NoiseEstimate(G, self.factor * trace, trace)

    @property
    def time(self) -> float:
        """The SDE's time: the sum of lr/l over the steps taken."""
        return self.elapsed

    @property
    def noise_source(self) -> str:
        """What G and N come from."""
        return "full_gradient"

    def start_values(self) -> tuple[float, float | None]:
        """Return R of the initial weights; what a measurement costs is a step's time once a row, and isn't measured."""
        return self.weight_sq_norm(), None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next: tensors and plain Python."""
        return {
            **super().state_dict(),
            "noise": self.noise.get_state(),
            "elapsed": self.elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: `state` is none of this run's; `self` may have taken a part.
        """
        super().load_state_dict(state)
        self.noise.set_state(state["noise"])
        self.elapsed = state["elapsed"]
