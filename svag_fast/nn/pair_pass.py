"""Both batches of a SVAG step through one forward and one backward call, in a training loop of one's own."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from svag_fast.nn.pair_run import Run, Way
from svag_fast.optim.two_batch import TwoBatchOptimizer
from svag_fast.sample_norms.context import SampleNorms


class Pair:
    """What :class:`pair_pass` gives: ``backward``, and what is known about the pass."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._norms: SampleNorms | None = None

    @property
    def norms(self) -> SampleNorms:
        """With ``norms=True`` every sample's squared gradient norm, [2B] a backward pass; also after the context.

        Raises:
            RuntimeError: without ``norms=True``, or before the model's first call.
        """
        self._norms = self._norms or self._run.norms
        if self._norms is None:
            raise RuntimeError("no norms: give pair_pass norms=True, and call the model before")
        return self._norms

    @property
    def way(self) -> str | None:
        """How the model's last call was made: "joint", "halves", or None before it."""
        return self._run.way

    def backward(self, losses: Tensor) -> None:
        """Backpropagate both batches' mean losses; ``optimizer.step()`` then steps from the two gradients.

        The first call after a step clears the gradients, where the model's call hasn't cleared them already: those of
        a pair whose step is over. Further ones before the next step add to both (accumulation).

        Args:
            losses: [2B], one for each sample, the first batch's first, as by ``reduction="none"``; a GradScaler's
                ``scale`` and a factor 1/k for k accumulated passes go onto them.

        Raises:
            TypeError, ValueError: what is no vector of 2B losses of the model's call in this context.
            RuntimeError: a gradient can't be told apart by batches; all gradients were cleared.
        """
        self._run.backward(losses)
        self._norms = self._norms or self._run.norms


class pair_pass:  # noqa: N801  (a context manager, used like a function)
    """Context in which a model takes both batches of a SVAG step at once, and the optimizer gets both gradients.

        with svag_fast.pair_pass(model, optimizer) as pair:
            losses = F.cross_entropy(model(torch.cat([x1, x2])), torch.cat([y1, y2]), reduction="none")
            pair.backward(losses)  # each batch's mean; gradients are cleared before
        stats = optimizer.step()   # G and N of the two batches, exact; clip and unscale as after two passes

    Gradients, statistics and running statistics are those of two passes, one after the other (Dropout draws other
    numbers). BatchNorm keeps statistics of its own for each half; at ``l = 1`` the second batch only measures and
    leaves the running statistics alone. The context may also be held over many steps.

    Args:
        model: its trained parameters are exactly the optimizer's; plain, compiled or DistributedDataParallel (whose
            two gradients are averaged after the backward pass, in one message, without its communication hooks).
        optimizer: SVAG, SVAGAdam or SVAGRMSprop.
        norms: every sample's squared gradient norm as well, as ``pair.norms``, a :class:`svag_fast.SampleNorms`; a
            factor on the losses enters squared. BatchNorm on batch statistics is refused. Jointly where each trained
            parameter is used once; else by halves, as :class:`svag_fast.per_sample_sq_norms` does it. Not under
            DistributedDataParallel.
        way: "joint": one pass over both batches, in which each layer forms its two weight gradients: Linear,
            convolutions, normalisations and embeddings by rules of their own. Any other layer (recurrent, attention,
            one of yours) is run on one half, then on the other, with all that is inside it, and said once by name. The
            samples come first. The first pass, and one after a flag of a module has changed, checks on a few of them
            that the batches don't meet, but not what the model does otherwise later, as from some step on. "halves":
            the whole model is called on one half, then on the other: any model, at the price of two passes. "auto" is
            "joint" where it serves the model and is faster (on a CPU: small inputs), and says once why it can't.

    Raises:
        TypeError, ValueError: the optimizer is another kind, or the parameters are not the same.
        RuntimeError: a gradient is held already.
        UnsupportedModuleError: ``norms=True`` and a module that has none, by name.
        CoupledSamples: ``way="joint"`` and a model that can't (in the first call of the model, what only shows there).
    """

    def __init__(
        self, model: nn.Module, optimizer: TwoBatchOptimizer, *, norms: bool = False, way: Way = "auto"
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(f"model must be a torch.nn.Module of Python code, got {type(model).__name__}")
        if not isinstance(optimizer, TwoBatchOptimizer):
            raise TypeError(
                f"optimizer must be SVAG, SVAGAdam or SVAGRMSprop, got {type(optimizer).__name__} (a trainer's wrapper "
                "holds it as .optimizer; for any other optimizer: svag_fast.nn.pair_ and svag_fast.svag_loss)"
            )
        if way not in ("auto", "joint", "halves"):
            raise ValueError(f"way must be 'auto', 'joint' or 'halves', got {way!r}")
        if norms and isinstance(model, DistributedDataParallel):
            raise ValueError("norms must be False under DistributedDataParallel, got True")
        self._model = model
        self._optimizer = optimizer
        self._norms = norms
        self._way = way
        self._run: Run | None = None

    def __enter__(self) -> Pair:
        if self._run is not None:
            raise RuntimeError("this context is already entered: make another pair_pass")
        pair = self._optimizer._pair
        run = pair.run
        if isinstance(run, Run) and run.undo:
            raise RuntimeError("another pair_pass of this optimizer is open")
        if not isinstance(run, Run) or not run.serves(self._model, self._optimizer, self._way):
            run = pair.run = Run(self._model, self._optimizer, self._way)
        try:
            run.begin(norms=self._norms)
        except BaseException:
            run.end()
            raise
        self._run = run
        return Pair(run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._run is not None
        self._run.end()
        self._run = None
