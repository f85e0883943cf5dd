"""The gradient noise of one batch out of one backward pass: python examples/noise_scale.py"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import svag_fast
from svag_fast.noise import from_sample_norms

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

batch = torch.randint(len(x), (256,))  # with replacement: independent draws
with svag_fast.per_sample_sq_norms(model) as norms:
    F.cross_entropy(model(x[batch]), y[batch]).backward()  # a mean over the samples

grad_sq_norm = sum(p.grad.square().sum() for p in model.parameters())
found = from_sample_norms(norms.total, grad_sq_norm)
print(f"G = |grad L|^2 = {found.grad_sq_norm:.4f}")
print(f"Tr Sigma of one sample = {found.sample_noise_trace:.4f}")
print(f"B_simple = Tr Sigma / G = {found.sample_noise_trace / found.grad_sq_norm:.0f} samples")
