"""The project's figures and the style that they share. Matplotlib is imported when a figure is made, without pyplot."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from types import ModuleType
from typing import TYPE_CHECKING

from svag_fast.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SGD_COLOR = "#D55E00"  # vermilion: apart from every blue and grey, in each kind of colour blindness too
GREY = "#8A8F98"  # what is there for comparison
INK = "#22262B"


def style() -> AbstractContextManager[None]:
    """Return a context in which figures have the project's look; make and save the figure inside it.

    >>> with style():
    ...     figure = Figure(figsize=(12, 5), layout="constrained")
    ...     save(figure, "out.png")
    """
    context: AbstractContextManager[None] = _matplotlib().rc_context(
        {
            "text.usetex": False,
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
            "font.size": 13,
            "axes.titlesize": 14,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": 13,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.linewidth": 0.8,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E8EB",
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.4,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "figure.facecolor": "white",
            "savefig.dpi": 160,
        }
    )
    return context


def l_colors(ls: Sequence[float]) -> dict[float, str]:
    """Return a colour for each l: SGD (l = 1) set apart, the others from light to dark blue as l grows."""
    colormaps = _matplotlib().colormaps
    from matplotlib.colors import to_hex

    svag = sorted(set(ls) - {1})
    shades = colormaps["YlGnBu"]
    colors = {l: to_hex(shades(0.98 - 0.56 * (len(svag) - 1 - i) / max(len(svag) - 1, 1))) for i, l in enumerate(svag)}
    return {l: SGD_COLOR if l == 1 else colors[l] for l in sorted(set(ls))}


def _matplotlib() -> ModuleType:
    """Import matplotlib, whatever MPLBACKEND says: no figure here needs a backend but Agg."""
    # Imported by the caller already: its backend is settled, and not ours to change.
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    # A notebook's cell hands its MPLBACKEND to the commands that it starts. It names a module that this Python need not
    # have, and matplotlib then refuses to be imported at all.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):  # where it is known it stays what the rest of the program gets
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, by the Agg renderer whatever the user's backend; ``path`` is replaced in one step.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full; what was at ``path`` is still there.
    """
    with replace_file(path) as file:
        figure.savefig(file, format="png", backend="agg")
