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

from svag_fast.analysis.runs import load_runs
from svag_fast.analysis.verdict import judge
from svag_fast.plots import style as plots
from svag_fast.plots.convergence import convergence_figure


@pytest.fixture(autouse=True)
def _in_style() -> Iterator[None]:
    with plots.style():
        yield


def figure_of(folder: Path, **options: object) -> Figure:
    runs = load_runs(folder)
    return convergence_figure(runs, judge(runs, **options))  # type: ignore[arg-type]


def panels(figure: Figure, metrics: int = 2) -> tuple[list[Axes], list[list[Axes]], list[Axes]]:
    """The curves, for each metric the means against 1/l, and the upper axes, from left to right."""
    plain = [axes for axes in figure.axes if not axes.get_xlabel().startswith("time")]
    top = [axes for axes in figure.axes if axes.get_xlabel().startswith("time")]
    columns = len(plain) // (1 + metrics)
    rows = [plain[i : i + columns] for i in range(0, len(plain), columns)]
    return rows[0], rows[1:], top


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def write_sweep(folder: Path, batch_sizes: list[int], ls: list[float], seeds: int = 3, sd: float = 0.003) -> None:
    rng = np.random.default_rng(0)
    for batch_size in batch_sizes:
        for l in ls:
            mean = rising(8, 0.97 if batch_size <= 8 else 0.5 + 0.05 * l)
            write_process(folder, mean, seeds=seeds, sd=sd, rng=rng, batch_size=batch_size, l=l)


def test_one_panel_a_batch_size_with_a_labelled_line_and_a_band_for_each_l(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2, 4, 8])
    figure = figure_of(tmp_path)
    curves, laws, top = panels(figure)
    assert [len(axes) for axes in (curves, *laws, top)] == [2, 2, 2, 2]
    assert [axes.get_title(loc="left") for axes in curves] == ["B = 8,  lr = 0.1", "B = 128,  lr = 1.6"]
    assert figure.get_suptitle() == "SGD matches its SDE limit at B = 8 and departs from it at B = 128"
    for axes in curves:
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(lines) == ["SGD (l = 1)", "l = 2", "l = 4", "l = 8"]
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
    lines = [line for line in curves.lines if not line.get_label().startswith("_")]
    for line, level in zip(lines, (60, 40), strict=True):
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
            assert time <= 0.1 * 1504 * 0.8  # all ticks are in the first phase here, where time = lr * k/l
            assert place == pytest.approx(time / 150.4 * total)


def limit_bars(axes: Axes, color: str) -> dict[float, float]:
    """Level by the effective step at which a limit's bar begins."""
    bars = [line for line in axes.lines if line.get_linestyle() == "--" and same_color(line.get_color(), color)]
    return {float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in bars}


def test_each_phases_limit_stands_over_the_window_that_is_averaged(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [1, 2, 4])
    runs = load_runs(tmp_path)
    (verdict,) = judge(runs)
    (curves,), _, _ = panels(convergence_figure(runs, [verdict]))
    bars = limit_bars(curves, plots.INK)
    limits = [100 * (cell.limit or 0) for part, cell in verdict.cells["test_accuracy"].items() if part != "end"]
    phase = 31 / 40 * 1504  # the made runs' first phase ends a row before 80 %
    assert bars == pytest.approx(dict(zip((phase / 2, (phase + 1504) / 2), limits, strict=True)))
    assert "limit" in words(curves)
    low, high = curves.collections[-1].get_paths()[0].get_extents().intervaly
    interval = verdict.cells["test_accuracy"]["phase 2"].limit_interval
    assert interval is not None
    assert (low, high) == pytest.approx((100 * interval[0], 100 * interval[1]))


def test_later_panels_carry_the_first_ones_limits_in_grey(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2, 4])
    (first, second), _, _ = panels(figure_of(tmp_path))
    assert not limit_bars(first, plots.GREY)
    assert list(limit_bars(second, plots.GREY).values()) == list(limit_bars(first, plots.INK).values())
    assert "limit at B = 8" in words(second)


def test_no_grey_limit_where_the_rates_do_not_scale_linearly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for batch_size, lr in ((8, 0.1), (128, 0.1)):
        for l in (2, 4):
            write_process(tmp_path, rising(), seeds=2, sd=0.01, rng=rng, batch_size=batch_size, lr=lr, l=l)
    (_, second), _, _ = panels(figure_of(tmp_path))
    assert not limit_bars(second, plots.GREY)
    assert limit_bars(second, plots.INK)


