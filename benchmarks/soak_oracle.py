"""Judges the effects and the history of the soak's workers: the promise must hold in spite of all faults."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import Engine, Row, select

from background.database.tables import executions
from background.schedule.periods import Every

from .soak_fleet import HEARTBEAT_SECONDS, LEASE_SECONDS, Fault
from .soak_worker import BACKOFF_SECONDS, BY_DESIGN, SLICES, effects, workers

Key = tuple[str, datetime]
Spans = Sequence[tuple[float, float]]  # in Unix seconds

CATCHING_UP_SECONDS = 2.0  # after an outage
PUT_OFF_SECONDS = 1.0  # after an outage, for the ticks of 80 workers
MET_SECONDS = 0.1  # from the recovery of a tick to its next claim
_MOST_USUAL_SECONDS = 0.5  # a later start is not the machine's fault


@dataclass
class Verdict:
    """Counts, lists of seconds, and the violations: a sentence with its worker and tick."""

    ticks: int = 0
    skipped: int = 0
    outage: int = 0
    undone: int = 0
    deleted: int = 0
    cancelled: int = 0
    failed: int = 0
    untried: int = 0
    duplicates: int = 0
    lost: int = 0
    early: int = 0
    out_of_order: int = 0
    not_final: int = 0
    take_over: list[float] = field(default_factory=list)
    take_over_of_stopped: list[float] = field(default_factory=list)
    hand_over: list[float] = field(default_factory=list)
    excused: list[float] = field(default_factory=list)
    calm_lateness: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    violations: list[tuple[Key, str]] = field(default_factory=list)


class Oracle:
    """The rows of one database about the soak's workers, read once."""

    def __init__(
        self, engine: Engine, absences: Spans = (), standstills: Spans = (), faults: Iterable[Fault] = ()
    ) -> None:
        self._absences, self._standstills, self._faults = absences, standstills, list(faults)
        self._crashes = [(fault.at, fault.until) for fault in self._faults if fault.kind == "crash"]
        self._deletions: dict[str, list[float]] = defaultdict(list)
        for fault in self._faults:
            for claim in fault.deleted:
                self._deletions[claim.worker].append(fault.at)
        self._periods = {worker.name: Every(worker.period) for worker in workers() if worker.period}
        with engine.connect() as connection:
            ran = executions.c.worker.in_(self._periods)
            self._executions = connection.execute(select(executions).where(ran).order_by(executions.c.id)).all()
            self._effects = connection.execute(select(effects).order_by(effects.c.id)).all()
        self._runs: dict[Key, list[Row[Any]]] = defaultdict(list)
        self._not_run: dict[str, list[Row[Any]]] = defaultdict(list)
        self._done: dict[Key, list[Row[Any]]] = defaultdict(list)
        for row in self._executions:
            if row.state in ("skipped", "missed"):
                self._not_run[row.worker].append(row)
            else:
                self._runs[row.worker, row.tick].append(row)
        for row in self._effects:
            if row.part == 0:
                self._done[row.worker, row.tick].append(row)

    def open(self, since: datetime, until: datetime) -> list[Key]:
        """Return the ticks after `since`, up to `until`, without an effect or an excuse."""
        return [key for key in self._ticks(since, until) if not self._done[key] and not self._excuse(key)]

    def judge(self, since: datetime, calm_until: datetime, until: datetime) -> Verdict:
        verdict = Verdict()
        self._judge_ticks(verdict, since, until)
        self._judge_effects(verdict)
        self._judge_notes(verdict)
        self._judge_states(verdict, until)
        self._judge_cancelled(verdict)
        self._judge_slices(verdict)
        self._judge_retries(verdict)
        self._time_starts(verdict, since, calm_until, until)
        for fault in self._faults:
            self._time_others(verdict, fault)
        return verdict

    def history(self, key: Key) -> Iterator[str]:
        """Yield the executions and effects of the tick and of the two periods before it."""
        worker, tick = key
        since = tick - 2 * self._periods[worker].period
        for row in self._executions:
            if row.worker == worker and since <= (row.through or row.tick) and row.tick <= tick:
                reason = (row.reason or "").strip().splitlines()[-1:]
                through = f" to {row.through:%H:%M:%S.%f}" if row.through else ""
                yield (
                    f"{row.id}: tick {row.tick:%H:%M:%S.%f}{through} {row.trigger} {row.state}, attempt {row.attempt}, "
                    f"token {row.token}, {row.instance_name}, {_time(row.started_at)} to {_time(row.finished_at)} "
                    f"{' '.join(reason)}"
                )
        for row in self._effects:
            if row.worker == worker and since <= row.tick <= tick:
                what = f"part {row.part}" if row.part else "done"
                by = f"token {row.token}, {row.pid}, {_time(row.at)}"
                yield f"effect {row.id}: tick {row.tick:%H:%M:%S.%f} {what}, {by}"

    # -- each tick once ------------------------------------------------------------------------

    def _ticks(self, since: datetime, until: datetime) -> Iterator[Key]:
        for worker, schedule in self._periods.items():
            tick = schedule.next(since)
            while tick <= until:
                yield worker, tick
                tick = schedule.next(tick)

    def _judge_ticks(self, verdict: Verdict, since: datetime, until: datetime) -> None:
        for key in self._ticks(since, until):
            verdict.ticks += 1
            if not self._done[key]:
                excuse = self._excuse(key)
                verdict.skipped += excuse == "skipped"
                verdict.outage += excuse == "outage"
                verdict.undone += excuse == "undone"
                verdict.deleted += excuse == "deleted"
                verdict.cancelled += excuse == "cancelled"
                verdict.untried += excuse == "untried"
                if not excuse:
                    verdict.lost += 1
                    verdict.violations.append((key, "lost"))

    def _excuse(self, key: Key) -> str | None:
        """Return the reason why a tick may lack an effect, if the history has a note of it.

        `skipped`: the previous run was in force. `outage`: the database was away until the next tick. `undone`: a crash
        lost commits after the tick. `deleted`: rows of the worker were deleted then. `cancelled`: its run was.
        `untried`: its run failed, and another fault came before the next attempt.
        """
        worker, tick = key
        if any(row.state == "cancelled" for row in self._runs.get(key, ())):
            return "cancelled"
        for row in self._not_run[worker]:
            if row.tick <= tick <= row.through:
                if row.state == "skipped" and self._was_in_force(worker, tick, row.finished_at):
                    return "skipped"
                if row.state == "missed" and self._was_away(tick, self._periods[worker].next(tick)):
                    return "outage"
                if loss := self._loss(worker, tick, row.finished_at):
                    return loss
        if self._is_untried(key):
            return "untried"
        lost = (row for row in self._runs.get(key, ()) if row.state == "lost")
        return next(("deleted" for row in lost if self._loss(worker, tick, row.finished_at) == "deleted"), None)

    def _is_untried(self, key: Key) -> bool:
        """Return whether a run failed, and an outage or a deletion lasted from then to the next tick."""
        rows, until = self._runs.get(key) or (), self._periods[key[0]].next(key[1])
        if not rows or rows[-1].state != "failed":
            return False
        ended, most = rows[-1].finished_at.timestamp(), until.timestamp() - PUT_OFF_SECONDS
        is_away = any(gone <= ended + BACKOFF_SECONDS * 1.5 and most <= back for gone, back in self._absences)
        return is_away or self._loss(key[0], key[1], until) is not None

    def _loss(self, worker: str, tick: datetime, noted: datetime) -> str | None:
        """Return the kind of loss between the tick and its note."""
        if self._crashed(tick, noted):
            return "undone"
        since, until = tick.timestamp(), noted.timestamp()
        # A worker's row that was deleted may be missing for a lease.
        if any(since - LEASE_SECONDS - 1 <= at <= until for at in self._deletions[worker]):
            return "deleted"
        return None

    def _was_in_force(self, worker: str, tick: datetime, noted: datetime) -> bool:
        return any(
            row.started_at <= noted and (row.finished_at is None or row.finished_at >= tick)
            for (name, before), rows in self._runs.items()
            if name == worker and before < tick
            for row in rows
        )

    def _was_away(self, since: datetime, until: datetime) -> bool:
        """Return whether the database was away from a tick until the next one, or until right before it.

        The fleet needs a moment for the ticks of all workers that an outage put off.
        """
        began, ended = since.timestamp(), until.timestamp() - PUT_OFF_SECONDS
        return any(gone <= began and ended <= back for gone, back in self._absences)

    def _judge_effects(self, verdict: Verdict) -> None:
        last: dict[str, datetime] = {}
        seen: set[tuple[str, datetime, int]] = set()
        for row in self._effects:
            key, part = (row.worker, row.tick), (row.worker, row.tick, row.part)
            if part in seen:
                verdict.duplicates += 1
                verdict.violations.append((key, "done twice"))
            seen.add(part)
            if row.at < row.tick:
                verdict.early += 1
                verdict.violations.append((key, f"done {(row.tick - row.at).total_seconds():.3f} s early"))
            if row.tick < last.get(row.worker, row.tick):
                verdict.out_of_order += 1
                verdict.violations.append((key, f"done after {_time(last[row.worker])}"))
            last[row.worker] = row.tick

    def _judge_notes(self, verdict: Verdict) -> None:
        """Check that no note denies a tick that was done, and that each done tick has its execution."""
        recorded = {(row.worker, row.token) for rows in self._runs.values() for row in rows}
        for key, rows in self._done.items():
            worker, tick = key
            for row in rows:
                rewritten = (
                    each for each in self._runs.get(key, ()) if each.token is None and each.state == "succeeded"
                )
                if (worker, row.token) not in recorded and not any(rewritten):
                    verdict.not_final += 1
                    verdict.violations.append((key, f"done by the token {row.token}, which no execution has"))
            for note in self._not_run[worker] if rows else ():
                if note.tick <= tick <= note.through:
                    verdict.not_final += 1
                    verdict.violations.append((key, f"done, and noted as {note.state}"))

    def _judge_states(self, verdict: Verdict, until: datetime) -> None:
        by_worker: dict[str, list[Row[Any]]] = defaultdict(list)
        for key, rows in self._runs.items():
            by_worker[key[0]] += rows
            for row in rows:
                if row.started_at < row.tick:
                    verdict.early += 1
                    verdict.violations.append((key, f"begun {(row.tick - row.started_at).total_seconds():.3f} s early"))
                # When the whole fleet ends, no instance is left to recover the last one's runs.
                is_left = row.state == "running" and row.tick > until
                is_final = row.state in ("succeeded", "lost", "handed back", "cancelled")
                if not (is_final or is_left or self._failed_by_design(row)):
                    verdict.not_final += 1
                    verdict.violations.append((key, f"an execution that {row.state}"))
                tokens = [done.token for done in self._done[key]]
                # A row that was written again has no token if another row has that token.
                has_effect = row.token in tokens if row.token else row.state == "succeeded" and bool(tokens)
                if (row.state == "succeeded") != has_effect:
                    verdict.not_final += 1
                    verdict.violations.append((key, f"{row.state}, but the effects are those of the tokens {tokens}"))
        for worker, rows in by_worker.items():
            numbered = sorted((row for row in rows if row.token), key=lambda row: row.token)
            for one, following in pairwise(numbered):
                is_over = one.finished_at is not None and one.finished_at <= following.started_at
                if not (is_over or self._lost_its_claim(one) or self._lost_its_claim(following)):
                    verdict.out_of_order += 1
                    verdict.violations.append(((worker, following.tick), "begun while another was in force"))

    def _failed_by_design(self, row: Any) -> bool:
        is_first = row.worker.startswith("failing_") and row.attempt == 1
        return is_first and row.state == "failed" and BY_DESIGN in (row.reason or BY_DESIGN)

    def _judge_slices(self, verdict: Verdict) -> None:
        """Check that each done tick of a worker with a cursor did each of its slices."""
        parts: dict[Key, set[int]] = defaultdict(set)
        for row in self._effects:
            parts[row.worker, row.tick].add(row.part)
        for key, rows in self._done.items():
            if key[0].startswith("cursor_") and rows and parts[key] != set(range(SLICES + 1)):
                verdict.lost += 1
                verdict.violations.append((key, f"done with the slices {sorted(parts[key])} only"))

    def _judge_retries(self, verdict: Verdict) -> None:
        """Check that an attempt after a failed one begins after the backoff, and before the next tick."""
        for key, rows in self._runs.items():
            verdict.failed += sum(row.state == "failed" for row in rows)
            for one, following in pairwise(rows):
                if one.state != "failed":
                    continue
                waited = (following.started_at - one.finished_at).total_seconds()
                if waited < BACKOFF_SECONDS * 0.75 and not self._crashed(one.started_at, following.started_at):
                    verdict.early += 1
                    verdict.violations.append((key, f"tried again after {waited:.3f} s"))
                if following.started_at >= self._periods[key[0]].next(key[1]):
                    verdict.out_of_order += 1
                    verdict.violations.append((key, "tried again after the next tick was due"))

    def _judge_cancelled(self, verdict: Verdict) -> None:
        """Check that a cancelled run ended as such, was asked for, commits nothing later, and is not run again."""
        asked_for = {(each.worker, each.token) for fault in self._faults if (each := fault.cancelled)}
        for key, rows in self._runs.items():
            for number, row in enumerate(rows):
                wrong = []
                if row.cancelled_at is not None and row.state not in ("cancelled", "running"):
                    wrong.append(f"cancelled, but it {row.state}")
                if row.state == "cancelled":
                    if (key[0], row.token) not in asked_for:
                        wrong.append("cancelled, although the operator did not ask for it")
                    if rows[number + 1 :]:
                        wrong.append("cancelled, but run again")
                    if any(each.token == row.token and each.at > row.finished_at for each in self._of(key)):
                        wrong.append("cancelled, but it committed later")
                verdict.not_final += len(wrong)
                verdict.violations += [(key, what) for what in wrong]

    def _of(self, key: Key) -> Iterator[Row[Any]]:
        """Yield the effects of the tick, those of its slices too."""
        return (row for row in self._effects if (row.worker, row.tick) == key)

    def _lost_its_claim(self, row: Any) -> bool:
        """Return whether a crash lost the claim of a run that went on.

        Another run may begin until this one is refused. The crash may also lose the end of the run before.
        """
        is_refused = row.state == "lost" and (row.reason or "").startswith("its claim is gone")
        return is_refused and self._crashed(row.started_at, row.finished_at)

    def _crashed(self, since: datetime, until: datetime) -> bool:
        """Return whether the database crashed, or was not back yet, between the two moments."""
        return any(since.timestamp() <= back and gone <= until.timestamp() for gone, back in self._crashes)

    # -- how long it took ----------------------------------------------------------------------

    def _time_starts(self, verdict: Verdict, since: datetime, calm_until: datetime, until: datetime) -> None:
        for (_, tick), rows in self._runs.items():
            if since < tick <= until:
                late = (rows[0].started_at - tick).total_seconds()
                verdict.lateness.append(late)
                if tick <= calm_until:
                    verdict.calm_lateness.append(late)

    def _time_others(self, verdict: Verdict, fault: Fault) -> None:
        """Measure the time between the fault of a process and the start of its ticks on other processes."""
        is_long = fault.kind in ("stop", "silence") and fault.until - fault.at > LEASE_SECONDS
        if fault.kind not in ("kill", "term") and not is_long:
            return
        left = "handed back" if fault.kind == "term" else "lost"
        for key, rows in self._runs.items():
            for one, following in pairwise(rows):
                if one.state == left and _held(one, fault):
                    seconds = following.started_at.timestamp() - fault.at
                    if self._is_met_by_another(fault, one) or self._is_met_by_deletion(fault, one, seconds):
                        verdict.excused.append(seconds)
                    else:
                        self._take_time(verdict, key, fault, seconds)

    def _is_met_by_another(self, fault: Fault, row: Row[Any]) -> bool:
        """Return whether the instance that recovered the tick was harmed at once. Then another lease must end."""
        recovered = row.finished_at.timestamp()
        faults = (each for each in self._faults if each is not fault and each.pids)
        return fault.kind == "kill" and any(0 <= each.at - recovered < MET_SECONDS for each in faults)

    def _is_met_by_deletion(self, fault: Fault, row: Row[Any], seconds: float) -> bool:
        """Return whether rows of the worker were deleted meanwhile: they must heal first."""
        return any(row.started_at.timestamp() <= at <= fault.at + seconds for at in self._deletions[row.worker])

    def _take_time(self, verdict: Verdict, key: Key, fault: Fault, seconds: float) -> None:
        # No instance looks before the lease may have ended.
        matters = fault.at if fault.kind == "term" else fault.at + LEASE_SECONDS - 2 * HEARTBEAT_SECONDS
        # After an outage, the delayed ticks run first.
        absences = ((gone, back + CATCHING_UP_SECONDS) for gone, back in self._absences)
        if any(gone < fault.at + seconds and matters < caught_up for gone, caught_up in absences):
            verdict.excused.append(seconds)
            return
        times, most = {
            "kill": (verdict.take_over, LEASE_SECONDS + 1),
            "stop": (verdict.take_over_of_stopped, None),
            "silence": (verdict.take_over_of_stopped, None),
            "term": (verdict.hand_over, 1.0),
        }[fault.kind]
        times.append(seconds)
        slow = self._stood_still(fault.at, fault.at + seconds) + _usual_lateness(verdict)
        if most is not None and seconds - slow > most:
            at = datetime.fromtimestamp(fault.at, UTC)
            start = f"begun elsewhere {seconds:.3f} s after the {fault.kind} of {fault.pids} at {_time(at)}"
            verdict.violations.append((key, f"{start}, expected at most {most:.0f} + {slow:.3f} s"))

    def _stood_still(self, since: float, until: float) -> float:
        """Return the seconds of this span in which nothing ran on this machine."""
        return sum(max(min(woken, until) - max(due, since), 0.0) for due, woken in self._standstills)


def _usual_lateness(verdict: Verdict) -> float:
    """Return the lateness of this machine without faults: almost zero, unless it is busy."""
    lateness = quantile(verdict.calm_lateness, 0.99) if verdict.calm_lateness else 0.0
    return min(max(lateness, 0.0), _MOST_USUAL_SECONDS)


def _held(row: Row[Any], fault: Fault) -> bool:
    """Return whether the process held this claim at the moment of the fault."""
    at = datetime.fromtimestamp(fault.at, UTC)
    is_same = int(row.instance_name.rpartition(":")[2]) in fault.pids
    return is_same and row.started_at <= at and (row.finished_at is None or row.finished_at >= at)


def _time(at: datetime | None) -> str:
    return f"{at:%H:%M:%S.%f}"[:-3] if at else "-"


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
