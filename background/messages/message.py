"""Messages: enqueue, claim, acknowledge, retry, bury. Each race is one statement."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Message:
    """One message, as its handler is given it."""

    id: int
    topic: str
    text: str
    """The payload as JSON."""
    key: str | None
    attempt: int
    token: int
    """Grows by one with every claim of this message."""
    enqueued_at: datetime
    due_at: datetime

    @property
    def tick(self) -> datetime:
        """When it was due: what its context has as the scheduled moment."""
        return self.due_at

    @cached_property
    def payload(self) -> Any:
        """What was enqueued: None, bool, int, float, str, and lists and dicts of them."""
        return json.loads(self.text)

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this message, and for no other message."""
        return f"{self.topic}:{self.id}"


@dataclass(frozen=True)
class Batch:
    """The right to handle `messages`, as long as `id` is what their rows say."""

    id: str
    worker: str
    messages: tuple[Message, ...]
    execution: None = None

    @property
    def ids(self) -> list[int]:
        return [message.id for message in self.messages]


class Freed(NamedTuple):
    """A message that no instance holds: "waiting" for another attempt, or "dead"."""

    id: int
    topic: str
    state: str
