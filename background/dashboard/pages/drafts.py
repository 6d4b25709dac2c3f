"""The form for another schedule, which shows a refused schedule again, and the next ticks of a valid schedule."""

from dataclasses import dataclass
from datetime import datetime

from flask import request

from ...errors import InvalidSchedule
from ...manager import the_manager
from ...schedule.parsing import typed_schedule
from ...schedule.periods import Schedule

LONGEST_NAME = 200
NEXT_TICKS = 5
DRAFT = ("edit", "schedule", "timezone")  # parameters of an address that shows a form again


@dataclass(frozen=True)
class Draft:
    """The input of a schedule's form that was not saved."""

    name: str
    """The worker."""
    schedule: str
    timezone: str
    error: str | None = None
    read: Schedule | None = None
    """The schedule that the input means. None if there is an error."""
    clock: datetime | None = None

    @property
    def ticks(self) -> list[datetime]:
        """The next ticks of the schedule."""
        return self.read.following(self.clock, NEXT_TICKS) if self.read and self.clock else []


def draft() -> Draft | None:
    """Return the input of the form: refused, with its error, or for a preview. None without such input."""
    name, schedule, timezone = (request.args.get(key, "")[:LONGEST_NAME] for key in DRAFT)
    if not name:
        return None
    try:
        read = typed_schedule(schedule, timezone)
    except InvalidSchedule as error:
        return Draft(name, schedule, timezone, error.message)
    return Draft(name, schedule, timezone, read=read, clock=the_manager().history.clock())
