"""The dashboard's pages of the fleet: who ran what when, and the instances."""

from flask import Blueprint, render_template
from flask.typing import ResponseReturnValue


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/timeline", "timeline", timeline_page)
    blueprint.add_url_rule("/instances", "instances", instances_page)


def timeline_page() -> ResponseReturnValue:
    return render_template("background/timeline.html")


def instances_page() -> ResponseReturnValue:
    return render_template("background/instances.html")
