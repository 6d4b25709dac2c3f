"""The exception of a handler that postpones its message."""

from datetime import timedelta

from ..errors import BackgroundError, InvalidMessage
from .payloads import as_delay


class Later(BackgroundError):
    """Raised by a handler: its message is handled again after a delay. This does not count as an attempt.

    `minutes` is a number, or a timedelta. The pages show the `reason`. Raises InvalidMessage.
    """

    def __init__(self, minutes: float | timedelta, reason: object = "") -> None:
        delay = as_delay(minutes, "minutes")
        if not delay:
            raise InvalidMessage(
                f"The handler raised Later({minutes!r}); expected a delay above 0: minutes, or a timedelta."
            )
        self.delay, self.has_reason = delay, bool(str(reason))
        super().__init__(str(reason) or f"again in {delay}")
