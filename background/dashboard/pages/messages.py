"""Pages of the messages: the topics, the browser of all messages, and one message with its errors."""

from collections.abc import Callable

from flask import Blueprint, abort, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from ...alarms import delivery
from ...errors import InvalidMessage, UnknownMessage, UnknownTopic, WrongState
from ...history.browsing.filters import OLDER, SEARCHED_TEXT, STATES, YOUNGER, Filter
from ...history.browsing.search import MOST_GROUPED
from ...history.executions import MOST_SEARCHED
from ...history.messages import Change
from ...history.text import changed, indented
from ...manager import the_manager
from ..filters import back, say
from .addresses import here, place_in, place_text

PER_PAGE = 25
CLASSES = {"running": "running", "done": "succeeded", "dead": "failed"}
_HOW = {
    "retry": ("waits again", "wait again"),
    "discard": ("is discarded", "are discarded"),
    "move": ("waits in {}", "wait in {}"),
}


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/messages", "messages", messages_page)
    blueprint.add_url_rule("/messages/<int:id>", "message", message_page)
    blueprint.add_url_rule("/messages/<int:id>/copy", "copy_message", copy, methods=["POST"])
    blueprint.add_url_rule("/messages/change", "change_messages", change, methods=["POST"])
    blueprint.add_url_rule("/messages/pause", "pause_topic", pause, methods=["POST"])
    blueprint.add_url_rule("/messages/resume", "resume_topic", resume, methods=["POST"])


# -- pages ---------------------------------------------------------------------------------------


def messages_page() -> ResponseReturnValue:
    mailbox, wanted, after = the_manager().messages, asked(request.args.get), place_in(request.args.get("after", ""))
    topics = mailbox.figures()
    try:
        found = mailbox.browse(wanted, topics, PER_PAGE, after)
    except UnknownTopic as error:
        abort(404, str(error))
    failed = Filter(topic=wanted.topic, state=wanted.state if wanted.state == "retrying" else "dead")
    return render_template(
        "background/messages.html",
        topics=topics,
        targets=[each.topic for each in topics if each.topic not in delivery.TOPICS],
        wanted=wanted,
        found=found,
        following=place_text(found.following),
        is_first=after is None,
        states=STATES,
        ages={**YOUNGER, **OLDER},
        classes=CLASSES,
        failed=failed,
        errors=mailbox.errors(failed, topics),
        grouped=MOST_GROUPED,
        searched=MOST_SEARCHED,
        searched_text=SEARCHED_TEXT,
        here=here(),
    )


def asked(get: Callable[..., str]) -> Filter:
    """Return the filter that the address or the form gives."""
    if not get("topic", "").isprintable():
        abort(404)
    return Filter(**{name: get(name, "").strip() for name in Filter.__dataclass_fields__}).cleaned()


def message_page(id: int) -> ResponseReturnValue:
    mailbox = the_manager().messages
    try:
        letter, failures = mailbox.letter(id)
    except UnknownMessage as error:
        abort(404, str(error))
    return render_template(
        "background/message.html",
        letter=letter,
        failures=list(reversed(failures)),
        payload=indented(letter.value),
        classes=CLASSES,
        worker=the_manager().topics.get(letter.topic),
        targets=[name for name in the_manager().topics if name not in delivery.TOPICS and name != letter.topic],
        here=here(),
    )


# -- buttons -------------------------------------------------------------------------------------


def change() -> ResponseReturnValue:
    """Retry, discard or move the selected messages, or all messages that match the filter of the form."""
    how, _, scope = request.form.get("do", "").partition(" ")
    if how not in _HOW:
        abort(400, "The form names no change.")
    topic = request.form.get("to") or None
    if how == "move" and topic is None:
        say("Nothing was changed. Choose the topic that gets the messages.", "error")
        return back("background.messages")
    if how == "move" and topic in delivery.TOPICS:
        say(f"Nothing was changed. {topic} takes only the engine's alerts: choose a topic of the application.", "error")
        return back("background.messages")
    mailbox, topic = the_manager().messages, topic if how == "move" else None
    try:
        if scope != "all":
            return _said(how, mailbox.change(how, request.form.getlist("id", type=int), topic), topic)
        if request.form.get("confirmed"):
            return _said(how, mailbox.change_all(how, asked(request.form.get), topic), topic)
    except UnknownTopic as error:
        abort(404, str(error))
    except WrongState as error:
        say(str(error), "error")
        return back("background.messages")
    say("Nothing was changed. Tick the box first to confirm the change of all messages.", "error")
    return back("background.messages")


def _said(how: str, outcome: Change, topic: str | None) -> ResponseReturnValue:
    one, many = (text.format(topic) for text in _HOW[how])
    say(
        changed(outcome.changed, outcome.left, outcome.is_complete, one, many), "success" if outcome.changed else "info"
    )
    return back("background.messages")


def copy(id: int) -> ResponseReturnValue:
    """Enqueue a message with the same topic and payload, without a key."""
    manager = the_manager()
    try:
        letter, _ = manager.messages.letter(id)
        copied = manager.enqueue(letter.topic, letter.value)
    except (UnknownMessage, UnknownTopic) as error:
        abort(404, str(error))
    except InvalidMessage as error:
        say(str(error), "error")
        return back("background.messages")
    manager.db.session.commit()
    say(f"Message {copied} is a copy of message {id}.", "success")
    return redirect(url_for("background.message", id=copied), 303)


def pause() -> ResponseReturnValue:
    return _control(the_manager().messages.pause, "{} is paused: its messages wait.", "{} was paused already.")


def resume() -> ResponseReturnValue:
    return _control(the_manager().messages.resume, "{} is resumed: its messages are handled.", "{} was not paused.")


def _control(control: Callable[[str], bool], done: str, already: str) -> ResponseReturnValue:
    topic = request.form.get("topic") or abort(400, "The form names no topic.")
    try:
        is_changed = control(topic)
    except UnknownTopic as error:
        abort(404, str(error))
    say((done if is_changed else already).format(topic), "success" if is_changed else "info")
    return back("background.messages")
