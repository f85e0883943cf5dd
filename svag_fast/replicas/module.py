"""S copies of a model that differ in their seeds, trained as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from svag_fast.numeric import integer
from svag_fast.replicas.build import (
    BuildModel,
    Memory,
    alone,
    build,
    check_same,
    checked_seeds,
    description,
    memory_needed,
)
from svag_fast.replicas.errors import NotReplicable
from svag_fast.replicas.probe import Run, Trial, compare, measure, run_alone
from svag_fast.replicas.stacked import coupled, split
from svag_fast.replicas.vmap import call_vmap, wrong_in_vmap

Engine: TypeAlias = Literal["stacked", "vmap"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
MUCH_FASTER = 0.8  # vmap is taken where its time is less than this part: noise must not change a run's rounding


class Replicas(nn.Module):
    """S models as one: their parameters are stacked, and one call takes a batch of samples through each.

        replicas = svag_fast.Replicas(build_model, seeds=range(16))
        optimizer = torch.optim.SGD(replicas.parameters(), lr=0.1)  # elementwise: each replica's own step
        out = replicas(x)                                           # x [16, B, ...], out [16, B, 10]
        F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum").div(B).backward()
        model = replicas.unstack(3)                                 # an ordinary model

    The gradient of the replicas' summed losses gives each replica the gradient of its own samples. An optimizer that
    works elementwise then steps each replica by itself; what adds up all parameters, as a clipped norm, adds them over
    all replicas. :class:`svag_fast.SVAG` given ``replicas=16`` measures and clips each by itself. A replica whose
    values are no longer finite doesn't disturb the others.

    Args:
        build_model: makes a model, the same for every seed but for the values of its parameters and buffers. It draws
            them from torch's default generators, which are seeded before and restored after; ``torch.initial_seed()``
            tells it the seed.
        seeds: distinct integers from 0 to 2^63 - 1; S is their number.
        engine: "stacked": each operation on parameters has a stacked form (Linear is a batched matrix product,
            convolution a grouped one), and what has none is refused. "vmap": ``torch.func.vmap``, for nearly any model,
            mostly slower. "auto": the first call tries both against replicas run alone, and takes "stacked" if it
            agrees and "vmap" isn't much faster; see ``engine`` and ``why``. The two differ by rounding, so name one
            where runs must be the same to the bit on other machines. Each agrees by trial: the first call of each mode
            and shape of input also runs two replicas alone, and all with nan in half of them.

    Parameters and buffers are [S, ...], named ``stacked.NAME``. :meth:`memory_needed` says before what they take; the
    trial in the first call takes up to six times the parameters more.

    Not served: random layers such as Dropout (p = 0 is), hooks, and what a model keeps outside parameters and buffers.

    Raises:
        TypeError, ValueError: seeds that are none, or twice the same; ``build_model`` makes no module.
        NotReplicable: the model can't be replicated; the message names the module, parameter or attribute.
        MemoryError: parameters and buffers don't fit into the memory that is free.

    Source: Li, Malladi, Arora (2021) speak of distributions over runs; the stacking is ours.
    """

    def __init__(
        self, build_model: BuildModel, seeds: Iterable[int] = range(16), *, engine: Engine | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        if not callable(build_model) or isinstance(build_model, nn.Module):
            raise TypeError(
                f"build_model must be a function that makes a new model, got {type(build_model).__name__}; for one "
                "model's copies with equal parameters: lambda: copy.deepcopy(model)"
            )
        if engine != "auto" and engine not in ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        self.seeds = checked_seeds(seeds)
        self._built = build(build_model, self.seeds)
        self.stacked = self._built.stacked
        self.training = self._built.model.training
        self._asked: Engine | Literal["auto"] = engine
        self._engine: Engine | None = None
        self._why = ""
        self._tried: set[Any] = set()

    @staticmethod
    def memory_needed(build_model: BuildModel, replicas: int, *inputs: Any) -> Memory:
        """Say how many bytes so many replicas take, from one model; nothing larger is allocated.

        Args:
            build_model: as for the class.
            replicas: S, at least 1.
            inputs: one replica's batch, as the model takes it: then the activations that a backward pass needs are
                counted too.

        Returns:
            Parameters, one gradient of each (SVAG holds a second one between its batches), buffers, activations.
        """
        return memory_needed(build_model, replicas, *inputs)

    @property
    def engine(self) -> str:
        """The engine in use; "auto" before the first call has chosen it."""
        return self._engine or self._asked

    @property
    def why(self) -> str:
        """How the engine was chosen: times of a forward and backward pass, or why an engine can't serve the model."""
        return self._why

    def forward(self, *inputs: Any, shared: bool = False, **named: Any) -> Any:
        """Each replica's output of its own samples.

        Args:
            inputs, named: what the model takes, by place and by name. Each tensor among them is [S, B, ...], replica
                s's samples at s; anything else goes to all replicas as it is.
            shared: one batch for all: each tensor is [B, ...]. It is never guessed from shapes.

        Returns:
            The model's output with each tensor as [S, B, ...].

        Raises:
            ValueError: no tensor; a tensor whose first dimension isn't S; a call in :class:`svag_fast.pair_pass`.
            NotReplicable: no engine can serve the model, or the one asked for can't, with the reason.
        """
        if "forward" in vars(self):
            raise ValueError(
                "something replaced the replicas' forward, as svag_fast.pair_pass does, which takes one model: call "
                "the replicas with each batch"
            )
        leaves, spec = tree_flatten((inputs, named))
        self._check(leaves, shared)
        key = self._key(leaves, spec, shared)
        if self._engine is None or key not in self._tried:
            self._choose(leaves, spec, shared)
            if all(x.numel() for x in leaves if isinstance(x, Tensor)):  # else the trial saw nothing
                self._tried.add(key)
        assert self._engine is not None
        return self._call(self._engine, leaves, spec, shared)

    def choose_engine(self, *inputs: Any, shared: bool = False, **named: Any) -> str:
        """Choose the engine for such inputs now, as the first call does, and return ``why``."""
        leaves, spec = tree_flatten((inputs, named))
        self._check(leaves, shared)
        self._engine = None
        self._tried.clear()
        self._choose(leaves, spec, shared)
        return self._why

    def unstack(self, s: int) -> nn.Module:
        """Return an ordinary model with copies of replica s's parameters and buffers, 0 <= s < S."""
        return alone(self._built, self._index(s))

    def load_replica(self, s: int, state_dict: Mapping[str, Tensor]) -> None:
        """Give replica s the parameters and buffers of an ordinary model's ``state_dict()``.

        Raises:
            RuntimeError: keys or shapes that aren't the model's; nothing was written.
        """
        model = alone(self._built, self._index(s))
        model.load_state_dict(dict(state_dict))
        self._take(s, model)

    def apply(self, fn: Callable[[nn.Module], object]) -> Replicas:
        """Call a function, such as one that draws initial weights, on every module of each replica as if alone.

        Raises:
            NotReplicable: it changes more than the values of parameters and buffers; nothing was written.
        """
        models = [alone(self._built, s) for s in range(len(self.seeds))]
        for model in models:
            before = description(model)
            model.apply(fn)  # type: ignore[arg-type]
            check_same(before, description(model), "apply's function must change values alone", "before", "after")
        for s, model in enumerate(models):
            self._take(s, model)
        return self

    def train(self, mode: bool = True) -> Replicas:
        """Set training or evaluation mode."""
        super().train(mode)
        self._built.model.train(mode)
        return self

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"{len(self.seeds)} of {type(self._built.model).__name__}, engine={self.engine!r}"

    def get_extra_state(self) -> dict[str, Any]:
        """The engine, so that a run that is resumed keeps its rounding."""
        return {"engine": self._engine}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the engine of a saved run, where none was asked for."""
        if state["engine"] in ENGINES and self._asked == "auto":
            self._set(state["engine"], "as in the saved state")

    def _take(self, s: int, model: nn.Module) -> None:
        """Give replica s an ordinary model's parameters and buffers."""
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, place in self._built.places.items():
                place.stacked[s].copy_(values[name])

    def _index(self, s: int) -> int:
        return integer("s", s, least=0, most=len(self.seeds) - 1)

    def _check(self, leaves: list[Any], shared: bool) -> None:
        S = len(self.seeds)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors:
            raise ValueError("the replicas' input must be a tensor, got none")
        for x in tensors:
            if not shared and (x.dim() < 2 or x.shape[0] != S):
                raise ValueError(
                    f"the input must be [S, B, ...] with S = {S} replicas (for one batch [B, ...] for all of them, say "
                    f"shared=True), got {list(x.shape)}"
                )
            if shared and x.dim() < 1:
                raise ValueError("the input must be of a dimension of samples, got none")

    def _key(self, leaves: list[Any], spec: TreeSpec, shared: bool) -> Any:
        """What a trial speaks of: anything but the values and the number of samples."""
        start = 1 if shared else 2
        shown = [
            (x.shape[start:], x.dtype, x.device, torch.is_autocast_enabled(x.device.type))
            if isinstance(x, Tensor)
            else repr(x)
            for x in leaves
        ]
        return self.training, torch.is_grad_enabled(), shared, str(spec), tuple(shown)

    def _set(self, engine: Engine, why: str) -> None:
        self._engine, self._why = engine, why

    def _call(self, engine: Engine, leaves: list[Any], spec: TreeSpec, shared: bool) -> Any:
        if engine == "vmap":
            return call_vmap(self._built, leaves, spec, shared=shared)
        S = len(self.seeds)
        if shared:
            leaves = [x.expand(S, *x.shape) if isinstance(x, Tensor) else x for x in leaves]
        folded = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in leaves]
        args, named = tree_unflatten(folded, spec)
        out = self._built.model(*args, **named)
        return tree_map(lambda x: split(x, S) if isinstance(x, Tensor) else x, out)

    def _choose(self, leaves: list[Any], spec: TreeSpec, shared: bool) -> None:
        """Find what serves these inputs, by trial; keep the engine there is if it does.

        Raises:
            NotReplicable: none does, or not the one asked for.
        """
        S, grad = len(self.seeds), torch.is_grad_enabled()
        with torch.inference_mode(False):
            inputs = tree_unflatten([x.detach().clone() if isinstance(x, Tensor) else x for x in leaves], spec)
            trial = run_alone(self._built, inputs, S, shared=shared, grad=grad)
            runs = {e: self._run(e, spec, shared) for e in ENGINES}
            if self._engine is not None and compare(self._built, runs[self._engine], trial, S) is None:
                return
            reasons = {e: self._reason(e, runs[e], trial) for e in self._candidates()}
            able = [e for e, reason in reasons.items() if reason is None]
            if not able:
                found = "; ".join(f"engine {e!r}: {reason}" for e, reason in reasons.items())
                raise NotReplicable(f"these replicas can't be run by {found}")
            if len(reasons) == 1:
                self._set(able[0], "as asked")
            elif len(able) == 1:
                other = next(e for e in reasons if e not in able)
                self._set(able[0], f"{able[0]}, because {other} can't serve this model: {reasons[other]}")
                if able == ["vmap"]:
                    warnings.warn(f"svag_fast.Replicas: {self._why}. It is mostly slower.", stacklevel=5)
            else:
                times = {e: measure(self._built, runs[e], inputs, grad=grad) for e in able}
                best: Engine = "vmap" if times["vmap"] < MUCH_FASTER * times["stacked"] else "stacked"
                shown = ", ".join(f"{e} {1e3 * t:.2f} ms" for e, t in times.items())
                passes = "forward and backward pass" if grad else "forward pass"
                self._set(best, f"{best}; a {passes} took: {shown}")

    def _candidates(self) -> tuple[Engine, ...]:
        return ENGINES if self._asked == "auto" else (self._asked,)

    def _reason(self, engine: Engine, run: Run, trial: Trial) -> str | None:
        """Why an engine can't serve, or None."""
        found = {"stacked": coupled, "vmap": wrong_in_vmap}[engine](self._built.model)
        return found or compare(self._built, run, trial, len(self.seeds))

    def _run(self, engine: Engine, spec: TreeSpec, shared: bool) -> Run:
        return lambda inputs: self._call(engine, tree_flatten(inputs)[0], spec, shared)
