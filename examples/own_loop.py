"""SVAG in your own training loop, with the gradient noise measured on the way: python examples/own_loop.py"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import svag_fast

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

l = 4  # l steps of SVAG are one effective step: one of SGD's
optimizer = svag_fast.SVAG(model.parameters(), lr=0.1, l=l, weight_decay=5e-4)
noise = svag_fast.RunningNoise()

for step in range(l * 200):
    optimizer.zero_grad()
    for which in (1, 2):  # two independent batches, at the same parameters
        batch = torch.randint(len(x), (32,))
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        if which == 1:
            optimizer.hold_gradient()
    stats = optimizer.step()
    if step >= l * 100:
        noise.update(stats)

print(f"accuracy {(model(x).argmax(1) == y).float().mean():.3f} after {step // l + 1} effective steps")
print(f"noise to signal N/G = {noise.nsr}")
