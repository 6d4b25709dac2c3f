"""Messages: enqueue, claim, acknowledge, retry, bury."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Message:
    """One message, as its handler is given it."""

    id: int
    topic: str
    payload: Any
    """What was enqueued: None, bool, int, float, str, and lists and dicts of them."""
    key: str | None
    attempt: int
    token: int
    """Grows by one with every claim of this message."""
    enqueued_at: datetime
    due_at: datetime

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this message, and for no other message."""
        return f"{self.topic}:{self.id}"
