"""Reads the executions for people. Decides nothing."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    CompoundSelect,
    Select,
    String,
    Text,
    and_,
    bindparam,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    type_coerce,
    union_all,
)

from ..database.clock import last_until, now
from ..database.tables import LARGEST_ID, executions, workers
from ..ledger.claim import WorkerState, is_of_claim
from ..ledger.ledger import Ledger
from .instances import InstanceHistory
from .records import FAILED, ErrorGroup, Glance, Place, Record, Surroundings, Window, grouped
from .text import clipped

MOST_SEARCHED = 5_000
ERRORS_IN, MOST_ERRORS = 1_000, 100  # the newest executions that are searched for errors, and the errors that are read
SHOWN_CURSOR = 1_000  # characters
_MOST_ATTEMPTS = 50
_MINUTE = timedelta(minutes=1)


class History:
    """Reads the rows of one database. Each method takes a constant number of queries, each on an index."""

    def __init__(self, ledger: Ledger, instances: InstanceHistory) -> None:
        self._ledger, self._instances = ledger, instances
        self._read = ledger.store.read

    def clock(self) -> datetime:
        """Read the database's clock."""
        [(clock,)] = self._read(select(now()))
        return clock  # type: ignore[no-any-return]

    def schedules(self) -> dict[str, str]:
        """Return the text of the schedule of each worker that the database knows."""
        return dict(self._read(_schedules))

    def scheduled_at(self, names: Collection[str]) -> dict[str, datetime]:
        """Return, for each worker of `names`, the moment from which its schedule is in force."""
        return dict(self._read(_scheduled_at.where(workers.c.name.in_(names)))) if names else {}

    def up_to(self, places: Sequence[tuple[str, datetime]], count: int) -> list[list[Record]]:
        """Return, for each worker and tick of `places`, the newest `count` rows up to this tick, newest first."""
        found: list[list[Record]] = [[] for _ in places]
        if found:
            parameters: dict[str, Any] = {}
            for number, (name, tick) in enumerate(places):
                parameters |= {f"worker_{number}": name, f"tick_{number}": tick}
            for number, *row in self._read(_up_to(len(found), count), parameters):
                found[number].append(Record(*row))
        return found

    def latest(self, names: Collection[str] | None = None) -> dict[str, Record]:
        """Return each worker's newest row (of `names`) that is not running. It may be about ticks without a run."""
        found = self._records(_latest) if names is None else self._records(_latest_of, {"names": [*names]})
        return {record.worker: record for record in found}

    def executions(self, name: str, limit: int = 20, state: str | None = None) -> list[Record]:
        """Return the newest executions of `name` (of one state), newest first."""
        query = _of(name).order_by(*_newest_first).limit(limit)
        return self._marked(self._records(query if state is None else query.where(executions.c.state == state)))

    def page(
        self, name: str, limit: int, state: str | None = None, before: Place | None = None
    ) -> tuple[list[Record], Place | None]:
        """Return the newest executions of `name` before that place, and the place where the next page begins, if any.

        The attempts at one tick stay on one page, unless they fill it. No index has the states, so a search for one
        state reads only the newest MOST_SEARCHED rows.
        """
        older = and_(executions.c.worker == name, true() if before is None else _is_before(before))
        places = select(executions.c.tick, executions.c.id, executions.c.state).where(older).order_by(*_newest_first)
        query = _of(name).where(older)
        if state is not None:
            searched = places.limit(MOST_SEARCHED).subquery()
            query = _of(name).where(executions.c.id.in_(select(searched.c.id).where(searched.c.state == state)))
        found = self._marked(self._records(query.order_by(*_newest_first).limit(limit + 1)))
        if len(found) > limit:
            whole = [each for each in found if each.tick != found[limit].tick] or found[:limit]
            return whole, (whole[-1].tick, whole[-1].id)
        return found, self._last_of(places) if state is not None else None

    def _last_of(self, places: Select[Any]) -> Place | None:
        """Return the last of the MOST_SEARCHED rows that were read. None if there are fewer."""
        last = self._read(places.offset(MOST_SEARCHED - 1).limit(1))
        return (last[0].tick, last[0].id) if last else None

    def recent(self, names: Collection[str], count: int) -> dict[str, list[Glance]]:
        """Return the newest `count` executions of each worker of `names`, oldest first."""
        found: dict[str, list[Glance]] = {name: [] for name in names}
        if found:
            if self._ledger.store.on_sqlite:
                rows = self._read(_glances(len(found), count), {f"worker_{at}": name for at, name in enumerate(found)})
            else:
                rows = self._read(_lateral_glances(count), {"names": [*found]})
            for glance in map(Glance._make, rows):
                found[glance.worker].append(glance)
        return {name: glances[::-1] for name, glances in found.items()}

    def execution(self, id: int) -> Record | None:
        """Return the execution `id`. None if it does not exist, or was pruned."""
        return next(iter(self._marked(self._records(_whole.where(executions.c.id == id)))), None)

    def neighbours(self, record: Record) -> tuple[int | None, int | None]:
        """Return the ids of the worker's executions before and after `record`, in the order of `page`."""
        place, ids = (record.tick, record.id), select(executions.c.id).where(executions.c.worker == record.worker)
        before = ids.where(_is_before(place)).order_by(*_newest_first).limit(1)
        after = ids.where(_is_after(place)).order_by(executions.c.tick, executions.c.id).limit(1)
        [(previous, following)] = self._read(select(before.scalar_subquery(), after.scalar_subquery()))
        return previous, following

    def attempts(self, record: Record) -> list[Record]:
        """Return every attempt at the tick of `record`, oldest first, without reasons."""
        same = executions.c.worker == record.worker, executions.c.tick == record.tick
        attempts = _brief.where(*same, executions.c.trigger == record.trigger).order_by(executions.c.id)
        return self._marked(self._records(attempts.limit(_MOST_ATTEMPTS)))

    def errors(self, name: str) -> list[ErrorGroup]:
        """Return the errors of the newest ERRORS_IN executions, grouped. At most MOST_ERRORS executions are read."""
        searched = select(*_columns).where(executions.c.worker == name).order_by(*_newest_first).limit(ERRORS_IN)
        newest = searched.subquery()
        failed = select(newest, now()).where(newest.c.state.in_(FAILED))
        found = self._records(failed.order_by(newest.c.tick.desc(), newest.c.id.desc()).limit(MOST_ERRORS))
        return grouped((each.last_line or each.state, each.ended_at, each.id) for each in found)

    def log(self, execution: int) -> str | None:
        """Return the log lines of that execution. None if it logged nothing, or was pruned."""
        return self.log_and_cursor(execution)[0]

    def log_and_cursor(self, execution: int) -> tuple[str | None, str | None]:
        """Return the log lines of that execution, and at most SHOWN_CURSOR characters of its cursor."""
        begin = func.substr(executions.c.cursor, 1, SHOWN_CURSOR + 1)
        for log, cursor in self._read(select(executions.c.log, begin).where(executions.c.id == execution)):
            return log, None if cursor is None else clipped(cursor, SHOWN_CURSOR)
        return None, None

    def per_minute(self) -> int:
        """Return the number of runs that began within the last minute."""
        [(number,)] = self._read(_just_begun)
        return number  # type: ignore[no-any-return]

    def running(self) -> list[Record]:
        """Return the running executions of all workers, without reasons."""
        return self._marked(self._records(_running.order_by(executions.c.id)))

    def window(
        self, length: timedelta, until: datetime | None = None, worker: str | None = None, limit: int = 600
    ) -> Window:
        """Return the executions (of `worker`) in that length of time up to `until`, by default now.

        Return at most the newest `limit` executions, and every older execution that still runs.
        """
        clock = self.clock()
        is_past = until is not None and until < clock
        until = until if until and is_past else clock
        since = until - length
        newest = self._records(_newest(worker, until, is_past).limit(limit + 1))
        shown, running = newest[:limit], self._records(_running)
        found = {each.id: each for each in (*running, *shown) if worker in (None, each.worker)}
        records = [found[id] for id in sorted(found) if _overlaps(found[id], since, until)]
        began = [each.started_at for each in shown if each.started_at] if len(newest) > limit else []
        complete_since = max(since, min(began)) if began else since
        instances = self._instances.lived(since, until, {each.instance for each in records if each.instance})
        alive = {each.id for each in instances if each.is_alive}
        marked = [
            each if each.state != "running" else each._replace(is_gone=each.instance not in alive) for each in records
        ]
        return Window(since, until, clock, tuple(marked), complete_since, instances)

    def around(self, name: str, at: datetime | None = None) -> Surroundings:
        """Return the rows about the tick that `at` belongs to. Without `at`, it is now, and a later manual run counts.

        With `at`, the rows are the same for each moment that belongs to the tick.
        """
        state = self._ledger.look(name)
        clock = state.clock if state else self.clock()
        is_now, at = at is None, at or clock
        alive, last_seen = self._instances.alive_and_last()
        if state is None:
            return Surroundings(name, at, clock, None, alive=alive, last_seen=last_seen)
        records, before = self._belonging(name, at, state)
        manual = self._manual(name, state.schedule.previous(at)) if is_now else None
        if records:
            return Surroundings(name, at, clock, state, records, alive=alive, last_seen=last_seen, manual=manual)
        after, oldest = self._behind(name, state.schedule.previous(at))
        return Surroundings(name, at, clock, state, (), before, after, oldest, alive, last_seen, manual)

    def _belonging(self, name: str, at: datetime, state: WorkerState) -> tuple[tuple[Record, ...], Record | None]:
        """Return the rows of the tick that `at` belongs to. If it has none, return the newest row before it.

        Once the schedule is in force, this is its latest tick up to `at`. Before that, rows of an older schedule count.
        """
        until = at if at < state.scheduled_at else state.schedule.previous(at)
        belongs = or_(executions.c.tick == at, and_(executions.c.trigger == "schedule", executions.c.tick <= until))
        query = _of(name).where(executions.c.tick <= at, belongs)
        found = self._records(query.order_by(*_newest_first).limit(_MOST_ATTEMPTS))
        if not found:
            return (), None
        newest = found[0]
        if newest.tick != at and not newest.covers(state.schedule.previous(at)):
            return (), newest
        same = [each for each in reversed(found) if (each.tick, each.trigger) == (newest.tick, newest.trigger)]
        return tuple(self._marked(same)), None

    def _manual(self, name: str, tick: datetime) -> Record | None:
        """Return the newest attempt at a manual run that was requested after `tick`."""
        manual = _of(name).where(executions.c.trigger == "manual", executions.c.tick > tick)
        return next(iter(self._marked(self._records(manual.order_by(*_newest_first).limit(1)))), None)

    def _behind(self, name: str, at: datetime) -> tuple[Record | None, datetime | None]:
        later = _of(name).where(executions.c.tick > at, executions.c.trigger == "schedule")
        after = self._records(later.order_by(executions.c.tick, executions.c.id).limit(1))
        [(oldest,)] = self._read(select(func.min(executions.c.tick)).where(executions.c.worker == name))
        return (after[0] if after else None), oldest

    def _records(self, query: Select[Any], values: dict[str, Any] | None = None) -> list[Record]:
        return [Record(*row) for row in self._read(query, values)]

    def _marked(self, records: list[Record]) -> list[Record]:
        """Return the records with `is_gone` filled in."""
        running = {each.instance for each in records if each.state == "running" and each.instance}
        gone = self._instances.gone(running)
        return [each._replace(is_gone=each.state == "running" and each.instance in gone) for each in records]


