"""From a function that builds a model to a model with places for S of each parameter, and the stacked tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from svag_fast.numeric import integer, shown
from svag_fast.replicas.errors import NotReplicable
from svag_fast.replicas.memory import free_memory
from svag_fast.replicas.stacked import PerReplica
from svag_fast.replicas.state import attributes

BuildModel = Callable[[], nn.Module]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Memory(NamedTuple):
    """Bytes that S replicas take; activations are 0 where no inputs were given."""

    parameters: int
    gradients: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(count)}" for name, count in self._asdict().items() if count)
        return f"{_size(self.total)} ({parts})"


class StackedTensors(nn.Module):
    """The stacked parameters and buffers of a module of the model, in the model's order and by its names."""


class Slot(NamedTuple):
    """A place in the model where a tensor was: a module's dict of parameters or of buffers, and a key."""

    tensors: dict[str, Any]
    key: str
    place: PerReplica


class Built(NamedTuple):
    """What :func:`build` makes."""

    model: nn.Module
    stacked: StackedTensors
    places: dict[str, PerReplica]
    slots: list[Slot]

    @property
    def buffers(self) -> list[str]:
        """The names of the places that are buffers."""
        return [name for name, place in self.places.items() if place.key not in place.home._parameters]

    @property
    def trained(self) -> list[str]:
        """The names of the places of trained parameters."""
        return [name for name, place in self.places.items() if place.stacked.requires_grad]


def checked_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """Return the seeds, distinct integers from 0 to 2^63 - 1, at least one."""
    try:
        found = tuple(integer("seeds", seed, least=0, most=2**63 - 1) for seed in seeds)
    except TypeError:
        raise TypeError(f"seeds must be integers, one a replica, such as range(16), got {shown(seeds)}") from None
    if not found:
        raise ValueError("seeds must be one or more, got none")
    twice = sorted(seed for seed, count in Counter(found).items() if count > 1)
    if twice:
        raise ValueError(f"seeds must be different, for replicas of one seed are one run, got {twice[0]} twice")
    return found


