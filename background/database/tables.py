"""The engine's tables. `BackgroundWorkerManager.init_app` copies them into the application's metadata."""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import zip_longest
from math import isfinite
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    bindparam,
    case,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
)

from ..host.logs import logger_of
from .clock import AHEAD, UtcDateTime, now
from .dialects.encodings import storable

log = logger_of(__name__)

metadata = MetaData()


class AnyText(TypeDecorator[str]):
    """Text with escapes for characters that the database cannot hold. An error may quote any file name."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value and storable(value, dialect)


class Whole(TypeDecorator[int]):
    """A whole number. SQLite keeps any text that a user types into its column."""

    impl = Integer
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _number if dialect.name == "sqlite" else None


class Large(Whole):
    """A whole number of 64 bits."""

    impl = BigInteger
    cache_ok = True


class Real(TypeDecorator[float]):
    """A finite number. Its column also keeps NaN and Infinity, and on SQLite any text."""

    impl = Float
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        return _number


def _number(value: Any) -> Any:
    if value is None or type(value) is int or (isinstance(value, float | Decimal) and isfinite(value)):
        return value
    return _no_number(f"{value!r:.50}")


@lru_cache(maxsize=1024)  # the warning appears once
def _no_number(value: str) -> int:
    """Return 0 for a value that is not a finite number. An error here would end each page that shows its row."""
    log.warning("The database has %s in a column of numbers. It counts as 0 until the row is corrected", value)
    return 0


LARGEST_ID = 2**63 - 1
LONGEST_RELEASE = 100
LONGEST_USER = 255
_Id = BigInteger().with_variant(Integer, "sqlite")

workers = Table(
    "background_workers",
    metadata,
    Column("name", String(200), primary_key=True),
    # The high-water mark: no tick at or below it is claimed. Never pruned. Lowered only after the database's clock was
    # ahead: see repair/clock_ahead.py.
    Column("mark", UtcDateTime),
    # The mark before it was lowered. Ticks up to here may have run. A tick that has an execution is not claimed again.
    Column("mark_ahead", UtcDateTime),
    # The mark before missed ticks were last recorded, as an UPDATE returns no old values.
    Column("previous_mark", UtcDateTime),
    # Grows with every claim. `running` is the token of the claim in force, or NULL. `claim` is the random id of that
    # claim, or NULL. A token can repeat after the database lost commits. An id cannot.
    Column("token", Large, nullable=False, server_default="0"),
    Column("running", Large),
    Column("claim", String(32)),
    # A copy of the newest claim. A user may delete the execution's row while the claim is in force.
    Column("claim_tick", UtcDateTime),
    Column("claim_attempt", Whole),
    Column("claim_trigger", String(10)),
    Column("claim_instance", String(32)),
    Column("claim_instance_name", String(255)),
    Column("claim_at", UtcDateTime),
    # A lost or handed back tick, which must be claimed before any newer tick. Or a run that a user requested.
    Column("pending_tick", UtcDateTime),
    Column("pending_attempt", Whole),
    Column("pending_trigger", String(10)),
    # The schedule in force, as text. `declared` is the schedule in the code of a release, before any `reschedule`.
    # `declared_by` is the instance that wrote it. Of two releases side by side, the release that stays writes last.
    Column("schedule", String(200), nullable=False),
    Column("declared", String(200), nullable=False),
    Column("declared_by", String(32)),
    Column("scheduled_at", UtcDateTime, nullable=False),
    Column("paused_at", UtcDateTime),
    # A failed tick is retried from `pending_after` until `pending_until`, when the worker's next tick is due. An
    # older release leaves both as they are. So a `pending_until` that is not after the pending tick means nothing.
    # Nor do they mean anything beside a run that a user requested.
    Column("pending_after", UtcDateTime),
    Column("pending_until", UtcDateTime),
)

# The pending tick failed, and waits for another attempt.
_is_until_later = workers.c.pending_until > workers.c.pending_tick
is_retry = and_(_is_until_later, func.coalesce(workers.c.pending_trigger, "schedule") != "manual")
_is_no_retry = or_(workers.c.pending_until.is_(None), workers.c.pending_until <= workers.c.pending_tick)
_may_be_retried = and_(workers.c.pending_after <= now(), workers.c.pending_until > now())
# A pending tick may no longer be due, because the database's clock was set back.
may_be_run_again = or_(
    and_(workers.c.paused_at.is_(None), workers.c.pending_tick <= now(), or_(_is_no_retry, _may_be_retried)),
    workers.c.pending_trigger == "manual",
)

executions = Table(
    "background_executions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("worker", String(200), nullable=False),
    Column("tick", UtcDateTime, nullable=False),
    # The last tick that a row of skipped or missed ticks stands for. `tick` is the first.
    Column("through", UtcDateTime),
    Column("trigger", String(10), nullable=False),
    Column("state", String(12), nullable=False),
    Column("attempt", Whole),
    Column("token", Large),
    # The random id of this execution's claim. NULL for an execution without a claim.
    Column("claim", String(32)),
    Column("instance", String(32)),
    Column("instance_name", String(255)),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("progress_done", Real),
    Column("progress_total", Real),
    Column("reason", AnyText),
    # The lines that the run logged. Written with the outcome, and with each earlier commit of the run.
    Column("log", AnyText),
    # The request to cancel this execution, and the user who made it.
    Column("cancelled_at", UtcDateTime),
    Column("cancelled_by", String(LONGEST_USER)),
    # The last committed `context.cursor`, as JSON. The next attempt at the tick begins with it.
    Column("cursor", Text),
    Index("ix_background_executions_worker_tick", "worker", "tick"),
    Index("ix_background_executions_token", "worker", "token", unique=True),
)


TRIED = "state = 'waiting' AND (attempt > 0 OR postponed > 0)"
"""The condition of the waiting messages that failed or were postponed."""


def _where(condition: str) -> dict[str, Any]:
    # Literals, not parameters. The database must see the values to know that a partial index applies.
    return {"postgresql_where": literal_column(condition), "sqlite_where": literal_column(condition)}


Index("ix_background_executions_running", executions.c.worker, **_where("state = 'running'"))
Index("ix_background_executions_finished", executions.c.finished_at, **_where("finished_at IS NOT NULL"))

instances = Table(
    "background_instances",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Whole, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("signed_off_at", UtcDateTime),
    Column("clock_offset", Real),
    Column("release", String(LONGEST_RELEASE)),
    # The claims of this instance that users cancelled, newest first: see `Leases.cancel`.
    Column("cancels", Text),
)

# Counters of each worker. They only grow, although the history is pruned. A row of the kind "state" counts the
# executions with that state. A row of the kind "duration" or "lateness" counts the executions in one bucket. The label
# is the bucket's upper bound in seconds. Lateness is the time from the tick to the start of its execution.
totals = Table(
    "background_totals",
    metadata,
    Column("worker", String(200), primary_key=True),
    Column("kind", String(10), primary_key=True),
    Column("label", String(12), primary_key=True),
    Column("count", Large, nullable=False),
    Column("seconds", Real, nullable=False),
    Column("latest_at", UtcDateTime, nullable=False),
)

messages = Table(
    "background_messages",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("topic", String(100), nullable=False),
    Column("key", String(200)),
    Column("payload", Text, nullable=False),
    # waiting -> running -> done. Or from running back to waiting, for another attempt, or to dead. Or from dead to
    # waiting, or to discarded.
    Column("state", String(10), nullable=False, server_default="waiting"),
    Column("enqueued_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime, nullable=False),
    # Counted by the claim, before the handler runs. A message that was handed back does not count as tried.
    Column("attempt", Whole, nullable=False, server_default="0"),
    # Grows by one at every claim. `batch` is the id of all messages of that claim. The fence checks it.
    Column("token", Large, nullable=False, server_default="0"),
    Column("batch", String(32)),
    Column("instance", String(32)),
    Column("instance_name", String(255)),
    Column("claimed_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    # The number of times that a handler raised `Later`, and the reason that it gave last.
    Column("postponed", Whole),
    Column("postponed_because", AnyText),
)


Index("ix_background_messages_key", messages.c.topic, messages.c.key, unique=True, **_where("key IS NOT NULL"))
Index("ix_background_messages_due", messages.c.topic, messages.c.due_at, messages.c.id, **_where("state = 'waiting'"))
Index("ix_background_messages_running", messages.c.instance, **_where("state = 'running'"))
# With all columns of its condition, so that a count of retrying messages reads the index alone.
_tried = messages.c.topic, messages.c.id, messages.c.attempt, messages.c.postponed
Index("ix_background_messages_tried", *_tried, **_where(TRIED))
Index("ix_background_messages_dead", messages.c.topic, messages.c.id, **_where("state = 'dead'"))
Index("ix_background_messages_finished", messages.c.finished_at, **_where("finished_at IS NOT NULL"))

message_errors = Table(
    "background_message_errors",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("message", _Id, ForeignKey(messages.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("attempt", Whole, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("instance_name", String(255)),
    Column("error", AnyText, nullable=False),
)

# The paused topics. A topic without a row is not paused.
topics = Table(
    "background_topics",
    metadata,
    Column("topic", String(100), primary_key=True),
    Column("paused_at", UtcDateTime, nullable=False),
)

# The incidents that alerts report. `opened_at` is the moment when the problem began, or was noticed.
incidents = Table(
    "background_incidents",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("kind", String(20), nullable=False),
    # The worker, the topic or the host. Empty for the whole fleet.
    Column("subject", String(255), nullable=False),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("detail", AnyText, nullable=False),
)
Index("ix_background_incidents_open", incidents.c.kind, incidents.c.subject, unique=True, **_where("ended_at IS NULL"))
Index("ix_background_incidents_begun", incidents.c.kind, incidents.c.subject, incidents.c.opened_at, unique=True)

# The counts of runs and messages for charts. Each row stands for the time from `start` on, of `seconds` seconds.
tallies = Table(
    "background_tallies",
    metadata,
    Column("seconds", Whole, primary_key=True),
    Column("start", UtcDateTime, primary_key=True),
    # "worker" or "topic", and its name. The empty name has the sum over all workers, or over all topics.
    Column("kind", String(10), primary_key=True),
    Column("name", String(200), primary_key=True),
    # JSON, see tallies/tally.py.
    Column("counts", Text, nullable=False),
)

# The regular work that one instance does for the fleet, and the moment up to which it is done.
chores = Table(
    "background_chores",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("until", UtcDateTime, nullable=False),
)

locks = Table(
    "background_locks",
    metadata,
    Column("name", String(200), primary_key=True),
    # Grows each time the lock is acquired, even after its row was pruned. The row with the empty name keeps the
    # greatest token of all pruned rows.
    Column("token", Large, nullable=False),
    # The id of one acquisition, or NULL if the lock is free. `instance` is the instance whose lease keeps it.
    Column("holder", String(32)),
    Column("instance", String(32)),
    Column("instance_name", String(255)),
    Column("since", UtcDateTime, nullable=False),
)


def is_in(state: str, columns: Any = messages.c) -> ColumnElement[bool]:
    """Return whether a message has that state, by a literal.

    The database must see the value to know that a partial index applies.
    """
    is_it: ColumnElement[bool] = columns.state == literal_column(f"'{state}'")
    return is_it


is_waiting, is_running, is_dead = is_in("waiting"), is_in("running"), is_in("dead")


def is_paused(topic: ColumnElement[str] | str) -> ColumnElement[bool]:
    return select(topics.c.topic).where(topics.c.topic == topic).exists()


NEVER = datetime(9999, 1, 1, tzinfo=UTC)


def from_floor(floor: str) -> ColumnElement[bool]:
    """Return whether a message is due at the moment in the parameter `floor`, or later. NULL is before all moments."""
    earliest: ColumnElement[datetime] = literal_column("CAST('-infinity' AS timestamptz)")
    return messages.c.due_at >= func.coalesce(bindparam(floor, type_=UtcDateTime()), earliest)


def next_due(names: Iterable[str], *floors: str) -> Iterator[ColumnElement[datetime | None]]:
    """Yield, for each topic, the moment at which its first waiting message is due.

    NEVER if no message waits. NULL if the topic is paused. `floors` name the parameters with the floors of the topics.
    """
    for topic, floor in zip_longest(names, floors):
        first = (
            select(messages.c.due_at)
            .where(is_waiting, messages.c.topic == topic, not_(is_paused(topic)))
            .order_by(messages.c.due_at, messages.c.id)
            .limit(1)
        )
        first = first.where(from_floor(floor)) if floor else first
        yield func.coalesce(first.scalar_subquery(), case((not_(is_paused(topic)), literal(NEVER, UtcDateTime()))))


def any_put_off(names: Iterable[str], *floors: str) -> list[ColumnElement[bool]]:
    """Return, for each topic, whether its first waiting message was enqueued or tried by a clock that was ahead.

    Later messages of the topic may have been, too.
    """
    found: list[ColumnElement[bool]] = []
    for topic, floor in zip_longest(names, floors):
        of_topic = select(messages).where(is_waiting, messages.c.topic == topic)
        of_topic = of_topic.where(from_floor(floor)) if floor else of_topic
        first = of_topic.order_by(messages.c.due_at, messages.c.id).limit(1).subquery()
        written = func.coalesce(first.c.claimed_at, first.c.enqueued_at)
        found.append(select(first.c.id).where(first.c.due_at > now(AHEAD), written > now(AHEAD)).exists())
    return found


any_running = select(messages.c.id).where(is_running).exists()
