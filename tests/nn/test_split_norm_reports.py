"""Faults that were reported of ghost, split and converted BatchNorm elsewhere: each is tried here.

| report                          | fault there                                                                     |
| ------------------------------- | ------------------------------------------------------------------------------- |
| tensorflow 23050, keras 15790   | evaluation asked for a multiple of the virtual batch                            |
| tensorflow 17625                | broke where dimensions happen to be of the same size                            |
| tabnet 384                      | a last chunk of one row failed in the middle of a pass                          |
| ludwig 3119                     | such a chunk went through unnormalised                                          |
| pytorch 96136                   | a checkpoint's recomputation counts the batch again                             |
| fairscale 1035                  | under a checkpoint statistics came with the backward pass alone                 |
| X3D-Multigrid 8                 | the split statistics never reached those that evaluation uses                   |
| torchgan 146                    | statistics of one batch leaked into the next                                    |
| apex 380                        | conversion lost num_batches_tracked                                             |
| mmdetection 577                 | conversion put layers of a model in evaluation into training                    |
| apex 133                        | half precision failed without affine parameters                                 |
| pytorch-image-models 118, advprop 8 | rows cut by DataParallel mixed the two batches                              |
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from svag_fast.nn import CoupledSamples, PairBatchNorm1d, PairBatchNorm2d, pair_, unpair_


def test_evaluation_takes_a_single_row():
    model = pair_(nn.Sequential(nn.BatchNorm1d(3)))
    model(torch.randn(8, 3))
    row = torch.randn(1, 3)
    plain = unpair_(copy.deepcopy(model)).eval()
    assert torch.equal(model.eval()(row), plain(row))


def test_all_dimensions_of_one_size():
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    plain, pair = nn.BatchNorm2d(4).double(), PairBatchNorm2d(4).double()
    torch.testing.assert_close(pair(x), torch.cat([plain(x[:2]), plain(x[2:])]))
    torch.testing.assert_close(pair.running_var, plain.running_var)


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_no_row_is_left_over_or_passed_through(rows):
    pair = PairBatchNorm1d(3)
    with pytest.raises(ValueError, match="same size" if rows % 2 else "more than one value"):
        pair(torch.randn(rows, 3))
    assert int(pair.num_batches_tracked) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_each_batch_in_the_forward_pass_and_not_again(reentrant):
    pair = PairBatchNorm1d(3)
    x = torch.randn(8, 3, requires_grad=True)
    out = checkpoint(pair, x, use_reentrant=reentrant)
    after_forward = pair.running_mean.clone()
    assert int(pair.num_batches_tracked) == 2
    assert float(after_forward.abs().min()) > 0
    out.square().sum().backward()
    assert int(pair.num_batches_tracked) == 2
    assert torch.equal(pair.running_mean, after_forward)


def test_evaluation_uses_what_training_has_gathered():
    generator = torch.Generator().manual_seed(0)
    pair = PairBatchNorm1d(2, momentum=0.2)
    for _ in range(200):
        pair(5 + 3 * torch.randn(64, 2, generator=generator))
    x = 5 + 3 * torch.randn(4096, 2, generator=generator)
    out = pair.eval()(x).detach()
    # Of 32 rows a batch and the last ten batches: the mean within 3/sqrt(320), the scale within 1/sqrt(640).
    assert float(out.mean(0).abs().max()) < 0.3
    assert float((out.std(0) - 1).abs().max()) < 0.2


def test_nothing_of_one_pass_reaches_the_next():
    pair = PairBatchNorm1d(3)
    x, other = torch.randn(8, 3), 100 * torch.randn(8, 3)
    first = pair(x)
    pair(other)
    assert torch.equal(pair(x), first)


def test_conversion_keeps_counts_modes_and_options():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, eps=0.1)).train()
    model[1].eval()
    model(torch.randn(8, 3))
    state = copy.deepcopy(model.state_dict())
    pair_(model)
    assert [m.training for m in model] == [True, False]
    assert [(m.momentum, m.eps) for m in model] == [(None, 1e-5), (0.1, 0.1)]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert int(model[0].num_batches_tracked) == 1
    unpair_(pair_(model.eval()))
    assert not any(m.training for m in model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_without_affine_parameters(dtype):
    pair = PairBatchNorm2d(3, affine=False).to(dtype)
    out = pair(torch.randn(4, 3, 5, 5).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out[:2].float().mean((0, 2, 3)), torch.zeros(3), atol=2e-2, rtol=0)
    torch.testing.assert_close(out[2:].float().var((0, 2, 3), unbiased=False), torch.ones(3), atol=5e-2, rtol=0)


def test_data_parallel_is_refused_by_name():
    with pytest.raises(CoupledSamples, match="DataParallel"):
        pair_(nn.DataParallel(nn.BatchNorm1d(3)))
