"""Many seeds of a model as one: stacked parameters, and engines that take all replicas through a step at once."""

from __future__ import annotations

from svag_fast.replicas.build import Memory
from svag_fast.replicas.errors import NotReplicable
from svag_fast.replicas.module import Replicas

__all__ = ["Memory", "NotReplicable", "Replicas"]
