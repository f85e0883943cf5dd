"""Scale invariance of every shipped net that claims it: L(cx) = L(x), <grad L, x> = 0, grad L(cx) = grad L(x)/c."""

from __future__ import annotations

import torch

from svag_fast.experiments.models import build_model, scale_invariance_report
from svag_fast.verify.check import Check, Outcome, SuiteSettings, one_thread

FAST = ("digits-net", "preresnet8-gn", "preresnet8-bn", "vgg11-gn")
FULL = (
    *FAST,
    "vgg11-bn",
    *(
        f"{family}-{norm}"
        for family in ("preresnet20", "preresnet32", "vgg13", "vgg16", "vgg19")
        for norm in ("gn", "bn")
    ),
    "preresnet8-bn-w4",
)
PLAIN = ("preresnet8-none",)
TOLERANCE = 1e-4


@one_thread()
def nets(settings: SuiteSettings) -> Outcome:
    """Relative violations on one batch in float64; nets without normalisation must be seen to fail."""
    outcome = Outcome(data={"nets": []})
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    for name in (*(FAST if settings.fast else FULL), *PLAIN):
        channels, side = (1, 8) if name == "digits-net" else (3, 32)
        model = build_model(name, in_channels=channels, num_classes=10, seed=settings.seed).double()
        images = torch.randn(4, channels, side, side, dtype=torch.float64, device="cpu", generator=generator)
        targets = torch.randint(10, (4,), generator=generator, dtype=torch.int64, device="cpu")
        report = scale_invariance_report(model, images, targets, scale=3.0)
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
