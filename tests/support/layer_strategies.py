"""Random convolutions for hypothesis; apart from tests/support/layer_cases.py, which needs torch alone."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, Any]]:
    """Input shape, weight shape and options, no samples included."""
    size = st.integers(1, 9)
    groups = draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    image = [max(draw(size), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    channels, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return [draw(st.integers(0, 5)), channels * groups, *image], [outputs * groups, channels, *kernel], options
