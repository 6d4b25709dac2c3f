"""The processes of the soak and their faults. At any time two processes are left alone."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import IO

from background import BackgroundWorkerManager

from .soak_clients import Clients
from .soak_database import Postgresql, Sqlite
from .soak_operator import Deleted, Pauses, cancel_run, delete_rows

ROOT = Path(__file__).parent.parent
LEASE_SECONDS, HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 2.0, 0.5, 5.0
LEFT_ALONE = 2
SETTLED_SECONDS = 1.0  # after a start, or a stop for longer than the lease
EXIT_SECONDS = SHUTDOWN_SECONDS + 5  # after a SIGTERM, which usually ends a process much sooner
START_SECONDS = 60
EXCUSING = ("restart", "cut", "hold", "crash", "fail_over")  # a process may refuse to start meanwhile
FLASK = ("flask", "workers", "run")
GUNICORN_WORKERS = 2
GUNICORN = (
    *("gunicorn", "--no-control-socket", "-b", "127.0.0.1:0", "-w", str(GUNICORN_WORKERS)),
    "benchmarks.soak_worker:create_app()",
)
SKEWS = ("-60", "-7", "-1", "+1", "+7", "+60")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@dataclass
class Fault:
    """One fault: its kind, its time (Unix seconds) and its instances. This host's clock is also the database's."""

    kind: str
    at: float
    pids: tuple[int, ...] = ()
    until: float = 0.0
    note: str = ""
    deleted: tuple[Deleted, ...] = ()
    cancelled: Deleted | None = None
    topic: str = ""
    # A moment after the commit of a pause. None if the commit may have failed.
    committed: float | None = None


@dataclass
class Life:
    """One process from its start to its end, with its children. Its log says when each of `instances` has joined."""

    slot: int
    popen: "subprocess.Popen[bytes]"
    log: Path
    instances: int
    state: str = "starting"  # up, stopped, silenced, killed, ending
    since: float = field(default_factory=time.monotonic)
    fault: Fault | None = None
    resumes: float = 0.0

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """The pids of the instances that have joined."""
        joined = re.findall(rb"Instance \S+:(\d+) joined with", self.log.read_bytes())
        return tuple(sorted(set(map(int, joined))))

    def has_joined(self) -> bool:
        return len(self.pids) >= self.instances

    def signal(self, number: signal.Signals) -> None:
        """Send the signal to the process and its children. Send SIGTERM only to the process, as a supervisor does."""
        if number == signal.SIGTERM:
            self.popen.send_signal(number)
        else:
            os.killpg(self.pid, number)

    def turn(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()


class Fleet:
    """`size` slots. Each holds a process, or the moment of its next start."""

    def __init__(
        self,
        size: int,
        database: Sqlite | Postgresql,
        logs: Path,
        random: Random,
        seed: int,
        manager: BackgroundWorkerManager,
    ) -> None:
        self.faults: list[Fault] = []
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.pids: set[int] = set()
        self._database, self._logs, self._random, self._seed = database, logs, random, seed
        self._manager, self._pauses = manager, Pauses(manager, random)
        self._slots: list[Life | float] = [0.0] * size
        self._began = time.monotonic()
        self._troubles: list[str] = []
        self._clients: list[str] = []
        self._log: IO[str] = (logs / "faults.log").open("w", buffering=1)

    @property
    def lives(self) -> list[Life]:
        return [life for life in self._slots if isinstance(life, Life)]

    def are_all_up(self) -> bool:
        return all(isinstance(life, Life) and life.state == "up" for life in self._slots)

    @property
    def clients(self) -> Clients:
        return self._database.clients

    # -- keeping them alive --------------------------------------------------------------------

    def look_after(self) -> None:
        """Start and resume processes that are due, and note processes that ended. Do not wait."""
        self._resume_topics()
        for slot, life in enumerate(self._slots):
            if isinstance(life, float):
                if time.monotonic() >= life:
                    self._slots[slot] = self._start(slot)
            elif life.popen.poll() is not None:
                if life.state == "silenced":
                    self._resume(life)
                self._ended(life)
            elif life.state == "starting" and life.has_joined():
                life.turn("up")
            elif life.state in ("stopped", "silenced") and time.monotonic() >= life.resumes:
                self._resume(life)
            elif life.state == "starting" and time.monotonic() - life.since > START_SECONDS:
                self._kill_hung(life, f"did not join within {START_SECONDS} s")
            elif life.state == "ending" and time.monotonic() - life.since > EXIT_SECONDS:
                self._kill_hung(life, f"did not end within {EXIT_SECONDS:.0f} s of a SIGTERM")

    def _start(self, slot: int) -> Life:
        self.counts["starts"] += 1
        instances = GUNICORN_WORKERS if slot % 6 == 2 else 1
        skew = self._random.choice(SKEWS) if self._can_skew and instances == 1 and self._random.random() < 0.4 else None
        log = self._logs / f"{slot}-{self.counts['starts']:04}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", *(FLASK if instances == 1 else GUNICORN)],
                env=self._environment(slot, skew),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C reaches only the soak, which ends the processes itself
            )
        self.pids.add(popen.pid)
        self.counts["skews"] += bool(skew)
        self._note("start", f"{popen.pid} in slot {slot}" + (f", its clock {skew} s" if skew else ""))
        return Life(slot, popen, log, instances)

    @property
    def _can_skew(self) -> bool:
        return self._database.can_skew and FAKETIME is not None

    def _environment(self, slot: int, skew: str | None) -> dict[str, str]:
        own = ("FLASK_", "WORKERS_", "WERKZEUG_", "GUNICORN_", "WEB_", "DATABASE_URL", "LOG_LEVEL", "PYTHON")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        environment |= {
            "FLASK_APP": "benchmarks.soak_worker",
            "DATABASE_URL": self._database.url_of(slot),
            "SECRET_KEY": "of-the-soak-4f1d9a7c3be2",
            "PUBLIC_URL": "https://localhost",
            "PYTHONUNBUFFERED": "1",
            "SOAK_SEED": str(self._seed),
            "WORKERS_LEASE_SECONDS": str(LEASE_SECONDS),
            "WORKERS_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
            "WORKERS_SHUTDOWN_SECONDS": str(SHUTDOWN_SECONDS),
        }
        if skew:
            environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{skew}s", "NO_FAKE_STAT": "1"}
            # Without the second, every wait for the interpreter's lock would time out at once.
            environment |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
        return environment

    def _ended(self, life: Life) -> None:
        code = life.popen.returncode
        self._note("end", f"{life.pid} with {code}")
        if life.state == "killed":
            pause = self._random.choice([0.0, self._random.uniform(0, 4)])
        elif life.state == "ending":
            pause = self._random.choice([0.0, self._random.uniform(0, 2)])
            if code != 0:
                self.problems.append(f"{life.log.name}: ended with {code} on a SIGTERM")
        else:
            pause = 0.5
            if life.state == "up" or not self._is_excused(life):
                self.problems.append(f"{life.log.name}: {life.state}, ended by itself with {code}")
        self._slots[life.slot] = time.monotonic() + pause

    def _is_excused(self, life: Life) -> bool:
        """Return whether a process may refuse to start, because the database is away or restarts."""
        began = time.time() - (time.monotonic() - life.since)
        return any(fault.kind in EXCUSING and fault.until > began for fault in self.faults)

    def _kill_hung(self, life: Life, reason: str) -> None:
        self.problems.append(f"{life.log.name}: {reason}")
        life.signal(signal.SIGKILL)
        life.turn("killed")

    # -- faults --------------------------------------------------------------------------------

    def harm(self) -> bool:
        """Cause one fault of a random kind. Return False if no process is left for it."""
        kinds: list[Callable[[], bool]] = [self._kill] * 4 + [self._stop] * 3 + [self._term] * 3
        kinds += (
            [self._trouble] * 4
            + [self._client] * 4
            + [self._delete, self._cancel, self._pause] * 2
            + [self._silence] * 2 * bool(self._database.proxies)
        )
        return self._random.choice(kinds)()

    def _victim(self, may_be: Callable[[Life], bool] = lambda life: True) -> Life | None:
        settled = time.monotonic() - SETTLED_SECONDS
        up = [life for life in self.lives if life.state == "up" and life.since < settled]
        candidates = [life for life in up if may_be(life)]
        return self._random.choice(candidates) if candidates and len(up) > LEFT_ALONE else None

    def _kill(self) -> bool:
        if life := self._victim():
            self._did(Fault("kill", time.time(), life.pids))
            life.signal(signal.SIGKILL)
            life.turn("killed")
        return life is not None

    def _stop(self) -> bool:
        if life := self._victim():
            seconds = self._some_leases()
            life.fault = self._did(Fault("stop", time.time(), life.pids, note=f"for {seconds:.1f} s"))
            life.signal(signal.SIGSTOP)
            life.resumes = time.monotonic() + seconds
            life.turn("stopped")
        return life is not None

    def _silence(self) -> bool:
        """Block the line between a process and its database, or only the replies."""
        if life := self._victim(lambda life: life.slot in self._database.proxies):
            seconds, replies_only = self._some_leases(), self._random.random() < 0.5
            note = f"{'the replies ' if replies_only else ''}for {seconds:.1f} s"
            life.fault = self._did(Fault("silence", time.time(), life.pids, note=note))
            self._database.proxies[life.slot].silence(replies_only)
            life.resumes = time.monotonic() + seconds
            life.turn("silenced")
        return life is not None

    def _some_leases(self) -> float:
        """Return a time in seconds, shorter or longer than the lease."""
        past_the_lease = self._random.random() < 0.5
        return LEASE_SECONDS * (self._random.uniform(1.25, 2.5) if past_the_lease else self._random.uniform(0.05, 0.6))

    def _resume(self, life: Life) -> None:
        note = ""
        if life.state == "stopped":
            life.signal(signal.SIGCONT)
        else:
            is_cut = self._random.random() < 0.5
            self._database.proxies[life.slot].heal(is_cut)
            note = "and cut" if is_cut else ""
        if life.fault:
            life.fault.until = time.time()
        self._note("resume", f"{life.pid} {note}")
        life.turn("up")

    def _term(self) -> bool:
        if life := self._victim():
            self._did(Fault("term", time.time(), life.pids))
            life.signal(signal.SIGTERM)
            life.turn("ending")
        return life is not None

    def _trouble(self) -> bool:
        """Cause one fault of the database. Its kinds take turns, so that a short soak has all of them."""
        kind = self._next_of(self._troubles, self._database.faults)
        at = time.time()
        note = getattr(self._database, kind)(self._random)
        if note is not None:
            self._did(Fault(kind, at, note=note, until=time.time() + 1.0))
        return note is not None

    def _client(self) -> bool:
        """Start another client of the database. It excuses no broken promise. The kinds of clients take turns."""
        kind, at = self._next_of(self._clients, self._database.clients.kinds), time.time()
        self._did(Fault(kind, at, note=getattr(self._database.clients, kind)(self._random), until=at))
        return True

    def _next_of(self, left: list[str], kinds: Sequence[str]) -> str:
        """Return the next kind of this round. In each round, each kind has one turn, in a new order."""
        if not left:
            left += self._random.sample(kinds, len(kinds))
        return left.pop()

    def _delete(self) -> bool:
        """Delete rows of running workers, as an operator may do."""
        at = time.time()
        deleted = delete_rows(self._database.operator, self._random)
        if deleted:
            note = ", ".join(map(str, deleted))
            self._did(Fault("delete", at, note=note, until=time.time(), deleted=deleted))
        return bool(deleted)

    def _cancel(self) -> bool:
        """Cancel a run, as an operator does."""
        at = time.time()
        cancelled = cancel_run(self._database.operator, self._manager, self._random)
        if cancelled:
            self._did(Fault("cancel", at, note=str(cancelled), until=time.time(), cancelled=cancelled))
        return cancelled is not None

    def _pause(self) -> bool:
        """Pause a topic for a while, as an operator does."""
        at = time.time()
        if paused := self._pauses.pause():
            topic, committed, note = paused
            self._did(Fault("pause", at, until=math.inf, note=note, topic=topic, committed=committed))
        return paused is not None

    def _resume_topics(self, at_once: bool = False) -> None:
        for topic, at in self._pauses.resume(at_once):
            fault = next(fault for fault in reversed(self.faults) if fault.topic == topic)
            fault.until = at
            self._note("resume", topic)

    def _did(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        self.counts[fault.kind] += 1
        self._note(fault.kind, f"{' '.join(map(str, fault.pids))} {fault.note}", fault.at)
        return fault

    def _note(self, event: str, text: str, at: float | None = None) -> None:
        clock = datetime.fromtimestamp(time.time() if at is None else at, UTC)
        self._log.write(f"{time.monotonic() - self._began:8.3f} {clock.isoformat()} {event}: {text}\n")

    # -- the end -------------------------------------------------------------------------------

    def resume_all(self) -> None:
        self._resume_topics(at_once=True)
        for life in self.lives:
            if life.state in ("stopped", "silenced"):
                self._resume(life)

    def term_all(self) -> None:
        """Tell every process to end. Each must end in time and with 0."""
        for life in self.lives:
            self._note("the end", str(life.pid))
            life.signal(signal.SIGTERM)
            life.turn("ending")
        for life in self.lives:
            try:
                life.popen.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.problems.append(f"{life.log.name}: did not end within {EXIT_SECONDS:.0f} s of a SIGTERM")
            else:
                self._ended(life)

    def close(self) -> None:
        """Kill the remaining processes, and remove the files that libfaketime leaves of a killed process."""
        for life in self.lives:
            if life.popen.poll() is None:
                life.signal(signal.SIGKILL)
                life.popen.wait()
        for pid in self.pids:
            for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
                Path("/dev/shm", name).unlink(missing_ok=True)
        self._log.close()
