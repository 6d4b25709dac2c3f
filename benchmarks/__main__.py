"""The commands of `python -m benchmarks`."""

import importlib
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from .cases import peers
from .harness import document, results
from .harness.clock import count_processor_time
from .harness.figures import NotDone, Setup
from .peers.environment import python

CASES = ("limits", "claim", "ticks", "sweep", "messages", "enqueue", "wakeup", "startup", "web", "pages", "fleet")
FIGURES = Path(__file__).parent / "figures.json"
ENGINES = ("sqlite", "postgresql")


@click.group()
def main() -> None:
    """Measure each part of the engine beside a denominator, in turns within one run.

    A ratio is a figure, divided by the denominator's figure of the same turn. docs/performance.md has the denominators.

    Needs requirements-dev.txt. A run starts and ends its own PostgreSQL. It exits with 1 if the work of a case was not
    done exactly once.

    \b
    Examples:
      python -m benchmarks claim --scale small
      python -m benchmarks messages --engine postgresql
    """


def measure(
    cases: tuple[str, ...],
    engine: str,
    scale: str,
    json: Path | None,
    turns: int | None,
    clock: str,
    only: str | None = None,
) -> None:
    """Run the cases on the engines, and print their figures. `only` is the only peer to measure."""
    engines = ENGINES if engine == "both" else (engine,)
    if json and scale == "small":
        keep_full_figures(json, cases, engines)
    if clock == "processor":
        count_processor_time()
    if scale == "small":
        click.echo(
            "The small scale only checks that the work is done once. Do not read its figures as speed.", err=True
        )
    failed = [
        f"{case} on {each}"
        for case in cases
        for each in engines
        if not succeeded(case, Setup(each, scale == "small", turns or (1 if scale == "small" else 5), only), json)
    ]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def succeeded(case: str, setup: Setup, json: Path | None) -> bool:
    """Run one case. Print its figures, and write them to the file. Return whether the work was done once."""
    figures = []
    try:
        with closing(importlib.import_module(f"{__package__}.cases.{case}").run(setup)) as measured:  # ends its servers
            for figure in measured:
                click.echo(f"{case:9} {setup.engine:10} {figure}")
                figures.append(figure)
    except (NotDone, click.ClickException) as error:
        click.echo(f"{case} on {setup.engine}: {error}", err=True)
        return False
    except ModuleNotFoundError as error:
        click.echo(
            f"{case} on {setup.engine}: the module {error.name!r} is missing; expected the packages of "
            "requirements-dev.txt. Install them: pip install -r requirements-dev.txt.",
            err=True,
        )
        return False
    except Exception:
        traceback.print_exc()
        return False
    if not figures:
        click.echo(f"{case:9} {setup.engine:10} has no figures on this database")
    if json and figures:
        results.write(json, results.entries(case, setup, figures), keeps_other_peers=setup.only is not None)
    return True


def writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a missing folder, and a file without figures, now and not after the measurement."""
    if path is None:
        return None
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.parent)!r}. Make it first.")
    return with_figures(context, option, path)


def with_figures(_context: click.Context, _option: click.Parameter, path: Path) -> Path:
    """Refuse a file without figures. A missing file is no error."""
    try:
        _ = results.read(path) and results.about(path)
    except (ValueError, LookupError, TypeError) as error:
        raise click.BadParameter(f"the file {str(path)!r} has no figures of a run. Name another file.") from error
    return path


def keep_full_figures(path: Path, cases: tuple[str, ...], engines: tuple[str, ...]) -> None:
    """Refuse a file with full figures that the small figures of these cases would replace."""
    for each in results.read(path):
        if each["scale"] == "full" and each["case"] in cases and each["engine"] in engines:
            raise click.UsageError(
                f"the file {str(path)!r} has figures of the case {each['case']!r} at the full scale. Figures of the "
                "small scale may not replace them. Name another file with --json."
            )


def only_full_figures(_context: click.Context, _option: click.Parameter, path: Path) -> Path:
    """Refuse a file with figures of the small scale, which say nothing about speed."""
    with_figures(_context, _option, path)
    for each in results.read(path):
        if each["scale"] != "full":
            raise click.BadParameter(
                f"the file {str(path)!r} has figures of the case {each['case']!r} at the small scale; expected only "
                "figures of the full scale. Measure this case again with --scale full."
            )
    return path


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--clock",
            type=click.Choice(["wall", "processor"]),
            default="wall",
            show_default=True,
            help="On a busy machine, `processor` is steadier. It counts the processor time of this process, for claim, "
            "messages, pages and enqueue_many.",
        ),
        click.option(
            "--turns",
            type=click.IntRange(min=1),
            help="How often each way is measured. Default: 5, and 1 at the small scale.",
        ),
        click.option(
            "--json",
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            callback=writable,
            help="Write the figures to this file too. It keeps the figures of other cases.",
        ),
        click.option(
            "--scale",
            type=click.Choice(["small", "full"]),
            default="full",
            show_default=True,
            help="`small` only checks that the work is done once.",
        ),
        click.option(
            "--engine",
            type=click.Choice([*ENGINES, "both"]),
            default="both",
            show_default=True,
            help="The database to measure on.",
        ),
    ):
        command = option(command)
    return command


def add(name: str, cases: tuple[str, ...], text: str) -> None:
    @main.command(name, help=text, short_help=text)
    @options
    def command(engine: str, scale: str, json: Path | None, turns: int | None, clock: str) -> None:
        measure(cases, engine, scale, json, turns, clock)


for _case in CASES:
    add(_case, (_case,), str(importlib.import_module(f"{__package__}.cases.{_case}").__doc__))
add("all", CASES, "All cases, one after the other.")


@main.command("peers", help=peers.__doc__, short_help=str(peers.__doc__))
@click.option("--only", type=click.Choice(peers.PEERS["postgresql"]), help="Measure this engine beside one peer.")
@options
def measure_peers(only: str | None, **chosen: Any) -> None:
    measure(("peers",), only=only, **chosen)


@main.command(short_help="Draw the pictures and fill the tables of the documents.")
@click.argument(
    "json", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=FIGURES, callback=only_full_figures
)
def plot(json: Path) -> None:
    """Draw the pictures and fill the tables of docs/performance.md and of the README, from the file JSON."""
    draw(json)


@main.command()
def record() -> None:
    """Measure all cases and the peers at the full scale. Write all figures and pictures of the documents."""
    python()  # now, so that a failed installation costs no measurement
    try:
        measure((*CASES, "peers"), "both", "full", FIGURES, None, "wall")
    finally:
        draw(FIGURES)


def draw(json: Path) -> None:
    program = Path(__file__).parent / "peers" / "draw.py"
    subprocess.run([python(), str(program), str(json), str(document.ROOT / "docs" / "images")], check=True)
    document.fill(results.read(json), results.about(json))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM ended the run."))  # and ends its servers
    main(prog_name="python -m benchmarks")
