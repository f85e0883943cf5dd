"""Are the samples of a batch independent in a model? Found by changing one of them and looking at the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from svag_fast.nn.replay import differ, randomised, rewound, tensors_of
from svag_fast.sample_norms.dispatch import run_compiled_code_eagerly


@dataclass(frozen=True)
class Independence:
    """The answer of :func:`check_independence`; true where the samples are independent.

    Attributes:
        independent: whether no sample's output changed with another sample's input.
        module: the name of the module in whose own forward the coupling begins ("" is the model itself), or None.
        reason: the answer in words.
    """

    independent: bool
    module: str | None
    reason: str

    def __bool__(self) -> bool:
        return self.independent


class _Event(NamedTuple):
    """A module is entered or left."""

    place: str
    kind: str
    leaves: bool
    parent: str
    tensors: list[Tensor]


def check_independence(model: nn.Module, *inputs: Any, **kwargs: Any) -> Independence:
    """Say whether each sample's output in training mode depends on that sample alone, and if not, where that begins.

    One sample (the first a little, then the last a lot) is changed and all others' outputs are compared, layer by
    layer. Random layers such as Dropout draw the same numbers in each run; the parameters are moved meanwhile, since
    coupling may hide behind weights that start at zero. It costs four forward passes without gradients, after which
    parameters, buffers (running statistics) and torch's generators are as before.

    Args:
        model: in training mode.
        inputs, kwargs: what the model takes; the samples are the first dimension of the first tensor among them, and of
            every other that is as long.

    Raises:
        ValueError: evaluation mode; fewer than two samples; no input that can be changed; an output without samples.
        RuntimeError: the model gives different outputs when run twice, so that nothing can be told.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not model.training:
        raise ValueError(
            "the model must be in training mode, model.train(), got evaluation mode, where BatchNorm hides what it does"
        )
    found = tensors_of((inputs, kwargs))
    if not found or found[0].shape[0] < 2:
        raise ValueError(
            "the first tensor of the inputs must be of at least two samples, got "
            f"{found[0].shape[0] if found else 'no tensor'}"
        )
    samples = found[0].shape[0]
    with torch.no_grad(), rewound(model) as replay, randomised(model):
        let_run = run_compiled_code_eagerly()
        try:
            run = functools.partial(_run, model, replay.rewind)
            base = run(inputs, kwargs)
            noise = _noise(base, run(inputs, kwargs))
            # A little, as it may have been; and so much that a maximum over the batch is this sample's, too.
            for sample, size in ((0, 1.0), (samples - 1, 16.0)):
                changed = run(*_changed((inputs, kwargs), sample, samples, size))
                coupled = _first_coupling(base, changed, sample, samples, noise)
                if coupled is not None:
                    return coupled
        finally:
            if let_run is not None:
                let_run()
    return Independence(True, None, "no sample's output depends on another sample")


def _run(model: nn.Module, rewind: Callable[[], None], inputs: Any, kwargs: Any) -> list[_Event]:
    """All modules' inputs and outputs, in the order of time."""
    events: list[_Event] = []
    inside: list[str] = []
    handles: list[Any] = []

    def entered(place: str, module: nn.Module, args: Any, own: Any) -> None:
        parent = inside[-1] if inside else ""
        inside.append(place)
        events.append(_Event(place, type(module).__name__, False, parent, _copies((args, own))))

    def left(place: str, module: nn.Module, args: Any, own: Any, out: Any) -> None:
        inside.pop()
        events.append(_Event(place, type(module).__name__, True, place, _copies(out)))

    try:
        for place, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(entered, place), with_kwargs=True))
            handles.append(module.register_forward_hook(functools.partial(left, place), with_kwargs=True))
        rewind()
        model(*inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _copies(value: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tensors_of(value)]  # layers that work in place write over them


def _noise(first: list[_Event], second: list[_Event]) -> float:
    """How far the outputs of two equal runs are apart by rounding, as on a device whose sums have no fixed order."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.tensors, b.tensors, strict=True):
            if not differ(x, y):
                continue
            size = float(x.abs().max())
            apart = float((x - y).abs().max()) if x.is_floating_point() else size
            if not apart <= 1e-3 * size:
                raise RuntimeError(
                    f"two runs on the same inputs differ in {_label(a)}: it draws random numbers that are not torch's, "
                    "or keeps something between calls, so independence can't be told"
                )
            worst = max(worst, apart)
    return 16 * worst


def _changed(arguments: tuple[Any, Any], sample: int, samples: int, size: float) -> tuple[Any, Any]:
    """The arguments with one sample changed, by so many times the largest value, in every tensor that has samples."""
    generator = torch.Generator("cpu").manual_seed(0)
    changes = 0

    def change(x: Any) -> Any:
        nonlocal changes
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != samples or not x[sample].numel():
            return x
        out = x.clone()
        row = out[sample]
        if x.dtype == torch.bool:
            out[sample] = ~row
        elif x.is_floating_point() or x.is_complex():
            spread = x.abs().nan_to_num(0.0, 0.0, 0.0).amax().clamp(min=1e-3)
            draw = torch.randn(row.shape, generator=generator, dtype=torch.float64, device="cpu")
            out[sample] = row + size * spread * draw.to(row)
        else:  # another sample's own, which is a valid index where this one is
            others = [i for i in range(samples) if not torch.equal(x[i], row)]
            if others:
                out[sample] = x[others[0]]
        changes += not torch.equal(out[sample], row) if x.dtype == torch.bool else differ(out[sample], x[sample])
        return out

    changed: tuple[Any, Any] = tree_map(change, arguments)
    if not changes:
        raise ValueError("inputs must be samples that differ, got equal integers alone, of which none could be changed")
    return changed


def _first_coupling(
    base: list[_Event], changed: list[_Event], sample: int, samples: int, noise: float
) -> Independence | None:
    ends = base[-1].tensors, changed[-1].tensors
    outputs = [(x, y) for x, y in zip(*ends, strict=True) if x.shape[0] == samples and y.shape == x.shape]
    if not outputs:
        raise ValueError(
            f"the model's outputs must be tensors whose first dimension is the {samples} samples, got none"
        )
    others = torch.arange(samples, device="cpu") != sample
    if not any(differ(x[others], y[others], noise) for x, y in outputs):
        return None  # inner tensors as long as that may be something else
    for a, b in zip(base, changed, strict=False):  # the flow of control may have changed too
        if a.place != b.place or a.leaves != b.leaves:
            break
        for x, y in zip(a.tensors, b.tensors, strict=False):
            if x.shape != y.shape:
                return _coupled(a)
            if x.shape[0] == samples and differ(x[others], y[others], noise):
                return _coupled(a)
    return Independence(False, "", "the model's outputs couple the samples, in a place that no module shows")


def _coupled(event: _Event) -> Independence:
    if event.leaves:
        return Independence(False, event.place, f"the samples are coupled in {_label(event)}")
    where = event.parent or "the model"
    return Independence(
        False, event.parent, f"the samples are coupled in the forward of {where}, before {_label(event)}"
    )


def _label(event: _Event) -> str:
    return f"{event.place or 'the model'} ({event.kind})"
