"""The dashboard's pages of the messages."""

from flask import Blueprint, render_template
from flask.typing import ResponseReturnValue


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/messages", "messages", messages_page)


def messages_page() -> ResponseReturnValue:
    return render_template("background/messages.html")
