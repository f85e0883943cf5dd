"""A step's launches and synchronisations don't grow unseen: what a GPU is asked for in each way to write a step."""

from __future__ import annotations

import pytest
import torch
from logging_device.device import Device, Log
from logging_device.steps import BATCH, CLASSES, LOOPS, Steps, images_of

from svag_fast import SVAG
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import Dataset
from svag_fast.experiments.training import Training
from svag_fast.kernels import device_cache
from svag_fast.ops.weight_grad import triton as weight_grad_triton
from svag_fast.optim import svag

# (launches, synchronisations) of the second step: a first one looks at the net. One op of ATen is one launch.
# None: BatchNorm's samples have no norms.
GOLDEN: dict[str, dict[tuple[str, bool], tuple[int, int] | None]] = {
    net: dict(zip([(loop, norms) for loop in LOOPS for norms in (False, True)], counts, strict=True))
    for net, counts in {
        #                  two passes   with norms   pair_pass    with norms
        "digits-net":     ((60, 0),     (78, 0),     (34, 0),     (37, 0)),
        "preresnet32-gn": ((526, 0),    (668, 0),    (298, 0),    (301, 0)),
        "preresnet32-bn": ((588, 0),    None,        (484, 0),    None),
        "vgg16-gn":       ((216, 0),    (274, 0),    (122, 0),    (125, 0)),
    }.items()
}  # fmt: skip
CASES = [(net, loop, norms) for net, row in GOLDEN.items() for (loop, norms), counts in row.items() if counts]


def complaint(log: Log, golden: tuple[int, int]) -> str:
    """What is wrong with the log, or nothing."""
    if log.launches > golden[0] or log.synchronisations > golden[1]:
        return f"more than {golden[0]} launches and {golden[1]} synchronisations:\n{log.summary()}"
    if log.launches < 0.97 * golden[0] or log.synchronisations < golden[1]:
        return f"fewer than {golden}: lower the table to ({log.launches}, {log.synchronisations})"
    return ""


@pytest.mark.parametrize(("net", "loop", "norms"), CASES)
def test_a_step_asks_for_no_more_than_the_table_says(gpu: Device, net: str, loop: str, norms: bool) -> None:
    steps, on_cpu = Steps(net, loop, norms, "logged"), Steps(net, loop, norms, "cpu")
    steps()
    with gpu.log() as log:
        found = steps()
    golden = GOLDEN[net][loop, norms]
    assert golden is not None
    if wrong := complaint(log, golden):
        pytest.fail(f"{net}, {loop}, norms={norms}: {wrong}", pytrace=False)
    # And it is the step: the CPU's, to rounding.
    on_cpu()
    expected = on_cpu()
    for p, q in zip([*steps.params, *found], [*on_cpu.params, *expected], strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-6)


def test_a_run_s_step_does_not_wait_for_the_one_before(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = images_of("digits-net", "logged")
    data = Dataset("fashion-mnist", images, labels, images, labels, CLASSES)
    config = RunConfig(
        dataset="fashion-mnist", batch_size=BATCH, lr=0.1, l=4, seed=0, effective_steps=10, device="logged"
    )
    monkeypatch.setattr(Training, "begin", lambda self: None)  # which measures times and losses
    training = Training(config, data)
    training.take_step()
    with gpu.log() as log:
        training.take_step()
    assert log.synchronisations == 0, log.summary()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_capture_finds_nothing_that_it_forbids(
    gpu: Device, loop: str, norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps("digits-net", loop, norms, "logged")
    steps.optimizer = SVAG(steps.params, lr=0.05, l=4, momentum=0.9, capturable=True)
    for _ in range(2):
        steps()
    for module in (device_cache, weight_grad_triton, svag):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    with gpu.log() as log:
        steps()
    assert log.synchronisations == 0, log.summary()


@pytest.mark.parametrize("extra", ["launch", "synchronisation"])
def test_one_more_fails_and_the_message_says_from_where(gpu: Device, extra: str) -> None:
    x = torch.ones(3, device="logged")
    with gpu.log() as log:
        _ = x * 2
        if extra == "launch":
            _ = x + 1
        else:
            float(x[0])
    wrong = complaint(log, (1, 0))
    assert "more than 1 launches" in wrong
    assert "test_counts.py" in wrong
    assert ("aten::add" in wrong) == (extra == "launch")
    assert ("1  synchronisation  item" in wrong) == (extra == "synchronisation")
