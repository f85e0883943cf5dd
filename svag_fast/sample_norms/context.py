"""Every sample's own squared gradient norm out of the one backward pass that training makes anyway.

The layers with large weights replace their weight gradient by one that brings the norms along
(`svag_fast.ops.weight_grad_and_sq_norms`), so they cost nothing extra; the small ones (biases, normalisations,
embeddings) are added up from their output's gradient. Which layer does what: `svag_fast.sample_norms.rule` and
`svag_fast.sample_norms.layers`; how they work together: docs/per_sample_norms.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

import svag_fast.sample_norms.layers.table  # noqa: F401  (registers its rules)
from svag_fast import moved
from svag_fast.sample_norms.dispatch import run_compiled_code_eagerly
from svag_fast.sample_norms.plan import UnsupportedModuleError
from svag_fast.sample_norms.rule import by_vmap, register_rule
from svag_fast.sample_norms.tape import Recorder, Rows, sum_of
from svag_fast.sample_norms.watch import Watch

__all__ = ["SampleNorms", "UnsupportedModuleError", "by_vmap", "per_sample_sq_norms", "register_rule"]

LossReduction: TypeAlias = Literal["mean", "sum"] | Tensor


class SampleNorms(Mapping[str, Tensor]):
    """Squared norms of the samples' own gradients: `norms.total` [B], `norms["layer1.weight"]` [B], all float64.

    Each backward pass appends its B rows, in order. A parameter without gradient in a pass has zeros there. A tied
    parameter is listed and counted once, under its first name, and found under each of its names. Where the loss gives
    samples weights (`loss_reduction=weights`), a sample of weight 0 has nan: the pass holds nothing of its gradient.
    """

    def __init__(self, recorder: Recorder, loss_reduction: LossReduction) -> None:
        self._recorder = recorder
        self._loss_reduction = loss_reduction

    @property
    def total(self) -> Tensor:
        """|g_i|² [B] over all tracked parameters together."""
        parts = []
        for rows in self._passes():
            norms = list(rows.sq_norms.values())
            # Few additions are cheaper than a stack.
            total = sum_of(norms) if len(norms) <= 4 else torch.stack(norms).sum(0)
            parts.append((rows.batch_size, total))
        return self._scaled(parts)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._recorder.aliases:
            raise KeyError(f"{name!r} is not a tracked parameter; tracked are {', '.join(self._recorder.aliases)}")
        parts = []
        for rows in self._passes():
            any_norms = next(iter(rows.sq_norms.values()))
            own = rows.sq_norms.get(rows.aliases.get(name, ""))
            parts.append((rows.batch_size, torch.zeros_like(any_norms) if own is None else own))
        return self._scaled(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._recorder.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._recorder.aliases.values()))

    def __len__(self) -> int:
        return len(set(self._recorder.aliases.values()))

    def reset(self, *, loss_reduction: LossReduction | None = None) -> None:
        """Forget the passes so far, to stay in one context over many steps; the next ones may have other weights."""
        if loss_reduction is not None:
            check_loss_reduction(loss_reduction)
            self._loss_reduction = loss_reduction
        self._recorder.reset()

    def _passes(self) -> list[Rows]:
        self._recorder.check()
        if not self._recorder.passes:
            raise RuntimeError("no backward pass has reached the tracked parameters inside the context yet")
        return self._recorder.passes

    def _scaled(self, parts: list[tuple[int, Tensor]]) -> Tensor:
        """The rows with what the loss puts before each sample's own gradient taken out."""
        if isinstance(self._loss_reduction, str):
            scaled = []
            for B, sq_norms in parts:
                scaled.append(sq_norms * float(B) ** 2 if self._loss_reduction == "mean" else sq_norms)
            return scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        sq_norms = torch.cat([sq_norms for _, sq_norms in parts])
        if self._loss_reduction.shape != sq_norms.shape:
            raise ValueError(
                f"loss_reduction must be the weights of the {sq_norms.numel()} samples of the backward passes so far, "
                f"got {self._loss_reduction.numel()}: give the weights of these with norms.reset(loss_reduction=...)"
            )
        weights = self._loss_reduction.to(sq_norms.device, torch.float64)
        return torch.where(weights == 0, torch.nan, sq_norms / weights.square())

    def __repr__(self) -> str:
        rows = sum(rows.batch_size for rows in self._recorder.passes)
        return f"SampleNorms({len(self)} parameters, {len(self._recorder.passes)} backward passes, {rows} rows)"


