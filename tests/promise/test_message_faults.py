"""Messages while processes die, freeze and stop, and the database goes away: each message is handled once."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy import text as sql
from sqlalchemy.pool import NullPool
from support.databases import close, on_postgresql, on_sqlite, text
from support.fleet import db, in_threads, make_app
from support.fork_server import Member, Nursery, Shops
from support.message_traces import Letterbox, unread
from support.processes import PATIENCE, eventually, margin
from support.proxy import Proxy
from support.run_traces import Effects
from support.servers import PGBOUNCER, PostgreSQL, pooler
from support.shop import migrate

EXPIRED = "its instance stopped renewing its lease"
LEASE = 1  # for processes that are killed or frozen. The other processes keep their lease on a busy machine


@pytest.fixture
def box(effects: Effects) -> Iterator[Letterbox]:
    box = Letterbox(effects)
    yield box
    close(box.app)


def freeze_one(shops: Shops, at: str, **more: Any) -> Member:
    """Start a process that freezes `at` a point of handling its first batch."""
    settings = {"PROBE_WORKERS": "notes", "PROBE_FREEZES_AT": at, "WORKERS_LEASE_SECONDS": LEASE}
    victim = shops.start(**settings | more)
    victim.wait_until_frozen()
    return victim


def others(shops: Shops, count: int = 2, **more: Any) -> list[Member]:
    return shops.join(count, **{"PROBE_WORKERS": "notes"} | more)


# -- killed ----------------------------------------------------------------------------------------


def kill_with_messages_in_hand(victim: Member, box: Letterbox, topic: str) -> None:
    while True:
        victim.freeze()
        if box.in_hand_of(victim, topic):
            victim.kill()
            return
        if box.are_over(topic):  # before a process could be killed
            box.put(topic, range(500))
        victim.thaw()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("database_url", "topic", "count", "batch"),
    [("sqlite", "bulk", 20_000, 50), ("postgresql", "bulk", 20_000, 50), ("sqlite", "notes", 800, 20)],
    indirect=["database_url"],
)
def test_half_of_eight_consumers_are_killed_while_messages_are_in_flight(
    shops: Shops, box: Letterbox, topic: str, count: int, batch: int
) -> None:
    more = {"PROBE_WORKERS": topic, "PROBE_BATCH": batch}
    victims = others(shops, 4, WORKERS_LEASE_SECONDS=2, PROBE_TAKES=0.3, **more)  # so they nearly always hold messages
    survivors = others(shops, 4, PROBE_TAKES=0.02, **more)
    box.put(topic, range(count))
    for victim in victims:
        kill_with_messages_in_hand(victim, box, topic)
    assert eventually(lambda: box.are_over(topic))
    assert len(box.check_all_done(topic)) == len(box.rows(topic)) >= count
    again = [row.attempt for row in box.rows(topic) if row.attempt > 1]
    assert len(again) >= 4
    assert all(member.is_up for member in survivors)


def test_the_messages_of_a_killed_process_are_taken_over_within_the_lease_and_a_second(
    shops: Shops, box: Letterbox
) -> None:
    box.put("notes", range(5))
    victim = freeze_one(shops, "commit")
    others(shops)
    killed = victim.kill()
    assert eventually(box.are_over)
    found = box.check_all_done()
    assert max(effect.at.timestamp() for effect in found) - killed <= LEASE + 1 + margin()
    assert {effect.attempt for effect in found} == {2}
    assert victim.pid not in box.pids()
    assert box.errors(box.rows()[0].id) == [(1, EXPIRED)]


def test_messages_committed_before_the_kill_are_not_handled_again(shops: Shops, box: Letterbox) -> None:
    box.put("notes", range(5))
    victim = freeze_one(shops, "committed", PROBE_BATCH=5)
    others(shops)
    victim.kill()
    box.put("notes", ["later"])
    assert eventually(box.are_over)
    *first, later = box.check_all_done()
    assert {(effect.pid, effect.attempt) for effect in first} == {(victim.pid, 1)}
    assert later.pid != victim.pid


@on_postgresql
def test_a_commit_whose_reply_was_lost_is_recognized_as_done(
    nursery: Nursery, effects: Effects, box: Letterbox
) -> None:
    box.put("notes", range(5))
    proxy = Proxy(make_url(effects.url))
    shops = Shops(nursery, text(proxy.url))
    try:
        lost = proxy.lose_reply(b"INSERT INTO effects")
        [member] = others(shops, 1)
        assert lost.wait(PATIENCE)
        member.wait_for("The messages are done")
        box.put("notes", ["later"])
        assert eventually(box.are_over)
        assert {effect.attempt for effect in box.check_all_done()} == {1}
    finally:
        proxy.close()
        shops.close()


# -- frozen, and woken up again --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database_url", "at", "count"),
    [
        ("sqlite", "claim", 5),
        ("sqlite", "handling", 1),
        ("postgresql", "claim", 5),
        ("postgresql", "handling", 1),
        ("postgresql", "effect", 5),
        ("postgresql", "commit", 5),  # already acknowledged, so the rows are locked
    ],
    indirect=["database_url"],
)
def test_a_process_that_wakes_after_its_lease_acknowledges_nothing(
    shops: Shops, box: Letterbox, at: str, count: int
) -> None:
    box.put("notes", range(count))
    zombie = freeze_one(shops, at)
    others(shops)
    assert eventually(box.are_over)
    before = box.rows()
    zombie.thaw()
    zombie.wait_for("Lost .* messages?|another instance took them over")
    zombie.wait_for("begins as a new instance")
    assert box.rows() == before
    assert {effect.attempt for effect in box.check_all_done()} == {2}
    assert zombie.pid not in box.pids()
    assert ("Handling" in zombie.output) == (at != "claim")
    assert "Traceback" not in zombie.output


@on_sqlite
@pytest.mark.parametrize(("at", "attempt"), [("effect", 2), ("commit", 1)])
def test_a_tick_is_decided_once_when_a_process_wakes_with_the_write_lock_of_sqlite_after_its_lease(
    shops: Shops, box: Letterbox, at: str, attempt: int
) -> None:
    """Check this although no other process can write before. A busy machine may cost one more lease."""
    box.put("notes", range(5))
    zombie = freeze_one(shops, at)
    others(shops)
    assert eventually(lambda: zombie.pid not in box.living())
    assert box.states() == {"running": 5}
    zombie.thaw()
    zombie.wait_for("begins as a new instance")
    assert eventually(box.are_over)
    attempts = {effect.attempt for effect in box.check_all_done()}
    assert attempts == {attempt} or (at == "effect" and min(attempts) == attempt)
    assert box.errors(box.rows()[0].id)[:1] == ([(1, EXPIRED)] if attempt > 1 else [])


@pytest.mark.parametrize(
    ("database_url", "sender", "at"),
    [("sqlite", "sender", "handling"), ("postgresql", "relays", "effect")],
    indirect=["database_url"],
)
def test_messages_that_a_frozen_process_enqueued_are_not_there(
    shops: Shops, effects: Effects, box: Letterbox, sender: str, at: str
) -> None:
    if sender == "relays":
        box.put("relays", [None])
    more = {"PROBE_WORKERS": f"{sender},notes"}
    zombie = freeze_one(shops, at, **more)
    others(shops, **more)
    assert eventually(lambda: box.rows() and box.are_over())
    zombie.thaw()
    zombie.wait_for("begins as a new instance")
    zombie.wait_for("Lost")
    assert [effect.attempt for effect in effects.all(sender)] == [2]
    assert len(box.check_all_done()) == 1


# -- poison ----------------------------------------------------------------------------------------


def test_a_message_that_kills_its_process_is_buried_and_its_neighbours_are_handled(
    shops: Shops, box: Letterbox
) -> None:
    fleet = others(shops, 4, PROBE_ATTEMPTS=2, WORKERS_LEASE_SECONDS=1.5)
    notes = box.put("notes", [*range(7), "kill", *range(12)])
    assert eventually(box.are_over)
    box.check()
    assert box.states() == {"done": 19, "dead": 1}
    assert box.errors(notes[7]) == [(1, EXPIRED), (2, EXPIRED)]
    survivors = [member for member in fleet if member.is_up]
    assert len(survivors) == 2
    box.put("notes", ["later"])
    assert eventually(box.are_over)
    assert box.check()[-1].pid in {member.pid for member in survivors}


def test_with_one_attempt_a_message_that_kills_its_process_buries_no_neighbour(shops: Shops, box: Letterbox) -> None:
    notes = box.put("notes", [*range(5), "kill", *range(5)])
    for _ in range(2):  # a process may be killed before it logs that it joined
        shops.start(PROBE_WORKERS="notes", PROBE_ATTEMPTS=1, WORKERS_LEASE_SECONDS=2)
    assert eventually(box.are_over)
    assert {effect.attempt for effect in box.check()} == {1}
    assert box.states() == {"done": 10, "dead": 1}
    assert box.errors(notes[5]) == [(1, EXPIRED)]


# -- enqueueing ------------------------------------------------------------------------------------


def test_four_producers_with_the_same_keys_enqueue_each_message_once(
    shops: Shops, effects: Effects, box: Letterbox
) -> None:
    others(shops)
    apps = [make_app(effects.url, unread("notes")) for _ in range(4)]

    def produce(number: int) -> int:
        manager, enqueued = apps[number].extensions["background_workers"], 0
        with apps[number].app_context():
            for each in range(80):
                key = f"key {(each + 20 * number) % 80}"
                enqueued += manager.enqueue("notes", number, key=key) is not None
                db.session.commit()
        return enqueued

    assert sum(in_threads(*(lambda number=number: produce(number) for number in range(4)))) == 80
    assert eventually(box.are_over)
    assert len(box.check_all_done()) == len({row.key for row in box.rows()}) == 80
    close(*apps)


# -- stopping -----------------------------------------------------------------------------------


def test_the_rest_of_a_stopping_process_batch_is_handled_elsewhere_at_once(shops: Shops, box: Letterbox) -> None:
    box.put("notes", ["one", "two", "wait", "four", "five"])
    [leaving] = others(shops, 1)
    leaving.wait_for("The note waits")
    # Their next heartbeats are far away.
    [other] = others(shops, 1, WORKERS_HEARTBEAT_SECONDS=20, WORKERS_LEASE_SECONDS=60)
    leaving.signal(signal.SIGTERM)
    told = time.time()
    leaving.wait()
    assert eventually(box.are_over)
    found = box.check_all_done()
    assert [(effect.pid, effect.attempt) for effect in found] == [(leaving.pid, 1)] * 3 + [(other.pid, 1)] * 2
    assert found[-1].at.timestamp() - told < 1 + margin()


def test_a_message_that_a_process_does_not_finish_in_time_is_handled_elsewhere_without_counting_an_attempt(
    shops: Shops, box: Letterbox
) -> None:
    box.put("notes", ["deaf", "next"])
    [leaving] = others(shops, 1, WORKERS_SHUTDOWN_SECONDS=0.5, PROBE_SECONDS=PATIENCE)
    leaving.wait_for("The note is deaf")
    others(shops, PROBE_SECONDS=0)
    leaving.signal(signal.SIGTERM)
    leaving.wait()
    assert eventually(box.are_over)
    assert {effect.attempt for effect in box.check_all_done()} == {1}
    assert leaving.pid not in box.pids()


# -- the database goes away ------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL(migrate)
    yield server
    server.close()


def test_a_restart_of_the_database_in_the_middle_of_a_batch_loses_and_repeats_nothing(
    nursery: Nursery, server: PostgreSQL
) -> None:
    effects = Effects(text(server.database()))
    box, shops = Letterbox(effects), Shops(nursery, effects.url)
    try:
        members = others(shops, 3, PROBE_BATCH=3, PROBE_SECONDS=2)
        box.put("notes", ["one", "wait", "three"] * 3)  # a notification to all processes: each takes three messages
        for member in members:
            member.wait_for("The note waits")
        server.stop("immediate")
        server.start()
        with box.app.app_context():
            db.engine.dispose()
        assert eventually(box.are_over)
        box.check_all_done()
        assert all(member.is_up for member in members)
    finally:
        shops.close()
        close(box.app)


def listeners(url: str) -> set[int]:
    """Return the connections that listen for messages."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return set(connection.scalars(sql("SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")))


