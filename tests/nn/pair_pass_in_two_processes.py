"""Run by test_pair_pass_surroundings.py: two processes hold `pair_pass` under DDP against one process alone."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from svag_fast import SVAG, pair_pass

B = 4  # of each batch, in each process


class Net(nn.Module):
    """GroupNorm, so that two processes are as one; a buffer that changes; a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten())
        self.last, self.unused = nn.Linear(64, 3), nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        if self.training:
            self.calls += 1
        return self.last(self.stem(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def check(rank: int, way: str) -> None:
    alone = net()
    ddp = DistributedDataParallel(net(), find_unused_parameters=True)
    reference, optimizer = (SVAG(m.parameters(), lr=0.1, l=3, weight_decay=0.1) for m in (alone, ddp))
    for step in range(3):
        torch.manual_seed(step)
        batches = [
            (torch.randn(2, 2 * B, 2, 6, 6, dtype=torch.float64), torch.randint(3, (2, 2 * B))) for _ in range(2)
        ]
        mine = slice(B * rank, B * (rank + 1))
        # The second step accumulates two passes, of which only the last one synchronises.
        passes = batches if step == 1 else batches[:1]
        with pair_pass(ddp, optimizer, way=way) as pair:
            for k, (x, y) in enumerate(passes):
                out = None
                inputs, labels = x[:, mine].flatten(0, 1), y[:, mine].flatten()
                if k + 1 < len(passes):
                    with ddp.no_sync():
                        out = ddp(inputs)
                else:
                    out = ddp(inputs)
                pair.backward(F.cross_entropy(out, labels, reduction="none") / len(passes))
        reference.zero_grad()
        for batch in (0, 1):
            for x, y in passes:
                (F.cross_entropy(alone(x[batch]), y[batch]) / len(passes)).backward()
            if batch == 0:
                reference.hold_gradient()
        torch.testing.assert_close(optimizer.step().raw, reference.step().raw, rtol=1e-9, atol=1e-12)
        for (name, p), q in zip(ddp.module.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
    assert ddp.module.unused.weight.grad is None
    # Plain training works as before.
    torch.manual_seed(9)
    x, y = torch.randn(2 * B, 2, 6, 6, dtype=torch.float64), torch.randint(3, (2 * B,))
    ddp.zero_grad()
    F.cross_entropy(ddp(x[mine]), y[mine]).backward()
    alone.zero_grad()
    F.cross_entropy(alone(x), y).backward()
    for (name, p), q in zip(ddp.module.named_parameters(), alone.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    ddp.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(ValueError, match="communication hook"), pair_pass(ddp, optimizer):
        pass


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for way in ("joint", "halves"):
        check(rank, way)
    dist.destroy_process_group()
    print("the same", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        child = os.fork()  # before any autograd engine runs; one import for both
        status = 0
        try:
            main(0 if child else 1, store)
        except BaseException:
            traceback.print_exc()
            status = 1
        if child == 0:
            sys.stdout.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
    sys.exit(status or os.waitstatus_to_exitcode(ended))
