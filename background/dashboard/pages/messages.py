"""Pages of the messages: the topics, the dead letters, and one message with its errors."""

from collections.abc import Callable

from flask import Blueprint, abort, render_template, request
from flask.typing import ResponseReturnValue

from ...database.tables import LARGEST_ID
from ...errors import UnknownMessage, UnknownTopic, WrongState
from ...history.text import decided, indented, whole_number
from ...manager import the_manager
from ..filters import back, say

_PAGE = 25
_CLASSES = {"running": "running", "done": "succeeded", "dead": "failed"}


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/messages", "messages", messages_page)
    blueprint.add_url_rule("/messages/<int:id>", "message", message_page)
    blueprint.add_url_rule("/messages/<int:id>/retry", "retry_message", retry_one, methods=["POST"])
    blueprint.add_url_rule("/messages/<int:id>/discard", "discard_message", discard_one, methods=["POST"])
    blueprint.add_url_rule("/messages/pause", "pause_topic", pause, methods=["POST"])
    blueprint.add_url_rule("/messages/resume", "resume_topic", resume, methods=["POST"])
    blueprint.add_url_rule("/messages/retry", "retry_messages", retry_all, methods=["POST"])
    blueprint.add_url_rule("/messages/discard", "discard_messages", discard_all, methods=["POST"])


# -- pages ---------------------------------------------------------------------------------------


def messages_page() -> ResponseReturnValue:
    mailbox, topic, before = the_manager().messages, request.args.get("topic") or None, _before()
    try:
        letters = mailbox.letters(topic, "dead", _PAGE + 1, before=before)
    except UnknownTopic as error:
        abort(404, str(error))
    return render_template(
        "background/messages.html",
        topics=mailbox.figures(),
        topic=topic,
        before=before,
        letters=letters[:_PAGE],
        following=letters[_PAGE - 1].id if len(letters) > _PAGE else None,
        here=request.full_path,
    )


def _before() -> int | None:
    """Return the place in the list, from the address. None means the beginning of the list."""
    number = whole_number(request.args.get("before", ""))
    return number if number is not None and number <= LARGEST_ID else None


def message_page(id: int) -> ResponseReturnValue:
    try:
        letter, failures = the_manager().messages.letter(id)
    except UnknownMessage as error:
        abort(404, str(error))
    return render_template(
        "background/message.html",
        letter=letter,
        failures=list(reversed(failures)),
        payload=indented(letter.value),
        classes=_CLASSES,
        worker=the_manager().topics.get(letter.topic),
        here=request.path,
    )


# -- buttons -------------------------------------------------------------------------------------


def retry_one(id: int) -> ResponseReturnValue:
    return _decide_one(the_manager().messages.retry, id, "waits again")


def discard_one(id: int) -> ResponseReturnValue:
    return _decide_one(the_manager().messages.discard, id, "is discarded")


def _decide_one(decide: Callable[..., int], id: int, outcome: str) -> ResponseReturnValue:
    try:
        decide([id])
    except UnknownMessage as error:
        abort(404, str(error))
    except WrongState as error:
        say(str(error), "error")
    else:
        say(f"Message {id} {outcome}.", "success")
    return back("background.messages")


def pause() -> ResponseReturnValue:
    return _control(the_manager().messages.pause, "{} is paused: its messages wait.", "{} was paused already.")


def resume() -> ResponseReturnValue:
    return _control(the_manager().messages.resume, "{} is resumed: its messages are handled.", "{} was not paused.")


def _control(change: Callable[[str], bool], done: str, already: str) -> ResponseReturnValue:
    topic = _topic()
    try:
        changed = change(topic)
    except UnknownTopic as error:
        abort(404, str(error))
    say((done if changed else already).format(topic), "success" if changed else "info")
    return back("background.messages")


def _topic() -> str:
    return request.form.get("topic") or abort(400, "The form names no topic.")


def retry_all() -> ResponseReturnValue:
    return _decide_all(the_manager().messages.retry, "waits again", "wait again")


def discard_all() -> ResponseReturnValue:
    return _decide_all(the_manager().messages.discard, "is discarded", "are discarded")


def _decide_all(decide: Callable[..., int], one: str, many: str) -> ResponseReturnValue:
    """Change all dead messages of the topic, including messages that died after the page was drawn."""
    topic = _topic()
    if not request.form.get("confirmed"):
        say("Nothing was changed. Tick the box first to confirm the change of all messages.", "error")
        return back("background.messages")
    try:
        count = decide(None, topic)
    except UnknownTopic as error:
        abort(404, str(error))
    say(decided(count, one, many), "success")
    return back("background.messages")
