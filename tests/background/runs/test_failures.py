"""Outcomes: every run's outcome is written, whatever its errors, its log and its progress are."""

import asyncio
import gc
import json
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy import URL, event
from sqlalchemy import text as sql
from support.databases import on_sqlite, text
from support.fleet import Fleet, Hourly, effect, last_hour, make_tables, states, wait_until

from background import Message, MessageWorker, WorkerContext
from background.errors import error_line
from background.runs.failures import cut, summary, traceback_of

HUGE = 30_000_000


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class Raising(Hourly):
    """Raises what `fail` raises."""

    fail: Callable[[], None]

    def do_work(self, context: WorkerContext) -> None:
        type(self).fail()


def outcome(fleet: Fleet, worker: type[Hourly]) -> Any:
    """Run `worker` once. Return its only execution."""
    manager = fleet.manager(worker)
    assert manager.tick(worker.name, last_hour()) is not None
    (row,) = fleet.executions(worker.name)
    assert fleet.row(worker.name).running is None
    return row


# -- a user's exceptions ----------------------------------------------------------------------------


def raise_from_itself() -> None:
    error = ValueError("in a circle")
    raise error from error


def raise_in_a_ring() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    first.__context__ = second
    raise first


def raise_unspeakable() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Unspeakable


def raise_huge() -> None:
    raise ValueError("a" + "x" * HUGE + "z")


def raise_many_lines() -> None:
    raise ValueError("one line\n" * 100_000)


def raise_long_chain() -> None:
    error: Exception = ValueError("the first")
    for number in range(2_000):
        error, before = ValueError(f"number {number}"), error
        error.__cause__ = before
    raise error


def raise_zero() -> None:
    raise ValueError("no text ends with \0")


def raise_deep_groups() -> None:
    error: Exception = ValueError("the innermost")
    for _ in range(3_000):
        error = ExceptionGroup("deeper", [error])
    raise error


@pytest.mark.parametrize(
    ("fail", "last_line"),
    [
        (raise_from_itself, "ValueError: in a circle"),
        (raise_in_a_ring, "ValueError: first"),
        (raise_unspeakable, "<exception str() failed>"),
        (raise_huge, "ValueError: axxx"),
        (raise_many_lines, "ValueError: one line"),
        (raise_long_chain, "ValueError: number 1999"),
        (raise_zero, r"ValueError: no text ends with \x00"),
        (raise_deep_groups, "ExceptionGroup: deeper (1 sub-exception), the first: ExceptionGroup: deeper"),
    ],
)
def test_whatever_a_run_raises_it_ends_and_its_reason_has_a_limit(
    fleet: Fleet, fail: Callable[[], None], last_line: str
) -> None:
    row = outcome(fleet, type("Raiser", (Raising,), {"fail": staticmethod(fail)}))
    assert row.state == "failed"
    assert len(row.reason) < 17_000
    assert last_line in str(error_line(row.reason))


def test_a_reason_shows_how_many_characters_were_cut(fleet: Fleet) -> None:
    row = outcome(fleet, type("Raiser", (Raising,), {"fail": staticmethod(raise_huge)}))
    assert f"({HUGE - 4_000 + len('ValueError: az') + 1:,} characters are cut)" in row.reason
    assert row.reason.rstrip().endswith("xz")


def test_text_that_fits_is_not_cut() -> None:
    assert cut("x" * 100, 100) == "x" * 100
    assert cut("a" * 50 + "b" * 60, 100) == "a" * 50 + "\n... (10 characters are cut) ...\n" + "b" * 50


def test_the_reason_of_an_exception_group_says_the_group_and_its_first_member(fleet: Fleet) -> None:
    async def fetch() -> None:
        raise ValueError("the price is missing")

    class Fetcher(Hourly):
        async def do_work(self, context: WorkerContext) -> None:
            try:
                raise KeyError("before")
            except KeyError:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fetch())

    row = outcome(fleet, Fetcher)
    said = (
        "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception), the first: ValueError: the price is missing"
    )
    assert error_line(row.reason) == said
    assert said in fleet.manager(Fetcher).why("fetcher", last_hour()).sentence


def test_an_error_that_a_group_caused_says_its_own_line() -> None:
    error = KeyError("the last")
    error.__cause__ = ExceptionGroup("several", [ValueError("one")])
    assert error_line(traceback_of(error)) == summary(error) == "KeyError: 'the last'"


