"""The engines take one path on one net and its batches, with the same statistics, to float32's rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chain_nets import Case
from torch.nn import functional as F

from svag_fast import SVAG, Replicas
from svag_fast.replicas.fused import FusedRuns
from svag_fast.replicas.sampling import batch_indices

B, STEPS, SETTINGS = 4, (1, 10, 100), {"lr": 0.05, "l": 4, "weight_decay": 0.01}
ROUNDING = 1e-6  # of |x|: what each engine may differ by from a path in float64 (tests/replicas/test_fused.py)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("mlp")


@pytest.mark.parametrize(("engine", "company"), [("stacked", [0, 1, 2]), ("stacked", [1]), ("vmap", [2, 0])])
def test_each_replica_is_the_fused_one_after_1_10_and_100_steps(case: Case, engine: Any, company: list[int]) -> None:
    fused = FusedRuns(
        case.chain, case.weights, case.frozen, inputs=case.inputs, targets=case.labels, seeds=range(3), batch_size=B,
        stat_every=1, **SETTINGS,
    )  # fmt: skip
    replicas = Replicas(lambda: copy.deepcopy(case.models[torch.initial_seed()]), company, engine=engine)
    trained = [p for p in replicas.parameters() if p.requires_grad]
    optimizer = SVAG(trained, replicas=len(company), **SETTINGS)
    sums, step = torch.zeros(len(company), 5, dtype=torch.float64), 0
    for to in STEPS:
        while step < to:
            optimizer.zero_grad()
            for batch in (1, 2):
                some = torch.stack([batch_indices(s, step, batch, B, len(case.inputs)) for s in company])
                out = replicas(case.inputs[some]).flatten(0, 1)
                F.cross_entropy(out, case.labels[some].flatten(), reduction="sum").div(B).backward()
                if batch == 1:
                    optimizer.hold_gradient()
            sums += optimizer.step().raw
            step += 1
        fused.advance(to)
        x = torch.cat([p.detach().flatten(1) for p in trained], 1)
        distance = (x - fused.weights[company]).norm(dim=1)
        assert (distance <= 2 * ROUNDING * x.norm(dim=1)).all(), (to, distance)
        theirs = fused.sums
        want = torch.stack([theirs.sq_norm1, theirs.sq_norm2, theirs.inner, theirs.weight_sq_norm], 1)[company]
        scale = want.abs()
        scale[:, 2] = (want[:, 0] * want[:, 1]).sqrt()  # an inner product may cancel
        assert ((sums[:, :4] - want).abs() <= 2e-5 * scale).all(), (to, sums, want)