def seeded(build_model: BuildModel, seed: int) -> nn.Module:
    """Build a model under a seed of torch's default generators, which are then as before."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = build_model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_model's result must be a torch.nn.Module, got {type(model).__name__}")
    return model


def build(build_model: BuildModel, seeds: tuple[int, ...]) -> Built:
    """Build a model under each seed, stack their parameters and buffers, and put places for them into the first.

    Raises:
        NotReplicable: a model that can't be replicated, or models that differ in more than the values of tensors.
        MemoryError: the stacked tensors don't fit into the free memory.
    """
    model = seeded(build_model, seeds[0])
    first = description(model)
    names = _unique_names(model)
    tensors = {name: tensor for tensor, name in names.items()}
    _check_memory(tensors.values(), len(seeds))
    stacks = {name: t.new_empty((len(seeds), *t.shape), requires_grad=False) for name, t in tensors.items()}
    with torch.no_grad():
        for s, seed in enumerate(seeds):
            other = model if s == 0 else seeded(build_model, seed)
            if s > 0:
                if other is model:
                    raise NotReplicable(
                        "build_model returned the same model twice: it must make a new one at each call"
                    )
                check_same(first, description(other), "the models differ between seeds", seeds[0], seed)
            for name, tensor in named_tensors(other):
                if name in stacks:
                    stacks[name][s].copy_(tensor)
    return _with_places(model, stacks, names)


def description(model: nn.Module) -> dict[str, str]:
    """All that must be the same in each model, by place: modules and their options, tensors' shapes, what is shared.

    Raises:
        NotReplicable: what can't be replicated at all.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        where = path or "the model itself"
        _check_module(where, module)
        found[where] = f"a {type(module).__module__}.{type(module).__qualname__}"
    found.update(attributes(model))
    names = _unique_names(model)
    for name, tensor in named_tensors(model):
        kind = "trained " * tensor.requires_grad + ("parameter" if isinstance(tensor, nn.Parameter) else "buffer")
        found[name] = f"a {kind} {list(tensor.shape)} {tensor.dtype} on {tensor.device}, first named {names[tensor]}"
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def memory_needed(build_model: BuildModel, replicas: int, *inputs: Any) -> Memory:
    """See :meth:`svag_fast.Replicas.memory_needed`."""
    S = integer("replicas", replicas, least=1)
    model = seeded(build_model, 0)
    description(model)
    params, buffers = list(model.parameters()), list(model.buffers())
    known = {t.untyped_storage().data_ptr() for t in [*params, *buffers]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    if inputs:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(*inputs)  # alive until the storages were counted, so that none is counted twice
        activations = sum(saved.values())
        del out
    else:
        activations = 0
    trained = [p for p in params if p.requires_grad]
    return Memory(S * _bytes(params), S * _bytes(trained), S * _bytes(buffers), S * activations)


def alone(built: Built, s: int) -> nn.Module:
    """Return an ordinary model with a copy of replica s's parameters and buffers."""
    memo: dict[int, Any] = {}
    for place in built.places.values():
        tensor = place.stacked[s].detach().clone()
        trained = place.stacked.requires_grad
        memo[id(place)] = nn.Parameter(tensor, trained) if isinstance(place.stacked, nn.Parameter) else tensor
    return copy.deepcopy(built.model, memo)


def _unique_names(model: nn.Module) -> dict[Tensor, str]:
    """Each parameter and buffer with its first name."""
    names: dict[Tensor, str] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(tensor, name)
    return names


def _with_places(model: nn.Module, stacks: dict[str, Tensor], names: dict[Tensor, str]) -> Built:
    root = StackedTensors()
    homes: dict[str, StackedTensors] = {"": root}
    places: dict[str, PerReplica] = {}
    slots: list[Slot] = []
    for path, module in model.named_modules():
        owned = [(k, t) for d in (module._parameters, module._buffers) for k, t in d.items() if t is not None]
        for key, tensor in owned:
            name = names[tensor]
            if name not in places:
                home = _home(homes, path)
                if isinstance(tensor, nn.Parameter):
                    home.register_parameter(key, nn.Parameter(stacks.pop(name), tensor.requires_grad))
                else:
                    persistent = key not in module._non_persistent_buffers_set
                    home.register_buffer(key, stacks.pop(name), persistent=persistent)
                places[name] = PerReplica(home, key, name)
            tensors: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            tensors[key] = places[name]
            slots.append(Slot(tensors, key, places[name]))
    return Built(model, root, places, slots)


def _home(homes: dict[str, StackedTensors], path: str) -> StackedTensors:
    if path not in homes:
        parent, _, last = path.rpartition(".")
        homes[path] = StackedTensors()
        _home(homes, parent).add_module(last, homes[path])
    return homes[path]


def _check_module(where: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, (torch.jit.ScriptModule, DataParallel, DistributedDataParallel, SyncBatchNorm)):
        raise NotReplicable(f"{where} is a {kind}, which can't be replicated")
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise NotReplicable(f"{where} is compiled: replicate the plain model")
    if isinstance(module, LazyModuleMixin) or any(
        t is not None and is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())
    ):
        raise NotReplicable(f"{where} is a {kind} not yet initialised: run a batch through it in build_model")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise NotReplicable(f"{where} has hooks, which would see all replicas at once")
    draws = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if isinstance(module, nn.RReLU) or (isinstance(draws, (int, float)) and draws > 0):
        raise NotReplicable(
            f"{where} is a {kind} that draws random numbers, and replicas have no streams of their own for them: set "
            "its probability to 0"
        )
    for name, p in module._parameters.items():
        if p is not None and not p.is_floating_point():
            raise NotReplicable(f"{where}: parameter {name} is {p.dtype}, and only real floating point can be trained")


def check_same(first: dict[str, str], second: dict[str, str], what: str, one: object, other: object) -> None:
    """Refuse two models whose :func:`description` differs; the message begins with ``what``."""
    for place in [*first, *(place for place in second if place not in first)]:
        a, b = first.get(place, "absent"), second.get(place, "absent")
        if a != b:
            raise NotReplicable(f"{what}: {place} is {a} at {one}, {b} at {other}")


def _check_memory(tensors: Iterable[Tensor], replicas: int) -> None:
    needed: dict[torch.device, int] = {}
    for t in tensors:
        needed[t.device] = needed.get(t.device, 0) + replicas * _bytes([t])
    for device, count in needed.items():
        free = free_memory(device)
        if free is not None and count > free:
            raise MemoryError(
                f"{replicas} replicas need {_size(count)} for parameters and buffers alone, and {device} has "
                f"{_size(free)} free"
            )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
