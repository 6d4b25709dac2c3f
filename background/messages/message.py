"""Values about messages: a message, a batch that an instance claimed, and a message that was freed."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple


class _Row(NamedTuple):
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


class Message(_Row):
    """One message, as its handler receives it."""  # a tuple, which is made in a fifth of a data class's time

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name!r} of a message: expected a message to stay as it was claimed")

    @property
    def tick(self) -> datetime:
        """The moment when the message was due. It is the `tick` of its context."""
        return self.due_at

    @cached_property
    def payload(self) -> Any:
        """The enqueued value: None, bool, int, float, str, and lists and dicts of them."""
        return json.loads(self.text)

    @property
    def idempotency_key(self) -> str:
        """A text that all attempts at this message share, and no other message has."""
        return f"{self.topic}:{self.id}"


@dataclass(frozen=True)
class Batch:
    """The right to handle `messages`, while their rows have the `id` of this batch."""

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
