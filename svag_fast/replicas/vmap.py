"""The engine for any model: ``torch.func.vmap`` over the replicas, whatever the model does with its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from svag_fast.replicas.build import Built
from svag_fast.replicas.stacked import PerReplica


@contextmanager
def with_tensors(built: Built, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The model with ordinary tensors in its places; gives a dict of those that it replaced itself, full at the end."""
    changed: dict[str, Tensor] = {}
    for slot in built.slots:
        slot.tensors[slot.key] = tensors[slot.place.name]
    try:
        yield changed
        for slot in built.slots:
            now = slot.tensors[slot.key]
            if now is not tensors[slot.place.name]:
                changed[slot.place.name] = now
    finally:
        for slot in built.slots:
            slot.tensors[slot.key] = slot.place


def wrong_in_vmap(model: nn.Module) -> str | None:
    """Name a layer whose options vmap passes over in silence."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and (
            module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        ):
            return f"{path} is an Embedding with options (padding_idx, max_norm, ...) that vmap ignores"
    return None


def call_vmap(built: Built, leaves: list[Any], spec: TreeSpec, *, shared: bool) -> Any:
    """The outputs [S, ...] of all replicas for inputs [S, ...], or the same input for all."""
    names = list(built.places)
    tensors = [place.stacked for place in built.places.values()]
    which = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    returned: list[tuple[list[Any], TreeSpec]] = []
    replaced: list[str] = []

    def one(tensors: list[Tensor], samples: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        filled = list(leaves)
        for i, x in zip(which, samples, strict=True):
            filled[i] = x
        given = dict(zip(names, tensors, strict=True))
        with with_tensors(built, given) as changed:
            args, named = tree_unflatten(filled, spec)
            found = tree_flatten(built.model(*args, **named))
        returned.append(found)
        replaced[:] = changed
        return [x for x in found[0] if isinstance(x, Tensor)], list(changed.values())

    mapped = torch.func.vmap(one, in_dims=(0, None if shared else 0), randomness="error")
    out, buffers = mapped(tensors, [leaves[i] for i in which])
    with torch.no_grad():
        for name, now in zip(replaced, buffers, strict=True):
            built.places[name].stacked.copy_(now)
    kept, out_spec = returned[-1]
    rest = iter(out)
    return tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in kept], out_spec)


@contextmanager
def substituted(places: Mapping[str, PerReplica], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other stacked tensors meanwhile, so that a trial run leaves parameters and buffers alone."""
    dicts: list[tuple[dict[str, Any], str, Any]] = []
    for name, tensor in tensors.items():
        home, key = places[name].home, places[name].key
        where: dict[str, Any] = home._parameters if key in home._parameters else home._buffers
        dicts.append((where, key, where[key]))
        where[key] = tensor
    try:
        yield
    finally:
        for where, key, before in dicts:
            where[key] = before
