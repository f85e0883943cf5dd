"""Whether Triton interprets its kernels, on the CPU, instead of compiling them."""

from __future__ import annotations

import os

import triton


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` holds for the kernels, as this version of Triton sees it."""
    knobs = getattr(triton, "knobs", None)  # since Triton 3.4
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
