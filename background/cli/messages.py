"""Commands of `flask messages`: list, show, stats, enqueue, pause, resume, retry, discard."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click

from ..errors import spelled_out
from ..history.browsing.topics import Topic
from ..history.messages import STATES, Failure, MessageRecord
from ..history.text import clipped, decided, indented, postponed, span, whole_number
from ..host import strict_json
from ..manager import the_manager
from .completion import topics
from .shared import (
    WorkersGroup,
    WrongUsage,
    as_json_option,
    checked_manager,
    examples,
    limit_option,
    pause_topic,
    print_json,
    resume_topic,
    row_limit,
    state_option,
)
from .terminal import Screen, localised, screen_of, utc_option

messages_cli = WorkersGroup(
    "messages",
    help="""See and control the messages.

    Times are local, or in UTC with --utc. A pipe gets them in ISO 8601. --json always has UTC.

    \b
    Exit codes:
      0  success
      1  the answer is no: a message that is in another state, a database that is not ready
      2  wrong usage, an id that no message has, or an unknown topic
    """,
    epilog=examples("flask messages stats", "flask messages list --state dead", "flask messages retry ID"),
)


# -- looking -------------------------------------------------------------------------------------


@messages_cli.command("list", epilog=examples("flask messages list", "flask messages list --topic TOPIC --state dead"))
@click.option("--topic", metavar="TOPIC", shell_complete=topics, help="Show only messages of this topic.")
@state_option(STATES, "messages")
@limit_option
@utc_option
@as_json_option
def list_messages(topic: str | None, state: str | None, limit: str, with_json: bool) -> None:
    """Show the messages, newest first.

    --json shows every payload, and the traceback of each last error, in full.
    """
    number = row_limit(limit)
    manager = checked_manager()
    letters = manager.messages.letters(topic, state, number, whole=with_json)
    if with_json:
        print_json([letter.as_dict() for letter in letters])
    elif letters:
        screen, headers = screen_of(manager), ("id", "topic", "state", "attempt", "key", "enqueued", "payload", "note")
        rows = [_cells(screen, letter) for letter in letters]
        click.echo(screen.table(headers, rows, elastic=("payload", "key"), spare=("attempt",)))
    else:
        click.echo(f"There is no message{f' of {topic}' if topic else ''}{f' that is {state}' if state else ''}.")


def _cells(screen: Screen, letter: MessageRecord) -> list[str]:
    state = _state(letter, screen.since(letter.due_at))
    identity = [str(letter.id), letter.topic, state, str(letter.attempt or "-"), clipped(letter.key or "", 40)]
    return [*identity, screen.since(letter.enqueued_at), clipped(letter.payload, 60), localised(_note(letter))]


def _state(letter: MessageRecord, due: str) -> str:
    if not letter.is_delayed:
        return letter.state
    return f"waiting, due {due}" if due.startswith("in ") else f"waiting until {due}"


def _note(letter: MessageRecord) -> str:
    if letter.state == "running":
        return f"on {letter.instance_name}{', which is gone: will be taken over' if letter.is_gone else ''}"
    if letter.state == "waiting" and letter.postponed and not letter.attempt:
        return postponed(letter.postponed, letter.postponed_because)
    return "" if letter.state == "done" else clipped(letter.last_line or "")


@messages_cli.command(epilog=examples("flask messages show ID", "flask messages show ID --json"))
@click.argument("id")
@utc_option
@as_json_option
def show(id: str, with_json: bool) -> None:
    """Show one message, with every error.

    Shows its payload too, and the traceback of each error.
    """
    number = _number(id)
    manager = checked_manager()
    letter, failures = manager.messages.letter(number)
    if with_json:
        print_json({**letter.as_dict(), "errors": [asdict(failure) for failure in failures]})
        return
    screen = screen_of(manager)
    click.echo(screen.facts(_facts(screen, letter)))
    click.echo(f"\n{indented(letter.value)}")
    for failure in failures:
        click.echo(f"\n{_failure(screen, failure)}")


def _facts(screen: Screen, letter: MessageRecord) -> dict[str, str]:
    worker = the_manager().topics.get(letter.topic)
    facts = {
        "message": str(letter.id),
        "topic": f"{letter.topic} ({worker.name if worker else 'not in this release'})",
        "state": f"running {_note(letter)}" if letter.state == "running" else _state(letter, screen.at(letter.due_at)),
        "attempt": str(letter.attempt or "-"),
        "key": letter.key or "-",
        "enqueued": screen.at(letter.enqueued_at),
        "due": screen.at(letter.due_at),
        "claimed": f"{screen.at(letter.claimed_at)} on {letter.instance_name}" if letter.claimed_at else "-",
        "finished": screen.at(letter.finished_at),
        "postponed": postponed(letter.postponed, letter.postponed_because)[10:] if letter.postponed else "-",
    }
    return {name: text for name, text in facts.items() if text != "-"}


def _failure(screen: Screen, failure: Failure) -> str:
    head = f"Attempt {failure.attempt} failed at {screen.at(failure.at)} on {failure.instance_name}:"
    return "\n".join(map(spelled_out, [head, *failure.error.rstrip().split("\n")]))


@messages_cli.command(epilog=examples("flask messages stats"))
@utc_option
@as_json_option
def stats(with_json: bool) -> None:
    """Count the messages of every topic, and show their waiting times.

    WAITING includes the DELAYED messages, which are due later. OLDEST is the time since the oldest waiting message was
    due. ON AVERAGE and AT MOST are the times from due to done, within the last hour.
    """
    found = checked_manager().messages.stats()
    if with_json:
        print_json([asdict(topic) for topic in found])
    elif found:
        done = ("done in 1 h", "on average", "at most")
        headers = ("topic", "worker", "waiting", "delayed", "running", "dead", "oldest", *done, "note")
        screen, is_paused = Screen.of(datetime.now(UTC)), any(topic.paused_at for topic in found)
        rows = [_topic_cells(screen, topic) for topic in found]
        click.echo(screen.table(headers, rows, spare=("worker", "on average"), has_moments=is_paused))
    else:
        click.echo("There is no topic. Write workers.add(MyMessageWorker) in create_app.")


def _topic_cells(screen: Screen, topic: Topic) -> list[str]:
    counts = (topic.waiting, topic.delayed, topic.running, topic.dead)
    times = (topic.mean_seconds, topic.longest_seconds)
    names = [topic.topic, topic.worker or "not in this release"]
    note = f"paused since {screen.at(topic.paused_at)}" if topic.paused_at else ""
    return [*names, *map(str, counts), _seconds(topic.oldest_seconds), str(topic.handled), *map(_seconds, times), note]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else span(timedelta(seconds=seconds))


# -- controlling ---------------------------------------------------------------------------------


@messages_cli.command(
    epilog=examples(
        """flask messages enqueue TOPIC '{"book": 1, "copies": 10}'""",
        "flask messages enqueue TOPIC 42 --key delivery-42 --delay 60",
    )
)
@click.argument("topic", shell_complete=topics)
@click.argument("payload", metavar="JSON")
@click.option(
    "--key", metavar="KEY", help="The message's key. If TOPIC has a message with this key, nothing is enqueued."
)
@click.option("--delay", type=float, metavar="SECONDS", help="Delay the message by this time.")
def enqueue(topic: str, payload: str, key: str | None, delay: float | None) -> None:
    """Enqueue a message of TOPIC, with JSON as its payload.

    Exits with 1 if a message has the key already.
    """
    try:
        value = strict_json.loads(payload)
    except ValueError as error:
        raise WrongUsage(
            f"The payload is {payload!r:.200}: {error}; expected JSON, such as 42 or '\"text\"'."
        ) from None
    manager = checked_manager()
    id = manager.enqueue(topic, value, key, delay)
    manager.db.session.commit()
    if id is None:
        raise click.ClickException(f"Nothing was enqueued: {topic} has a message with the key {key!r} already.")
    click.echo(f"Message {id} waits.")


@messages_cli.command(epilog=examples("flask messages pause TOPIC"))
@click.argument("topic", shell_complete=topics)
def pause(topic: str) -> None:
    """Pause TOPIC: its messages wait until you resume it.

    The pause holds across restarts and releases. A batch in progress goes on. The topic takes new messages.
    """
    pause_topic(topic)


@messages_cli.command(epilog=examples("flask messages resume TOPIC"))
@click.argument("topic", shell_complete=topics)
def resume(topic: str) -> None:
    """Handle the messages of TOPIC again."""
    resume_topic(topic)


def _ids_or_all(command: Callable[..., None]) -> Callable[..., None]:
    """Give `retry` and `discard` their parameters: ids, or --all with an optional --topic."""
    command = click.option(
        "--topic", metavar="TOPIC", shell_complete=topics, help="With --all: only messages of this topic."
    )(command)
    command = click.option("--all", "every", is_flag=True, help="All dead messages.")(command)
    return click.argument("ids", nargs=-1, metavar="[ID]...")(command)


@messages_cli.command(epilog=examples("flask messages retry ID", "flask messages retry --all --topic TOPIC"))
@_ids_or_all
def retry(ids: tuple[str, ...], every: bool, topic: str | None) -> None:
    """Make dead or discarded messages wait again.

    A delayed message becomes due now. Attempts count from one again, and errors stay. --all means all dead messages. If
    one of several IDs cannot be retried, no message changes.
    """
    numbers = _numbers(ids, every, topic)
    click.echo(_outcome(checked_manager().messages.retry(numbers, topic), numbers, "waits again", "wait again"))


@messages_cli.command(epilog=examples("flask messages discard ID", "flask messages discard --all --topic TOPIC"))
@_ids_or_all
def discard(ids: tuple[str, ...], every: bool, topic: str | None) -> None:
    """Discard dead or waiting messages, so that they are never handled.

    They and their keys stay as long as done messages. Until then no new message takes such a key. --all means all dead
    messages. If one of several IDs cannot be discarded, no message changes.
    """
    numbers = _numbers(ids, every, topic)
    click.echo(_outcome(checked_manager().messages.discard(numbers, topic), numbers, "is discarded", "are discarded"))


def _outcome(count: int, ids: list[int] | None, one: str, many: str) -> str:
    if ids is not None and count == 1:
        return f"Message {ids[0]} {one}."
    return decided(count, one, many)


def _numbers(ids: tuple[str, ...], every: bool, topic: str | None) -> list[int] | None:
    """Return the ids. None means all dead messages. Raises WrongUsage."""
    if bool(ids) == every:
        raise WrongUsage("Expected IDs of messages, or --all for all dead messages: `flask messages list` shows them.")
    if topic is not None and not every:
        raise WrongUsage(f"--topic {topic!r} goes with --all; expected IDs without it.")
    return None if every else [_number(each) for each in ids]


def _number(id: str) -> int:
    if (number := whole_number(id)) is None:
        raise WrongUsage(f"The ID is {id!r}; expected a whole number: `flask messages list` shows them.")
    return number
