"""The measure: each case beside its denominator, in turns. The ratios count, not the absolute numbers.

    python -m benchmarks messages --engine postgresql
    python -m benchmarks all --scale small

Needs requirements-dev.txt: a run starts and ends its own PostgreSQL. A case exits with 1 if its work was not done
exactly once.
"""

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

from .harness import document, results
from .harness.clock import count_processor_time
from .harness.figures import NotDone, Setup
from .peers.environment import python

CASES = ("limits", "claim", "ticks", "sweep", "messages", "enqueue", "wakeup", "startup", "web", "pages", "fleet")
FIGURES = Path(__file__).parent / "figures.json"
ENGINES = ("sqlite", "postgresql")


@click.group(help=__doc__)
def main() -> None:
    pass


def measure(cases: tuple[str, ...], engine: str, scale: str, json: Path | None, turns: int | None, clock: str) -> None:
    """Run the cases on the engines, and print their figures."""
    if clock == "processor":
        count_processor_time()
    failed = [
        f"{case} on {each}"
        for case in cases
        for each in (ENGINES if engine == "both" else (engine,))
        if not succeeded(case, Setup(each, scale == "small", turns or (1 if scale == "small" else 5)), json)
    ]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def succeeded(case: str, setup: Setup, json: Path | None) -> bool:
    """Run one case. Print its figures, and put them into the file."""
    figures = []
    try:
        with closing(importlib.import_module(f"{__package__}.cases.{case}").run(setup)) as measured:  # ends its servers
            for figure in measured:
                click.echo(f"{case:9} {setup.engine:10} {figure}")
                figures.append(figure)
    except NotDone as error:
        click.echo(f"{case} on {setup.engine}: {error}", err=True)
        return False
    except Exception:
        traceback.print_exc()
        return False
    if json:
        results.write(json, results.entries(case, setup, figures))
    return True


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--clock",
            type=click.Choice(["wall", "processor"]),
            default="wall",
            show_default=True,
            help="For a busy machine: claim, messages, enqueue_many and pages count this process's processor time.",
        ),
        click.option("--turns", type=int, help="Default: 5, and 1 for the small scale."),
        click.option("--json", type=click.Path(path_type=Path), help="Put the figures into this file."),
        click.option("--scale", type=click.Choice(["small", "full"]), default="full", show_default=True),
        click.option("--engine", type=click.Choice([*ENGINES, "both"]), default="both", show_default=True),
    ):
        command = option(command)
    return command


def add(name: str, cases: tuple[str, ...], text: str) -> None:
    @main.command(name, help=text)
    @options
    def command(engine: str, scale: str, json: Path | None, turns: int | None, clock: str) -> None:
        measure(cases, engine, scale, json, turns, clock)


for _case in CASES:
    add(_case, (_case,), str(importlib.import_module(f"{__package__}.cases.{_case}").__doc__))
add("peers", ("peers",), str(importlib.import_module(f"{__package__}.cases.peers").__doc__))
add("all", CASES, "All cases, one after the other.")


@main.command()
@click.argument("json", type=click.Path(exists=True, path_type=Path), default=FIGURES)
def plot(json: Path) -> None:
    """Draw the pictures of docs/performance.md, and fill its tables and the README's, from the JSON of a run."""
    draw(json)


@main.command()
def record() -> None:
    """Measure all cases and the peers at the full scale, and write all figures of the documents."""
    try:
        measure((*CASES, "peers"), "both", "full", FIGURES, None, "wall")
    finally:
        draw(FIGURES)


def draw(json: Path) -> None:
    program = Path(__file__).parent / "peers" / "draw.py"
    subprocess.run([python(), str(program), str(json), str(document.ROOT / "docs" / "images")], check=True)
    document.fill(results.read(json), results.about(json))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("The run was told to end."))  # and ends its servers
    main(prog_name="python -m benchmarks")
