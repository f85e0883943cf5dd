"""What the picture shows: panels, lines, labels, axes (structure, not pixels)."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
from make_runs import rising, write_process, write_run
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from svag_fast import plots
from svag_fast.convergence_plot import convergence_figure
from svag_fast.curves import load_runs
from svag_fast.verdict import judge


@pytest.fixture(autouse=True)
def _in_style() -> Iterator[None]:
    with plots.style():
        yield


def figure_of(folder: Path, **options: str) -> Figure:
    runs = load_runs(folder)
    return convergence_figure(runs, judge(runs, **options))  # type: ignore[arg-type]


def panels(figure: Figure) -> tuple[list[Axes], list[Axes], list[Axes]]:
    """The curves, the distances, and the upper axes, from left to right."""
    plain = [axes for axes in figure.axes if not axes.get_xlabel().startswith("time")]
    top = [axes for axes in figure.axes if axes.get_xlabel().startswith("time")]
    half = len(plain) // 2
    return plain[:half], plain[half:], top


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def write_sweep(folder: Path, batch_sizes: list[int], ls: list[float], seeds: int = 3, sd: float = 0.03) -> None:
    rng = np.random.default_rng(0)
    for batch_size in batch_sizes:
        for l in ls:
            mean = rising(8, 0.97 if batch_size <= 8 else 0.5 + 0.05 * l)
            write_process(folder, mean, seeds=seeds, sd=sd, rng=rng, batch_size=batch_size, l=l)


def test_one_panel_a_batch_size_with_a_labelled_line_and_a_band_for_each_l(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2, 4, 8])
    figure = figure_of(tmp_path)
    curves, distances, top = panels(figure)
    assert [len(axes) for axes in (curves, distances, top)] == [2, 2, 2]
    assert [axes.get_title(loc="left") for axes in curves] == ["B = 8,  lr = 0.1", "B = 128,  lr = 1.6"]
    assert figure.get_suptitle() == "SGD stays with its SDE limit at B = 8 and leaves it at B = 128"
    for axes in curves:
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["SGD (l = 1)", "l = 2", "l = 4", "l = 8"]
        assert len(axes.collections) == 4  # bands
        assert set(lines) <= set(words(axes))
        assert same_color(lines["SGD (l = 1)"].get_color(), plots.SGD_COLOR)
        for label, line in lines.items():
            (text,) = (text for text in axes.texts if text.get_text() == label)
            assert same_color(text.get_color(), line.get_color())
    assert curves[0].get_ylabel() == "test accuracy (%)"


def test_lines_are_the_mean_over_seeds_in_percent(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, l=1, seed=seed, accuracy=np.full(41, 0.5 + 0.1 * seed))
        write_run(tmp_path, l=2, seed=seed, accuracy=np.full(41, 0.3 + 0.1 * seed))
    (curves,), _, _ = panels(figure_of(tmp_path))
    for line, level in zip(curves.lines, (60, 40), strict=True):
        np.testing.assert_allclose(line.get_ydata(), level)
        np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1504, 41))
    low, high = curves.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((50, 70))  # one standard deviation to each side


def test_upper_axis_is_the_sdes_time_which_slows_down_when_the_rate_falls(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2])
    curves, _, top = panels(figure_of(tmp_path))
    for axes, below, total in zip(top, curves, (1504, 94), strict=True):
        assert axes.get_xlim() == below.get_xlim() == (0, total)
        labels = [float(text.get_text()) for text in axes.get_xticklabels()]
        places = axes.get_xticks()
        assert len(labels) >= 3
        for time, place in zip(labels, places, strict=True):
            assert time <= 0.1 * 1504 * 0.8  # all ticks lie in the first phase here, where time = lr * k/l
            assert place == pytest.approx(time / 150.4 * total)


def test_later_panels_carry_the_first_ones_limit_in_grey_at_the_same_time(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2])
    (first, second), _, _ = panels(figure_of(tmp_path))
    assert not any(same_color(line.get_color(), plots.GREY) for line in first.lines)
    (grey,) = (line for line in second.lines if same_color(line.get_color(), plots.GREY))
    (limit,) = (line for line in first.lines if line.get_label() == "l = 2")
    np.testing.assert_allclose(grey.get_ydata(), limit.get_ydata())
    np.testing.assert_allclose(grey.get_xdata(), limit.get_xdata() / 16, atol=1e-9)  # 16 times the rate
    assert "B = 8, l = 2" in words(second)


def test_no_grey_line_where_the_rates_do_not_scale_linearly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for batch_size, lr in ((8, 0.1), (128, 0.1)):
        write_process(tmp_path, rising(), seeds=2, sd=0.01, rng=rng, batch_size=batch_size, lr=lr, l=2)
    (_, second), _, _ = panels(figure_of(tmp_path))
    assert len(second.lines) == 1


def test_distances_stand_with_their_errors_before_the_seed_noise(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2, 4])
    runs = load_runs(tmp_path)
    verdicts = judge(runs)
    _, distances, _ = panels(convergence_figure(runs, verdicts))
    assert distances[0].get_ylim() == distances[1].get_ylim()
    for axes, verdict in zip(distances, verdicts, strict=True):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["SGD", "l = 2", "l = 4"]
        shown = [c.curve for c in verdict.comparisons.values() if c.curve]
        assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * d.seed_noise for d in shown])
        points = [container.lines[0].get_ydata()[0] for container in axes.containers if hasattr(container, "lines")]
        assert points == pytest.approx([100 * d.size.value for d in shown])
        assert any(f"± {100 * shown[0].size.standard_error:.1f}" in text for text in words(axes))
    assert distances[1].get_title(loc="left") == "SVAG has not converged by l = 4; SGD departs"


def test_unfinished_runs_are_thin_lines_without_a_label(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [1, 2])
    write_run(tmp_path, l=4, seed=0, fraction=0.5)
    write_run(tmp_path, l=4, seed=1, fraction=0)
    figure = figure_of(tmp_path)
    (curves,), _, _ = panels(figure)
    thin = [line for line in curves.lines if line.get_linewidth() < 1]
    assert [len(line.get_xdata()) for line in thin] == [20, 1]
    assert "l = 4" not in words(curves)
    assert "6 of 8 runs finished" in figure.get_supxlabel()


def test_before_any_run_has_finished_the_axes_are_there_and_say_so(tmp_path: Path) -> None:
    for batch_size in (8, 128):
        run = write_run(tmp_path, batch_size=batch_size, l=2)
        (run / "metrics.csv").unlink()
    curves, distances, top = panels(figure_of(tmp_path))
    assert not top
    assert [words(axes) for axes in curves] == [["no run has come this far"]] * 2
    assert [words(axes) for axes in distances] == [["needs two finished seeds of two l"]] * 2
    assert curves[0].get_xlim() == (0, 1504)


def test_losses_can_be_drawn_too(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [1, 2])
    (curves,), (distances,), _ = panels(figure_of(tmp_path, metric="train_loss"))
    assert curves.get_ylabel() == "train loss"
    assert curves.get_ylim()[1] < 5
    assert "points" not in distances.get_ylabel()


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of words that lie on one another in the drawn figure, and words that leave it."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()]
    # an annotation's own extent has its line in it
    boxes = [(t.get_text(), matplotlib.text.Text.get_window_extent(t, renderer)) for t in texts]  # type: ignore[arg-type]
    found = []
    for i, (a, box) in enumerate(boxes):
        if not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1):
            found.append((a, "the edge"))
        for b, other in boxes[i + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            if width > 1 and height > 0.2 * min(box.height, other.height):  # line spacing is part of a box
                found.append((a, b))
    return found


@pytest.mark.parametrize(
    ("batch_sizes", "ls", "seeds"),
    [([8], [1, 2], 3), ([8, 128], [1, 2, 4, 8], 3), ([2, 8, 32, 128], [1, 2, 4, 8, 16], 2), ([8, 128], [1, 2, 4], 1)],
)
def test_no_word_lies_on_another_or_leaves_the_picture(
    tmp_path: Path, batch_sizes: list[int], ls: list[float], seeds: int
) -> None:
    write_sweep(tmp_path, batch_sizes, ls, seeds)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = figure_of(tmp_path)
    FigureCanvasAgg(figure)
    assert overlaps(figure) == []


def test_saved_picture_is_large_enough_for_a_slide(tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs", [8, 128], [1, 2])
    path = tmp_path / "convergence.png"
    plots.save(figure_of(tmp_path / "runs"), path)
    header = path.read_bytes()[:24]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width >= 1920
    assert height >= 1080