def test_means_stand_against_1_over_l_with_the_fitted_line_its_limit_and_the_margin(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8, 128], [1, 2, 4])
    runs = load_runs(tmp_path)
    verdicts = judge(runs)
    _, laws, _ = panels(convergence_figure(runs, verdicts))
    for row, metric, factor in zip(laws, ("test_accuracy", "test_loss"), (100, 1), strict=True):
        for axes, verdict in zip(row, verdicts, strict=True):
            assert axes.get_ylabel() in ("", "test accuracy (%)", "test loss")
            assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1/4", "1/2", "1"]
            points = [c.lines[0].get_xydata()[0] for c in axes.containers if hasattr(c, "lines")]
            for part in ("phase 1", "phase 2"):
                cell = verdict.cells[metric][part]
                assert cell.limit is not None
                expected = [(1 / l, factor * mean.value) for l, mean in cell.means.items()]
                for point in [*expected, (0, factor * cell.limit)]:
                    assert any(np.allclose(point, drawn) for drawn in points)
                assert f"{part}\n{cell.answer}" in words(axes)
            assert len(axes.patches) == 2  # the margins
    titles = [axes.get_title(loc="left") for axes in laws[0]]
    assert titles[0] == "SGD matches the limit\nSVAG has converged by l = 2"
    assert titles[1].splitlines() == [
        "SGD departs from the limit",
        "SVAG has not converged by l = 2",
        "the 1/l regime is not reached",
        "not the limit of B = 8",
    ]


def test_diverged_runs_end_in_a_cross_and_are_in_no_line(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [2, 4])
    for seed in range(2):
        write_run(tmp_path, l=1, seed=seed, fraction=0.5, diverged=True)
    figure = figure_of(tmp_path)
    (curves,), (accuracy, _), _ = panels(figure)
    crosses = [line for line in curves.lines if line.get_marker() == "x"]
    assert [float(line.get_xdata()[0]) for line in crosses] == pytest.approx([19 / 40 * 1504] * 2)
    assert "SGD (l = 1)" not in words(curves)
    assert [tick.get_text() for tick in accuracy[0].get_xticklabels()] == ["0", "1/4", "1/2"]
    assert accuracy[0].get_title(loc="left").startswith("SGD diverged: it departs\nSVAG has ")
    assert "2 diverged (×)" in figure.get_supxlabel()


@pytest.mark.parametrize(
    ("inits", "text"),
    [
        ([{}, {}], "one initialisation for all runs"),
        ([{"init": "own"}] * 2, "each run from its own initialisation"),
    ],
)
def test_the_caption_says_where_runs_start_from(tmp_path: Path, inits: list[dict[str, str]], text: str) -> None:
    for seed, init in enumerate(inits):
        write_run(tmp_path, seed=seed, **init)  # type: ignore[arg-type]
    assert text in figure_of(tmp_path).get_supxlabel().replace("\n", " ")


def test_the_caption_says_how_batches_were_drawn(tmp_path: Path) -> None:
    for sampling, text in (
        ("replacement", "batches drawn with replacement"),
        ("distinct", "batches of distinct images"),
    ):
        write_run(tmp_path / sampling, sampling=sampling)
        assert text in figure_of(tmp_path / sampling).get_supxlabel().replace("\n", " ")


def test_a_metric_that_some_runs_never_measured_is_drawn_from_the_others(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [1, 2])
    run = load_runs(tmp_path)[-1]
    run.metrics["test_accuracy"][:] = np.nan
    runs = [*load_runs(tmp_path)[:-1], run]
    (curves,), _, _ = panels(convergence_figure(runs, judge(runs)))
    assert "l = 2" in words(curves)
    for run in runs:
        run.metrics["test_accuracy"][:] = np.nan
    (curves,), _, _ = panels(convergence_figure(runs, judge(runs)))
    assert "l = 2" not in words(curves)


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
    curves, laws, top = panels(figure_of(tmp_path))
    assert not top
    assert [words(axes) for axes in curves] == [["no run has come this far"]] * 2
    assert [words(axes) for row in laws for axes in row] == [["no run has finished"]] * 4
    assert curves[0].get_xlim() == (0, 1504)


def test_any_metrics_can_be_drawn(tmp_path: Path) -> None:
    write_sweep(tmp_path, [8], [1, 2])
    (curves,), ((law,),), _ = panels(figure_of(tmp_path, metrics=["train_loss"]), 1)
    assert curves.get_ylabel() == law.get_ylabel() == "train loss"
    assert curves.get_ylim()[1] < 5


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of words that cover one another in the drawn figure, and words that leave it."""
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
def test_no_word_covers_another_or_leaves_the_picture(
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
