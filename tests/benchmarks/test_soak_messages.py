"""The judge of the soak's messages: each is handled once, a postponement is no attempt, and a pause holds."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, insert
from sqlalchemy.pool import NullPool

from background.database.dialects.sqlite import prepare
from background.database.tables import message_errors, messages
from benchmarks.soak_fleet import Fault
from benchmarks.soak_messages import POSTPONED, letters, metadata, receipts
from benchmarks.soak_messages_oracle import UNDER_WAY_SECONDS, Oracle, Verdict

AT = datetime(2026, 3, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)


class Soaked:
    """A database as a soak leaves it, with one letter and its message."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, poolclass=NullPool)
        prepare(self.engine)
        metadata.create_all(self.engine)

    def handled(self, kind: str = "usual", failed: tuple[int, ...] = (), **more: Any) -> None:
        """Insert a message that was handled at AT, after the `failed` attempts."""
        payload = json.dumps({"letter": "a", "kind": kind})
        row = {"topic": "letters", "payload": payload, "state": "done", "attempt": 1, "token": 1}
        row |= {"enqueued_at": AT, "due_at": AT, "claimed_at": AT, "finished_at": AT, **more}
        with self.engine.begin() as connection:
            connection.execute(insert(letters), {"id": "a", "kind": kind, "refused": False})
            number = connection.execute(insert(messages).returning(messages.c.id), row).scalar_one()
            receipt = {"letter": "a", "message": number, "token": row["token"], "pid": 1, "at": AT}
            connection.execute(insert(receipts), receipt)
            for attempt in failed:
                error = {"message": number, "attempt": attempt, "instance_name": "host:1", "error": "no", "at": AT}
                connection.execute(insert(message_errors), error)

    def judge(self, *faults: Fault) -> Verdict:
        return Oracle(self.engine, faults).judge(AT - SECOND, AT - SECOND, AT)


@pytest.fixture
def soaked(sqlite_url: str) -> Soaked:
    return Soaked(sqlite_url)


def sentences(verdict: Verdict) -> list[str]:
    return [line.splitlines()[0].removeprefix("message letters:1: ") for line in verdict.violations]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"token": 3, "postponed": 2}, []),
        ({"token": 4, "attempt": 2, "postponed": 2, "failed": (1,)}, []),
        ({"token": 3, "attempt": 3, "postponed": 2}, ["done, with errors of the attempts []", "postponed 2 times"]),
        ({"token": 2, "postponed": 2}, ["postponed 2 times"]),
        ({"token": 5, "postponed": 3}, ["postponed 3 times"]),
    ],
)
def test_a_postponement_costs_a_claim_and_no_attempt(soaked: Soaked, row: dict[str, Any], said: list[str]) -> None:
    soaked.handled(POSTPONED, **row)
    verdict = soaked.judge()
    assert (sorted(sentences(verdict)), verdict.postponed) == (said, row["postponed"])


def test_a_message_that_did_not_ask_for_it_is_not_postponed(soaked: Soaked) -> None:
    soaked.handled(token=2, postponed=1)
    assert sentences(soaked.judge()) == ["postponed 1 times"]


def test_an_attempt_that_failed_has_its_error(soaked: Soaked) -> None:
    soaked.handled(attempt=3, token=3, failed=(2,))
    assert sentences(soaked.judge()) == ["done, with errors of the attempts [2]"]


def pause(before: float, after: float, committed: bool = True, topic: str = "letters") -> Fault:
    since, until = AT.timestamp() - before, AT.timestamp() + after
    return Fault("pause", since, until=until, topic=topic, committed=since if committed else None)


def test_a_message_that_is_claimed_while_its_topic_is_paused_is_a_violation(soaked: Soaked) -> None:
    soaked.handled()
    late = UNDER_WAY_SECONDS + 0.1
    assert sentences(soaked.judge(pause(late, 1))) == ["claimed while its topic was paused"]
    others = [
        pause(late, -0.1),
        pause(UNDER_WAY_SECONDS - 0.1, 1),
        pause(late, 1, False),
        pause(late, 1, topic="parcels"),
    ]
    assert sentences(soaked.judge(*others)) == []


def test_the_wait_for_the_end_of_a_pause_is_not_timed(soaked: Soaked) -> None:
    soaked.handled(finished_at=AT + SECOND)
    assert soaked.judge().seconds == [1.0]
    assert soaked.judge(pause(1, 0.5, committed=False)).seconds == []
    assert soaked.judge(pause(1, -0.5)).seconds == [1.0]
