"""What a step of SVAG costs in a user's own loop, over SGD's at the batch size of both batches together.

"pair_pass" (ours) chooses its way itself. On a shared machine: `--benchmark-timer=time.process_time`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_step import CONTENDERS, Step

CASES = {
    "digits-net, B = 8": ("digits-net", 8, "nchw", 200),
    "digits-net, B = 128": ("digits-net", 128, "nchw", 60),
    "preresnet32-bn, B = 64": ("preresnet32-bn", 64, "nchw", 3),
    "preresnet32-bn, B = 64, cl": ("preresnet32-bn", 64, "channels_last", 3),
    "preresnet32-gn, B = 64": ("preresnet32-gn", 64, "nchw", 3),
    "preresnet32-gn, B = 64, cl": ("preresnet32-gn", 64, "channels_last", 3),
    "vgg16-bn, B = 32": ("vgg16-bn", 32, "nchw", 3),
    "vgg16-bn, B = 32, cl": ("vgg16-bn", 32, "channels_last", 3),
}


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "pair_pass"])
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: Any, contest: Any, case: str, contender: str) -> None:
    net, batch, memory_format, rounds = CASES[case]
    benchmark.group = case
    torch.set_num_threads(1)
    ours, theirs = (Step(net, batch, memory_format, name) for name in ("pair_pass", contender))
    contest(theirs.take, ours=ours.take, rounds=rounds)
