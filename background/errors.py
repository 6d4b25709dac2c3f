"""The engine's errors. Each text names the event (with the value), the expectation and the remedy."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from click import ClickException


class BackgroundError(ClickException):
    """The base of every error that the engine raises.

    A `flask` command that ends with such an error prints its text instead of a traceback.
    """


class UnknownWorker(BackgroundError):
    """A name that no registered worker has. With a `topic`, the name of a worker of messages, which has no ticks."""

    exit_code = 2

    def __init__(self, name: str, known: Iterable[str], topic: str | None = None) -> None:
        if topic is not None:
            super().__init__(
                f"The worker {name!r} handles the messages of {topic!r} and has no ticks; expected a periodic worker: "
                f"see `flask messages list --topic {topic}`."
            )
            return
        super().__init__(f"There is no worker named {name!r}. {_hint(name, known, 'registered workers')}")


class DuplicateWorker(BackgroundError):
    """A second worker with the same name."""


class InvalidWorker(BackgroundError):
    """A worker that cannot be registered, because it is abstract or an attribute is out of range."""


class InvalidSchedule(BackgroundError):
    """A period, a cron expression or a time zone that gives no ticks."""


class InvalidConfig(BackgroundError):
    """A setting whose value the engine cannot use."""


class MissingDependency(BackgroundError):
    """A package that the engine needs is not installed."""


class DatabaseNotReady(BackgroundError):
    """The database is missing, unreachable, or behind the migrations."""


class InvalidMigration(BackgroundError):
    """A version that the engine's tables cannot be brought to, or cannot be brought to from where they are."""


class ClaimLost(BackgroundError):
    """The run no longer holds its claim. The open transaction of its session is rolled back."""


class NotFenced(BackgroundError):
    """A write of a run to a connection that the fence does not guard."""


class CommitFirst(BackgroundError):
    """A call that commits separately would wait for a lock of the caller's own open transaction."""


class RunStopped(BackgroundError):
    """The run ends here, and is handed back or cancelled. Raised by `context.raise_if_stopping()`."""


class DryRunCommits(BackgroundError):
    """A worker committed during a dry run, which must be rolled back."""


class UnknownTopic(BackgroundError):
    """A topic that no registered worker handles."""

    exit_code = 2

    def __init__(self, topic: object, known: Iterable[str]) -> None:
        hint = _hint(topic, known, "known topics")
        super().__init__(
            f"No worker handles the topic {topic!r}; expected the topic of a registered MessageWorker. {hint}"
        )


class UnknownMessage(BackgroundError):
    """An id that no message has."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(f"There is no message {message}; `flask messages list` shows all messages.")


class WrongState(BackgroundError):
    """A message whose state does not allow the requested change."""


class InvalidMessage(BackgroundError):
    """A payload that is not JSON or is too large, or a key or a delay that is not allowed."""


class Bury(BackgroundError):
    """Raised by a handler: its message is buried without another attempt. The reason is the message's error."""

    def __init__(self, reason: object) -> None:
        super().__init__(str(reason))


class BatchRolledBack(BackgroundError):
    """A handler rolled back the transaction of a whole batch."""


class InvalidProgress(BackgroundError):
    """A `done` or a `total` that is not a finite number."""


class InvalidCursor(BackgroundError):
    """A cursor that is not JSON or is too large, or a cursor of a run that has none."""


class InvalidLock(BackgroundError):
    """A name or a time-out that a lock cannot have."""


class LockNotAcquired(BackgroundError):
    """The database did not answer, so it is unknown whether the lock is held."""


def _hint(name: object, known: Iterable[str], kind: str) -> str:
    known = sorted(known)
    close = get_close_matches(name, known, n=1) if isinstance(name, str) else ()
    return f"Did you mean {close[0]!r}?" if close else f"The {kind} are: {', '.join(known) or 'none'}."


_LONGEST_LINE = 1_000


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text. Drivers add the statement and a link, which belong in a traceback.

    A character that could steer a log or a terminal is written as an escape.
    """
    try:
        line = str(error).strip().splitlines()[0]
    except Exception:  # the text is empty, or the error cannot give it
        return type(error).__name__
    return spelled_out(shortened(line, _LONGEST_LINE))


def shortened(text: str, most: int) -> str:
    """Return at most the first `most` characters of a text. A cut text says how many characters are cut."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters are cut)"


def spelled_out(text: str) -> str:
    """Return the text in one line that steers no terminal. Escapes stand for the characters that would."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def error_line(text: str | None) -> str | None:
    """Return the line of a traceback that names the error, with the first line of its message.

    In the traceback of an exception group, this is the last line.
    """
    lines = (text or "").strip().splitlines()
    if len(lines) > 1 and _END_OF_GROUP.fullmatch(lines[-2]):
        return lines[-1].strip()
    frames = [at for at, line in enumerate(lines) if line.startswith('  File "')]
    behind = iter(lines[frames[-1] + 1 :] if frames else [])
    line = next((each for each in behind if not each.startswith(" ")), lines[-1].strip() if lines else None)
    if line and _WITHOUT_TEXT.fullmatch(line):  # its message begins with empty lines
        text = next((each.strip() for each in behind if each.strip()), "")
        line = f"{line.rstrip()} {text}" if text else line.rstrip(": ")
    return line


_END_OF_GROUP = re.compile(r" *\+-+")
_WITHOUT_TEXT = re.compile(r"\S+: ?")
