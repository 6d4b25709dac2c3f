"""Measures the promise under faults.

Real processes of the shop are killed, stopped and terminated. Their database is restarted or held, crashes, fails over,
or loses its connections or rows. An operator cancels runs and pauses topics. Other clients hold transactions open, send
storms of notifications, and take backups. Meanwhile the workers leave an effect for each of their ticks, and the
handlers a receipt for each message. Some runs and messages fail at first, and some messages are postponed.

    python -m benchmarks.soak --engine postgresql --minutes 10 --processes 6 --seed 1

Prints a table. Exits with 1 if the promise was broken, or a take-over or a hand-over came too late. Time in which the
machine stood still, or is late without any fault, does not count. It needs requirements-dev.txt, and starts a
PostgreSQL of its own. With libfaketime some processes have a wrong clock there.
"""

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from types import FrameType

from app import create_app
from migrations.schema import upgrade
from models import db

from . import soak_locks, soak_losers, soak_messages, soak_messages_oracle, soak_operator
from .soak_database import LOST_COMMITS, Pace, Postgresql, Sqlite, Watch
from .soak_fleet import FAKETIME, LEASE_SECONDS, Fleet
from .soak_oracle import Oracle, Verdict, quantile
from .soak_worker import BY_DESIGN, effects

CATCH_UP_SECONDS = 5.0  # after the start, when every worker runs its latest tick
PATIENCE_SECONDS = 90.0  # for a busy machine to start all processes, or to finish the open work
FAULT_SECONDS = (0.3, 2.1)  # between two faults
# The last errors of a message that always fails. The database may be away at its last attempt. The oracle checks that
# no other message is buried.
_LAST_WORDS = ("ValueError: poison", "sqlalchemy.exc.OperationalError: ")
MOST_SHOWN = 12


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, interrupt)
    logs = Path(tempfile.mkdtemp(prefix="bookstore-soak-logs-"))
    is_fine = False
    print(f"A table follows in {arguments.minutes:g} minutes, plus the time to start and end", flush=True)
    try:
        with database(arguments.engine, arguments.processes) as where:
            is_fine = soak(where, logs, arguments)
    finally:
        if is_fine:
            shutil.rmtree(logs)
        else:
            print(f"The logs are kept in {logs}", flush=True)
    print("The promise was kept" if is_fine else "The promise was broken")
    sys.exit(0 if is_fine else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if not 0.5 <= arguments.minutes <= 10_000:
        parser.error(f"--minutes is {arguments.minutes:g}; expected at least half a minute")
    if not 3 <= arguments.processes <= 100:
        parser.error(f"--processes is {arguments.processes}; expected 3 or more, as two are always left alone")
    return arguments


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def database(engine: str, processes: int) -> Iterator[Sqlite | Postgresql]:
    folder = Path(tempfile.mkdtemp(prefix="bookstore-soak-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user
    where = Sqlite(folder) if engine == "sqlite" else Postgresql(folder, processes)
    try:
        app = create_app({"DATABASE_URL": where.url, "SECRET_KEY": "soak", "LOG_LEVEL": "WARNING"})
        with app.app_context():
            upgrade()
            db.engine.dispose()
        effects.create(where.engine)
        for more in (soak_messages, soak_locks, soak_losers):
            more.metadata.create_all(where.engine)
        yield where
    finally:
        where.close()
        shutil.rmtree(folder, ignore_errors=True)


def soak(where: Sqlite | Postgresql, logs: Path, arguments: argparse.Namespace) -> bool:
    random = Random(arguments.seed)
    seconds = arguments.minutes * 60
    watch, pace, operating = Watch(where), Pace(), ExitStack()
    manager = operating.enter_context(soak_operator.controls(where.url))
    fleet = Fleet(arguments.processes, where, logs, random, arguments.seed, manager)
    try:
        wait_until_up(fleet)
        look_after(fleet, CATCH_UP_SECONDS)
        since = datetime.now(UTC)
        look_after(fleet, max(seconds / 10, 10))
        calm_until = datetime.now(UTC)
        harm(fleet, seconds - (calm_until - since).total_seconds(), random)
        until = datetime.now(UTC)
        fleet.resume_all()
        wait_until_up(fleet)
        wait_until_done(fleet, where, since, until)
        fleet.term_all()
    finally:
        fleet.close()
        operating.close()
        absences, standstills = watch.stop(), pace.stop()
    oracle = Oracle(where.engine, absences, standstills, fleet.faults)
    verdict = oracle.judge(since, calm_until, until)
    mail = soak_messages_oracle.Oracle(where.engine, fleet.faults).judge(since, calm_until, until)
    locks, losses = soak_locks.judge(where.engine), soak_losers.judge(where.engine, since, calm_until)
    report = Report(arguments, verdict, mail, locks, losses, fleet, absences, standstills)
    report.table()
    return report.violations(oracle, logs)


def wait_until_up(fleet: Fleet) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fleet.are_all_up() and time.monotonic() < deadline:
        look_after(fleet, 0.1)
    if not fleet.are_all_up():
        fleet.problems.append(f"not all processes were up within {PATIENCE_SECONDS:.0f} s")


def look_after(fleet: Fleet, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        fleet.look_after()
        time.sleep(min(left, 0.02))


def harm(fleet: Fleet, seconds: float, random: Random) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        look_after(fleet, min(left, random.uniform(*FAULT_SECONDS)))
        while time.monotonic() < deadline and not fleet.harm():
            look_after(fleet, 0.1)


def wait_until_done(fleet: Fleet, where: Sqlite | Postgresql, since: datetime, until: datetime) -> None:
    """Let the fleet finish the open work without faults. Work that stays open counts as lost."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    look_after(fleet, 1)
    while is_open(where, fleet, since, until) and time.monotonic() < deadline:
        look_after(fleet, 1)


def is_open(where: Sqlite | Postgresql, fleet: Fleet, since: datetime, until: datetime) -> bool:
    ticks = Oracle(where.engine, faults=fleet.faults).open(since, until)
    return bool(ticks or soak_messages_oracle.Oracle(where.engine).open(until))


class Report:
    def __init__(
        self,
        arguments: argparse.Namespace,
        verdict: Verdict,
        mail: soak_messages_oracle.Verdict,
        locks: soak_locks.Verdict,
        losses: dict[int, int],
        fleet: Fleet,
        absences: list[tuple[float, float]],
        standstills: list[tuple[float, float]],
    ) -> None:
        self._arguments, self._verdict, self._mail, self._locks = arguments, verdict, mail, locks
        self._losses, self._fleet = losses, fleet
        self._absences, self._standstills = absences, standstills

    def table(self) -> None:
        arguments, verdict, counts = self._arguments, self._verdict, self._fleet.counts
        lease = LEASE_SECONDS
        rows: list[tuple[str, object, str]] = [
            ("ticks", f"{verdict.ticks:,}", ""),
            ("faults", f"{len(self._fleet.faults):,}", ""),
            ("kills (SIGKILL)", counts["kill"], ""),
            ("stops (SIGSTOP, SIGCONT)", self._count("stop"), ""),
            ("told to end (SIGTERM)", counts["term"], ""),
            *self._troubles(),
            ("processes with a wrong clock", self._skews(), ""),
            ("database away", total(self._absences), ""),
            ("machine stood still", total(self._standstills), ""),
            ("duplicates", verdict.duplicates, "0"),
            ("lost", verdict.lost, "0"),
            ("early", verdict.early, "0"),
            ("out of order", verdict.out_of_order, "0"),
            ("executions with a wrong outcome", verdict.not_final, "0"),
            ("skipped (the previous run was in force)", verdict.skipped, ""),
            ("outage (the database was away)", verdict.outage, ""),
            ("missed, as a crash had lost the commits of their runs", verdict.undone, ""),
            ("lost or missed, as rows of their workers were deleted", verdict.deleted, ""),
            ("cancelled by the operator", f"{verdict.cancelled} of {counts['cancel']} requests", ""),
            (
                "runs that failed, of them not tried again due to another fault",
                f"{verdict.failed}, {verdict.untried}",
                "",
            ),
            ("take-over after SIGKILL", times(verdict.take_over), f"<= {lease + 1:.0f} s"),
            ("take-over after SIGSTOP or silence", times(verdict.take_over_of_stopped), ""),
            ("hand-over after SIGTERM", times(verdict.hand_over), "<= 1 s"),
            ("both, if another fault came in between", times(verdict.excused), ""),
            ("start after the tick, without faults", times(verdict.calm_lateness), "p99 <= 50 ms"),
            ("start after the tick, all", times(verdict.lateness), ""),
            ("statements of an instance that loses a tick, without faults", statements(self._losses), "<= 1"),
            *self._messages(),
            ("locks held", f"{self._locks.held:,}", ""),
            ("locks held by two, or not in the order of their tokens", self._locks.overlaps, "0"),
        ]
        title = (
            f"{arguments.engine}, {arguments.minutes:g} min, {arguments.processes} processes, lease {lease:g} s, "
            f"seed {arguments.seed}"
        )
        print(f"| {title} | | target |\n|---|---|---|")
        for name, value, target in rows:
            print(f"| {name} | {value} | {target} |")
        print(flush=True)

    def _messages(self) -> list[tuple[str, object, str]]:
        mail = self._mail
        return [
            ("messages", f"{mail.enqueued:,}", ""),
            ("handled", f"{mail.handled:,}", ""),
            ("buried (messages that always fail)", mail.buried, ""),
            ("refused, as their key was taken", mail.refused, ""),
            ("postponed (Later)", f"{mail.postponed:,} times", ""),
            ("topics paused", self._fleet.counts["pause"], ""),
            ("claimed while their topic was paused", mail.paused, "0"),
            ("handled twice", mail.twice, "0"),
            ("not handled", mail.lost, "0"),
            ("handled early", mail.early, "0"),
            ("broken in another way (rollback, key, attempt, error)", mail.wrong, "0"),
            ("from due to done, without faults", times(mail.calm_seconds), ""),
            ("from due to done, without pauses", times(mail.seconds), ""),
        ]

    def _troubles(self) -> list[tuple[str, object, str]]:
        counts, faults = self._fleet.counts, self._fleet.faults
        others: list[tuple[str, object, str]] = [
            ("rows deleted", sum(len(each.deleted) for each in faults), ""),
            ("transactions held open by another client", counts["transaction"], ""),
            ("storms of notifications", counts["storm"], ""),
            ("backups: begun, complete", f"{counts['backup']}, {self._fleet.clients.backups}", ""),
        ]
        if self._arguments.engine == "sqlite":
            return [("write lock held", counts["hold"], ""), *others]
        lossy = sum(fault.kind == "crash" and fault.note == LOST_COMMITS for fault in faults)
        return [
            ("connections cut", counts["cut"], ""),
            ("silent lines", self._count("silence"), ""),
            ("database restarts", counts["restart"], ""),
            ("database crashes", f"{counts['crash']}, {lossy} of them lost acknowledged commits", ""),
            ("fail-overs that left the sockets open", counts["fail_over"], ""),
            *others,
        ]

    def _count(self, kind: str) -> str:
        faults = [fault for fault in self._fleet.faults if fault.kind == kind]
        longer = sum(fault.until - fault.at > LEASE_SECONDS for fault in faults)
        return f"{len(faults)}, {longer} of them past the lease"

    def _skews(self) -> str:
        if self._arguments.engine == "sqlite":
            return "none: the host's clock is the database's"
        if FAKETIME is None:
            return "none: libfaketime is not installed"
        return f"{self._fleet.counts['skews']} of {self._fleet.counts['starts']}"

    def violations(self, oracle: Oracle, logs: Path) -> bool:
        """Print the violations with their history. Return whether the promise was kept."""
        found = self._verdict.violations
        for key, what in found[:MOST_SHOWN]:
            print(f"VIOLATION: {key[0]}, tick {key[1].isoformat()}: {what}")
            for line in oracle.history(key):
                print(f"    {line}")
        if len(found) > MOST_SHOWN:
            print(f"... and {len(found) - MOST_SHOWN} more: {Counter(what for _, what in found[MOST_SHOWN:])}")
        problems = self._fleet.problems + [f"{count} x {text}" for text, count in tracebacks(logs).items()]
        problems += (
            self._fleet.clients.problems + self._mail.violations[:MOST_SHOWN] + self._locks.violations[:MOST_SHOWN]
        )
        for problem in problems:
            print(f"VIOLATION: {problem}")
        return not found and not problems


def tracebacks(logs: Path) -> Counter[str]:
    """Count the tracebacks in the processes' logs by the log line before and the error at the end."""
    found: Counter[str] = Counter()
    for path in sorted(logs.glob("*-*.log")):
        for entry in re.split(r"^(?=\[?\d{4}-\d\d-\d\d )", path.read_text(errors="replace"), flags=re.MULTILINE):
            message, *lines = entry.splitlines() or [""]
            if any(line.startswith("Traceback ") for line in lines):
                error = next((line for line in reversed(lines) if re.match(r"[\w.]*[a-z](: |$)", line)), "")
                is_failed = "Failed at the tick" in message and error == f"ValueError: {BY_DESIGN}"
                if not is_failed and not ("Buried the message letters:" in message and error.startswith(_LAST_WORDS)):
                    found[f"traceback in {path.name}: {message[24:]}: {error}"] += 1
    return found


def total(spans: list[tuple[float, float]]) -> str:
    return f"{len(spans)} times, {sum(until - since for since, until in spans):.1f} s"


def statements(losses: dict[int, int]) -> str:
    """Return the mean, and the number of ticks that cost a loser more than one statement."""
    lost = sum(losses.values())
    if not lost:
        return "none"
    mean = sum(count * ticks for count, ticks in losses.items()) / lost
    more = ", ".join(f"{ticks:,} cost {count}" for count, ticks in losses.items() if count > 1)
    return f"{mean:.3f} of {lost:,}" + (f"; {more}" if more else "")


def times(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    p50, p99, most = (quantile(seconds, share) for share in (0.5, 0.99, 1))
    return f"p50 {p50:.3f} / p99 {p99:.3f} / max {most:.3f} s of {len(seconds):,}"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
    sys.exit(130)