_columns = [executions.c[field] for field in Record._fields if field in executions.c]
_newest_first = (executions.c.tick.desc(), executions.c.id.desc())


def _newest(worker: str | None, until: datetime, is_past: bool) -> Select[Any]:
    """Select the executions before `until`, newest first, in the order of an index."""
    if worker is not None:
        return _brief.where(executions.c.worker == worker, executions.c.tick <= until).order_by(*_newest_first)
    return (
        _brief.where(executions.c.id <= last_until(executions.c.started_at, until)) if is_past else _brief
    ).order_by(executions.c.id.desc())


def _of(name: str) -> Select[Any]:
    return _whole.where(executions.c.worker == name)


_without_reason = [
    type_coerce(null(), String).label("reason") if column.name == "reason" else column for column in _columns
]
_whole: Select[Any] = select(*_columns, now().label("clock"))
_brief: Select[Any] = select(*_without_reason, now().label("clock"))
# These are built once, as building takes longer than reading.
# With the last id, PostgreSQL expects few rows. Without it, PostgreSQL starts parallel workers, which takes longer.
_before = last_until(executions.c.started_at, select(now(-_MINUTE)).scalar_subquery())
_just_begun = select(func.count()).where(
    executions.c.id > _before, executions.c.id <= LARGEST_ID, executions.c.started_at.is_not(None)
)
_running = _brief.join(workers, is_of_claim)
_each = executions.alias()
_newest_ended = (
    select(_each.c.id)
    .where(_each.c.worker == workers.c.name, _each.c.state != "running")
    .order_by(_each.c.tick.desc(), _each.c.id.desc())
    .limit(1)
    .scalar_subquery()
)
_latest = _whole.select_from(executions).join(workers, executions.c.id == _newest_ended)
_latest_of = _latest.where(workers.c.name.in_(bindparam("names", expanding=True)))


