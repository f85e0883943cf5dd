"""Steps that the benches of replicas time: the fused kernel's, the stacked engines', and the trainer's in processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from svag_fast import SVAG, Replicas
from svag_fast.experiments.config import RunConfig
from svag_fast.experiments.data import load_dataset
from svag_fast.experiments.models import build_model
from svag_fast.experiments.training import Training
from svag_fast.replicas.chain import chain_of
from svag_fast.replicas.fused import FusedRuns

L, LR = 4, 0.05
NETS = ("digits-net", "digits-mlp")


def net(name: str, seed: int = 0) -> nn.Module:
    return build_model(name, in_channels=1, num_classes=10, seed=seed)


def fused(name: str, replicas: int, batch: int, *, threads: int) -> tuple[Callable[[], None], int]:
    """A call, and how many replica-steps it takes: some 20 ms of them a thread."""
    data, chain = load_dataset("digits"), chain_of(net(name))
    weights = chain.initial().weights.expand(replicas, -1)
    runs = FusedRuns(
        chain, weights, inputs=data.train_images, targets=data.train_labels, seeds=range(replicas), batch_size=batch,
        lr=LR, l=L, threads=threads,
    )  # fmt: skip
    steps = max(2, threads * (512 if name == "digits-net" else 8192) // (batch * replicas))

    def call() -> None:
        runs.advance(int(runs.steps[0]) + steps)

    return call, steps * replicas


def stacked(name: str, count: int, batch: int, engine: Any) -> tuple[Callable[[], None], int]:
    """The same of a step by an engine of :class:`svag_fast.Replicas`, with ``SVAG(replicas=count)``."""
    data = load_dataset("digits")
    replicas = Replicas(lambda: net(name, torch.initial_seed()), range(count), engine=engine)
    optimizer = SVAG(replicas.parameters(), LR, l=L, replicas=count)

    def call() -> None:
        optimizer.zero_grad()
        for which in range(2):
            some = torch.randint(len(data.train_labels), (count, batch))
            out, labels = replicas(data.train_images[some]).flatten(0, 1), data.train_labels[some].flatten()
            F.cross_entropy(out, labels, reduction="sum").div(batch).backward()
            if which == 0:
                optimizer.hold_gradient()
        optimizer.step()

    return call, count


def trainer(name: str, batch: int) -> Callable[[], Any]:
    config = RunConfig(model=name, batch_size=batch, lr=LR, l=L, seed=0, effective_steps=10_000)
    return Training(config, load_dataset("digits")).take_step


class TrainerProcesses:
    """Two processes of the trainer, each with one thread, which take so many steps each at every call."""

    def __init__(self, name: str, batch: int, steps: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.steps = steps
        self.cpu_seconds: list[float] = []  # of both, a call
        pairs = [spawn.Pipe() for _ in range(2)]
        self.ends = [ours for ours, _ in pairs]
        self.processes = [spawn.Process(target=_train, args=(theirs, name, batch), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()
        self()  # until they have imported all

    def __call__(self) -> None:
        for end in self.ends:
            end.send(self.steps)
        self.cpu_seconds.append(sum(end.recv() for end in self.ends))

    def close(self) -> None:
        for end in self.ends:
            end.send(0)
        for process in self.processes:
            process.join()


def _train(end: Connection, name: str, batch: int) -> None:
    torch.set_num_threads(1)
    step = trainer(name, batch)
    while steps := end.recv():
        start = time.process_time()
        for _ in range(steps):
            step()
        end.send(time.process_time() - start)
