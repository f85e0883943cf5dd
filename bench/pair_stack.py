"""Where the time of a small net's step goes: µs of CPU by layer of the stack, `pair_pass` beside SGD at batch 2B.

`python bench/pair_stack.py [NET BATCH ROUNDS]` takes both steps in alternation, in one thread, and prints medians.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import defaultdict
from statistics import median

import torch
import torch.nn.functional as F
from training_step import Step

import svag_fast

Times = dict[str, list[float]]


class Laps:
    """Times between one call and the next."""

    def __init__(self, times: Times) -> None:
        self._times, self._last = times, time.process_time_ns()

    def __call__(self, name: str) -> None:
        now = time.process_time_ns()
        self._times[name].append((now - self._last) / 1e3)
        self._last = time.process_time_ns()


def of_pair(step: Step, times: Times) -> None:
    lap = Laps(times)
    context = svag_fast.pair_pass(step.model, step.optimizer)
    pair = context.__enter__()
    lap("enter, or zero_grad")
    x, y = step.joined()
    lap("torch.cat")
    out = step.model(x)
    lap("forward")
    losses = F.cross_entropy(out, y, reduction="none")
    lap("loss")
    pair.backward(losses)
    lap("backward")
    context.__exit__(None, None, None)
    lap("leave")
    step.optimizer.step()
    lap("step")


def of_sgd(step: Step, times: Times) -> None:
    lap = Laps(times)
    step.optimizer.zero_grad()
    lap("enter, or zero_grad")
    x, y = step.joined()
    lap("torch.cat")
    out = step.model(x)
    lap("forward")
    loss = F.cross_entropy(out, y)
    lap("loss")
    loss.backward()
    lap("backward")
    lap("leave")
    step.optimizer.step()
    lap("step")


def main(net: str = "digits-net", batch: str = "8", rounds: str = "1000") -> None:
    torch.set_num_threads(1)
    ways = [(of_pair, "pair_pass", Step(net, int(batch), "nchw", "pair_pass"))]
    ways.append((of_sgd, "SGD at 2B", Step(net, int(batch), "nchw", "SGD at 2B")))
    times: dict[str, Times] = {name: defaultdict(list) for _, name, _ in ways}
    gc.disable()
    for k in range(20 + int(rounds)):
        for take, name, step in ways:
            take(step, times[name] if k >= 20 else defaultdict(list))
    ours, theirs = ({lap: median(all_) for lap, all_ in times[name].items()} for _, name, _ in ways)
    print(f"{'µs':<20}{'pair_pass':>10}{'SGD at 2B':>10}")
    for lap in ours:
        print(f"{lap:<20}{ours[lap]:>10.0f}{theirs[lap]:>10.0f}")
    print(f"{'all':<20}{sum(ours.values()):>10.0f}{sum(theirs.values()):>10.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
