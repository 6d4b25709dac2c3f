"""Judges the soak's messages: each must be handled once, in spite of all faults."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, Row, select

from background.database.tables import message_errors, messages

from .soak_fleet import Fault
from .soak_messages import POISON, POSTPONED, POSTPONEMENTS, TOPICS, Letters, letters, receipts

UNDER_WAY_SECONDS = 0.5  # a claim that began before the commit of a pause may end after it


@dataclass
class Verdict:
    """Counts, lists of seconds, and the violations as sentences."""

    enqueued: int = 0
    handled: int = 0
    buried: int = 0
    refused: int = 0
    postponed: int = 0
    paused: int = 0
    twice: int = 0
    lost: int = 0
    early: int = 0
    wrong: int = 0
    calm_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Oracle:
    """The rows of one database about the soak's messages, read once."""

    def __init__(self, engine: Engine, faults: Iterable[Fault] = ()) -> None:
        self._pauses = [fault for fault in faults if fault.topic]
        most = {worker.topic: worker.max_attempts for worker in TOPICS}
        with engine.connect() as connection:
            ours = select(messages).where(messages.c.topic.in_(most)).order_by(messages.c.id)
            self._messages = connection.execute(ours).all()
            self._records = {row.id: row for row in connection.execute(select(letters))}
            self._receipts: dict[str, list[Row[Any]]] = defaultdict(list)
            for row in connection.execute(select(receipts).order_by(receipts.c.id)):
                self._receipts[row.letter].append(row)
            self._errors: dict[int, list[Row[Any]]] = defaultdict(list)
            for row in connection.execute(select(message_errors).order_by(message_errors.c.id)):
                self._errors[row.message].append(row)
        self._letter_of = {row.id: str(json.loads(row.payload)["letter"]) for row in self._messages}
        self._most = most

    def open(self, until: datetime) -> list[int]:
        """Return the messages enqueued up to `until` that are neither done nor buried."""
        return [row.id for row in self._messages if row.enqueued_at <= until and row.finished_at is None]

    def judge(self, since: datetime, calm_until: datetime, until: datetime) -> Verdict:
        verdict = Verdict(enqueued=len(self._messages))
        self._judge_letters(verdict)
        for row in self._messages:
            self._judge_message(verdict, row, until)
            if row.state == "done" and row.enqueued_at > since and row.topic == Letters.topic:  # the quick messages
                self._time(verdict, row, calm_until)
        return verdict

    def _judge_letters(self, verdict: Verdict) -> None:
        """Check that each letter has one message, except a refused letter, and that each message has a letter."""
        times, keys = Counter(self._letter_of.values()), {row.key for row in self._messages}
        for letter in self._records.values():
            verdict.refused += letter.refused
            if letter.refused and (times[letter.id] or letter.key not in keys):
                verdict.wrong += 1
                verdict.violations.append(f"letter {letter.id}: its key {letter.key} was refused without a reason")
            elif not letter.refused and times[letter.id] == 0:
                verdict.lost += 1
                verdict.violations.append(f"letter {letter.id}: committed, and its message is not there")
            elif times[letter.id] > 1:
                verdict.twice += 1
                verdict.violations.append(f"letter {letter.id}: {times[letter.id]} messages")
        for letter_id in (times.keys() | self._receipts.keys()) - self._records.keys():
            verdict.wrong += 1
            verdict.violations.append(f"letter {letter_id}: rolled back, and its message is there, or was handled")

    def _judge_message(self, verdict: Verdict, row: Row[Any], until: datetime) -> None:
        done = self._receipts[self._letter_of[row.id]]
        verdict.handled += row.state == "done"
        verdict.buried += row.state == "dead"
        if len(done) > 1:
            verdict.twice += 1
            self._violated(verdict, row, f"handled {len(done)} times")
        if any(each.at < row.due_at for each in done):
            verdict.early += 1
            self._violated(verdict, row, "handled before it was due")
        if (row.state == "done") != bool(done):
            verdict.lost += row.state == "done"
            verdict.wrong += row.state != "done"
            self._violated(verdict, row, f"{row.state}, with {len(done)} effects")
        self._judge_postponements(verdict, row)
        if any(_begins_in(pause, row) for pause in self._pauses):
            verdict.paused += 1
            self._violated(verdict, row, "claimed while its topic was paused")
        if row.finished_at is None:
            if row.enqueued_at <= until:
                verdict.lost += 1
                self._violated(verdict, row, f"left {row.state}")
        elif (row.state == "dead") != (json.loads(row.payload)["kind"] == POISON):
            verdict.wrong += 1
            self._violated(verdict, row, f"{row.state}, which is wrong")
        else:
            self._judge_errors(verdict, row)

    def _judge_errors(self, verdict: Verdict, row: Row[Any]) -> None:
        """Check that each counted attempt that failed has its error, and that no other claim counts."""
        attempts = [error.attempt for error in self._errors[row.id]]
        failed = self._most[row.topic] if row.state == "dead" else row.attempt - 1
        if attempts != list(range(1, failed + 1)):
            verdict.wrong += 1
            self._violated(verdict, row, f"{row.state}, with errors of the attempts {attempts}")

    def _judge_postponements(self, verdict: Verdict, row: Row[Any]) -> None:
        """Check that each postponement cost a claim and no attempt, and that no other message was postponed."""
        times, is_asked = row.postponed or 0, json.loads(row.payload)["kind"] == POSTPONED
        verdict.postponed += times
        if times > (min(POSTPONEMENTS, row.token - row.attempt) if is_asked else 0):
            verdict.wrong += 1
            self._violated(verdict, row, f"postponed {times} times")

    def _time(self, verdict: Verdict, row: Row[Any], calm_until: datetime) -> None:
        seconds = (row.finished_at - row.due_at).total_seconds()
        since, until = row.due_at.timestamp(), row.finished_at.timestamp()
        if any(each.topic == row.topic and each.at < until and since < each.until for each in self._pauses):
            return
        verdict.seconds.append(seconds)
        if row.due_at <= calm_until:
            verdict.calm_seconds.append(seconds)

    def _violated(self, verdict: Verdict, row: Row[Any], what: str) -> None:
        lines = [f"message {row.topic}:{row.id}: {what}", *self._history(row)]
        verdict.violations.append("\n    ".join(lines))

    def _history(self, row: Row[Any]) -> Iterator[str]:
        yield (
            f"{row.state}, attempt {row.attempt}, token {row.token}, batch {row.batch}, {row.instance_name}, enqueued "
            f"{row.enqueued_at:%H:%M:%S.%f}, due {row.due_at:%H:%M:%S.%f}, claimed {row.claimed_at}, {row.finished_at}"
        )
        for error in self._errors[row.id]:
            last = error.error.strip().splitlines()[-1]
            yield f"attempt {error.attempt} failed at {error.at:%H:%M:%S.%f} on {error.instance_name}: {last}"
        for receipt in self._receipts[self._letter_of[row.id]]:
            yield f"handled by token {receipt.token}, {receipt.pid}, {receipt.at:%H:%M:%S.%f}"


def _begins_in(pause: Fault, row: Row[Any]) -> bool:
    """Return whether the last claim of the message began between the commit of the pause and its end."""
    if pause.topic != row.topic or pause.committed is None or row.claimed_at is None:
        return False
    return pause.committed + UNDER_WAY_SECONDS < row.claimed_at.timestamp() < pause.until
