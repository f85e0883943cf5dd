"""`svag-fast new FILE.py`: a task's file to begin from."""

from __future__ import annotations

import shlex
from pathlib import Path

import rich_click as click

TEMPLATE = '''\
"""What to train: a network, its data, its loss. Replace each part by your own.

svag-fast check {file}    tries it, and says what is measured and what a grid of runs costs
svag-fast run {file} --batch-size 8,128 --lr 0.1 --weight-decay 0 --l 1,2,4 --seeds 8
"""

import torch
from sklearn.datasets import load_digits

import svag_fast


def data():
    """Inputs and targets, one row a sample: here scikit-learn's 1,797 images of digits, 8x8."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8)
    return (x - x.mean()) / x.std(), torch.tensor(digits.target)


def model():
    """A new network at each call. Its weights come from torch's global generator, which every run seeds."""
    # GroupNorm, unlike BatchNorm, keeps samples apart, so that each sample's gradient norm can be measured as well.
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),
        torch.nn.GroupNorm(4, 16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        torch.nn.GroupNorm(4, 32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    )


def accuracy(outputs, targets):
    """A number of all test samples together. One whose name ends in "accuracy" is a fraction."""
    return (outputs.argmax(1) == targets).float().mean()


def task():
    """What `svag-fast run` and `svag-fast check` ask for."""
    x, y = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return svag_fast.Task(
        model=model,
        # Tensors, or any map-style torch.utils.data.Dataset (then `collate=` may make the batches).
        train=(x[train], y[train]),
        test=(x[test], y[test]),
        # One value a sample, never a mean. For what is no pair (inputs, targets): a function loss(model, batch).
        loss=torch.nn.CrossEntropyLoss(reduction="none"),
        # Runs are compared by the first metric and by the loss.
        metrics={{"accuracy": accuracy}},
        # Of training batches, on the device, from the generator that it is given.
        augment=svag_fast.augment.crop_flip(padding=1),
    )
'''


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def new(file: Path) -> None:
    """Write FILE.py, a task that runs as it is, with a comment on each part. An existing file is never overwritten."""
    if file.suffix != ".py" or not file.stem:
        raise click.UsageError(f"FILE must be one whose name ends in .py, got {str(file)!r}")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(TEMPLATE.format(file=shlex.quote(str(file))))
    except FileExistsError as error:
        raise click.ClickException(f"FILE must be a new one, got {str(file)!r}, which is there already") from error
    except OSError as error:
        raise click.ClickException(f"{file} can't be written: {error.strerror}") from error
    click.echo(f"wrote {file}. Try it: svag-fast check {shlex.quote(str(file))}")
