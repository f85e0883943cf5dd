"""How a user keeps the first batch's gradient while the second's is made, and clips or unscales both."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from svag_fast.numeric import real
from svag_fast.ops.step_stats import StepStats
from svag_fast.optim.grad_lists import carriers, clip_replicas, replica_norms
from svag_fast.optim.held_gradient import HeldGradient
from svag_fast.optim.in_backward import StepsInBackward
from svag_fast.optim.optimizer_methods import outside_compiler, plain

_zero_grad = plain(Optimizer.zero_grad)


class HoldingOptimizer(Optimizer):
    """An optimizer that keeps one gradient beside the parameters' own."""

    _pair: HeldGradient

    @property
    def stats(self) -> StepStats | None:
        """The last step's statistics."""
        return self._pair.stats

    def _check_no_replicas(self, what: str) -> None:
        if self.param_groups[0].get("replicas") is not None:
            raise RuntimeError(
                f"{what} has one scale for all replicas, and would lower it for all as long as one of them overflows: "
                "train replicas in bfloat16 or float32, without it"
            )

    @outside_compiler
    def hold_gradient(self) -> None:
        """Keep ``.grad`` as the first batch's gradient and clear it for the second batch's.

        Nothing is copied, except gradients whose memory others see: buckets of DistributedDataParallel, a trainer's
        own buffers, a variable that refers to the gradient.

        What changes gradients between their backward pass and the step (clipping, averaging, masks) must change both:
        call it before this, and again before ``step()``. Where one alone was changed in place or replaced, the step is
        refused. That goes by PyTorch's counts of changes in place, so it isn't noticed through ``.grad.data``, NumPy or
        other libraries' kernels, nor in the first gradient of an optimizer made at ``l = 1`` that never held one.

        Raises:
            RuntimeError: a gradient is held already, or there is none to hold.
        """
        if self._pair.grads is not None:
            raise RuntimeError("a gradient is held already: call step(), or discard_gradient() to give it up")
        self._pair.take(self.param_groups)

    @outside_compiler
    def hold_pair(self, first: Mapping[Tensor, Tensor], stepped: StepsInBackward | None = None) -> None:
        """Keep both batches' gradients where your own backward pass made them, as in :func:`svag_fast.pair_pass`.

        Then ``step()`` without a closure; clipping, unscaling and :meth:`discard_gradient` are as after
        :meth:`hold_gradient` and a second backward pass.

        Args:
            first: the first batch's gradient of each parameter that has one, in memory of its own; the second batch's
                are in ``.grad``. Replaces a pair that is held already.
            stepped: the steps that other parameters took in the backward pass already, which then have no gradient.

        Raises:
            RuntimeError: a gradient is held by :meth:`hold_gradient`.
            ValueError: a gradient isn't of its parameter's shape, or isn't of a parameter of this optimizer.
        """
        if self._pair.grads is not None and not self._pair.paired:
            raise RuntimeError("a gradient is held already: call step(), or discard_gradient() to give it up")
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for p, g in first.items():
            if id(p) not in known or g.shape != p.shape:
                what = f"a parameter {list(p.shape)}" if id(p) in known else "a parameter that is not the optimizer's"
                raise ValueError(f"first must be as its parameters are, got a gradient {list(g.shape)} of {what}")
        self._pair.put(self.param_groups, first, stepped)

    @outside_compiler
    def discard_gradient(self) -> None:
        """Forget the held gradient, if any.

        Raises:
            RuntimeError: layers took their step in the backward pass already.
        """
        if self._pair.stepped is not None:
            raise _stepped_already()
        self._pair.clear()

    def _check_no_in_backward(self, what: str) -> None:
        if any(group.get("in_backward") for group in self.param_groups):
            raise RuntimeError(
                f"{what} needs gradients, and with in_backward=True layers take their step without: in_backward=False"
            )

    @outside_compiler
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients: as in torch.optim; where a pair is held, both.

        A gradient held by :meth:`hold_gradient` stays: the second batch's is to come.
        """
        if self._pair.stepped is not None:
            raise _stepped_already()
        _zero_grad(self, set_to_none)
        if self._pair.paired:
            self._pair.clear()

    @outside_compiler
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the held gradient and the current one in place, each by its own norm, to ``max_norm``.

        Call it before ``step()``. Each is what clipped SGD would use for its batch, so SVAG on them converges to the
        SDE of clipped SGD. The statistics are those of the clipped gradient. Under a GradScaler call :meth:`unscale_`
        before.

        Returns:
            The norms before: ``[2]``, held and current, or ``[1]`` where none is held (at ``l = 1``). Replicas are
            clipped each by its own norm, and there are ``[2, S]`` of them, or ``[1, S]``.

        Raises:
            RuntimeError: there is no second gradient, one alone was changed, layers step in the backward pass, or a
                norm is inf or nan and ``error_if_nonfinite``; nothing was clipped.
            ValueError, TypeError: ``max_norm`` isn't a number >= 0, or ``norm_type`` is nan.
        """
        self._check_no_in_backward("clip_grad_norm_")
        if not real("max_norm", max_norm) >= 0:  # a negative one would turn the gradients round
            raise ValueError(f"max_norm must be a number >= 0, got {max_norm}")
        if math.isnan(real("norm_type", norm_type)):
            raise ValueError(f"norm_type must be a number or inf, got {norm_type}")
        replicas = self.param_groups[0].get("replicas")
        current = [p for group in self.param_groups for p in group["params"]]
        batches = [current]
        if self._pair.grads is not None:
            self._pair.second(self.param_groups, seen_by_scaler=False)
            batches = [carriers(self._pair.first()), current]
        grads = [[p.grad for p in params if p.grad is not None] for params in batches]
        if replicas is None:
            norms = [nn.utils.get_total_norm(listed, norm_type, error_if_nonfinite) for listed in grads]
        else:
            norms = [replica_norms(listed, replicas, norm_type, error_if_nonfinite) for listed in grads]
        self._pair.clipped = True
        for params, listed, norm in zip(batches, grads, norms, strict=True):
            if replicas is None:
                nn.utils.clip_grads_with_norm_(params, max_norm, norm)
            else:
                clip_replicas(listed, max_norm, norm)
        self._pair.note_both()
        return torch.stack([norm.to(norms[0].device) for norm in norms])

    @outside_compiler
    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the held gradient and the current one by the GradScaler's scale, to clip or look at them.

        Takes the place of ``scaler.unscale_(optimizer)``, which sees the current gradient alone; an overflow in either
        is known to the scaler. Then ``scaler.step(optimizer)``.

        Raises:
            RuntimeError: there is no second gradient yet, the optimizer is one of replicas, or the scaler refuses.
        """
        self._check_no_replicas("a GradScaler")
        self._check_no_in_backward("a GradScaler")
        if self._pair.grads is None:
            scaler.unscale_(self)
            return
        self._pair.second(self.param_groups, seen_by_scaler=False)
        self.param_groups.append({"params": carriers(self._pair.first())})
        try:
            scaler.unscale_(self)
        finally:
            self.param_groups.pop()
        self._pair.unscaled = True
        self._pair.note_both()


def _stepped_already() -> RuntimeError:
    return RuntimeError("layers have taken their step in the backward pass (in_backward=True): call step()")