def test_a_messages_errors_have_a_limit_and_groups_say_their_first_member(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(MessageWorker):
        topic = "notes"
        backoff = timedelta()
        max_attempts = 2

        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "huge":
                raise_huge()
            raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])

    manager = fleet.manager(Failing)
    fleet.enqueue("notes", "huge", "group")
    manager.start()
    wait_until(lambda: states(fleet) == ["dead", "dead"], "the end")
    errors = [row.error for row in fleet.errors()]
    assert len(errors) == 4
    assert all(len(each) < 17_000 for each in errors)
    said = "ExceptionGroup: several (2 sub-exceptions), the first: ValueError: one"
    assert [error_line(each) for each in errors].count(said) == 2
    assert max(len(each.getMessage()) for each in caplog.records) < 3_000


# -- progress ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("step 2 of 5",),
        ("2",),
        (None,),
        (True,),
        (2, False),
        (2, "5"),
        (float("nan"),),
        (1, float("inf")),
        (10**400,),
        (Decimal("sNaN"),),
        (timedelta(seconds=1),),
        ({2},),
        (object(),),
        (2j,),
    ],
)
@on_sqlite
def test_a_progress_that_is_not_a_finite_number_is_refused_at_the_call(fleet: Fleet, given: tuple[Any, ...]) -> None:
    class Importer(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.progress(*given)

    row = outcome(fleet, Importer)
    assert row.state == "failed"
    assert "background.errors.InvalidProgress: context.progress was given " in row.reason
    assert "expected a finite number" in row.reason


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ((2, 5), (2, 5)),
        ((0.5,), (0.5, None)),
        ((Fraction(1, 2), Decimal("1.5")), (0.5, 1.5)),
        ((0, 0), (0, 0)),
    ],
)
def test_every_finite_number_is_accepted_as_progress(
    fleet: Fleet, given: tuple[Any, ...], written: tuple[Any, ...]
) -> None:
    class Importer(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context._progress_logged = float("-inf")
            context.progress(*given)

    row = outcome(fleet, Importer)
    assert (row.state, row.progress_done, row.progress_total) == ("succeeded", *written)


# -- text that the database cannot hold ------------------------------------------------------------------


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "EUC_JP", "WIN1252"])
def other_fleet(
    request: pytest.FixtureRequest, postgresql_server: URL, databases: Callable[[str], object]
) -> Iterator[Fleet]:
    """Give a fleet on a database of another encoding."""
    name = f"encoded_{request.param.lower()}"
    databases(f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    url = text(postgresql_server.set(database=name))
    make_tables(url)
    fleet = Fleet(url)
    yield fleet
    fleet.close()
    gc.collect()
    databases(f"DROP DATABASE {name} WITH (FORCE)")


MANY = "Łukasz, Ζεύς, 山 and 🐟"


def test_characters_that_a_database_of_another_encoding_cannot_hold_are_escaped(
    other_fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "łódź")
    handled = []

    class Greeting(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.logger.info("sent to %s", MANY)
            effect(context)

    class Failing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            raise ValueError(MANY)

    class Taking(MessageWorker):
        topic = "notes"
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            handled.append(message.payload)
            raise ValueError(MANY)

    manager = other_fleet.manager(Greeting, Failing, Taking, RELEASE="łatest" * 16)
    manager.start()
    other_fleet.enqueue("notes", MANY)
    with manager.app.app_context():
        manager.enqueue_many("notes", [MANY, {MANY: 1}])
        manager.db.session.commit()
    wait_until(lambda: states(other_fleet) == ["dead"] * 3, "the messages' ends")
    wait_until(lambda: sorted(other_fleet.states()) == ["failed", "succeeded"], "the runs' ends")
    assert handled == [MANY, MANY, {MANY: 1}]
    rows = {row.worker: row for row in other_fleet.executions()}
    written = [
        str(rows["greeting"].log),
        str(rows["failing"].reason),
        *(str(row.error) for row in other_fleet.errors()),
    ]
    assert all("\\U0001f41f" in each for each in written)
    assert rows["greeting"].instance_name.startswith(r"\u0142\xf3d\u017a:")
    assert other_fleet.effects() == [""]


def test_a_client_encoding_unknown_to_the_server_is_respected_too(
    postgresql_server: URL, databases: Callable[[str], object]
) -> None:
    databases("CREATE DATABASE twice ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    url = text(postgresql_server.set(database="twice").update_query_dict({"client_encoding": "utf8"}))
    make_tables(url)
    fleet = Fleet(url)
    try:

        class Greeting(Hourly):
            def do_work(self, context: WorkerContext) -> None:
                context.logger.info("sent to é and Ł")

        row = outcome(fleet, Greeting)
        assert row.state == "succeeded"
        assert "sent to é and \\u0141" in row.log
    finally:
        fleet.close()
        databases("DROP DATABASE twice WITH (FORCE)")


# -- rows that the database refuses --------------------------------------------------------------


def refuse_texts(fleet: Fleet, table: str, column: str) -> None:
    """Have the database refuse every row of `table` whose `column` says "secret"."""
    with fleet.engine.begin() as connection:
        if fleet.engine.dialect.name == "sqlite":
            for moment in ("INSERT", "UPDATE"):
                connection.execute(
                    sql(
                        f"CREATE TRIGGER refuse_{moment} BEFORE {moment} ON {table} WHEN NEW.{column} LIKE '%secret%' "
                        "BEGIN SELECT RAISE(ABORT, 'refused'); END"
                    )
                )
        else:
            connection.execute(
                sql(f"ALTER TABLE {table} ADD CONSTRAINT no_secret CHECK ({column} NOT LIKE '%secret%')")
            )


def test_an_outcome_that_the_database_refuses_is_written_without_log_and_reason(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_texts(fleet, "background_executions", "reason")

    class Telling(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.logger.info("on my way")
            raise ValueError("a secret")

    row = outcome(fleet, Telling)
    assert (row.state, row.reason, row.log) == ("failed", None, None)
    assert [each for each in caplog.records if "so less of it is written" in each.message]


def test_a_run_whose_log_the_database_refuses_ends(fleet: Fleet) -> None:
    refuse_texts(fleet, "background_executions", "log")

    class Telling(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.logger.info("a secret")
            effect(context)

    row = outcome(fleet, Telling)
    assert (row.state, row.log) == ("failed", None)
    assert fleet.effects() == []


def test_a_messages_error_that_the_database_refuses_is_replaced(fleet: Fleet) -> None:
    refuse_texts(fleet, "background_message_errors", "error")

    class Failing(MessageWorker):
        topic = "notes"
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            raise ValueError("a secret")

    manager = fleet.manager(Failing)
    fleet.enqueue("notes", 1)
    manager.start()
    wait_until(lambda: states(fleet) == ["dead"], "the end")
    assert [row.error for row in fleet.errors()] == ["The error could not be written: see the log of the instance."]


def test_an_outcome_refused_in_every_form_is_given_up_within_a_lease_and_the_worker_goes_on(
    fleet: Fleet,
) -> None:
    with fleet.engine.begin() as connection:
        where = "NEW.state = 'failed'"
        if fleet.engine.dialect.name == "sqlite":
            connection.execute(
                sql(
                    f"CREATE TRIGGER refuse BEFORE UPDATE ON background_executions WHEN {where} "
                    "BEGIN SELECT RAISE(ABORT, 'refused'); END"
                )
            )
        else:
            connection.execute(sql("ALTER TABLE background_executions ADD CONSTRAINT none CHECK (state <> 'failed')"))

    class Telling(Hourly):
        max_attempts = 1

        def do_work(self, context: WorkerContext) -> None:
            raise ValueError("a secret")

    fleet.manager(Telling).start()
    wait_until(lambda: fleet.states() == ["lost"], "the end of the claim")
    assert fleet.row("telling").running is None


def test_a_generator_that_a_method_returns_fails_the_run_in_a_sentence(fleet: Fleet) -> None:
    class Lazy(Hourly):
        def do_work(self, context: WorkerContext) -> Any:
            return (number for number in range(3))

    row = outcome(fleet, Lazy)
    assert row.state == "failed"
    assert "returned a generator, so nothing was done; expected a method that does its work" in row.reason


# -- many payloads ----------------------------------------------------------------------------------


def test_many_payloads_are_enqueued_in_statements_of_a_bounded_size(fleet: Fleet) -> None:
    class Taking(MessageWorker):
        topic = "notes"

        def handle(self, message: Message, context: WorkerContext) -> None:
            pass

    manager = fleet.manager(Taking)
    sizes: list[int] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("INSERT INTO background_messages"):
            sizes.append(len(str(parameters).encode()))

    payloads = ["x" * 250_000] * 60 + ["é" * 100_000] * 20 + ["y"] * 6_000
    with manager.app.app_context():
        event.listen(manager.db.engine, "before_cursor_execute", note)
        assert manager.enqueue_many("notes", payloads) == len(payloads)
        manager.db.session.commit()
    assert len(sizes) > 3
    assert max(sizes) < 20_000_000
    assert [json.loads(row.payload) for row in fleet.messages()] == payloads


# -- a missing table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["SELECT * FROM reminders", "SELECT note2 FROM effects"])
def test_a_run_that_needs_a_missing_table_or_column_names_the_command_that_finds_it(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    class Reminding(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(sql(statement))

    assert fleet.manager(Reminding).tick("reminding", last_hour()).state == "failed"
    hint = "The database lacks a table or a column of the models: see `flask workers check`"
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"][1:] == [hint]
