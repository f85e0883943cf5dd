"""`svag-fast check`: what is wrong with a task fails with its reason; what one should know of is told."""

import re
import textwrap

import pytest
from click.testing import CliRunner

from svag_fast.cli.main import main

QUICK = ["--batch-size", "4", "--l", "1,2", "--seeds", "1", "--effective-steps", "3", "--weight-decay", "0"]
QUICK += ["--rows", "1", "--evaluations", "1", "--jobs", "1"]

TASK = """
import os
import numpy
import torch
from torch import nn
import svag_fast
from svag_fast.experiments.models import build_model

GENERATOR = torch.Generator().manual_seed(0)
x, y = torch.randn(24, 1, 4, 4, generator=GENERATOR), torch.arange(24) % 3


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(numpy.random.default_rng().normal(size=x.shape)).to(x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.weight * x


def net(*layers):
    return lambda: nn.Sequential(nn.Flatten(), *(layer() for layer in layers), nn.Linear(16, 3))


def failing(*arguments):
    raise KeyError("my own error")


def task(**parts):
    some = dict(model=net(), train=(x, y), test=(x, y), loss=nn.CrossEntropyLoss(reduction="none"))
    return svag_fast.Task(**some | parts)


"""


def check(tmp_path, code, options=()):
    file = tmp_path / "tried.py"
    file.write_text(TASK + textwrap.dedent(code))
    result = CliRunner().invoke(main, ["check", f"{file}:tried", *QUICK, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["tried.py"]
    return result


def tried(**parts):
    return f"tried = task({', '.join(f'{name}={code}' for name, code in parts.items())})"


FAILS = {
    "no such name": ("other = task()", "must be a svag_fast.Task, or a function that returns one, got no such name"),
    "not a task": ("tried = 3", "must be a svag_fast.Task, or a function that returns one, got 3"),
    "code that fails": ("tried = failing", "KeyError: 'my own error'"),
    "a model that fails": (tried(model="failing"), "in failing"),
    "a model that is none": (tried(model="lambda: 3"), "model must be a function that returns a torch.nn.Module"),
    "one model each time": ("one = net()()\n" + tried(model="lambda: one"), "got the same ones twice"),
    "no parameter": (tried(model="nn.Flatten"), "model must be one with a trained parameter, got none"),
    "outputs without samples": (
        tried(model="lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Flatten(0))"),
        "model must be one that returns a row a sample",
    ),
    "another shape": (
        tried(model="lambda: nn.Linear(5, 3)"),
        "mat1 and mat2 shapes cannot be multiplied",
    ),
    "a mean": (tried(loss="nn.CrossEntropyLoss()"), 'loss must be of reduction="none", one value a sample'),
    "a function's mean": (
        tried(loss="lambda outputs, targets: nn.functional.cross_entropy(outputs, targets)"),
        "loss must be one value a sample",
    ),
    "nan": (tried(loss="lambda outputs, targets: outputs.sum(1).sub(1e9).sqrt()"), "yes, but not finite: nan, nan"),
    "nan on the test data": (
        tried(test="(x * float('nan'), y)"),
        "first row of metrics: test_loss of the initial weights must be finite",
    ),
    "a label out of range": (tried(train="(x, y + 1)"), "labels from 0 to 2, as the model has 3 outputs, got 3"),
    "fewer samples than a batch": (tried(train="(x[:3], y[:3])"), "batch_size must be at most 3"),
    "coupled samples": (
        tried(model="net(Centred)"),
        "model must be one whose samples are independent, but for BatchNorm, got one where the samples are coupled in",
    ),
    "no number": (tried(metrics="{'size': lambda outputs, targets: outputs}"), "metric size must be a number"),
    "fewer samples after augmentation": (
        tried(augment="lambda images, generator: images[:1]"),
        "augment must be a function that keeps the",
    ),
    "an augmentation that fails": (tried(augment="failing"), "KeyError: 'my own error'"),
}


@pytest.mark.parametrize("name", FAILS)
def test_what_would_fail_fails_with_its_reason(name, tmp_path):
    code, message = FAILS[name]
    result = check(tmp_path, code)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert re.search("^FAILS ", result.output, re.M)
    assert result.output.endswith("a run would fail\n")


TOLD = {
    "independent": ("", r"ok    samples independent in training mode: yes"),
    "steps": (
        "",
        r"ok    cost: about .* seconds here: 2 runs of 9 steps in all, 1 at a time; .* at B = 4",
    ),
    "norms": (
        tried(model="net(nn.ReLU, lambda: nn.Linear(16, 16), lambda: nn.LayerNorm(16))"),
        r"ok    per-sample norms: of all layers: 2 Linear, 1 LayerNorm; G and N come from them",
    ),
    "batch norm": (
        tried(model="net(lambda: nn.BatchNorm1d(16))"),
        r"note  samples independent in training mode: no: the samples are coupled in 1 \(BatchNorm1d\)\. Each",
    ),
    "batch norm has no norms": (
        tried(model="net(lambda: nn.BatchNorm1d(16))"),
        r"note  per-sample norms: no: .*; G and N come from pairs of batches\n"
        r"      none of 1 \(BatchNorm1d\), 2 \(Linear\): 1 \(BatchNorm1d\): .*BatchNorm",
    ),
    "numbers from elsewhere": (
        tried(model="net(Noisy)"),
        r"note  samples independent in training mode: can't be told: two runs on the same inputs differ in .*\n"
        r"note  deterministic: no: losses differ when made twice",
    ),
    "no rule": (
        tried(model="net(Scale)"),
        r"note  per-sample norms: no: .*\n      none of 1 \(Scale\): 1 \(Scale\): no rule for it, or teach it "
        r"with svag_fast\.register_rule.*\n      a rule for 1 Linear",
    ),
    "dropout": (tried(model="net(nn.Dropout)"), r"ok    deterministic: yes: initial weights, batches, losses, grad"),
    "weights from elsewhere": (
        tried(model="net(lambda: (torch.manual_seed(int.from_bytes(os.urandom(4), 'big')), nn.Identity())[1])"),
        r"note  deterministic: no: initial weights differ when made twice from the same seed",
    ),
    "an augmentation with its own generator": (
        tried(augment="lambda images, generator: images + torch.randn(images.shape, generator=GENERATOR)"),
        r"ok    deterministic: yes",
    ),
    "an augmentation with the system's entropy": (
        tried(augment="lambda images, generator: images + os.urandom(1)[0] + os.urandom(1)[0]"),
        r"note  deterministic: no: batches differ when made twice",
    ),
    "an augmentation from the generator": (
        tried(augment="svag_fast.augment.crop_flip(1)"),
        r"ok    deterministic: yes",
    ),
    "a trained head": (
        tried(model="net()"),
        r"note  scale-invariant: no: loss change .* at 3 times the weights, broken by 1\.weight, 1\.bias",
    ),
    "an invariant net": (
        "shape = dict(in_channels=1, num_classes=3, pixels=16)\n"
        + tried(model="lambda: build_model('mlp24-ln', **shape, seed=torch.initial_seed())"),
        r"ok    scale-invariant: yes: loss change .* at 3 times the weights",
    ),
    "a regression": (
        tried(
            model="lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 1))",
            train="(x, y[:, None] / 3)",
            test="(x, y[:, None] / 3)",
            loss="lambda outputs, targets: (outputs - targets).square().sum(1)",
        ),
        r"ok    one loss a sample: yes",
    ),
    "a data set with a collate function": (
        tried(
            train="torch.utils.data.TensorDataset(x, y)",
            test="torch.utils.data.TensorDataset(x, y)",
            collate="lambda items: {'x': torch.stack([x for x, _ in items]), 'y': torch.stack([y for _, y in items])}",
            loss="lambda model, batch: nn.functional.cross_entropy(model(batch['x']), batch['y'], reduction='none')",
        ),
        r"ok    deterministic: yes: .*\nok    per-sample norms: of all layers: 1 Linear",
    ),
    "a language model": (
        """
        tokens = torch.randint(11, (24, 6), generator=GENERATOR)
        gpt = lambda: build_model(
            "gpt1x12-ln-plain-tied", in_channels=None, num_classes=11, pixels=6, seed=torch.initial_seed()
        )

        def next_token(model, batch):
            logits = model(batch[:, :-1])
            return nn.functional.cross_entropy(logits.movedim(2, 1), batch[:, 1:], reduction="none").mean(1)

        tried = task(model=gpt, train=tokens, test=tokens, loss=next_token)
        """,
        r"ok    per-sample norms: of all layers: 2 Embedding, 3 LayerNorm, 5 Linear; .*\n"
        r"note  scale-invariant: no: .*token\.weight",
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_one_should_know_is_told(name, tmp_path):
    code, message = TOLD[name]
    result = check(tmp_path, code or tried())
    assert result.exit_code == 0, result.output
    assert re.search(message, result.output), result.output
    assert "FAILS" not in result.output


@pytest.mark.parametrize(
    ("target", "norms"),
    [
        ("digits", "ok    per-sample norms: of all layers: 3 Linear"),
        ("digits/preresnet8-bn", "note  per-sample norms: no: the samples are coupled in .*BatchNorm2d"),
    ],
)
def test_built_in_names_are_checked_like_a_task(target, norms):
    result = CliRunner().invoke(main, ["check", target, *QUICK])
    assert result.exit_code == 0, result.output
    assert "ok    task: 1,437 training and 360 test samples" in result.output
    assert re.search(norms, result.output), result.output
    assert "ok    scale-invariant: yes" in result.output
    assert re.search("ok    cost: about .* 2 runs of 9 steps in all", result.output)


def test_a_wrong_command_is_refused(tmp_path):
    for arguments, message in (
        (["digits/"], "TARGET must be"),
        ([str(tmp_path / "none.py")], "TARGET must be a file that is there"),
        (["nonesuch"], "TARGET must be"),
        (["json:loads", "--lr", "-1"], "lr must be"),
    ):
        result = CliRunner().invoke(main, ["check", *arguments])
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.replace("│", " ").split())


def test_data_dir_is_searched_as_by_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SVAG_FAST_DATA", "elsewhere")
    monkeypatch.setattr("svag_fast.experiments.data.files.Path.is_file", lambda self: False)
    result = CliRunner().invoke(main, ["check", "cifar10/preresnet8-bn", "--data-dir", str(tmp_path / "here")])
    assert result.exit_code == 2
    assert f"areinnoneof{tmp_path}/here" in re.sub(r"[\s│]+", "", result.output)
