"""The nets by name: one grammar, one table, one message."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from svag_fast.experiments.models.gpt import gpt
from svag_fast.experiments.models.residual import preresnet, resnet, wide_resnet
from svag_fast.experiments.models.small import digits_mlp, digits_net, mlp
from svag_fast.experiments.models.vgg import vgg
from svag_fast.experiments.ranges import check_range
from svag_fast.numeric import integer

_NUMBER = r"\d{1,9}"
_VALUES = {
    "norm": "bn|gn|none",
    "norm or ln": "bn|gn|ln|none",
    "widths": rf"{_NUMBER}(?:x{_NUMBER})*",
    "width": rf"{_NUMBER}(?:\.{_NUMBER})?",  # of nets for images: a factor on their channels
}


@dataclass(frozen=True)
class Family:
    """Nets that share a name.

    Attributes:
        grammar: of the name, as messages show it: <part> is a number or a norm, [part] may be left out.
        build: takes the parts, `plain` where the grammar has it, and what `shape` names.
        shape: arguments of `build` that say what the net is for: "in_channels" and "num_classes" of images, "inputs"
            (values of an image), "vocabulary" and "context" of tokens.
    """

    grammar: str
    build: Callable[..., nn.Module]
    shape: tuple[str, ...] = ("in_channels", "num_classes")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The names."""
        optional = self.grammar.replace("[", "(?:").replace("]", ")?")

        def part(match: re.Match[str]) -> str:
            name = match[1]
            return f"(?P<{name.partition(' ')[0]}>{_VALUES.get(name, _NUMBER)})"

        return re.compile(re.sub("<([a-z ]+)>", part, optional))

    @property
    def takes_tokens(self) -> bool:
        """Whether its input is tokens [B, T], else images [B, C, H, W]."""
        return "vocabulary" in self.shape

    def options(self, name: str) -> dict[str, Any] | None:
        """The arguments that a name means, or None where it is another family's.

        Raises:
            ValueError: a number is out of range.
        """
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        found: dict[str, Any] = {}
        for part, text in match.groupdict().items():
            if part == "norm":
                found[part] = text
            elif part == "widths":
                found[part] = [integer("each width", int(width), least=1, most=65536) for width in text.split("x")]
            elif part == "depth" or (part == "width" and not self.takes_tokens):
                found[part] = check_range(part, float(text or 1) if part == "width" else int(text))
            else:
                found[part] = integer(part, int(text), least=1, most=65536)
        flags = [flag for flag in ("plain", "tied") if f"-{flag}" in self.grammar]
        return found | {flag: f"-{flag}" in name for flag in flags}


FAMILIES = (
    Family("digits-mlp", digits_mlp, ("inputs", "num_classes")),
    Family("digits-net", digits_net),
    Family("preresnet<depth>-<norm>[-w<width>][-plain]", preresnet),
    Family("resnet<depth>-<norm>[-w<width>][-plain]", resnet),
    Family("vgg<depth>-<norm>[-w<width>][-plain]", vgg),
    Family("wrn<depth>-<width>-<norm>[-plain]", wide_resnet),
    Family("mlp<widths>-<norm or ln>[-plain]", mlp, ("inputs", "num_classes")),
    Family("gpt<layers>x<width in features>-ln[-plain[-tied]]", gpt, ("vocabulary", "context")),
)
EXAMPLES = ("preresnet32-gn", "vgg16-bn-w2", "resnet32-bn-plain", "wrn16-4-bn", "mlp128x64-ln", "gpt2x32-ln-plain-tied")


def grammar() -> str:
    """What a name may be, for messages and help."""
    names = [family.grammar for family in FAMILIES]
    return (
        f"{', '.join(names[:-1])} or {names[-1]}, with norm bn, gn or none and what is in brackets left out or not, "
        f"such as {', '.join(EXAMPLES)}"
    )


def build_model(name: str, *, in_channels: int | None, num_classes: int, seed: int = 0, pixels: int = 64) -> nn.Module:
    """Build a net by its name, with initial weights that depend on the name, the shapes and `seed` alone.

    Args:
        name: see `grammar`; "-plain" is the form with parameters in its norms and a trained head, the scale-invariant
            one goes without.
        in_channels: channels of the images; None for tokens, which "gpt..." takes.
        num_classes: number of classes, or of tokens.
        seed: of the initial weights.
        pixels: of an image's channel, which matters to "digits-mlp" and "mlp..." alone; or the longest sequence.

    Raises:
        ValueError: no net has that name, or it takes no such input.
    """
    for family in FAMILIES:
        options = family.options(name)
        if options is not None:
            break
    else:
        raise ValueError(f"model must be {grammar()}, got {name!r}")
    if family.takes_tokens is not (in_channels is None):
        kind, other = ("images", "tokens") if family.takes_tokens else ("tokens", "images")
        raise ValueError(f"model must be one for {kind}, got {name!r}, which takes {other}")
    shape = {
        "in_channels": in_channels,
        "inputs": (in_channels or 0) * pixels,
        "num_classes": num_classes,
        "vocabulary": num_classes,
        "context": pixels,
    }
    generator = torch.Generator("cpu").manual_seed(seed)
    return family.build(**options, **{name: shape[name] for name in family.shape}, generator=generator)
