"""Every topic at a glance: its messages that wait, run or are dead, and its throughput."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, literal, null, select, union_all

from ...database.clock import elapsed, now
from ...database.store import Store
from ...database.tables import is_dead, is_running, is_waiting, messages, topics
from ...worker import MessageWorker
from .filters import in_state

_RECENTLY, _JUST_NOW = timedelta(hours=1), timedelta(minutes=1)
_SAMPLE = 5_000  # the newest messages, from which a high throughput is estimated


@dataclass(frozen=True)
class Topic:
    """One topic at a glance."""

    topic: str
    worker: str | None
    """The name of the worker that handles it. None if this release has no such worker."""
    waiting: int = 0
    delayed: int = 0
    """The number of waiting messages that are due later."""
    running: int = 0
    dead: int = 0
    oldest_seconds: float | None = None
    """The seconds since the first waiting message was due. None if no message is due yet."""
    handled: int = 0
    """The number of messages done within the last hour."""
    mean_seconds: float | None = None
    """The mean time from due to done, of the messages that `handled` counts."""
    longest_seconds: float | None = None
    retrying: int = 0
    """The number of waiting messages that failed, and are tried again."""
    postponed: int = 0
    """The number of waiting messages whose handler raised `Later`."""
    paused_at: datetime | None = None
    per_minute: int = 0
    """The number of messages done within the last minute."""
    is_estimate: bool = False
    """True if `handled` is an estimate from the newest messages."""


class TopicHistory:
    """Reads the topics of one database, in a constant number of queries per call."""

    def __init__(self, store: Store, workers: Mapping[str, type[MessageWorker]]) -> None:
        """`workers` are those of this release, by topic."""
        self._store, self._workers = store, workers

    def stats(self) -> list[Topic]:
        """Return every topic of this release, and every other topic in the database. Reads each message of the hour."""
        found = self._depths()
        for row in self._store.read(_handled):
            found.setdefault(row.topic, {}).update(row._mapping)
        return self._topics(found)

    def depths(self) -> list[Topic]:
        """Return the topics as `stats` does, but without the messages that are done. Does not read their rows."""
        return self._topics(self._depths())

    def figures(self) -> list[Topic]:
        """Return the topics as `stats` does, without the times. Many messages that are done do not make it slower."""
        found = self._depths()
        for row in self._store.read(_finished):
            found.setdefault(row.topic, {}).update(_flow(row))
        return self._topics(found)

    def rates(self) -> list[Topic]:
        """Return the topics as `figures` does, without `handled`. Reads only the messages of the last minute."""
        found, rows = self._depths(), self._store.read(_just_finished)
        share = 1.0
        if sum(row.sample for row in rows) == _SAMPLE:
            covered = rows[0].clock - min(row.oldest for row in rows)
            share = max(covered, timedelta(milliseconds=1)) / _JUST_NOW
        for row in rows:
            found.setdefault(row.topic, {})["per_minute"] = round(row.done / share)
        return self._topics(found)

    def _depths(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {topic: {} for topic in self._workers}
        for row in self._store.read(_depths):
            of_topic = found.setdefault(row.topic, {})
            if row.state == "paused":
                of_topic["paused_at"] = row.since
                continue
            of_topic[row.state] = row.count
            if row.state == "waiting":
                waited = (row.clock - row.since).total_seconds()
                of_topic |= {"delayed": row.delayed, "oldest_seconds": waited if waited >= 0 else None}
        return found

    def _topics(self, found: Mapping[str, dict[str, Any]]) -> list[Topic]:
        names = {topic: worker.name for topic, worker in self._workers.items()}
        return [Topic(**{"topic": topic, "worker": names.get(topic)} | more) for topic, more in sorted(found.items())]


def _depth(name: str, which: ColumnElement[bool], *more: Any) -> Select[Any]:
    """Count the messages of one kind by topic. Reads only the index of that kind."""
    columns = (messages.c.topic, literal(name).label("state"), func.count().label("count"), *more)
    return select(*columns).where(which).group_by(messages.c.topic)


_clock = select(now()).scalar_subquery()  # read once
_delayed = func.count().filter(messages.c.due_at > _clock)
_open = union_all(
    _depth("waiting", is_waiting, _delayed.label("delayed"), func.min(messages.c.due_at).label("since")),
    _depth("retrying", in_state("retrying", messages.c), null(), null()),
    _depth("postponed", in_state("postponed", messages.c), null(), null()),
    _depth("running", is_running, null(), null()),
    _depth("dead", is_dead, null(), null()),
    select(topics.c.topic, literal("paused"), literal(0), null(), topics.c.paused_at),
).subquery()
_depths = select(_open, now().label("clock"))

_sample = (
    select(messages.c.topic, messages.c.state, messages.c.finished_at)
    .where(messages.c.finished_at.is_not(None))
    .order_by(messages.c.finished_at.desc())
    .limit(_SAMPLE)
)
_newest = _sample.cte("newest")
_within = _sample.where(messages.c.finished_at > select(now(-_JUST_NOW)).scalar_subquery()).subquery()
_just_finished = select(
    _within.c.topic,
    func.count().filter(_within.c.state == "done").label("done"),
    func.count().label("sample"),
    func.min(_within.c.finished_at).label("oldest"),
    now().label("clock"),
).group_by(_within.c.topic)


def _since(length: timedelta) -> Any:
    return func.count().filter(_newest.c.finished_at > select(now(-length)).scalar_subquery())


_finished = (
    select(
        _newest.c.topic,
        _since(_JUST_NOW).label("minute"),
        _since(_RECENTLY).label("hour"),
        select(func.count()).select_from(_newest).scalar_subquery().label("sample"),
        select(func.min(_newest.c.finished_at)).scalar_subquery().label("oldest"),
        now().label("clock"),
    )
    .where(_newest.c.state == "done")
    .group_by(_newest.c.topic)
)


def _flow(row: Row[Any]) -> dict[str, Any]:
    covered = row.clock - row.oldest
    if row.sample < _SAMPLE or covered >= _RECENTLY:
        return {"per_minute": row.minute, "handled": row.hour}
    share = max(covered, timedelta(milliseconds=1))
    minute = row.minute if covered >= _JUST_NOW else round(row.minute * (_JUST_NOW / share))
    return {"per_minute": minute, "handled": round(row.hour * (_RECENTLY / share)), "is_estimate": True}


_took = elapsed(messages.c.due_at, messages.c.finished_at)
_handled = (
    select(
        messages.c.topic,
        func.count().label("handled"),
        func.count().filter(messages.c.finished_at > select(now(-_JUST_NOW)).scalar_subquery()).label("per_minute"),
        func.avg(_took).label("mean_seconds"),
        func.max(_took).label("longest_seconds"),
    )
    .where(messages.c.state == "done", messages.c.finished_at > select(now(-_RECENTLY)).scalar_subquery())
    .group_by(messages.c.topic)
)
