"""`svag-fast reproduce`: a figure of the paper by one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich import box
from rich.console import Console
from rich.table import Table

from svag_fast.cli.options import NumberList, data_dir_option
from svag_fast.cli.stopped import Stopped
from svag_fast.experiments.config import ExperimentConfig, cores
from svag_fast.experiments.experiment_folder import ExperimentError, check_experiment, prepare_folder
from svag_fast.experiments.grid import ExperimentInterruptedError, run_experiment, start_fork_server
from svag_fast.experiments.presets import PRESETS, SCALES, Preset, Scale, find_preset
from svag_fast.experiments.ranges import ConfigError, check_range
from svag_fast.numeric import must_be, shown

if TYPE_CHECKING:
    from svag_fast.analysis.reproduction import Reproduction


@click.command()
@click.argument("name", required=False)
@click.option("--list", "list_", is_flag=True, help="List the figures instead: settings and cost.")
@click.option("--probe", is_flag=True, help="With --list: time some steps of each, and say hours on this machine.")
@click.option(
    "--scale", type=click.Choice(SCALES), default="small", show_default=True,
    help="paper: its own setting. small: digits, in minutes. smoke: in seconds, only to see that it works.",
)  # fmt: skip
@click.option("--l", type=NumberList(), metavar="L,...", help="SVAG's l, instead of the preset's.")
@click.option("--seeds", type=int, metavar="N", help="Number of seeds, instead of the preset's.")
@data_dir_option
@click.option("--device", metavar="NAME", help="Where nets and data live: cpu, cuda.  [default: cpu]")
@click.option("--threads", type=int, metavar="N", help="Threads of each run's process.  [default: 1]")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Runs at a time.  [default: cores / threads]")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the runs, the figure and the table; what is there is continued.  [default: runs/NAME-SCALE]",
)  # fmt: skip
def reproduce(
    name: str | None,
    list_: bool,
    probe: bool,
    scale: Scale,
    out: Path | None,
    jobs: int | None,
    **given: Any,
) -> None:
    """Reproduce a figure of the paper: train what it needs, draw it, and set what was measured beside the paper's word.

    NAME is one of those that --list shows. The runs are ordinary ones, in a folder for each experiment, which
    `svag-fast report` and `svag-fast predict` read too. After any interruption the same command continues. The folder
    gets NAME.png and NAME.json.
    """
    console = Console()
    changes = {key: value for key, value in given.items() if value is not None}
    try:
        if list_:
            _list(scale, probe, console)
            return
        if name is None:
            raise ConfigError(must_be("NAME", "a figure's (--list shows them)", "none"))
        if probe:
            raise ConfigError(must_be("--probe", "given with --list", shown(name)))
        preset = find_preset(name)
        out = out or Path("runs", f"{name}-{scale}")
        check_range("jobs", jobs or 1)
        found = _paths(preset, scale, changes) if preset.kind == "paths" else None
        if found is None:
            _train(preset, scale, changes, out, jobs, console)
        tell(preset, scale, out, console, found)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    except ExperimentInterruptedError as error:
        raise Stopped(f"{error}. The same command continues.", error.number) from error
    except (ExperimentError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _train(
    preset: Preset, scale: Scale, changes: dict[str, Any], out: Path, jobs: int | None, console: Console
) -> None:
    experiments = preset.experiments(scale, **changes)
    start_fork_server()
    # All are looked at before the first is trained.
    for config in experiments.values():
        check_experiment(config)
    for name, config in experiments.items():
        prepare_folder(out / name, config, resume=True)
        console.print(f"{preset.name} at {scale} scale, {name}: {describe(config)}, in {out / name}", highlight=False)
        at_once = jobs or max(1, cores() // config.threads)
        run_experiment(config, out / name, jobs=at_once, console=console)


def describe(config: ExperimentConfig) -> str:
    """What a grid trains, in a line."""
    runs = config.runs()
    noise = f" with {100 * config.label_noise:g} % label noise" if config.label_noise else ""
    sizes = ", ".join(map(str, dict.fromkeys(run.batch_size for run in runs)))
    ls = (
        "" if config.process != "svag" else f", l = {', '.join(f'{l:g}' for l in dict.fromkeys(run.l for run in runs))}"
    )
    return f"{config.model} on {config.dataset}{noise}, B = {sizes}{ls}, {len(runs)} runs"


def _paths(preset: Preset, scale: Scale, changes: dict[str, Any]) -> Reproduction:
    from svag_fast.analysis.reproduction import of_paths
    from svag_fast.experiments.paths import simulate_paths

    wrong = [f"--{key}" for key in changes if key not in ("l", "seeds")]
    if wrong or changes.get("seeds", 1) != 1:
        expected = f"left out of {preset.name}, which trains nothing"
        raise ConfigError(must_be(wrong[0] if wrong else "--seeds", expected, "a value"))
    settings = preset.settings(scale)
    ls = changes.get("l", [settings["l"]])
    if len(ls) != 1:
        raise ConfigError(must_be("l", "one number", f"{len(ls)}"))
    l = check_range("l", ls[0])
    if (l * settings["effective_steps"]) % 1:
        name = f"l times {settings['effective_steps']} effective steps"
        raise ConfigError(must_be(name, "a whole number", f"l = {l}"))
    paths = simulate_paths(effective_steps=settings["effective_steps"], l=l, paths=settings["paths"])
    return of_paths(preset, scale, paths)


def tell(preset: Preset, scale: Scale, out: Path, console: Console, found: Reproduction | None = None) -> Reproduction:
    """Write the figure and the table of what is in `out`, and print the table.

    Args:
        preset, scale: which one.
        out: its folder.
        console: where the table goes.
        found: what was found already; by default it is read from the runs.
    """
    from svag_fast.analysis.reproduction import reproduction
    from svag_fast.plots import style as plots
    from svag_fast.plots.reproduction import reproduction_figure

    if found is None:
        found = reproduction(preset, scale, out, list(preset.experiments(scale)))
    if not console.is_terminal:
        console.width = 150
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        plots.save(reproduction_figure(found), out / f"{preset.name}.png")
    found.save(out / f"{preset.name}.json")
    table = Table(title=f"\nFigure {preset.figure}: {found.setting}", title_justify="left", box=box.SIMPLE)
    for heading in ("", "paper", "here"):
        table.add_column(heading)
    for row in found.rows:
        table.add_row(row.quantity, row.paper, row.measured)
    console.print(table, highlight=False)
    if scale != "paper" and preset.kind != "paths":
        own = next(iter(preset.experiments("paper").values()))
        console.print(f"The paper's own setting: {describe(own)}.", highlight=False)
    if scale == "smoke":
        console.print("Smoke scale: its numbers mean nothing.", highlight=False)
    console.print(found.answer, highlight=False)
    console.print(f"\n{out / preset.name}.png, {out / preset.name}.json", highlight=False, markup=False)
    return found


def _list(scale: Scale, probe: bool, console: Console) -> None:
    if not console.is_terminal:
        console.width = 170
    table = Table(title=f"The paper's figures at {scale} scale", title_justify="left", box=box.SIMPLE)
    for heading in ("name", "figure", "what it shows", "setting", "runs", "samples"):
        table.add_column(heading, justify="right" if heading in ("runs", "samples") else "left")
    if probe:
        table.add_column("core hours here", justify="right")
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.figure, preset.shows, *_costs(preset, scale, probe))
    console.print(table, highlight=False)
    console.print("samples: that all runs together take gradients of, in millions (a step of SGD or SVAG has 2B).")


def _costs(preset: Preset, scale: Scale, probe: bool) -> list[str]:
    if preset.kind == "paths":
        return ["one dimension, simulated", "", "", *(["0"] if probe else [])]
    configs = list(preset.experiments(scale).values())
    runs = [run for config in configs for run in config.runs()]
    samples = sum(run.steps * (2 * run.batch_size if run.process == "svag" else run.population) for run in runs)
    setting = describe(configs[0]).rpartition(", ")[0]
    cells = [setting, f"{len(runs)}", f"{samples / 1e6:,.1f}"]
    if probe:
        from svag_fast.experiments.probe import probe as seconds

        cells.append(f"{sum(seconds(config) for config in configs) / 3600:.2g}")
    return cells
