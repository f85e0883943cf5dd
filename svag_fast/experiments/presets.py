"""The paper's figures as tables of plain values: what is trained for each, at three scales.

`paper` is the paper's own setting (Li, Malladi, Arora, NeurIPS 2021; where text and the authors' configuration differ,
the text). `small` asks the same question of scikit-learn's digits, in minutes on two cores. `smoke` trains for seconds,
to see that all of it works: its numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from svag_fast.experiments.config import ExperimentConfig
from svag_fast.experiments.ranges import ConfigError
from svag_fast.numeric import must_be, shown

Scale: TypeAlias = Literal["paper", "small", "smoke"]
Kind: TypeAlias = Literal["processes", "paths", "scaling", "convergence"]
Settings: TypeAlias = dict[str, Any]

SCALES: tuple[Scale, ...] = ("paper", "small", "smoke")

# Failure of the linear scaling rule: a final test error more than so much, of its value, above the lowest.
FAILURE = 0.2

# 300 epochs of CIFAR-10, whose rate drops at 250; no momentum, weight decay 5e-4, lr 0.8 at B = 128, else by linear
# scaling.
_CIFAR: Settings = {
    "dataset": "cifar10",
    "label_noise": 0.0,
    "model": "preresnet32-bn",
    "augment": "crop-flip",
    "weight_decay": 5e-4,
    "epochs": 300,
    "schedule": "milestones:250/300",
    "sampling": "shuffle",
    "rows": 300,
    "evaluations": 300,
    "replicas": "off",
}
# The digits with label noise, and a net of three layers: the smallest in which both sides of Figure 4 show.
_DIGITS: Settings = {
    "dataset": "digits",
    "label_noise": 0.2,
    "model": "digits-mlp",
    "weight_decay": 0.00125,
    "schedule": "step",
    "sampling": "replacement",
    "rows": 320,
    "evaluations": 80,
}
_SMOKE: Settings = {"rows": 40, "evaluations": 2}

# Of each kind of figure and scale: what all its presets share.
_SHARED: dict[Kind, dict[Scale, Settings]] = {
    "processes": {
        "paper": _CIFAR | {"model": "preresnet32-gn", "augment": "none", "batch_size": 500, "lr": 0.8, "l": 1}
        # The rate drops at step 24,000, and the curves end at 32,000. Rows are means over 100 steps, as the figure's.
        | {"epochs": None, "effective_steps": 32_000, "schedule": "milestones:0.75", "rows": 320, "seeds": 1},
        "small": _DIGITS
        | {"batch_size": 16, "lr": 1.6, "effective_steps": 1280, "l": 1, "rows": 64, "evaluations": 64}
        | {"seeds": 8, "replicas": "off"},
        "smoke": _DIGITS | _SMOKE | {"batch_size": 16, "lr": 1.6, "effective_steps": 12, "l": 1, "seeds": 1}
        | {"replicas": "off", "rows": 6},
    },
    "scaling": {
        "paper": _CIFAR | {"batch_size": [2**k for k in range(1, 12)], "lr": 0.8 / 64, "l": 1, "seeds": 1},
        "small": _DIGITS
        | {"batch_size": [2, 4, 8, 16, 32, 64, 128, 256], "lr": 0.2, "effective_steps": 10_240, "l": 1, "seeds": 16},
        "smoke": _DIGITS | _SMOKE
        | {"batch_size": [4, 16], "lr": 0.4, "effective_steps": 160, "l": 1, "seeds": 2, "replicas": "off"},
    },
    "convergence": {
        "paper": _CIFAR | {"batch_size": 64, "lr": 0.4, "l": [1, 2, 4, 8, 16], "seeds": 1},
        "small": _DIGITS | {"batch_size": 4, "lr": 0.4, "effective_steps": 5120, "l": [1, 2, 4, 8], "seeds": 16},
        "smoke": _DIGITS | _SMOKE | {"batch_size": 4, "lr": 0.4, "effective_steps": 30, "l": [1, 2, 4], "seeds": 2}
        | {"replicas": "off", "rows": 30},
    },
    "paths": {
        # One dimension: there is no other scale. The effective steps end where the paths have come to rest.
        "paper": {"effective_steps": 40, "l": 16, "paths": 400_000},
        "small": {"effective_steps": 40, "l": 16, "paths": 100_000},
        "smoke": {"effective_steps": 40, "l": 16, "paths": 1000},
    },
}  # fmt: skip
_PROCESSES = {"SGD": "svag", "NGD": "ngd", "GD": "gd"}
# A net on the digits where a preset is about the net: as small as its family has it.
_SMALL_NET: Settings = {"model": "preresnet8-gn", "replicas": "off", "seeds": 2, "effective_steps": 640, "l": [1, 2, 4]}
_SMALL_NET |= {"evaluations": 20, "rows": 64}
# VGG halves an image four times, so that the digits are too small for it.
_VGG: Settings = {"dataset": "fashion-mnist", "label_noise": 0.0, "seeds": 1, "effective_steps": 320}


@dataclass(frozen=True)
class Preset:
    """A figure or panel of the paper.

    Attributes:
        name: as the command line has it.
        figure: of the paper, or the section of its appendix.
        kind: what is drawn: test accuracy of processes; paths in one dimension; G/N against the batch size; test
            accuracy by l.
        shows: what it shows, in one line.
        reported: what the paper reports, by the name of what is measured here.
        varied: settings that differ from the kind's at every scale.
        own: settings that differ at one scale, over those.
    """

    name: str
    figure: str
    kind: Kind
    shows: str
    reported: Mapping[str, str] = field(default_factory=dict)
    varied: Settings = field(default_factory=dict)
    own: Mapping[Scale, Settings] = field(default_factory=dict)

    def settings(self, scale: Scale) -> dict[str, Any]:
        """Return the settings of its experiment at a scale; a "processes" figure has one for each process."""
        if scale not in SCALES:
            raise ConfigError(must_be("scale", f"one of {', '.join(SCALES)}", shown(scale)))
        return {**_SHARED[self.kind][scale], **self.varied, **self.own.get(scale, {})}

    def experiments(self, scale: Scale, **changes: Any) -> dict[str, ExperimentConfig]:
        """Return the experiments to run, by the names of their folders; none for paths, which are simulated.

        Args:
            scale: a name in `SCALES`.
            changes: settings over the preset's, such as ``seeds=3``.

        Raises:
            ConfigError: a setting is wrong.
        """
        settings = self.settings(scale) | changes
        if self.kind == "paths":
            return {}
        if self.kind != "processes":
            return {"runs": ExperimentConfig.from_dict(settings)}
        found = {}
        for name, process in _PROCESSES.items():
            # The paper's SGD goes through epochs; the noise that NGD has is that of independent batches.
            own = {} if process == "svag" else {"sampling": "replacement"}
            found[name] = ExperimentConfig.from_dict(settings | own | {"process": process})
        return found


def _processes(name: str, figure: str, shows: str, **more: Any) -> Preset:
    return Preset(name, figure, "processes", shows, **more)


def _scaling(name: str, figure: str, model: str, shows: str, small: str, **varied: Any) -> Preset:
    # Of a net of its own a quarter of the batch sizes and of the time.
    net = _SMALL_NET | {"model": small, "batch_size": [4, 16, 64, 256], "lr": 0.4, "effective_steps": 2560, "l": 1}
    own: dict[Scale, Settings] = {"paper": {"model": model, **varied}}
    if small.startswith("vgg"):
        net |= _VGG
    if small != "digits-mlp":
        smoke = {
            "model": small.replace("vgg11", "preresnet8").replace("-w4", "-w2"),
            "effective_steps": 40,
            "batch_size": [4],
            "seeds": 1,
        }
        own |= {"small": net, "smoke": smoke}
    return Preset(name, figure, "scaling", shows, own=own)


def _convergence(
    name: str, figure: str, shows: str, small: Settings | None = None, sgd: str = "", **paper: Any
) -> Preset:
    own: dict[Scale, Settings] = {"paper": paper}
    small = small or {}
    if small.get("model", "digits-mlp") != "digits-mlp":
        # Digits and a net that is small enough for them, also where the small scale has another data set.
        smoke = {
            "model": small["model"].replace("vgg11", "preresnet8").replace("-w4", "-w2"),
            "batch_size": small.get("batch_size", 4),
        }
        smoke |= {"effective_steps": 6, "l": [1, 2], "seeds": 1}
        own |= {"small": _SMALL_NET | small, "smoke": smoke}
    else:
        own |= {"small": small, "smoke": {k: v for k, v in small.items() if k not in ("effective_steps", "l")}}
    return Preset(name, figure, "convergence", shows, {"SVAG": "converges", "SGD": sgd} if sgd else {}, own=own)


_MATCHES = "matches the limit"
_LARGE: Settings = {"batch_size": 1024, "lr": 6.4}
_SMALL_LARGE: Settings = {"batch_size": 256, "lr": 25.6, "effective_steps": 80, "l": [1, 2, 4, 8, 16, 32]}
# 60,000 real images, one epoch: batch sizes on both sides of B*, the rate of B = 8 scaled linearly.
_FASHION: Settings = {"dataset": "fashion-mnist", "label_noise": 0.0, "model": "preresnet8-bn-w0.5", "seeds": 3}
_FASHION |= {"weight_decay": 0.0025, "rows": 100, "evaluations": 20}
_FASHION_SMALL: Settings = _FASHION | {"batch_size": 8, "lr": 0.1, "effective_steps": 7500}
_FASHION_LARGE: Settings = _FASHION | {"batch_size": 512, "lr": 6.4, "effective_steps": 117, "l": [1, 2, 4, 8]}
_AT_128: Settings = {"batch_size": 128, "lr": 0.8, "l": [1, 2, 4, 8]}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _processes(
            "fig1",
            "1",
            "SGD with Gaussian noise (NGD) reaches SGD's accuracy, gradient descent does not",
            reported={"SGD": "89.4 %", "NGD": "89.3 %", "GD": "75.5 %"},
        ),
        Preset("fig2", "2", "paths", "at a finite learning rate SVAG has the SDE's distribution of paths, SGD has not"),
        _scaling("fig3", "3 left", "preresnet32-bn", "linear scaling fails where G/N is large", "digits-mlp"),
        _scaling("fig3-gn", "3 middle", "preresnet32-gn", "the same with GroupNorm", "preresnet8-gn"),
        _scaling("fig3-vgg", "3 right", "vgg19-gn", "the same for VGG-19 with GroupNorm", "vgg11-gn"),
        _convergence("fig4-left", "4 left", "SVAG converges, SGD matches its limit", sgd=_MATCHES),
        _convergence(
            "fig4-right", "4 right", "SVAG converges, SGD departs from its limit", _SMALL_LARGE,
            "departs from the limit", **_LARGE,
        ),
        _convergence(
            "fig4-left-fashion", "4 left", "SVAG converges, SGD matches its limit: Fashion-MNIST",
            _FASHION_SMALL, _MATCHES, dataset="fashion-mnist",
        ),
        _convergence(
            "fig4-right-fashion", "4 right", "SVAG converges, SGD departs from its limit: Fashion-MNIST",
            _FASHION_LARGE, "departs from the limit", **_LARGE, dataset="fashion-mnist",
        ),
        _convergence(
            "bn-128", "F.1", "SVAG converges, SGD matches its limit: BatchNorm",
            {"model": "preresnet8-bn", "batch_size": 8}, _MATCHES, **_AT_128,
        ),
        _convergence(
            "gn-128", "F.1", "the same with GroupNorm", {"model": "preresnet8-gn"}, _MATCHES, **_AT_128,
            model="preresnet32-gn",
        ),
        _convergence(
            "wide", "F.1", "a net four times as wide", {"model": "preresnet8-bn-w4", "batch_size": 8}, _MATCHES,
            **_AT_128, model="preresnet32-bn-w4",
        ),
        _convergence(
            "vgg-bn", "F.1", "VGG-16 with BatchNorm", _VGG | {"model": "vgg11-bn", "batch_size": 8}, **_AT_128,
            model="vgg16-bn",
        ),
        _convergence(
            "vgg-gn", "F.1", "VGG-16 with GroupNorm", _VGG | {"model": "vgg11-gn"}, **_AT_128, model="vgg16-gn"
        ),
        _convergence(
            "vgg-none", "F.1", "VGG-16 without normalisation", _VGG | {"model": "vgg11-none", "lr": 0.005},
            **_AT_128 | {"lr": 0.01}, model="vgg16-none",
        ),
        _convergence(
            "triangle", "F.1", "a rate that rises and falls twice",
            {"schedule": "triangle", "replicas": "off", "seeds": 4}, **_AT_128, schedule="triangle",
        ),
        _convergence(
            "cosine", "F.1", "a cosine schedule",
            {"schedule": "cosine", "replicas": "off", "seeds": 4}, **_AT_128, schedule="cosine",
        ),
        _convergence("cifar100", "F.1", "another data set: CIFAR-100", **_AT_128, dataset="cifar100"),
        _convergence("svhn", "F.1", "another data set: SVHN", **_AT_128, dataset="svhn"),
        *(
            _convergence(
                f"sampling-{mode}", "F.1", f"batches drawn otherwise: {text}",
                {"sampling": mode, "replicas": "off", "seeds": 4}, **_AT_128, sampling=mode,
            )
            for mode, text in (
                ("shuffle", "shuffled epochs"),
                ("replacement", "with replacement"),
                ("halves", "the two batches without replacement"),
                ("distinct", "each of the two without replacement"),
            )
        ),
        _scaling(
            "fig3-plain", "F.2", "resnet32-bn-plain", "a net that isn't scale-invariant", "resnet8-bn-plain"
        ),
        _scaling("fig3-wide-bn", "F.2", "preresnet32-bn-w4", "a net four times as wide: BatchNorm", "preresnet8-bn-w4"),
        _scaling("fig3-wide-gn", "F.2", "preresnet32-gn-w4", "the same with GroupNorm", "preresnet8-gn-w4"),
        _scaling(
            "fig3-none", "F.2", "preresnet32-none", "a net without normalisation", "preresnet8-none", lr=0.01 / 64
        ),
        _processes(
            "fig1-wide", "F.3", "the same for a net four times as wide",
            own={
                "paper": {"model": "preresnet32-gn-w4"},
                "small": {"model": "mlp256x256-ln", "seeds": 2},
                "smoke": {"model": "mlp256x256-ln"},
            },
        ),
        _processes(
            "fig1-small-batch", "F.3", "the same for a smaller batch",
            own={
                "paper": {"batch_size": 125},
                "small": {"batch_size": 4, "effective_steps": 5120, "lr": 0.4, "seeds": 2},
            },
        ),
    )
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(must_be("NAME", f"one of {', '.join(PRESETS)}", shown(name)))
    return PRESETS[name]
