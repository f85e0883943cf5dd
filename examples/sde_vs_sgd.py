"""SGD, SVAG and the SDE on a problem with known answers (Theorem 4.3): python examples/sde_vs_sgd.py"""

import torch

from svag_fast import sde

problem = sde.multiplicative_quadratic(curvature=1.0, noise_std=1.0)  # the gradient of one batch is (1 + noise) x
lr, time, x0 = 0.25, 2.0, torch.tensor(1.0, dtype=torch.float64)
exact = sde.sde_moments(problem, 1.0, [time], lr=lr)[0, 2]
print(f"SDE           E x^2 = {exact:.5f}, exactly")
for l in (1, 4, 16):
    process = sde.SVAGProcess(lr=lr, l=l)
    mean, error = sde.expectation(process, problem, x0, time, torch.square, trajectories=400_000)
    print(f"SVAG, l = {l:2}  E x^2 = {mean:.5f} +- {error:.5f}" + ("  (l = 1 is SGD)" if l == 1 else ""))
