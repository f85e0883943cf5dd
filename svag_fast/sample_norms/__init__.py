"""Per-sample gradient norms out of an ordinary backward pass."""

from typing import TYPE_CHECKING, Any

from svag_fast import moved
from svag_fast.sample_norms.context import LossReduction, SampleNorms, per_sample_sq_norms
from svag_fast.sample_norms.plan import UnsupportedModuleError
from svag_fast.sample_norms.rule import by_vmap, register_rule

__all__ = ["LossReduction", "SampleNorms", "UnsupportedModuleError", "by_vmap", "per_sample_sq_norms", "register_rule"]


if not TYPE_CHECKING:  # else a type checker would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        return moved.old_name(__name__, {"UnsupportedModule": "UnsupportedModuleError"}, name)
