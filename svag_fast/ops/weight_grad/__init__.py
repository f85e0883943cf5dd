"""The weight gradient of a layer with its samples' squared norms, in one product."""

from svag_fast.ops.weight_grad.op import WeightGrad, weight_grad_and_sq_norms

__all__ = ["WeightGrad", "weight_grad_and_sq_norms"]
