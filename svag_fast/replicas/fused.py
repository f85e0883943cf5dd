"""Many replicas of a small chain net trained by a fused CPU kernel: a thread a replica, whole steps without PyTorch.

chain = chain_of(model)
runs = FusedRuns(
    chain, torch.stack([chain.flatten(build(seed)).weights for seed in range(16)]),
    inputs=train_images, targets=train_labels, seeds=range(16), batch_size=4,
    lr=[(0, 0.4), (4096, 0.04)], l=1, weight_decay=1.25e-3, stat_every=8,
)
for step in range(16, 5120 + 1, 16):
    runs.advance(step)
    means, test = runs.sums.means(), runs.evaluate(test_images, test_labels)
    runs.clear_sums()
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svag_fast.numeric import integer
from svag_fast.ops.memory import address, mark_written
from svag_fast.replicas.chain import Chain
from svag_fast.replicas.fused_net import FusedNet, Loss, check_floats, sample_shape
from svag_fast.replicas.fused_settings import Schedule, listed, one_each, run_settings
from svag_fast.replicas.memory import free_memory

__all__ = ["Evaluation", "FusedRuns", "Loss", "RunMeans", "RunSums", "Schedule", "memory_needed"]

# What one call of the kernel does at most, so that Ctrl-C is answered soon: multiply-adds of a replica, some 0.2 s.
_CALL_OPERATIONS = 2e9
_STEP_OPERATIONS = 5e4  # what a step costs beside its products


class RunMeans(NamedTuple):
    """Means over steps, each float64 [S]; nan where there was no such step.

    The losses are those of batch 1 and 2 before each step, over the steps that drew the batch. The others have the
    meaning that they have in :class:`svag_fast.StepStats`, over the measured steps: ``sq_norm1`` |g1|^2, ``sq_norm2``
    |g2|^2, ``inner`` <g1, g2>, and ``weight_sq_norm`` |x|^2 before the step, all over the trained parameters.
    """

    loss1: Tensor
    loss2: Tensor
    sq_norm1: Tensor
    sq_norm2: Tensor
    inner: Tensor
    weight_sq_norm: Tensor


class RunSums(NamedTuple):
    """Sums over the steps since :meth:`FusedRuns.clear_sums`, each float64 [S]; see :class:`RunMeans`.

    ``steps1`` and ``steps2`` count the steps that drew batch 1 and 2, ``measured`` those that were measured.
    """

    loss1: Tensor
    loss2: Tensor
    steps1: Tensor
    steps2: Tensor
    sq_norm1: Tensor
    sq_norm2: Tensor
    inner: Tensor
    weight_sq_norm: Tensor
    measured: Tensor

    def means(self) -> RunMeans:
        """Return the sums over their counts."""
        measured = (self.sq_norm1, self.sq_norm2, self.inner, self.weight_sq_norm)
        return RunMeans(self.loss1 / self.steps1, self.loss2 / self.steps2, *(s / self.measured for s in measured))


class Evaluation(NamedTuple):
    """``loss`` float64 [S], the mean over the samples; ``accuracy`` float64 [S], a fraction, None without classes."""

    loss: Tensor
    accuracy: Tensor | None


class FusedRuns:
    """S training runs of one chain net, which share the data and nothing else.

    A step at learning rate lr is ``x <- x - (lr/l) (c1 g1 + c2 g2 + weight_decay x)`` with the gradients of two batches
    drawn with replacement (:func:`svag_fast.replicas.sampling.batch_indices`, by seed, step and batch). At l = 1, which
    is SGD, c2 is 0 and batch 2 is drawn on measured steps alone. Steps 0, k, 2k, ... are measured, k = ``stat_every``.

    A replica's path depends on its own settings, weights, frozen values and the data alone: not on S, the other
    replicas, the number of threads, or where `advance` paused (where a diverging one stops may). At l = 1 it doesn't
    depend on ``stat_every`` either; at l > 1 measured steps round differently. The SIMD level (``SVAG_FAST_SIMD``) may
    change the last bits.

    After 100 steps the weights of the nets in the tests are within 1e-6 |x| of those of a PyTorch loop in float64.

    A replica diverges where the loss of a batch is not finite, then that step isn't taken; or where a weight isn't,
    which is looked at after every 32nd step and at the end of `advance`. It stays where it is; the others continue.

    Args:
        chain: the net.
        weights: [S, P] float32, where each replica starts; copied.
        frozen: [F], or [S, F] for each its own, float32, copied; by default those of the chain's model.
        inputs: [n, ...] float32 on the CPU, the training data: vectors, or images [n, C, H, W]; copied.
        targets: [n] int64 classes for cross-entropy, [n, outputs] float32 for the squared error; copied.
        loss: the mean over the batch of "cross_entropy", or of "squared_error" over batch and outputs, as
            ``F.cross_entropy`` and ``F.mse_loss`` are.
        seeds: S integers in [0, 2^64), of the batches; equal ones draw the same.
        batch_size: samples of each of the two batches; an integer, or S of them.
        lr: the learning rate: a number, or a schedule ``[(0, 0.4), (4096, 0.04)]`` of the steps from which each number
            holds, or S of either.
        l: SVAG's l >= 1; a number, or S of them.
        weight_decay: a number, or S of them.
        stat_every: which steps are measured; 0 for none.
        threads: at most so many; by default ``torch.get_num_threads()`` at each call.

    Raises:
        TypeError, ValueError: an argument is none of these, or the layers don't fit the data; it is named.
        MemoryError: what is needed (see :func:`memory_needed`) is not free; nothing was taken.
    """

    def __init__(
        self,
        chain: Chain,
        weights: Tensor,
        frozen: Tensor | None = None,
        *,
        inputs: Tensor,
        targets: Tensor,
        loss: Loss = "cross_entropy",
        seeds: Sequence[int],
        batch_size: int | Sequence[int],
        lr: Schedule | Sequence[Schedule],
        l: float | Sequence[float] = 1,
        weight_decay: float | Sequence[float] = 0.0,
        stat_every: int = 0,
        threads: int | None = None,
    ) -> None:
        if not isinstance(chain, Chain):
            raise TypeError(f"chain must be what chain_of returns, got a {type(chain).__name__}")
        if loss not in ("cross_entropy", "squared_error"):
            raise ValueError(f"loss must be 'cross_entropy' or 'squared_error', got {loss!r}")
        count = len(weights) if isinstance(weights, Tensor) and weights.dim() else 0
        check_floats("weights", weights, f"[S, {chain.weight_count}]", (count, chain.weight_count))
        if not count:
            raise ValueError("weights must be a row for each replica, got none")
        frozen = chain.initial().frozen if frozen is None else frozen
        shapes = ((chain.frozen_count,), (count, chain.frozen_count))
        check_floats("frozen", frozen, f"[{shapes[0][0]}] or {list(shapes[1])}", *shapes)
        self.chain = chain
        self._loss = loss
        self._net = FusedNet(chain, sample_shape("inputs", inputs), loss)
        self._net.check(inputs, targets)
        self._stat_every = integer("stat_every", stat_every, least=0)
        self._threads = None if threads is None else integer("threads", threads, least=1, most=2**15)
        needed = self._net.memory(count, frozen.numel(), self._thread_count(count), len(inputs))
        if (free := free_memory(inputs.device)) is not None and needed > free:
            raise MemoryError(
                f"{count} replicas need {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: expected fewer "
                "replicas or threads"
            )
        self._settings = run_settings(count, seeds, batch_size, lr, l, weight_decay)
        # Copies: what was checked must not change. A label out of range would lead the kernel out of its memory.
        self._train = self._net.samples(inputs.detach().clone(), targets.detach().clone())
        self._weights = weights.detach().clone(memory_format=torch.contiguous_format)
        self._frozen = frozen.detach().clone(memory_format=torch.contiguous_format)
        self._steps = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._diverged = torch.zeros(count, dtype=torch.bool, device="cpu")
        self._sums = torch.zeros(count, len(RunSums._fields), dtype=torch.float64, device="cpu")
        self._prepare_work()

    def _prepare_work(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self._at_work = threading.Lock()  # the kernels lend their work space to one call at a time

    def __getstate__(self) -> dict[str, Any]:
        with self._at_work:  # a copy stands at a whole step too
            return {key: value for key, value in vars(self).items() if key not in ("_scratch", "_slots", "_at_work")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_work()

    @property
    def weights(self) -> Tensor:
        """The present weights, [S, P] float32; the next step starts from what is in this tensor."""
        return self._weights

    @property
    def frozen(self) -> Tensor:
        """The values that are not trained, [F] or [S, F] float32."""
        return self._frozen

    @property
    def steps(self) -> Tensor:
        """How many steps each replica has taken, int64 [S], a copy."""
        return self._steps.clone()

    @property
    def diverged(self) -> Tensor:
        """Which replicas have stopped because a loss or a weight is not finite, bool [S], a copy."""
        return self._diverged.clone()

    @property
    def sums(self) -> RunSums:
        """Copies of the sums since the last :meth:`clear_sums`."""
        return RunSums(*self._sums.clone().unbind(1))

    def clear_sums(self, replicas: Sequence[int] | None = None) -> None:
        """Set the sums to 0: of all replicas, or of these."""
        if replicas is None:
            self._sums.zero_()
        else:
            for s in replicas:
                self._sums[integer("replicas", s, least=0, most=len(self._sums) - 1)] = 0.0

    def advance(self, to_steps: int | Sequence[int]) -> None:
        """Take every replica that has not diverged to a step, in calls of the kernel of about 0.2 s, or one step.

        After Ctrl-C, which is answered between two calls, each replica stands at a whole step, which ``steps`` says.

        Args:
            to_steps: an integer, or S of them; a replica that is there already stays.

        Raises:
            TypeError, ValueError: these are no steps.
        """
        each = one_each("to_steps", to_steps, len(self._weights))
        targets = [integer("to_steps", t, least=0, most=2**62) for t in each]
        while True:
            steps = self._steps.tolist()
            behind = [
                s
                for s, (step, to, over) in enumerate(zip(steps, targets, self._diverged.tolist(), strict=True))
                if step < to and not over
            ]
            if not behind:
                return
            quota = _CALL_OPERATIONS * self._thread_count(len(behind)) / len(behind)
            fields, costs = [], {}
            for s, settings in enumerate(self._settings):
                cost = self._net.operations * settings.batch_size * (1 if settings.l == 1 else 2) + _STEP_OPERATIONS
                to = min(targets[s], steps[s] + max(1, int(quota / cost)))
                costs[s] = (to - steps[s]) * cost
                fields.append(settings.fields(steps[s], to, targets[s]))
            longest_first = sorted(behind, key=lambda s: -costs[s])
            with self._at_work:
                self._replicas(longest_first).advance(
                    fields,
                    self._train.addresses,
                    self._train.count,
                    self._stat_every,
                    address(self._sums, "sums"),
                    address(self._steps, "steps"),
                    address(self._diverged, "diverged"),
                )
            mark_written([self._weights])

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Evaluation:
        """Return the mean loss of every replica on some data, and, of classes, the accuracy.

        Args:
            inputs: [m, ...] as the training data.
            targets: of them.
        """
        self._net.check(inputs, targets)
        data = self._net.samples(inputs, targets)
        count = len(self._weights)
        losses = torch.empty(count, dtype=torch.float64, device="cpu")
        right = torch.empty(count, dtype=torch.int64, device="cpu")
        with self._at_work:
            self._replicas(range(count)).evaluate(
                count, data.addresses, data.count, address(losses, "losses"), address(right, "right")
            )
        return Evaluation(losses, right / data.count if self._loss == "cross_entropy" else None)

    def gradient(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the gradient of the mean loss over these training samples for every replica: [S, P] float32."""
        samples = [integer("indices", i, least=0, most=self._train.count - 1) for i in listed("indices", indices)]
        if not samples:
            raise ValueError("indices must be one sample or more, got none")
        grads = torch.empty_like(self._weights)
        count = len(self._weights)
        with self._at_work:
            self._replicas(range(count)).gradient(
                count, self._train.addresses, self._train.count, samples, address(grads, "grads")
            )
        return grads

    def unstack(self, s: int) -> nn.Module:
        """Return replica ``s`` as an ordinary model."""
        s = integer("s", s, least=0, most=len(self._weights) - 1)
        return self.chain.unflatten(self._weights[s], self._frozen if self._frozen.dim() == 1 else self._frozen[s])

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all that decides what comes next, beside the arguments."""
        return {name: getattr(self, f"_{name}").clone() for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave; a refused state changes nothing.

        Raises:
            KeyError, TypeError, ValueError: it is none of these runs'.
        """
        for name in _STATE:
            ours, theirs = getattr(self, f"_{name}"), state[name]
            if not isinstance(theirs, Tensor):
                raise TypeError(f"{name} must be a tensor, got a {type(theirs).__name__}")
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise ValueError(
                    f"{name} must be {ours.dtype} {list(ours.shape)}, got {theirs.dtype} {list(theirs.shape)}"
                )
        if int(state["steps"].min()) < 0:
            raise ValueError(f"steps must be 0 or more, got {int(state['steps'].min())}")
        for name in _STATE:
            getattr(self, f"_{name}").copy_(state[name])

    def _thread_count(self, replicas: int) -> int:
        return max(1, min(replicas, torch.get_num_threads() if self._threads is None else self._threads))

    def _replicas(self, order: Sequence[int]) -> Any:
        from svag_fast import _C

        threads = self._thread_count(len(order))
        if len(self._scratch) < threads * self._net.scratch:
            self._scratch = torch.zeros(threads * self._net.scratch, dtype=torch.float32, device="cpu")
            self._slots = torch.zeros(threads, dtype=torch.int8, device="cpu")
        return _C.Replicas(
            self._net.compiled,
            address(self._weights, "weights"),
            self._weights.shape[1],
            address(self._frozen, "frozen"),
            0 if self._frozen.dim() == 1 else self._frozen.shape[1],
            list(order),
            threads,
            address(self._scratch, "scratch"),
            address(self._slots, "slots"),
        )


_STATE = ("weights", "steps", "diverged", "sums")


def memory_needed(
    chain: Chain, inputs: Tensor, *, replicas: int, loss: Loss = "cross_entropy", threads: int | None = None
) -> int:
    """Return the bytes that :class:`FusedRuns` takes for these inputs: weights, a copy of the data, work space."""
    net = FusedNet(chain, sample_shape("inputs", inputs), loss)
    replicas = integer("replicas", replicas, least=1)
    threads = torch.get_num_threads() if threads is None else integer("threads", threads, least=1)
    return net.memory(replicas, chain.frozen_count, min(threads, replicas), len(inputs))
