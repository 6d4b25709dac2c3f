"""The processes of the soak, and what is done to them. At any time two of them are left alone."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import IO

from .soak_database import Postgresql, Sqlite

ROOT = Path(__file__).parent.parent
LEASE_SECONDS, HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 2.0, 0.5, 5.0
LEFT_ALONE = 2
SETTLED_SECONDS = 1.0  # after a start, or a stop for longer than the lease
EXIT_SECONDS = SHUTDOWN_SECONDS + 5  # after a SIGTERM; a process that is told ends long before
START_SECONDS = 60
SKEWS = ("-60", "-7", "-1", "+1", "+7", "+60")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@dataclass
class Fault:
    """What was done, when (Unix seconds, the database's clock: both are this host's), to which process."""

    kind: str
    at: float
    pid: int = 0
    until: float = 0.0
    note: str = ""


@dataclass
class Life:
    """One process from its start to its end."""

    slot: int
    popen: "subprocess.Popen[bytes]"
    log: Path
    skew: str | None
    state: str = "starting"  # up, stopped, ending
    since: float = field(default_factory=time.monotonic)
    fault: Fault | None = None
    resumes: float = 0.0

    @property
    def pid(self) -> int:
        return self.popen.pid

    def has_joined(self) -> bool:
        return b" joined with " in self.log.read_bytes()

    def turn(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()


class Fleet:
    """`size` slots; each holds a process, or the moment of its next start."""

    def __init__(self, size: int, database: Sqlite | Postgresql, logs: Path, random: Random, seed: int) -> None:
        self.faults: list[Fault] = []
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.pids: set[int] = set()
        self._database, self._logs, self._random, self._seed = database, logs, random, seed
        self._slots: list[Life | float] = [0.0] * size
        self._began = time.monotonic()
        self._log: IO[str] = (logs / "faults.log").open("w", buffering=1)

    @property
    def lives(self) -> list[Life]:
        return [life for life in self._slots if isinstance(life, Life)]

    def are_all_up(self) -> bool:
        return all(isinstance(life, Life) and life.state == "up" for life in self._slots)

    # -- keeping them alive --------------------------------------------------------------------

    def look_after(self) -> None:
        """What a supervisor does, at once: start what is to be started, and note what ended by itself."""
        for slot, life in enumerate(self._slots):
            if isinstance(life, float):
                if time.monotonic() >= life:
                    self._slots[slot] = self._start(slot)
            elif life.popen.poll() is not None:
                self._ended(life)
            elif life.state == "starting" and life.has_joined():
                life.turn("up")
            elif life.state == "stopped" and time.monotonic() >= life.resumes:
                self._resume(life)
            elif life.state == "starting" and time.monotonic() - life.since > START_SECONDS:
                self._kill_hung(life, f"did not join within {START_SECONDS} s")
            elif life.state == "ending" and time.monotonic() - life.since > EXIT_SECONDS:
                self._kill_hung(life, f"did not end within {EXIT_SECONDS:.0f} s of a SIGTERM")

    def _start(self, slot: int) -> Life:
        self.counts["starts"] += 1
        skew = self._random.choice(SKEWS) if self._can_skew and self._random.random() < 0.4 else None
        log = self._logs / f"{slot}-{self.counts['starts']:04}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", "flask", "workers", "run"],
                env=self._environment(skew),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is for the soak, which ends them by itself
            )
        self.pids.add(popen.pid)
        self.counts["skews"] += bool(skew)
        self._note("start", f"{popen.pid} in slot {slot}" + (f", its clock {skew} s" if skew else ""))
        return Life(slot, popen, log, skew)

    @property
    def _can_skew(self) -> bool:
        return self._database.can_skew and FAKETIME.exists()

    def _environment(self, skew: str | None) -> dict[str, str]:
        own = ("FLASK_", "WORKERS_", "WERKZEUG_", "DATABASE_URL", "LOG_LEVEL", "PYTHON")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        environment |= {
            "FLASK_APP": "benchmarks.soak_worker",
            "DATABASE_URL": self._database.url,
            "SECRET_KEY": "soak",
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
            self.counts["exits in time"] += 1
            if code != 0:
                self.problems.append(f"{life.log.name}: ended with {code} on a SIGTERM")
        else:
            pause = 0.5
            self.counts["ends by itself"] += 1
            if life.state == "up" or not self._is_excused(life):
                self.problems.append(f"{life.log.name}: {life.state}, ended by itself with {code}")
        self._slots[life.slot] = time.monotonic() + pause

    def _is_excused(self, life: Life) -> bool:
        """A process may refuse to start where the database is not there, or restarts, at that moment."""
        began = time.time() - (time.monotonic() - life.since)
        return any(fault.kind in ("restart", "cut", "hold") and fault.until > began for fault in self.faults)

    def _kill_hung(self, life: Life, what: str) -> None:
        self.problems.append(f"{life.log.name}: {what}")
        life.popen.kill()
        life.turn("killed")

    # -- faults --------------------------------------------------------------------------------

    def harm(self) -> bool:
        """One fault of a random kind; False where there is no process left to do it to."""
        kinds: list[Callable[[], bool]] = [self._kill] * 4 + [self._stop] * 3 + [self._term] * 3
        kinds += [self._trouble] * 4
        return self._random.choice(kinds)()

    def _victim(self) -> Life | None:
        settled = time.monotonic() - SETTLED_SECONDS
        up = [life for life in self.lives if life.state == "up" and life.since < settled]
        return self._random.choice(up) if len(up) > LEFT_ALONE else None

    def _kill(self) -> bool:
        if life := self._victim():
            self._did(Fault("kill", time.time(), life.pid))
            life.popen.kill()
            life.turn("killed")
        return life is not None

    def _stop(self) -> bool:
        if life := self._victim():
            past_the_lease = self._random.random() < 0.5
            leases = self._random.uniform(1.25, 2.5) if past_the_lease else self._random.uniform(0.05, 0.6)
            seconds = leases * LEASE_SECONDS
            life.fault = self._did(Fault("stop", time.time(), life.pid, note=f"for {seconds:.1f} s"))
            os.kill(life.pid, signal.SIGSTOP)
            life.resumes = time.monotonic() + seconds
            life.turn("stopped")
        return life is not None

    def _resume(self, life: Life) -> None:
        os.kill(life.pid, signal.SIGCONT)
        if life.fault:
            life.fault.until = time.time()
            self._note("resume", str(life.pid))
        life.turn("up")

    def _term(self) -> bool:
        if life := self._victim():
            self._did(Fault("term", time.time(), life.pid))
            life.popen.terminate()
            life.turn("ending")
        return life is not None

    def _trouble(self) -> bool:
        kind = self._random.choice(self._database.faults)
        fault = Fault(kind, time.time())
        fault.note = str(getattr(self._database, kind)(self._random))
        fault.until = time.time() + 1.0
        self._did(fault)
        return True

    def _did(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        self.counts[fault.kind] += 1
        self._note(fault.kind, f"{fault.pid or ''} {fault.note}", fault.at)
        return fault

    def _note(self, what: str, text: str, at: float | None = None) -> None:
        clock = datetime.fromtimestamp(time.time() if at is None else at, UTC)
        self._log.write(f"{time.monotonic() - self._began:8.3f} {clock.isoformat()} {what}: {text}\n")

    # -- the end -------------------------------------------------------------------------------

    def resume_all(self) -> None:
        for life in self.lives:
            if life.state == "stopped":
                self._resume(life)

    def term_all(self) -> None:
        """Every one is told to end, and has to do so in time and with 0."""
        for life in self.lives:
            self._note("the end", str(life.pid))
            life.popen.terminate()
            life.turn("ending")
        for life in self.lives:
            try:
                life.popen.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.problems.append(f"{life.log.name}: did not end within {EXIT_SECONDS:.0f} s of a SIGTERM")
            else:
                self._ended(life)

    def close(self) -> None:
        """Whatever happened, leave no process behind, nor what libfaketime leaves of one that was killed."""
        for life in self.lives:
            if life.popen.poll() is None:
                life.popen.kill()
                life.popen.wait()
        for pid in self.pids:
            for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
                Path("/dev/shm", name).unlink(missing_ok=True)
        self._log.close()
