"""The log of a run: kept with its execution, and marked as the run's in JSON logs."""

import logging
import re
import threading
from datetime import UTC, datetime

import pytest
from support.fleet import Fleet, Hourly, db, effect, statements, states, wait_until

from background import Message, MessageWorker, WorkerContext
from background.runs.fence import RunFields


@pytest.fixture(autouse=True)
def _everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def logged(fleet: Fleet, worker: type[Hourly]) -> tuple[str, list[str]]:
    """Run `worker`. Return its state, and the lines that its execution keeps."""
    manager = fleet.manager(worker)
    execution = manager.tick(worker.name, datetime.now(UTC))
    assert execution is not None
    return execution.state, (manager.history.log(execution.claim.execution) or "").splitlines()


class Talking(Hourly):
    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("Counting %s", "sheep")
        logging.getLogger("a.library").warning("One of them \x00 sleeps")
        thread = threading.Thread(target=logging.getLogger("elsewhere").warning, args=("Not ours",))
        thread.start()
        thread.join()


def test_an_execution_keeps_all_log_lines_of_its_run(fleet: Fleet) -> None:
    state, lines = logged(fleet, Talking)
    assert state == "succeeded"
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "", line) for line in lines] == [
        "INFO    Counting sheep",
        r"WARNING One of them \x00 sleeps",
    ]


def test_a_run_that_failed_keeps_its_lines_too(fleet: Fleet) -> None:
    class Failing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            context.logger.info("On my way")
            raise ValueError("out of paper")

    state, lines = logged(fleet, Failing)
    assert state == "failed"
    assert [line.endswith("On my way") for line in lines] == [True]


def test_each_commit_of_a_run_saves_its_log_lines(fleet: Fleet) -> None:
    seen: list[str | None] = []

    class Slicing(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for number in range(2):
                context.logger.info("Slice %d", number)
                effect(context)
                context.commit()
                seen.append(manager.history.log(context.claim.execution))

    manager = fleet.manager(Slicing)
    manager.tick("slicing", datetime.now(UTC))
    assert [(log or "").count("Slice") for log in seen] == [1, 2]


@pytest.mark.promise
def test_a_long_log_is_not_written_again_with_each_commit(fleet: Fleet) -> None:
    class Talkative(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for number in range(200):
                context.logger.info("Slice %d", number)
                effect(context)
                context.commit()

    manager = fleet.manager(Talkative)
    with manager.app.app_context(), statements(db.engine) as seen:
        manager.tick("talkative", datetime.now(UTC))
    written = [
        statement for statement in seen if statement.startswith("UPDATE background_executions") and "log" in statement
    ]
    assert len(written) < 100
    assert (fleet.executions()[0].log or "").count("Slice") == 200


def test_the_latest_lines_of_an_endless_log_are_kept(fleet: Fleet) -> None:
    class Chattering(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            for number in range(1_000):
                context.logger.info("Line %d", number)
            context.logger.info("x" * 100_000)

    _, lines = logged(fleet, Chattering)
    assert len(lines) == 501
    assert lines[0] == "(501 earlier lines are not kept)"
    assert lines[1].endswith("Line 501")
    assert len(lines[-1]) < 2_100


def test_a_log_line_that_cannot_be_written_causes_no_error(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    class Misspelling(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            logging.raiseExceptions = False
            context.logger.info("%d sheep", "many")

    try:
        assert logged(fleet, Misspelling) == ("succeeded", [])
    finally:
        logging.raiseExceptions = True


def test_runs_side_by_side_keep_their_lines_apart(fleet: Fleet) -> None:
    both = threading.Barrier(2)

    class First(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            both.wait(60)
            context.logger.info("I am %s", self.name)
            both.wait(60)

    class Second(First):
        pass

    manager = fleet.manager(First, Second)
    threads = [threading.Thread(target=manager.tick, args=(name, datetime.now(UTC))) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    lines = {row.worker: row.log.splitlines() for row in fleet.executions()}
    assert {name: [line.split()[-1] for line in kept] for name, kept in lines.items()} == {
        "first": ["first"],
        "second": ["second"],
    }


def test_a_line_of_a_handler_names_the_message(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reading(MessageWorker):
        topic = "letters"

        def handle(self, message: Message, context: WorkerContext) -> None:
            context.logger.info("Reading")
            logging.getLogger("a.library").info("Reading aloud")

    manager = fleet.manager(Reading)
    monkeypatch.setattr(caplog.handler, "filters", [RunFields()])
    ids = fleet.enqueue("letters", 1, 2)
    manager.start()
    wait_until(lambda: states(fleet) == ["done", "done"], "the handling")
    lines = [each for each in caplog.records if each.message.startswith("Reading")]
    assert [each.execution for each in lines] == [f"letters:{id}" for id in ids for _ in range(2)]  # type: ignore[attr-defined]
