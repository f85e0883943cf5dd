"""What an installed wheel must do. A script: it runs with another environment's Python, outside the checkout."""

import sys
from pathlib import Path

import torch

import svag_fast
import svag_fast._C
import svag_fast.kernels
from svag_fast.ops import svag_coefficients, svag_step_

for module in (svag_fast, svag_fast._C, svag_fast.kernels):
    if not Path(module.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"{module.__name__} came from {module.__file__}, not from the wheel in {sys.prefix}")

x, g1, g2 = (torch.randn(1001, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
c1, c2 = svag_coefficients(4)
expected = x.double() - 0.1 / 4 * (c1 * g1.double() + c2 * g2.double() + 0.01 * x.double())
stats = svag_step_([x], [g1], [g2], lr=0.1, l=4, weight_decay=0.01, backend="cpu")
torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-6)
torch.testing.assert_close(stats.grad_sq_norm, g1.double() @ g2.double(), rtol=1e-4, atol=1e-3)
print("smoke test passed")
