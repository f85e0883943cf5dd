"""The error for a model that can't be replicated."""

from __future__ import annotations


class NotReplicable(ValueError):  # noqa: N818  (named like CoupledSamples: it says what is wrong with the model)
    """A model, or a way through it, that :class:`svag_fast.Replicas` can't serve; the message names the place."""