def _overlaps(record: Record, since: datetime, until: datetime) -> bool:
    return record.began_at <= until and record.ended_at >= since


def _is_after(place: Place) -> ColumnElement[bool]:
    tick, id = place
    return and_(executions.c.tick >= tick, or_(executions.c.tick > tick, executions.c.id > id))


def _is_before(place: Place) -> ColumnElement[bool]:
    tick, id = place
    return and_(executions.c.tick <= tick, or_(executions.c.tick < tick, executions.c.id < id))


_schedules = select(workers.c.name, workers.c.schedule)
_scheduled_at = select(workers.c.name, workers.c.scheduled_at)


@lru_cache
def _up_to(places: int, count: int) -> CompoundSelect[Any]:
    """Select the newest scheduled rows of each place, each with the number of its place."""
    newest = select(*_without_reason, now()).where(executions.c.trigger == "schedule")
    newest = newest.order_by(*_newest_first).limit(count)
    of_place = (
        select(literal_column(str(number)), newest.where(_is_up_to(number)).subquery()) for number in range(places)
    )
    return union_all(*of_place)


def _is_up_to(number: int) -> ColumnElement[bool]:
    tick = bindparam(f"tick_{number}", type_=executions.c.tick.type)
    return and_(executions.c.worker == bindparam(f"worker_{number}"), executions.c.tick <= tick)


_ended_at = func.coalesce(executions.c.finished_at, now())
_glance = select(
    executions.c.worker, executions.c.tick, executions.c.state, executions.c.started_at, _ended_at
).order_by(*_newest_first)


@lru_cache  # making this query takes longer than running it
def _glances(names: int, count: int) -> CompoundSelect[Any]:
    """Select the newest executions of each name, so that the database reads only `count` index entries for each."""
    is_of_name = (executions.c.worker == bindparam(f"worker_{number}") for number in range(names))
    return union_all(*(select(_glance.limit(count).where(condition).subquery()) for condition in is_of_name))


@lru_cache
def _lateral_glances(count: int) -> Select[Any]:
    """Select the same for PostgreSQL, which plans one subquery of all names faster than one for each."""
    names = func.unnest(bindparam("names", type_=ARRAY(Text))).table_valued("name").render_derived()
    return select(_glance.where(executions.c.worker == names.c.name).limit(count).lateral()).select_from(names)
