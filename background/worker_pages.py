"""The dashboard's pages of the workers."""

from flask import Blueprint, render_template
from flask.typing import ResponseReturnValue


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/", "overview", overview_page)


def overview_page() -> ResponseReturnValue:
    return render_template("background/overview.html")
