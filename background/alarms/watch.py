"""The watch over the fleet: finds incidents, and enqueues one alert when an incident opens and one when it ends."""

from collections.abc import Callable, Collection
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from ..database.clock import steady
from ..database.connections import again_if_stale
from ..errors import first_line
from ..host.logs import logger_of
from ..manager import BackgroundWorkerManager
from . import delivery
from .alert import alert, title
from .findings import PATIENCE, Findings, outage
from .incidents import Incident, Incidents

log = logger_of(__name__)


class FleetWatch:
    """Looks for incidents. In each interval, one process of the fleet looks."""

    every = timedelta(seconds=15)

    def __init__(self, manager: BackgroundWorkerManager) -> None:
        self._manager = manager
        self._joined_at = 0.0
        self._unreported: tuple[str, tuple[datetime | None, datetime]] | None = None
        """An outage whose alert is not yet written: its description, its beginning and its end."""
        self.interval = self.every.total_seconds()
        self.topics: Collection[str] = {worker.topic for worker in delivery.channels(manager.app)}

    @property
    def incidents(self) -> Incidents:
        """The rows of the incidents."""
        return Incidents(self._manager.stores)

    def before_joining(self) -> None:
        """Send an alert if no instance was alive until now. An error is logged: the workers must start without it."""
        self._joined_at = steady()
        try:
            silence = self._manager.instance_history.silence()
            if (detail := outage(silence)) is not None and silence is not None:
                self._unreported = detail, (silence.since, silence.clock)
            self._report_outage()
        except Exception as error:
            log.warning("Cannot say since when no instance was alive: %s", first_line(error))

    def _report_outage(self) -> None:
        """Send the alert of an outage. After an error, for example on a read-only database, the next look sends it.

        Concurrency: several processes may start at once. The index on the beginning lets one of them write the row.
        """
        if (unreported := self._unreported) is not None:
            detail, span = unreported
            self._decide(lambda session: self.incidents.open(session, "silent", "", detail, span))
            if self._unreported is unreported:  # the heartbeat's thread may have found another outage
                self._unreported = None

    def look(self) -> None:
        """Look at the fleet, if no other instance did so within the interval."""
        self._report_outage()
        if again_if_stale(lambda: self.incidents.claim_look(self.every)):
            self.look_now()

    def look_now(self) -> None:
        """Look at the fleet. Open and end incidents."""
        known = self.incidents.known()  # first, as another instance may open an incident meanwhile
        open = {each.key for each in known if each.ended_at is None}
        found = {each.key: each for each in self._findings().look(open, self._patience())}
        for incident in known:
            if incident.ended_at is None and incident.key not in found:
                self._decide(lambda session, id=incident.id: self.incidents.end(session, id))  # type: ignore[misc]
        keys = {incident.key for incident in known}
        for key, each in found.items():
            if key not in keys:
                opens = (each.kind, each.subject, each.detail())
                self._decide(lambda session, opens=opens: self.incidents.open(session, *opens))  # type: ignore[misc]

    def _findings(self) -> Findings:
        manager = self._manager
        return Findings(manager.stores, manager.workers, manager.app.config["ALERT_AFTER_FAILURES"])

    def _patience(self) -> timedelta:
        """Return the time that a tick may wait. After a start, ticks that already wait get time to run."""
        left = PATIENCE.total_seconds() - (steady() - self._joined_at)
        return timedelta.max if left > 0 else PATIENCE

    def _decide(self, change: Callable[[Session], Incident | None]) -> None:
        """Change an incident, and enqueue its alert in the same transaction."""
        manager = self._manager
        with manager.app.app_context():
            session = manager.db.session()
            incident = change(session)
            if incident is None:
                session.rollback()
                return
            delivery.enqueue(manager, alert(manager.app, incident))
            session.commit()
        log.warning("%s: %s", title(incident), incident.detail)
