"""Which engine: what each gives is compared with single replicas run alone, then those that agree are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from svag_fast.nn.independence import check_independence
from svag_fast.replicas.build import Built, alone
from svag_fast.replicas.errors import NotReplicable
from svag_fast.replicas.generators import Generators
from svag_fast.replicas.state import attributes
from svag_fast.replicas.vmap import substituted, with_tensors

TIMED = 3  # passes a candidate, of which the fastest counts

Run = Callable[[Any], Any]
"""From inputs [S, ...] (or one for all), by place and by name, to outputs [S, ...]."""


class Found(NamedTuple):
    """What a pass gave: the outputs' leaves, the parameters' gradients, the buffers after it."""

    outputs: list[Any]
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Trial(NamedTuple):
    """Replicas run alone, by number, which an engine is to be compared with; with gradients or without."""

    inputs: Any
    shared: bool
    grad: bool
    singles: dict[int, Found]


def run_alone(built: Built, inputs: Any, replicas: int, *, shared: bool, grad: bool) -> Trial:
    """Run the first and the last replica alone, without a trace in parameters, buffers or generators.

    Args:
        grad: whether to form gradients, which keep all activations meanwhile.

    Raises:
        NotReplicable: the model draws random numbers, or changes what it keeps outside its buffers.
        Exception: what the model itself raises.
    """
    singles: dict[int, Found] = {}
    before = attributes(built.model)
    for s in sorted({0, replicas - 1}):
        tensors = {name: place.stacked[s].detach().clone() for name, place in built.places.items()}
        own = tree_map(lambda x, s=s: (x if shared else x[s]).clone() if isinstance(x, Tensor) else x, inputs)
        states = _generators(built)
        for name in built.trained:
            tensors[name].requires_grad_()
        with torch.set_grad_enabled(grad), with_tensors(built, tensors) as replaced:
            outputs = tree_leaves(built.model(*own[0], **own[1]))
            grads = _gradients(outputs, tensors, built)
        singles[s] = Found(outputs, grads, {name: replaced.get(name, tensors[name]) for name in built.buffers})
        if states != _generators(built):
            states.restore()
            raise NotReplicable(
                "the forward pass must be without random numbers, for which replicas have no streams of their own, got "
                f"some drawn by {_who_draws(built, s, own)}"
            )
    after = attributes(built.model)
    changed = [place for place in after if before.get(place) != after[place]]
    if changed:
        raise NotReplicable(f"the model's forward pass changes {changed[0]}, which is no parameter and no buffer")
    return Trial(inputs, shared, grad, singles)


def _who_draws(built: Built, s: int, inputs: Any) -> str:
    """Name the innermost module of replica s that draws random numbers first; the generators stay as they are."""
    model, states, found = alone(built, s), _generators(built), [""]
    entered: list[Generators] = []

    def leave(name: str) -> Callable[..., None]:
        def look(*_: Any) -> None:
            if entered.pop() != _generators(built) and not found[0]:
                found[0] = name

        return look

    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_: entered.append(_generators(built)))
        module.register_forward_hook(leave(f"{path or 'the model itself'} ({type(module).__name__})"))
    try:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        states.restore()
    return found[0] or "the model"


def compare(built: Built, run: Run, trial: Trial, replicas: int) -> str | None:
    """Say why an engine can't serve this model and these inputs, or None."""
    states = _generators(built)
    try:
        tensors = {name: place.stacked.detach().clone() for name, place in built.places.items()}
        found = _pass(built, run, tensors, trial.inputs, replicas, grad=trial.grad)
        del tensors  # as large as all parameters
        for s, single in trial.singles.items():
            reason = _differs(_of(found, slice(s, s + 1)), _of(single, None))
            if reason is not None:
                return f"{reason} a model alone{_coupling(built, trial)}"
        if replicas == 1:
            return None
        # With nan in the first half's parameters and samples, the other half must stay as it is.
        half = (replicas + 1) // 2
        inputs = trial.inputs if trial.shared else tree_map(lambda x: _poisoned(x, half), trial.inputs)
        poisoned = {name: _poisoned(place.stacked, half) for name, place in built.places.items()}
        beside_nan = _pass(built, run, poisoned, inputs, replicas, grad=trial.grad)
        for s in range(half, replicas):
            reason = _differs(_of(beside_nan, slice(s, s + 1)), _of(found, slice(s, s + 1)))
            if reason is not None:
                return f"{reason} the same replica beside others: the model couples samples"
        return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    finally:
        states.restore()


