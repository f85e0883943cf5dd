"""The shared style, and the structure of the figures: axes, lines, labels (not pixels)."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from svag_fast.plots import style as plots


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_importing_plots_does_not_import_matplotlib() -> None:
    code = "import sys, svag_fast.plots.style; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_style_is_undone_after_the_block_and_needs_no_latex() -> None:
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["text.usetex"] is False
        assert matplotlib.rcParams["font.size"] >= 13
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("ls", [[1], [2], [1, 2], [1, 2, 4, 8, 16, 64]])
def test_l_colours_get_darker_with_l_and_stand_out_from_white(ls: list[float]) -> None:
    colors = plots.l_colors(ls)
    assert list(colors) == ls
    blues = [luminance(color) for l, color in colors.items() if l != 1]
    assert blues == sorted(blues, reverse=True)
    assert len(set(colors.values())) == len(ls)
    assert colors.get(1, plots.SGD_COLOR) == plots.SGD_COLOR
    assert all(1.05 / (luminance(color) + 0.05) > 1.5 for color in colors.values())


def test_save_replaces_the_file_and_keeps_the_old_one_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with plots.style():
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        plots.save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")

    path.write_bytes(b"old")
    figure.add_subplot().set_title("$\\undefinedmacro$")  # fails while it draws
    with pytest.raises(ValueError, match="undefinedmacro"):
        plots.save(figure, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonesuch", "svg", ""])
def test_a_notebook_s_backend_is_not_needed_and_not_lost(tmp_path: Path, backend: str) -> None:
    """MPLBACKEND as a command started from a notebook inherits it; matplotlib can't be imported by itself then."""
    code = (
        "import os, sys\nfrom svag_fast.plots import style as plots\nplots.l_colors([1, 2])\n"
        "with plots.style():\n"
        "    from matplotlib.figure import Figure\n"
        "    figure = Figure(); figure.add_subplot().plot([0, 1]); plots.save(figure, sys.argv[1])\n"
        "import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "print(os.environ['MPLBACKEND'], dict.__getitem__(matplotlib.rcParams, 'backend'))"
    )
    path = tmp_path / "a.png"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.startswith(backend)
    assert (done.stdout.split()[-1] == "svg") == (backend == "svg")
