"""The search for messages: each filter, the order and the bounds of a search, errors in groups, and bulk changes."""

import re
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, text, update
from support.databases import on_postgresql, on_sqlite
from support.fleet import Fleet, in_threads, statements, states

from background import BackgroundWorkerManager, MessageWorker, UnknownTopic, WrongState
from background.database import tables
from background.history.browsing import search
from background.history.browsing.filters import Filter
from background.history.messages import Browsed, Change

DAY = timedelta(days=1)


class Orders(MessageWorker):
    topic = "orders"

    def handle(self, *_: Any) -> None:
        """Handle nothing: no instance runs here."""


class Mail(Orders):
    topic = "mail"


@pytest.fixture
def manager(fleet: Fleet) -> BackgroundWorkerManager:
    return fleet.manager(Orders, Mail)


def put(fleet: Fleet, topic: str = "orders", payload: str = '"x"', error: str | None = None, **columns: Any) -> int:
    """Insert a message, by default one that was enqueued a moment ago and waits. Return its id."""
    clock = fleet.apps[-1].extensions["background_workers"].history.clock()
    row = {"topic": topic, "payload": payload, "enqueued_at": clock, "due_at": clock, **columns}
    with fleet.engine.begin() as connection:
        id: int = connection.execute(insert(tables.messages).values(row).returning(tables.messages.c.id)).scalar_one()
        if error is not None:
            failure = {"message": id, "attempt": 1, "at": clock, "error": error}
            connection.execute(insert(tables.message_errors).values(failure))
    return id


def browse(manager: BackgroundWorkerManager, after: Any = None, limit: int = 25, **fields: str) -> Browsed:
    return manager.messages.browse(Filter(**fields).cleaned(), manager.messages.figures(), limit, after)


def ids(manager: BackgroundWorkerManager, **fields: str) -> list[int]:
    found = browse(manager, **fields)
    assert found.is_complete
    assert found.matches == len(found.letters)
    return [letter.id for letter in found.letters]


