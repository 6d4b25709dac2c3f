"""What can go wrong, in one shape: what (with the value), what was expected, what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from click import ClickException


class BackgroundError(ClickException):
    """The base of every error that the engine raises; its text is one sentence for a person.

    Where it ends a `flask` command, that sentence is printed instead of a traceback.
    """


class UnknownWorker(BackgroundError):
    """A name that no registered worker has; or, where a tick was meant, that of the worker of a `topic`."""

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
    """A second worker of the same name."""


class InvalidWorker(BackgroundError):
    """A worker that cannot be registered: abstract, or with an attribute that is out of range."""


class InvalidSchedule(BackgroundError):
    """A period, a cron expression or a time zone that no tick can be computed from."""


class InvalidConfig(BackgroundError):
    """A setting whose value the engine cannot use."""


class MissingDependency(BackgroundError):
    """A package that the engine needs and that is not installed."""


class DatabaseNotReady(BackgroundError):
    """The database is missing, unreachable, or behind the migrations."""


class ClaimLost(BackgroundError):
    """The run no longer holds its claim; what its session had not committed is rolled back."""


class NotFenced(BackgroundError):
    """A write of a run that no check of its claim would guard."""


class CommitFirst(BackgroundError):
    """A call that commits on its own, while the caller's own transaction holds what it would wait for."""


class RunStopped(BackgroundError):
    """Raised by `context.raise_if_stopping()`: the run ends here and is handed back."""


class UnknownTopic(BackgroundError):
    """A topic that no registered worker handles."""

    exit_code = 2

    def __init__(self, topic: object, known: Iterable[str]) -> None:
        hint = _hint(topic, known, "known topics")
        super().__init__(f"No worker handles the topic {topic!r}; expected that of a registered MessageWorker. {hint}")


class UnknownMessage(BackgroundError):
    """An id that no message has."""

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(f"There is no message {message}; `flask messages list` shows those that there are.")


class WrongState(BackgroundError):
    """A message that is in no state for what was asked."""


class InvalidMessage(BackgroundError):
    """A payload that is not JSON or too large, or a key or a delay that a message cannot have."""


class BatchRolledBack(BackgroundError):
    """A handler rolled back the transaction of a whole batch."""


class InvalidProgress(BackgroundError):
    """A `done` or a `total` that is not a finite number."""


class InvalidLock(BackgroundError):
    """A name or a time-out that a lock cannot have."""


class LockNotAcquired(BackgroundError):
    """Whether a lock is held could not be found out: the database did not answer."""


def _hint(name: object, known: Iterable[str], what: str) -> str:
    known = sorted(known)
    close = get_close_matches(name, known, n=1) if isinstance(name, str) else ()
    return f"Did you mean {close[0]!r}?" if close else f"The {what} are: {', '.join(known) or 'none'}."


_LONGEST_LINE = 1_000


def first_line(error: BaseException) -> str:
    """The first line of an error's text: drivers add the statement and a link, which belong in a traceback.

    What no log or terminal should be sent (an escape, a character that turns the line around) is spelled out.
    """
    try:
        line = str(error).strip().splitlines()[0]
    except Exception:  # it has no text, or none that can be had
        return type(error).__name__
    return spelled_out(shortened(line, _LONGEST_LINE))


def shortened(text: str, most: int) -> str:
    """Return the first `most` characters of a longer text, and how many were cut. A shorter text stays whole."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} characters are cut)"


def spelled_out(text: str) -> str:
    """Return the text in one line that steers no terminal. Escapes stand for the characters that would."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def error_line(text: str | None) -> str | None:
    """Return the line of a traceback that has the error itself, without further lines of its message.

    Below the frame around an exception group, this is the last line.
    """
    lines = (text or "").strip().splitlines()
    if len(lines) > 1 and _END_OF_GROUP.fullmatch(lines[-2]):
        return lines[-1].strip()
    frames = [at for at, line in enumerate(lines) if line.startswith('  File "')]
    behind = lines[frames[-1] + 1 :] if frames else []
    return next((line for line in behind if not line.startswith(" ")), lines[-1].strip() if lines else None)


_END_OF_GROUP = re.compile(r" *\+-+")
