"""Draws the two pictures of docs/performance.md. Runs in the environment of the peers, which has matplotlib.

Usage: draw.py FIGURES FOLDER
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "bookstore", "svg.fonttype": "path", "font.size": 9})
OURS, THEIRS = "#0b6e4f", "#8d99ae"
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}

Figure = dict[str, Any]


def main(path: str, folder: str) -> None:
    figures: list[Figure] = json.loads(Path(path).read_text(encoding="utf-8"))["figures"]
    for name, draw in (("rates", draw_rates), ("growth", draw_growth)):
        drawing = draw(figures)
        drawing.savefig(Path(folder) / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def draw_rates(figures: list[Figure]) -> Any:
    """Draw a bar for each way to handle messages: the median, and a line from the smallest value to the greatest."""
    drawing, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 1))
    for axis, engine in zip(axes, NAMES, strict=True):
        bars: dict[str, list[float]] = {}
        for figure in figures:
            if figure["case"] == "peers" and figure["engine"] == engine:
                bars[f"this engine, {figure['name'].removesuffix(', one consumer')}"] = figure["values"]
                bars[figure["of"]] = figure["of_values"]
        ordered = sorted(bars.items(), key=lambda each: statistics.median(each[1]))
        medians = [statistics.median(values) for _, values in ordered]
        errors = [[mid - min(values), max(values) - mid] for mid, (_, values) in zip(medians, ordered, strict=True)]
        colors = [OURS if name.startswith("this engine") else THEIRS for name, _ in ordered]
        axis.barh([name for name, _ in ordered], medians, color=colors, xerr=list(zip(*errors, strict=True)) or None)
        for place, mid in enumerate(medians):
            axis.text(max(bars[ordered[place][0]]), place, f" {mid:,.0f}", va="center")
        axis.set_title(f"effects in {NAMES[engine]}", fontsize=9)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.suptitle("Messages a second, each with one row as its effect", fontsize=10)
    drawing.tight_layout()
    return drawing


def draw_growth(figures: list[Figure]) -> Any:
    """Draw each cost, as a multiple of its cost at the smallest amount of work."""
    drawing, axis = pyplot.subplots(figsize=(9, 4))
    for (engine, name), points in sorted(lines(figures).items()):
        if len(points) > 1:
            amounts = sorted(points)
            costs = [points[amount] / points[amounts[0]] for amount in amounts]
            axis.plot(amounts, costs, "o-" if engine == "postgresql" else "s--", label=f"{name}, {NAMES[engine]}")
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set(xscale="log", xlabel="amount of work", ylabel="cost, of the cost at the smallest amount", ylim=(0, None))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    return drawing


def lines(figures: list[Figure]) -> dict[tuple[str, str], dict[int, float]]:
    """Return the costs by engine and name, and by the amount of work."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    pages: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        at, median = figure.get("at"), statistics.median(figure["values"])
        if figure["case"] == "pages" and figure.get("of"):
            pages[figure["engine"]].append(figure)
        if at is None:
            continue
        match figure["case"], figure["name"]:
            case "sweep", "sweep":
                found[figure["engine"], "sweep, for each stale user (by users)"][at] = 1 / median
            case "messages", "handle_many, with messages waiting":
                found[figure["engine"], "handle_many, for each message (by messages)"][at] = 1 / median
            case "fleet", "an idle instance":
                found[figure["engine"], "processor of an idle instance (by workers)"][at] = median
            case "fleet", "memory":
                found[figure["engine"], "memory of an instance (by workers)"][at] = median
    for engine, of_engine in pages.items():
        for at, name in ((1_000, "of_values"), (1_000_000, "values")):
            costs = [statistics.median(figure[name]) for figure in of_engine]
            found[engine, "the median page (by executions)"][at] = statistics.median(costs)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