def cut(url: str, connections: set[int]) -> None:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        for pid in connections:
            connection.execute(sql("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


@on_postgresql
def test_a_process_without_its_listener_finds_messages_with_its_heartbeat(shops: Shops, box: Letterbox) -> None:
    [member] = others(shops, 1, PROBE_RETRY=PATIENCE)
    assert eventually(lambda: listeners(box.url))
    cut(box.url, listeners(box.url))
    box.put("notes", ["one"])
    assert eventually(box.are_over)
    assert not listeners(box.url)
    box.check_all_done()
    assert "Traceback" not in member.output


@on_postgresql
def test_a_listener_whose_connection_was_cut_connects_again(shops: Shops, box: Letterbox) -> None:
    """Check this without a heartbeat, so that only LISTEN can notify the process."""
    others(shops, 1, WORKERS_HEARTBEAT_SECONDS=2 * PATIENCE, WORKERS_LEASE_SECONDS=5 * PATIENCE, PROBE_RETRY=0.1)
    first = eventually(lambda: listeners(box.url))
    box.put("notes", ["one"])
    assert eventually(box.are_over)
    cut(box.url, first)
    box.put("notes", ["while no process listens"])
    assert eventually(lambda: listeners(box.url) - first)
    assert eventually(box.are_over)
    box.put("notes", ["three"])
    assert eventually(box.are_over)
    box.check_all_done()


@pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer")
@on_postgresql
def test_behind_a_transaction_mode_pooler_messages_are_handled(
    nursery: Nursery, effects: Effects, box: Letterbox
) -> None:
    with pooler(make_url(effects.url), 3) as pooled:
        shops = Shops(nursery, text(pooled))
        try:
            members = others(shops)
            for number in range(5):
                box.put("notes", range(number + 1))
                assert eventually(box.are_over)
            assert len(box.check_all_done()) == 15
            for member in members:
                member.signal(signal.SIGTERM)
                member.wait()
                assert "Traceback" not in member.output
        finally:
            shops.close()


# -- when ------------------------------------------------------------------------------------------


def test_a_delayed_message_is_handled_when_it_is_due_by_the_database_and_at_most_a_heartbeat_later(
    shops: Shops, box: Letterbox
) -> None:
    others(shops)
    for number in range(10):
        box.put("notes", [number], delay=number * 0.1)
    assert eventually(box.are_over)
    found = box.check_all_done()
    late = [(effect.at - effect.tick).total_seconds() for effect in found]
    assert min(late) >= 0
    assert max(late) <= 0.2 + margin()


# -- releases --------------------------------------------------------------------------------------


def test_messages_of_a_topic_that_a_release_does_not_have_are_left_alone(shops: Shops, box: Letterbox) -> None:
    notes = box.put("notes", range(5))
    victim = freeze_one(shops, "handling")
    victim.kill()
    more = box.put("notes", range(5))
    [without] = others(shops, 1, PROBE_WORKERS="bulk")
    box.put("bulk", range(5))
    assert eventually(lambda: box.are_over("bulk"))
    assert eventually(lambda: victim.pid not in box.living())
    box.put("bulk", range(5))
    assert eventually(lambda: box.are_over("bulk"))
    assert box.states() == {"running": 5, "waiting": 5}
    others(shops, 1)
    assert eventually(box.are_over)
    assert {effect.key: effect.attempt for effect in box.check_all_done()} == {
        **{f"notes:{note}": 2 for note in notes},
        **{f"notes:{note}": 1 for note in more},
    }
    assert "Traceback" not in without.output