def measure(built: Built, run: Run, inputs: Any, *, grad: bool) -> float:
    """Seconds of a forward and, with ``grad``, backward pass, without a trace in gradients and buffers."""
    trained = [place.stacked for place in built.places.values() if place.stacked.requires_grad]
    device = next((p.stacked.device for p in built.places.values()), torch.device("cpu"))
    best = math.inf
    with torch.set_grad_enabled(grad):
        for _ in range(1 + TIMED):
            clones = {name: built.places[name].stacked.detach().clone() for name in built.buffers}
            start = _now(device)
            with substituted(built.places, clones):
                out = [x for x in tree_leaves(run(inputs)) if isinstance(x, Tensor) and x.requires_grad]
                if out and trained:
                    torch.autograd.grad([x.sum() for x in out], trained, allow_unused=True)
            best = min(best, _now(device) - start)
    return best


def _pass(built: Built, run: Run, tensors: dict[str, Tensor], inputs: Any, replicas: int, *, grad: bool) -> Found:
    """All replicas, with other stacked tensors in place of theirs."""
    for name in built.trained:
        tensors[name].requires_grad_()
    with torch.set_grad_enabled(grad), substituted(built.places, tensors):
        # A copy, since a model may write into its input.
        outputs = tree_leaves(run(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)))
        for x in outputs:
            if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] != replicas):
                raise NotReplicable(f"an output has the shape {list(x.shape)}")
        grads = _gradients(outputs, tensors, built, replicas)
    return Found(outputs, grads, {name: tensors[name] for name in built.buffers})


def _gradients(
    outputs: list[Any], tensors: dict[str, Tensor], built: Built, replicas: int | None = None
) -> dict[str, Tensor]:
    """Of the outputs' sum with weights that are the same for each replica; zeros where there is none."""
    made = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    trained = {name: tensors[name] for name in built.trained}
    if not made or not trained:
        return {}
    weights = []
    for x in made:
        one = x if replicas is None else x[0]
        w = torch.arange(one.numel(), device=x.device, dtype=torch.float32).cos().view(one.shape).to(x.dtype)
        weights.append(w.expand_as(x))
    found = torch.autograd.grad(made, list(trained.values()), weights, allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def _of(found: Found, rows: slice | None) -> Found:
    """The same of some replicas; with None, of one that has no dimension for them."""

    def take(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach()[None] if rows is None else x.detach()[rows]

    outputs = [take(x) for x in found.outputs]
    return Found(outputs, {k: take(g) for k, g in found.grads.items()}, {k: take(b) for k, b in found.buffers.items()})


def _differs(got: Found, want: Found) -> str | None:
    """The beginning of a sentence that says in what, or None."""
    if len(got.outputs) != len(want.outputs):
        return "it gives outputs of another structure than"
    for x, y in zip(got.outputs, want.outputs, strict=True):
        same = _close(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)
        if not same:
            return "its outputs differ from those of"
    for name, b in want.buffers.items():
        if not _close(got.buffers[name], b):
            return f"it leaves other values in the buffer {name} than"
    if got.grads.keys() != want.grads.keys():
        return "it gives gradients of other parameters than"
    largest = max((_largest(g) for g in want.grads.values()), default=0.0)
    for name, g in want.grads.items():
        if not _close(got.grads[name], g, beside=largest):
            return f"its gradient of {name} differs from that of"
    return None


def _coupling(built: Built, trial: Trial) -> str:
    """Where samples meet, if they do elsewhere than in a BatchNorm: text to add."""
    model = alone(built, 0)
    args, named = tree_map(lambda x: x if trial.shared or not isinstance(x, Tensor) else x[0], trial.inputs)
    if named:
        return ""
    try:
        found = check_independence(model, *args)
    except (ValueError, RuntimeError):  # it has too few samples, or is in evaluation mode: nothing to add
        return ""
    if found.module is None or isinstance(model.get_submodule(found.module), _BatchNorm):
        return ""
    return f": {found.module or 'its own forward'} couples samples"


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _close(got: Tensor, want: Tensor, *, beside: float = 0.0) -> bool:
    """Whether two are equal but for rounding; `beside`: values of which a difference may be what is left."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    if not torch.equal(want.isfinite(), got.isfinite()):
        return False
    a, b = got[want.isfinite()].double(), want[want.isfinite()].double()
    device = want.device.type
    inside = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else want.dtype
    eps = max(torch.finfo(dtype).eps for dtype in (want.dtype, inside))
    return bool(((a - b).abs() <= math.sqrt(eps) * _largest(b) + 1000 * eps * beside).all())


def _poisoned(x: Any, half: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    copied = x.detach().clone()
    if copied.is_floating_point():
        copied[:half] = math.nan
    return copied


def _generators(built: Built) -> Generators:
    return Generators.now(sorted({p.stacked.device.index for p in built.places.values() if p.stacked.is_cuda}))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
