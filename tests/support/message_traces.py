"""Messages of the traced app: enqueued as by a web process, and checked after any faults."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import create_engine, func, select
from sqlalchemy.pool import NullPool
from support.fleet import db, make_app
from support.fork_server import Member
from support.run_traces import Effect, Effects

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.database import tables

TOPICS = ("notes", "bulk", "relays")


class Letterbox:
    """The messages in one database and the effects of their handlers. Each call reads them again."""

    def __init__(self, effects: Effects) -> None:
        self._effects, self.url = effects, effects.url
        self.app = make_app(effects.url, *map(unread, TOPICS))
        self._engine = create_engine(effects.url, poolclass=NullPool)

    @property
    def manager(self) -> BackgroundWorkerManager:
        manager: BackgroundWorkerManager = self.app.extensions["background_workers"]
        return manager

    def put(self, topic: str, payloads: Iterable[Any], **more: Any) -> list[int]:
        """Enqueue the payloads in one commit. Return the ids in order."""
        with self.app.app_context():
            before = db.session.scalar(select(func.max(tables.messages.c.id))) or 0
            self.manager.enqueue_many(topic, payloads, **more)
            db.session.commit()
            new = select(tables.messages.c.id).where(tables.messages.c.id > before, tables.messages.c.topic == topic)
            return list(db.session.scalars(new.order_by(tables.messages.c.id)))

    def living(self) -> set[int]:
        """Return the pids of the processes whose lease has not ended."""
        return self._effects.instances(alive=True)

    # -- the rows in the database -----------------------------------------------------------------

    def rows(self, topic: str = "notes") -> Sequence[Any]:
        query = select(tables.messages).where(tables.messages.c.topic == topic).order_by(tables.messages.c.id)
        with self._engine.connect() as connection:
            return connection.execute(query).all()

    def states(self, topic: str = "notes") -> Counter[str]:
        query = select(tables.messages.c.state, func.count()).where(tables.messages.c.topic == topic)
        with self._engine.connect() as connection:
            return Counter(dict(connection.execute(query.group_by("state")).all()))

    def are_over(self, topic: str = "notes") -> bool:
        """Return True if every message is done or dead."""
        return not {"waiting", "running"} & self.states(topic).keys()

    def in_hand_of(self, member: Member, topic: str = "notes") -> int:
        """Count the messages that this process holds."""
        held = (tables.messages.c.topic == topic, tables.messages.c.state == "running")
        its = tables.messages.c.instance_name.like(f"%:{member.pid}")
        with self._engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(tables.messages).where(*held, its)) or 0

    def errors(self, message: int) -> list[tuple[int, str]]:
        """Return the failed attempts, each with the last line of its error."""
        errors = tables.message_errors
        query = select(errors.c.attempt, errors.c.error).where(errors.c.message == message).order_by(errors.c.id)
        with self._engine.connect() as connection:
            return [(attempt, error.strip().splitlines()[-1]) for attempt, error in connection.execute(query)]

    def effects(self, topic: str = "notes") -> list[Effect]:
        return self._effects.all(topic)

    # -- the oracle ------------------------------------------------------------------------------

    def check(self, topic: str = "notes") -> list[Effect]:
        """Check that each done message has exactly one effect, any other message none, and none is early.

        Returns the effects.
        """
        rows, found = {f"{topic}:{row.id}": row for row in self.rows(topic)}, self.effects(topic)
        times = Counter(effect.key for effect in found)
        assert not (twice := {key: count for key, count in times.items() if count > 1}), f"twice: {twice}"
        assert not (unknown := times.keys() - rows.keys()), f"of messages that were never enqueued: {unknown}"
        done = {key for key, row in rows.items() if row.state == "done"}
        assert times.keys() == done, f"done without an effect, or the other way: {times.keys() ^ done}"
        assert not [effect for effect in found if effect.at < rows[effect.key].due_at], "early"
        for row in rows.values():
            assert row.state != "dead" or self.errors(row.id), f"dead without an error: {row}"
        return found

    def check_all_done(self, topic: str = "notes") -> list[Effect]:
        """Check as `check` does, and that every message is done."""
        assert self.states(topic).keys() == {"done"}, self.states(topic)
        return self.check(topic)

    def pids(self, topic: str = "notes") -> set[int]:
        return {effect.pid for effect in self.effects(topic)}


def unread(topic: str) -> type[MessageWorker]:
    """Return a worker that handles nothing, because an enqueuing process must know the topic."""

    def handle(self: MessageWorker, message: Message, context: WorkerContext) -> None:
        raise AssertionError

    return type(topic, (MessageWorker,), {"name": topic, "topic": topic, "handle": handle})
