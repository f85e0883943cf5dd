"""A small training of replicas that saves after each step and continues from what was saved; for test_resume.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svag_fast import SVAG, Replicas
from svag_fast.files import replace_file
from svag_fast.replicas.sampling import batch_indices

STEPS, B = 30, 4
X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def train(file: Path | None) -> dict[str, Tensor]:
    """Return what the replicas are at the end."""
    replicas = Replicas(build_model, (3, 11, 7), engine="stacked")
    optimizer = SVAG(replicas.parameters(), lr=[0.2, 0.1, 0.3], l=[1, 4, 2], momentum=0.9, compensated=True, replicas=3)
    first = 0
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        replicas.load_state_dict(saved["replicas"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resumed at step {first}")
    for step in range(first, STEPS):
        optimizer.zero_grad()
        for batch in (1, 2):
            index = torch.stack([batch_indices(seed, step, batch, B, len(X)) for seed in replicas.seeds])
            out = replicas(X[index]).flatten(0, 1)
            F.cross_entropy(out, Y[index].flatten(), reduction="sum").div(B).backward()
            if batch == 1:
                optimizer.hold_gradient()
        optimizer.step()
        if file is not None:
            with replace_file(file) as target:
                state = {"replicas": replicas.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, target)
            print("step", step + 1, flush=True)
            if step == STEPS // 2 and not first:
                sys.stdin.read()  # until it is killed
    tensors = {name: value for name, value in replicas.state_dict().items() if isinstance(value, Tensor)}
    return tensors | {"time": optimizer.param_groups[0]["time"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    ended = train(path)
    whole = train(None)
    assert ended.keys() == whole.keys()
    different = [name for name, value in ended.items() if not torch.equal(value, whole[name])]
    print("the same bits" if not different else f"differ: {different}")
