"""Scale invariance of every shipped net that claims it: L(cx) = L(x), <grad L, x> = 0, grad L(cx) = grad L(x)/c."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from svag_fast.experiments.models import build_model, scale_invariance_report
from svag_fast.verify.check import Check, Outcome, SuiteSettings, one_thread

SMALL = ("resnet8-bn", "wrn10-1-gn", "mlp64x32-ln", "gpt2x32-ln")
FAST = ("digits-net", "preresnet8-gn", "preresnet8-bn", "vgg11-gn", *SMALL)
FULL = (
    *FAST,
    "vgg11-bn",
    *(
        f"{family}-{norm}"
        for family in ("preresnet20", "preresnet32", "vgg13", "vgg16", "vgg19")
        for norm in ("gn", "bn")
    ),
    "preresnet8-bn-w4",
    "resnet32-gn",
    "wrn16-4-bn",
)
PLAIN = ("preresnet8-none", "resnet8-bn-plain")
TOLERANCE = 1e-4
SIDE = 32  # of an image, but of digits


@one_thread()
def nets(settings: SuiteSettings) -> Outcome:
    """Relative violations on one batch in float64; nets without normalisation must be seen to fail."""
    outcome = Outcome(data={"nets": []})
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    for name in (*(FAST if settings.fast else FULL), *PLAIN):
        inputs, targets, channels = _batch(name, generator)
        model = build_model(name, in_channels=channels, num_classes=10, seed=settings.seed, pixels=SIDE**2).double()
        report = scale_invariance_report(model, inputs, targets, loss=_cross_entropy, scale=3.0)
        holds, claimed = report.holds(TOLERANCE), name not in PLAIN
        worst = max(report.loss_change, report.radial_gradient, report.gradient_change)
        outcome.data["nets"].append({"name": name, "claimed": claimed, "violation": worst})
        outcome.checks.append(
            Check(
                "Section 5",
                f"{name} is {'scale-invariant' if claimed else 'not scale-invariant (contrast)'}",
                f"largest relative violation {worst:.2g}",
                f"below {TOLERANCE:g}" if claimed else f"above {TOLERANCE:g}",
                holds == claimed,
            )
        )
    return outcome


def _batch(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor, int | None]:
    """Four samples for a net, their targets, and the channels of images."""
    if name.startswith("gpt"):
        tokens = torch.randint(10, (4, 12), generator=generator, dtype=torch.int64, device="cpu")
        return tokens, tokens.roll(-1, 1), None
    channels, side = (1, 8) if name == "digits-net" else (3, SIDE)
    images = torch.randn(4, channels, side, side, dtype=torch.float64, device="cpu", generator=generator)
    return images, torch.randint(10, (4,), generator=generator, dtype=torch.int64, device="cpu"), channels


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each sample's class, or of each token's next."""
    return F.cross_entropy(logits.movedim(-1, 1), targets)
