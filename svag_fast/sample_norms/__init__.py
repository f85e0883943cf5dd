"""Per-sample gradient norms out of an ordinary backward pass."""

from svag_fast.sample_norms.context import LossReduction, SampleNorms, per_sample_sq_norms
from svag_fast.sample_norms.rule import by_vmap, register_rule
from svag_fast.sample_norms.watch import UnsupportedModule

__all__ = ["LossReduction", "SampleNorms", "UnsupportedModule", "by_vmap", "per_sample_sq_norms", "register_rule"]
