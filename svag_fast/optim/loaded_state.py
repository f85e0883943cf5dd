"""What an optimizer's checkpoint must be before anything is replaced by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from svag_fast.optim.two_batch import TwoBatchOptimizer

# Each kind of ours has its own of these; so a group says whose it is.
_KINDS = frozenset({"betas", "alpha"})
# What a torch optimizer's group has beside its options.
_BESIDE = frozenset({"params", "param_names", "initial_lr"})


# Means of squares.
_SQUARES = frozenset({"exp_avg_sq", "square_avg"})


class TorchPeer(NamedTuple):
    """The optimizer of torch.optim that ours is at l = 1."""

    name: str
    marks: frozenset[str]
    """Options by which its groups are known."""
    off: tuple[str, ...]
    """Options that ours lacks, which must be off."""
    any_l: bool
    """Whether it has no state, and so means the same at every l, without momentum."""


def checked(optimizer: TwoBatchOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state to load, with that of torch's own optimizer converted.

    Raises:
        ValueError, TypeError: it is another optimizer's, or a value in it is out of range, and which.
    """
    _check_form(state_dict)
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
        return state_dict  # torch has its own words for this
    state_dict = {**state_dict, "param_groups": [_group(optimizer, i, group) for i, group in enumerate(saved)]}
    if any("l" not in group for group in saved) and optimizer.torch_peer.any_l:
        moving = {number for group in saved if group["momentum"] for number in group["params"]}
        buffers = {number: of.get("momentum_buffer") for number, of in state_dict["state"].items() if number in moving}
        state_dict["state"] = {k: {"momentum_buffer": buffer} for k, buffer in buffers.items() if buffer is not None}
    merged = [{**now, **loaded} for now, loaded in zip(groups, state_dict["param_groups"], strict=True)]
    ls: list[Any] = []
    for i, (now, group) in enumerate(zip(groups, merged, strict=True)):
        if group.get("replicas") != now.get("replicas"):
            raise ValueError(
                f"replicas of param group {i} of the loaded state must be {now.get('replicas')}, as this optimizer's, "
                f"got {group.get('replicas')}"
            )
        try:
            ls.append(optimizer._check_loaded_group(group).l)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param group {i} of the loaded state: {error}") from error
        if ls[-1] != ls[0]:
            raise ValueError(
                f"l of the loaded state must be the same in all param groups, {merged[0]['l']} in group 0, got "
                f"{group['l']} in group {i}"
            )
    numbers = [number for group in saved for number in group["params"]]
    params = [p for group in groups for p in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            "the loaded state must be one with a number for each parameter, got several parameters of one number"
        )
    if unknown := [number for number in state_dict["state"] if number not in set(numbers)]:
        raise ValueError(
            "the loaded state must be of its own parameters, got a state of no parameter: "
            f"{', '.join(map(repr, unknown[:5]))}"
        )
    for i, (now, loaded) in enumerate(zip(groups, saved, strict=True)):
        _check_names(i, now.get("param_names"), loaded.get("param_names"))
    for number, p in zip(numbers, params, strict=True):
        _check_state(f"state {number}", state_dict["state"].get(number, {}), p, optimizer.state_names)
    return state_dict


def own_memory(state: Mapping[Any, dict[str, Any]], loaded: dict[Any, dict[str, Any]]) -> None:
    """Copy the state's tensors that torch's loading took over as they are: another optimizer may step with them."""
    theirs = {id(value) for values in loaded.values() for value in values.values()}
    for values in state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and id(value) in theirs:
                values[name] = value.detach().clone()


def _check_form(state_dict: dict[str, Any]) -> None:
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise TypeError(
                f"the loaded state must be an optimizer's, its {name} a {kind.__name__}, got a "
                f"{type(state_dict.get(name)).__name__}"
            )
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in state_dict["param_groups"]):
        raise TypeError(
            "the loaded state must be an optimizer's, each param group a dict with a list params, got another form"
        )
    for number, state in state_dict["state"].items():
        if not isinstance(state, dict):
            raise TypeError(f"state {number} of the loaded state must be a dict, got a {type(state).__name__}")


def _check_names(i: int, now: list[str] | None, loaded: list[str] | None) -> None:
    """Refuse the same names in another order: torch goes by the order. Other names may be a renamed model's."""
    if now and loaded and now != loaded and sorted(now) == sorted(loaded):
        name, other = next(pair for pair in zip(now, loaded, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"the loaded state's param group {i} must be in this optimizer's order, by which state is given out, got "
            f"{other!r} in the place of {name!r}"
        )


def _group(optimizer: TwoBatchOptimizer, i: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved group with the options of ours; those that it lacks are the group's own."""
    now = {
        k: v
        for k, v in optimizer.param_groups[i].items()
        if k != "params" and not k.startswith(("steps", "effective_steps", "time"))
    }
    own = "l" in saved and _KINDS & saved.keys() == _KINDS & now.keys()
    if own:
        return {**{k: v for k, v in now.items() if k in optimizer.defaults}, **saved}
    peer, name = optimizer.torch_peer, type(optimizer).__name__
    if "l" in saved or not peer.marks <= saved.keys() or _KINDS & saved.keys() != _KINDS & now.keys():
        options = ", ".join(sorted(saved.keys() - {"params"}))
        raise ValueError(
            f"the loaded state must be {name}'s, got another optimizer's: its param group {i} has {options}"
        )
    if more := [k for k in peer.off if saved.get(k)]:
        had = ", ".join(f"{k}={saved[k]!r}" for k in more)
        raise ValueError(
            f"the loaded state must be without {had}, which {name} doesn't take over, got torch's {peer.name} with it"
        )
    l = optimizer._check_group(optimizer.param_groups[i], read=True).l
    if l != 1 and (not peer.any_l or saved["momentum"]):
        shown = l if isinstance(l, tuple) else f"{l:g}"
        raise ValueError(
            f"the loaded state must be of moments at l = {shown}, got torch's {peer.name}, whose are others"
        )
    return {**now, **{k: v for k, v in saved.items() if k in now or k in _BESIDE}}


def _check_state(what: str, state: dict[str, Any], p: Tensor, names: frozenset[str]) -> None:
    """Refuse a parameter's state that lacks a part, or has one of another shape."""
    needed = names - {"compensation", "momentum_buffer", "measured"}
    if state and (missing := needed - state.keys()):
        raise ValueError(f"{what} of the loaded state must be complete, got one without {', '.join(sorted(missing))}")
    for name in names & state.keys():
        value = state[name]
        if name in ("step", "measured"):
            if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise TypeError(f"{what} of the loaded state: {name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{what} of the loaded state: {name} must be a finite number >= 0, got {value}")
        elif not isinstance(value, Tensor):
            raise TypeError(f"{what} of the loaded state: {name} must be a tensor, got a {type(value).__name__}")
        elif value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
            kind = "on meta" if value.is_meta else f"{value.layout}, {value.dtype}"
            raise TypeError(f"{what} of the loaded state: {name} must be a dense floating-point tensor, got {kind}")
        elif name in _SQUARES and bool((value < 0).any()):
            raise ValueError(
                f"{what} of the loaded state: {name} must be >= 0, as a mean of squares is, got elements below 0"
            )
        elif value.shape != p.shape:
            raise ValueError(
                f"{what} of the loaded state: {name} must be of shape {list(p.shape)}, as its parameter is, got "
                f"{list(value.shape)}"
            )
