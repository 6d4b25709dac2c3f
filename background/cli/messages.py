"""`flask messages ...`: what waits, what went wrong, and what is to become of it."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import click

from ..errors import spelled_out
from ..history.messages import STATES, Failure, MessageRecord, Topic
from ..history.text import clipped, decided, indented, second, span, table
from ..manager import the_manager
from .shared import WorkersGroup, WrongUsage, as_json_option, checked_manager, one_state, print_json, row_limit

messages_cli = WorkersGroup(
    "messages",
    help="""See and steer the messages. Times are ISO 8601, in UTC.

    \b
    Exit codes:
      0  fine
      1  the answer is no: a message that is in another state, a database that is not ready
      2  wrong usage, an id that no message has, or a topic that nobody knows
    """,
)


# -- looking -------------------------------------------------------------------------------------


@messages_cli.command("list")
@click.option("--topic", help="Only those of this topic.")
@click.option("--state", help=f"Only those which are: {', '.join(STATES)}.")
@click.option("--limit", default="20", show_default=True, help="How many at most.")
@as_json_option
def list_messages(topic: str | None, state: str | None, limit: str, as_json: bool) -> None:
    """Show the messages, newest first.

    With --json every payload, and the traceback of its last error, is shown in full.
    """
    number, state = row_limit(limit), one_state(state, STATES)
    letters = checked_manager().messages.letters(topic, state, number, whole=as_json)
    if as_json:
        print_json([letter.as_dict() for letter in letters])
    elif letters:
        headers = ("id", "topic", "state", "attempt", "key", "enqueued", "payload", "note")
        click.echo(table(headers, map(_cells, letters)))
    else:
        click.echo(f"There is no message{f' of {topic}' if topic else ''}{f' that is {state}' if state else ''}.")


def _cells(letter: MessageRecord) -> list[str]:
    identity = [str(letter.id), letter.topic, _state(letter), str(letter.attempt or "-"), clipped(letter.key or "", 40)]
    return [*identity, second(letter.enqueued_at), clipped(letter.payload, 60), _note(letter)]


def _state(letter: MessageRecord) -> str:
    return f"waiting until {second(letter.due_at)}" if letter.is_delayed else letter.state


def _note(letter: MessageRecord) -> str:
    if letter.state == "running":
        return f"on {letter.instance_name}{', which is gone: will be taken over' if letter.is_gone else ''}"
    return "" if letter.state == "done" else letter.last_line or ""


@messages_cli.command()
@click.argument("id")
@as_json_option
def show(id: str, as_json: bool) -> None:
    """Show one message, with every error.

    Also its payload, and the traceback of each error.
    """
    number = _number(id)
    letter, failures = checked_manager().messages.letter(number)
    if as_json:
        print_json({**letter.as_dict(), "errors": [asdict(failure) for failure in failures]})
        return
    for name, text in _facts(letter).items():
        click.echo(f"{name:9} {spelled_out(text)}")
    click.echo(f"\n{indented(letter.value)}")
    for failure in failures:
        click.echo(f"\n{_failure(failure)}")


def _facts(letter: MessageRecord) -> dict[str, str]:
    worker = the_manager().topics.get(letter.topic)
    facts = {
        "message": str(letter.id),
        "topic": f"{letter.topic} ({worker.name if worker else 'not in this release'})",
        "state": f"running {_note(letter)}" if letter.state == "running" else _state(letter),
        "attempt": str(letter.attempt or "-"),
        "key": letter.key or "-",
        "enqueued": second(letter.enqueued_at),
        "due": second(letter.due_at),
        "claimed": f"{second(letter.claimed_at)} on {letter.instance_name}" if letter.claimed_at else "-",
        "finished": second(letter.finished_at),
    }
    return {name: text for name, text in facts.items() if text != "-"}


def _failure(failure: Failure) -> str:
    head = f"Attempt {failure.attempt} failed at {second(failure.at)} on {failure.instance_name}:"
    return "\n".join(map(spelled_out, [head, *failure.error.rstrip().split("\n")]))


@messages_cli.command()
@as_json_option
def stats(as_json: bool) -> None:
    """Show how much of every topic waits, and for how long.

    WAITING counts those that are DUE LATER, too. OLDEST is how long ago the first of them was due. ON AVERAGE and AT
    MOST is how long it took within the last hour, from when a message was due until it was done.
    """
    topics = checked_manager().messages.stats()
    if as_json:
        print_json([asdict(topic) for topic in topics])
    elif topics:
        done = ("done in 1 h", "on average", "at most")
        headers = ("topic", "worker", "waiting", "due later", "running", "dead", "oldest", *done)
        click.echo(table(headers, map(_topic_cells, topics)))
    else:
        click.echo("There is no topic; write workers.add(MyMessageWorker) in create_app.")


def _topic_cells(topic: Topic) -> list[str]:
    counts = (topic.waiting, topic.delayed, topic.running, topic.dead)
    times = (topic.mean_seconds, topic.longest_seconds)
    names = [topic.topic, topic.worker or "not in this release"]
    return [*names, *map(str, counts), _seconds(topic.oldest_seconds), str(topic.handled), *map(_seconds, times)]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else span(timedelta(seconds=seconds))


# -- steering ------------------------------------------------------------------------------------


def _ids_or_all(command: Callable[..., None]) -> Callable[..., None]:
    """What `retry` and `discard` are told: ids, or --all."""
    command = click.option("--topic", help="With --all: only those of this topic.")(command)
    command = click.option("--all", "every", is_flag=True, help="All dead ones.")(command)
    return click.argument("ids", nargs=-1, metavar="[ID]...")(command)


@messages_cli.command()
@_ids_or_all
def retry(ids: tuple[str, ...], every: bool, topic: str | None) -> None:
    """Have dead or discarded messages handled again.

    Waiting ones are handled at once. They begin with their first attempt, and their errors are kept. --all means the
    dead ones. Of several IDs all are retried, or none.
    """
    numbers = _numbers(ids, every, topic)
    click.echo(_told(checked_manager().messages.retry(numbers, topic), numbers, "waits again", "wait again"))


@messages_cli.command()
@_ids_or_all
def discard(ids: tuple[str, ...], every: bool, topic: str | None) -> None:
    """Have dead messages, or waiting ones, never be handled.

    They are kept as long as those that are done, and their keys refuse others as long. --all means the dead ones. Of
    several IDs all are discarded, or none.
    """
    numbers = _numbers(ids, every, topic)
    click.echo(_told(checked_manager().messages.discard(numbers, topic), numbers, "is discarded", "are discarded"))


def _told(count: int, ids: list[int] | None, one: str, many: str) -> str:
    if ids is not None and count == 1:
        return f"Message {ids[0]} {one}."
    return decided(count, one, many)


def _numbers(ids: tuple[str, ...], every: bool, topic: str | None) -> list[int] | None:
    """The ids; None for all of them."""
    if bool(ids) == every:
        raise WrongUsage("Expected the IDs of messages, or --all for all dead ones: `flask messages list` shows them.")
    if topic is not None and not every:
        raise WrongUsage(f"--topic {topic!r} goes with --all; expected IDs without it.")
    return None if every else [_number(each) for each in ids]


def _number(id: str) -> int:
    if not (id.isascii() and id.isdigit() and len(id) < 1_000):
        raise WrongUsage(f"The ID is {id!r}; expected a whole number: `flask messages list` shows them.")
    return int(id)
