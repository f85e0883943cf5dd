"""Settings of every test."""

from __future__ import annotations

import torch

# One busy core makes a second OpenMP thread spin for ever: tests that need more threads ask for them.
torch.set_num_threads(1)