def test_each_filter_finds_its_messages(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    clock = manager.history.clock()
    old = put(fleet, state="done", enqueued_at=clock - 2 * DAY, finished_at=clock)
    waits = put(fleet, payload='{"Book":100,"50%":"a_b"}', key="order 17")
    later = put(fleet, "mail", due_at=clock + DAY)
    postponed = put(fleet, due_at=clock + 2 * DAY, postponed=3, postponed_because="closed")
    retrying = put(fleet, "mail", attempt=1, error="Traceback\nOSError: Paper jam")
    running = put(fleet, state="running", attempt=1, instance="x")
    dead = put(fleet, "mail", state="dead", attempt=5, error="ValueError: no book", finished_at=clock)
    dropped = put(fleet, "old", state="discarded", finished_at=clock, key="order 17")
    everything = [dropped, dead, running, retrying, postponed, later, waits, old]
    for fields, expected in (
        ({}, everything),
        ({"topic": "mail"}, [dead, retrying, later]),
        ({"topic": "old"}, [dropped]),
        ({"state": "waiting"}, [waits, retrying, later, postponed]),  # in the order in which they are due
        ({"state": "delayed"}, [later, postponed]),
        ({"state": "delayed", "topic": "mail"}, [later]),
        ({"state": "retrying"}, [retrying]),
        ({"state": "postponed"}, [postponed]),
        ({"state": "running"}, [running]),
        ({"state": "done"}, [old]),
        ({"state": "dead"}, [dead]),
        ({"state": "dead", "topic": "orders"}, []),
        ({"state": "discarded"}, [dropped]),
        ({"key": "order 17"}, [waits]),  # no topic that is known has the other
        ({"key": "order 17", "topic": "old"}, [dropped]),
        ({"key": "order"}, []),
        ({"error": "paper JAM"}, [retrying]),
        ({"error": "jam", "state": "dead"}, []),
        ({"text": "0%"}, [waits]),
        ({"text": '"book":1'}, [waits]),
        ({"text": "a_b"}, [waits]),
        ({"text": "a%b"}, []),
        ({"age": "1h"}, everything[:-1]),
        ({"age": "over-1d"}, [old]),
        ({"age": "over-1h", "state": "waiting"}, []),
        ({"age": "7d", "state": "dead"}, [dead]),
        ({"state": "nonsense", "age": "nonsense", "topic": "\0"}, everything),
    ):
        assert ids(manager, **fields) == expected, fields
    with pytest.raises(UnknownTopic, match="Did you mean 'mail'"):
        browse(manager, topic="mial")


@pytest.mark.parametrize("fields", [{}, {"state": "waiting"}, {"state": "dead"}, {"state": "dead", "topic": "mail"}])
def test_the_pages_lead_through_all_messages_once(
    fleet: Fleet, manager: BackgroundWorkerManager, fields: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = manager.history.clock()
    for number in range(20):
        state = "dead" if number % 3 else "waiting"
        due_at = clock + timedelta(seconds=number // 4)  # several are due at the same moment
        put(fleet, "mail" if number % 2 else "orders", state=state, due_at=due_at)
    expected = ids(manager, **fields)
    for most in (5_000, 4):
        monkeypatch.setattr(search, "MOST_SEARCHED", most)
        seen, place, pages = [], None, 0
        while pages == 0 or place:
            found = browse(manager, place, 3, **fields)
            seen += [letter.id for letter in found.letters]
            place, pages = found.following, pages + 1
        assert seen == expected


def test_a_search_says_how_far_it_looked(
    fleet: Fleet, manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_SEARCHED", 3)
    wanted, *_ = [put(fleet, payload=f'"{number}"') for number in range(5)]
    found = browse(manager, text='"0"')
    assert (found.letters, found.matches, found.is_complete) == ([], 0, False)
    found = browse(manager, found.following, text='"0"')
    assert [letter.id for letter in found.letters] == [wanted]
    assert found.is_complete


def test_the_old_dead_letters_of_a_rare_topic_are_found_at_once(
    fleet: Fleet, manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_SEARCHED", 3)
    clock = manager.history.clock()
    dead = put(fleet, "mail", state="dead")
    old = put(fleet, enqueued_at=clock - 2 * DAY)
    for _ in range(9):
        put(fleet, state="done")
    assert ids(manager, state="dead") == [dead]
    assert ids(manager, state="waiting") == [old]
    found = browse(manager, age="over-1d")
    assert [letter.id for letter in found.letters] == [old]


def test_errors_are_grouped_by_their_last_line(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    long = 'Traceback\n  File "x.py", line 1, in handle\n' + "    x\n" * 2_000
    one, two = (put(fleet, topic, state="dead", error=f"{long}OSError: jam\n") for topic in ("orders", "mail"))
    three = put(fleet, state="dead", error="ValueError: no book")
    put(fleet, error="OSError: jam", attempt=1)
    with fleet.engine.begin() as connection:
        newest = {"message": one, "attempt": 2, "at": manager.history.clock(), "error": "OSError: jam"}
        connection.execute(insert(tables.message_errors).values(newest))
    topics = manager.messages.figures()
    jam, book = manager.messages.errors(Filter(state="dead"), topics)
    assert (jam.line, jam.count, jam.newest) == ("OSError: jam", 2, one)
    assert jam.first_at < jam.last_at
    assert (book.line, book.count, book.newest, book.first_at) == ("ValueError: no book", 1, three, book.last_at)
    [jam] = manager.messages.errors(Filter(state="dead", topic="mail"), topics)
    assert (jam.count, jam.newest) == (1, two)
    [jam] = manager.messages.errors(Filter(state="retrying"), topics)
    assert jam.count == 1


# -- changes ---------------------------------------------------------------------------------------


def test_a_change_of_many_leaves_messages_in_other_states_alone(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    clock = manager.history.clock()
    due = {"due_at": clock + DAY, "attempt": 2}
    each = [put(fleet, state=state, **due) for state in ("dead", "discarded", "waiting", "running", "done")]
    assert manager.messages.change("retry", [*each, 999, -1]) == Change(3, 3)
    assert states(fleet) == ["waiting", "waiting", "waiting", "running", "done"]
    assert [row.attempt for row in fleet.messages()] == [0, 0, 0, 2, 2]
    assert manager.messages.change("discard", each) == Change(3, 2)
    assert states(fleet) == ["discarded", "discarded", "discarded", "running", "done"]
    assert manager.messages.change("retry", []) == Change(0, 0)


def test_moved_messages_wait_in_the_other_topic(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    clock = manager.history.clock()
    dead = put(fleet, state="dead", attempt=5, finished_at=clock, due_at=clock - DAY)
    delayed = put(fleet, attempt=2, due_at=clock + DAY)
    running = put(fleet, state="running")
    taken = put(fleet, key="k")
    put(fleet, "mail", key="k")
    assert manager.messages.change("move", [dead, delayed, running, taken], "mail") == Change(2, 2)
    rows = {row.id: row for row in fleet.messages()}
    assert [rows[id].topic for id in (dead, delayed, running, taken)] == ["mail", "mail", "orders", "orders"]
    assert (rows[dead].state, rows[dead].attempt, rows[dead].finished_at) == ("waiting", 0, None)
    assert rows[dead].due_at >= clock
    assert (rows[delayed].attempt, rows[delayed].due_at) == (2, clock + DAY)
    with pytest.raises(UnknownTopic, match="Did you mean 'mail'"):
        manager.messages.change("move", [dead], "mial")


def test_two_messages_with_one_key_are_not_moved_together(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    both = [put(fleet, topic, key="k") for topic in ("orders", "old")]
    with pytest.raises(WrongState, match="two of the messages for the topic 'mail' have the same key"):
        manager.messages.change("move", both, "mail")
    assert [row.topic for row in fleet.messages()] == ["orders", "old"]


def test_a_move_that_stops_at_such_a_key_says_how_many_messages_it_moved_before(
    fleet: Fleet, manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_SEARCHED", 2)
    for topic in ("orders", "old"):
        put(fleet, topic, key="k", state="discarded")
    put(fleet, state="discarded")
    put(fleet, state="discarded")
    with pytest.raises(WrongState, match=r"^Only 2 messages were changed: two of the messages"):
        manager.messages.change_all("move", Filter(state="discarded"), "mail")
    assert [row.topic for row in fleet.messages()] == ["orders", "old", "mail", "mail"]


def test_an_id_that_is_selected_twice_counts_once(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    dead, done = (put(fleet, state=state) for state in ("dead", "done"))
    assert manager.messages.change("retry", [dead, done, dead, done]) == Change(1, 1)


def test_a_message_is_either_claimed_or_changed(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    for _ in range(10):
        fleet.enqueue("orders", *range(20))
        each = [row.id for row in fleet.messages() if row.state == "waiting"]
        claim = manager.stores.queue.claim
        batch, change = in_threads(
            lambda claim=claim: claim("orders", "orders", 15, ("us", "here:1")),
            lambda each=each: manager.messages.change("discard", each),
        )
        claimed = len(batch.messages) if batch else 0
        assert claimed + change.changed == len(each)
        assert change.left == claimed
        with fleet.engine.begin() as connection:
            connection.execute(update(tables.messages).values(state="done"))


def test_all_that_match_are_changed_in_slices(
    fleet: Fleet, manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_SEARCHED", 4)
    for number in range(10):
        put(fleet, state="dead", error="OSError: jam" if number % 2 else "ValueError: x")
    put(fleet, "mail", state="dead", error="OSError: jam")
    with statements(manager.stores.main.engine) as sent:
        assert manager.messages.change_all("retry", Filter(error="jam", topic="orders", state="dead")) == Change(5, 0)
    assert len([each for each in sent if "UPDATE" in each]) == 3
    assert states(fleet) == ["dead", "waiting"] * 5 + ["dead"]
    monkeypatch.setattr("background.history.messages._MOST_SEARCHES", 1)
    assert manager.messages.change_all("discard", Filter(state="dead")) == Change(4, 0, is_complete=False)


# -- the work --------------------------------------------------------------------------------------

SEARCHES: list[dict[str, str]] = [
    {},
    {"state": "dead"},
    {"state": "waiting", "topic": "orders"},
    {"state": "running"},
    {"state": "done", "text": "x"},
    {"error": "jam"},
    {"key": "k"},
    {"age": "over-1d"},
]


@pytest.fixture
def full(fleet: Fleet, manager: BackgroundWorkerManager) -> BackgroundWorkerManager:
    with manager.app.app_context():
        manager.enqueue_many("orders", ["x"] * 30_000)
        manager.enqueue_many("mail", ["x"] * 30_000)
        session = manager.db.session
        session.execute(text("UPDATE background_messages SET state = 'dead' WHERE id % 2 = 0"))
        session.execute(
            text("UPDATE background_messages SET state = 'done', finished_at = enqueued_at WHERE id % 7 = 0")
        )
        session.execute(text("ANALYZE"))
        session.commit()
    return manager


def test_a_search_takes_a_constant_number_of_statements(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    counts = []
    for number in (1, 30):
        for _ in range(number):
            put(fleet, state="dead", error="OSError: jam")
            put(fleet, "mail")
        for fields in SEARCHES:
            with statements(manager.stores.main.engine) as sent:
                browse(manager, **fields)
                manager.messages.errors(Filter(state="dead"), manager.messages.figures())
            counts.append(len(sent))
    assert max(counts) <= 9
    assert counts[: len(SEARCHES)] == counts[len(SEARCHES) :]


@on_postgresql
def test_a_search_reads_an_index_and_no_more_rows_than_its_bound(full: BackgroundWorkerManager) -> None:
    engine = full.stores.main.engine
    for fields in SEARCHES:
        asked: list[tuple[str, Any]] = []

        def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
            asked.append((statement, parameters))  # noqa: B023 - called within the loop

        topics = full.messages.figures()
        event.listen(engine, "before_cursor_execute", remember)
        full.messages.browse(Filter(**fields), topics)
        full.messages.errors(Filter(state="dead"), topics)
        event.remove(engine, "before_cursor_execute", remember)
        for statement, parameters in asked:
            with engine.connect() as connection:
                plan = "\n".join(
                    connection.exec_driver_sql(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", parameters).scalars()
                )
            assert "Seq Scan on background_messages" not in plan, (fields, plan)
            read = [int(rows) for rows in re.findall(r"actual rows=(\d+)", plan)]
            assert max(read) <= 2 * search.MOST_SEARCHED, (fields, plan)


@on_sqlite
@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({"state": "dead"}, "dead"),
        ({"state": "waiting"}, "due"),
        ({"state": "running"}, "running"),
        ({"key": "k"}, "key"),
    ],
)
def test_a_search_for_open_messages_or_a_key_reads_their_own_index_on_sqlite(
    full: BackgroundWorkerManager, fields: dict[str, str], index: str
) -> None:
    asked: list[tuple[str, Any]] = []
    topics, engine = full.messages.figures(), full.stores.main.engine
    event.listen(engine, "before_cursor_execute", lambda _, __, text, values, *___: asked.append((text, values)))
    full.messages.browse(Filter(**fields), topics)
    with engine.connect() as connection:
        plans = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}", more).all() for each, more in asked[:2]]
    steps = [row[3] for plan in plans for row in plan]
    assert [step for step in steps if f"INDEX ix_background_messages_{index}" in step]
    assert "SCAN background_messages" not in steps