def check_loss_reduction(loss_reduction: LossReduction) -> None:
    """Refuse what is neither "mean", "sum" nor a weight for each sample."""
    if isinstance(loss_reduction, Tensor):
        if loss_reduction.dim() != 1 or loss_reduction.is_complex() or loss_reduction.requires_grad:
            kind = ", with a gradient" if loss_reduction.requires_grad else ""
            raise ValueError(
                "loss_reduction as a tensor must be each sample's real, constant weight in the loss, of shape [B], got "
                f"{list(loss_reduction.shape)}, {loss_reduction.dtype}{kind}"
            )
        if not bool(loss_reduction.isfinite().all()):
            raise ValueError(f"loss_reduction must be finite, got {loss_reduction.tolist()}")
    elif loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean', 'sum' or a tensor of weights [B], got {loss_reduction!r}")


class per_sample_sq_norms:  # noqa: N801  (a context manager, used like a function)
    """Context in which backward passes through `model` also give each sample's squared gradient norm.

    `.grad` receives what it would without the context (to rounding), from the same single backward pass; the model is
    as before after the context, whatever happens inside.

        with svag_fast.per_sample_sq_norms(model) as norms:
            F.cross_entropy(model(x), y).backward()
        norms.total            # [B] squared norm of each sample's own gradient
        norms["layer1.weight"] # [B]

    The samples are the first dimension of the model's input, and of every layer's. A value that all samples share
    (`wpe(torch.arange(T))`, a table [1, T, d]) is computed for each sample apart; other first dimensions are refused in
    the forward pass. Row i of each use of a parameter within one backward pass belongs to sample i. Weights that are
    shared have their cross terms counted. Each further backward pass appends its rows. A factor on the
    loss (a gradient scaler's, 1/k for k accumulated passes) enters squared. Code from torch.compile runs eagerly
    meanwhile. A model's first pass is gone back through again, from some rows: where rows are no samples it raises. So
    is the first after a module's flag (``training``) has changed.

    Layers and parameters may be added, replaced, frozen or unfrozen inside the context: the next pass through the
    model serves or refuses them.

    Args:
        model: any module. BatchNorm on batch statistics, transposed convolutions and layers without a rule are refused.
        loss_reduction: what stands before each sample's own loss. "mean": 1/B, B the number of samples (norms are
            multiplied by B²). "sum": 1. A tensor [B]: w_i, where the loss is Σ w_i loss_i (norms are divided by w_i²).
            A loss that divides by anything else is no "mean" here: a token mean divides by the number of tokens, class
            weights and ignore_index by the sum of weights. Nothing shows this from the outside, and norms come out
            wrong by (B w_i)²: give the weights. For a language model with n_i tokens in sequence i, and loss_i its
            mean over them, F.cross_entropy over all tokens has w_i = n_i / Σ n; see docs/per_sample_norms.md.
        parameters: only these parameters of the model; None for all that require a gradient.
        batch_size: B, where it is not the first dimension of the model's first tensor input, or where layers are
            called without the model. None: from the input.
        check: hold every layer's norms and gradient against its samples' own gradients, formed one by one, and its
            rows against each other, in every pass (slow). Without it gradient and rows are checked in a first pass.

    Raises:
        UnsupportedModuleError: on entry, with the module's name and what to do; the model is untouched. In the
            forward pass where such a module was added since.
        ValueError: an unknown reduction, a parameter that is not the model's, or nothing to track. In the forward pass
            where a layer's rows are not the samples (positions first, a batch that is mixed).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: LossReduction = "mean",
        parameters: Iterable[nn.Parameter] | None = None,
        batch_size: int | None = None,
        check: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_loss_reduction(loss_reduction)
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
        if batch_size is not None and batch_size < 0:
            raise ValueError(f"batch_size must be at least 0, got {batch_size}")
        self._model = model
        self._loss_reduction = loss_reduction
        self._parameters = None if parameters is None else _parameter_list(parameters)
        self._batch_size = batch_size
        self._check = check
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> SampleNorms:
        if self._undo:
            raise RuntimeError("this context is already entered: make another per_sample_sq_norms")
        recorder = Recorder()
        watch = Watch(self._model, recorder, self._parameters, self._batch_size, self._check)
        recorder.untracked = watch.untracked
        self._undo = [watch.end, recorder.close]
        try:
            if (let_run := run_compiled_code_eagerly()) is not None:
                self._undo.append(let_run)
            watch.begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return SampleNorms(recorder, self._loss_reduction)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()


def _parameter_list(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    if isinstance(parameters, Tensor):
        raise TypeError("parameters must be an iterable of parameters, got a single tensor")
    out = list(parameters)
    for i, parameter in enumerate(out):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}] must be a parameter of the model, got {type(parameter).__name__}")
    return out


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"UnsupportedModule": "UnsupportedModuleError"}, name)
