"""Teach per_sample_sq_norms a layer of your own, and check the rule: python examples/custom_layer_rule.py"""

import torch

import svag_fast


class Scale(torch.nn.Module):
    """y = weight * x, for x of [B, T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale each channel."""
        return self.weight * x


@svag_fast.register_rule(Scale)
def scale(module, inputs, output_grad):
    """Each sample's gradient, [B, C]."""
    return {"weight": (output_grad * inputs[0]).sum(1)}


model = torch.nn.Sequential(torch.nn.Linear(8, 16), Scale(16), torch.nn.Linear(16, 1))
x = torch.randn(4, 5, 8)
with svag_fast.per_sample_sq_norms(model, check=True) as norms:  # compares each rule with autograd's gradient
    model(x).square().mean().backward()
for name in norms:
    print(f"{name:10} {[round(v, 6) for v in norms[name].tolist()]}")
