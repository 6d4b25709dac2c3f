"""The pauses of topics, in a table of their own. The claim of messages and the heartbeat read it."""

from sqlalchemy import delete

from ..database.clock import now
from ..database.store import Store
from ..database.tables import topics


class Pauses:
    """Pauses and resumes topics for the whole fleet."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def pause(self, topic: str) -> bool:
        """Pause the topic: no instance claims its messages. True if it was not paused before.

        Concurrency: consumers may claim at the same time. A claim that began before the commit is a batch in progress.
        """
        paused = self._store.insert(topics).values(topic=topic, paused_at=now()).on_conflict_do_nothing()
        with self._store.begin() as connection:
            return connection.execute(paused.returning(topics.c.topic)).first() is not None

    def resume(self, topic: str) -> bool:
        """End the pause, and wake the consumers of the fleet. True if the topic was paused."""
        was_paused = self._store.change(delete(topics).where(topics.c.topic == topic)) == 1
        if was_paused:
            self._store.ring()
        return was_paused
