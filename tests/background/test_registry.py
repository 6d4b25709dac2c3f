"""Registering: accepted and refused classes, the words of each refusal, and no start."""

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partialmethod, singledispatchmethod, wraps
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from support.fleet import make_app

from background import (
    BackgroundWorkerManager,
    DuplicateWorker,
    InvalidSchedule,
    InvalidWorker,
    Message,
    MessageWorker,
    PeriodicWorker,
    UnknownWorker,
    WorkerContext,
)

ROOT = Path(__file__).parents[2]
HOUR = timedelta(hours=1)


class Tidy(PeriodicWorker):
    period = HOUR

    def do_work(self, context: WorkerContext) -> None:
        pass


@pytest.fixture
def manager(tmp_path: Path) -> BackgroundWorkerManager:
    app = make_app(f"sqlite:///{tmp_path / 'never.sqlite'}")
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


def worker(class_name: str = "Sample", /, **attributes: Any) -> Any:
    return type(class_name, (Tidy,), attributes)


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("NightlyReportWorker", "nightly_report_worker"),
        ("HTTPPing", "http_ping"),
        ("Ping2Worker", "ping2_worker"),
        ("already_snake", "already_snake"),
    ],
)
def test_a_workers_name_is_its_class_name_in_snake_case(
    manager: BackgroundWorkerManager, class_name: str, name: str
) -> None:
    manager.add(worker(class_name))
    assert name in manager.workers


def test_an_explicit_name_is_kept_and_not_inherited(manager: BackgroundWorkerManager) -> None:
    parent = worker(name="nightly.report-2")
    manager.add(parent)
    manager.add(type("Other", (parent,), {}))
    assert {"nightly.report-2", "other"} <= set(manager.workers)


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"period": None}, "Worker 'sample': it has neither a period nor a cron: write period = timedelta(minutes=10)"),
        ({"cron": "0 0 * * *"}, "Worker 'sample': it has both a period (1:00:00) and a cron ('0 0 * * *'): keep one"),
        ({"period": timedelta()}, "period 0:00:00 is out of range: expected a millisecond to 366 days"),
        ({"period": timedelta(seconds=-1)}, "is out of range: expected a millisecond to 366 days"),
        ({"period": 600}, "period 600 is a number: write timedelta(seconds=600)"),
        ({"period": "10m"}, "period '10m' is not a timedelta: write timedelta(minutes=10), for example."),
        ({"period": None, "cron": "61 * * * *"}, "cron '61 * * * *' has the minute '61': expected 0-59."),
        ({"period": None, "cron": "* * *"}, "cron '* * *' has 3 field(s): expected five"),
        (
            {"period": None, "cron": "0 0 12 * * ?"},
            "cron '0 0 12 * * ?' has 6 fields, the first for seconds: expected five; write '0 12 * * *'.",
        ),
        (
            {"period": None, "cron": "0 0 * * *", "timezone": "Europe/Berlim"},
            "timezone 'Europe/Berlim' is not in the time zone database. Did you mean 'Europe/Berlin'?",
        ),
        ({"timezone": "UTC"}, "timezone 'UTC' has no use without a cron: remove it, or write a cron."),
    ],
)
def test_an_impossible_schedule_is_refused_in_a_sentence(
    manager: BackgroundWorkerManager, attributes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidSchedule) as refused:
        manager.add(worker(**attributes))
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("Worker 'sample': ")
    assert "sample" not in manager.workers


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"max_attempts": 0}, "has max_attempts = 0; expected a whole number from 1 to 1000000: change it in Sample."),
        ({"max_attempts": True}, "has max_attempts = True; expected a whole number from 1 to 1000000"),
        ({"max_attempts": 2.5}, "has max_attempts = 2.5; expected a whole number from 1 to 1000000"),
        ({"on_lost": "ignore"}, "has on_lost = 'ignore'; expected 'retry' or 'skip'"),
        ({"timeout": timedelta()}, "has timeout = datetime.timedelta(0); expected a timedelta above 0 and at most"),
        ({"timeout": 5}, "has timeout = 5; expected a timedelta above 0 and at most 366 days, or None"),
        ({"timeout": timedelta.max}, "above 0 and at most 366 days, or None: change it in Sample."),
        ({"max_attempts": 10**30}, "expected a whole number from 1 to 1000000: change it in Sample."),
        ({"jitter": timedelta(seconds=-1)}, "expected a timedelta of at least 0"),
        ({"jitter": 2 * HOUR}, "expected at most its period, 1:00:00: change it in Sample."),
        ({"jitter": None}, "has jitter = None; expected a timedelta of at least 0"),
        ({"enabled": "no"}, "has enabled = 'no'; expected True or False"),
        ({"catch_up": 1}, "has catch_up = 1; expected True or False"),
        ({"run_on_first_start": None}, "has run_on_first_start = None; expected True or False"),
        ({"name": "two words"}, "Sample.name is 'two words'; expected 1 to 100 letters, digits, '_', '-' or '.'"),
        ({"name": ""}, "Sample.name is ''; expected 1 to 100 letters"),
        ({"name": "n" * 101}, "expected 1 to 100 letters"),
        ({"name": "-option"}, "Sample.name is '-option'; expected"),
        ({"name": None}, "Sample.name is None; expected"),
    ],
)
def test_an_attribute_out_of_range_is_refused_in_a_sentence(
    manager: BackgroundWorkerManager, attributes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidWorker) as refused:
        manager.add(worker(**attributes))
    assert sentence in str(refused.value)


class Undone(PeriodicWorker):
    period = HOUR


class Abstract(Tidy, ABC):
    @property
    @abstractmethod
    def source(self) -> str: ...


@pytest.mark.parametrize("cls", [Undone, Abstract, PeriodicWorker])
def test_an_abstract_class_is_refused(manager: BackgroundWorkerManager, cls: Any) -> None:
    with pytest.raises(InvalidWorker, match="is abstract; expected a class that can run: give it do_work"):
        manager.add(cls)


def some(*_: object) -> Iterator[None]:
    yield


async def some_awaited(*_: object) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("body", [some, some_awaited])
@pytest.mark.parametrize("method", ["do_work", "handle", "handle_many"])
def test_a_generator_method_is_refused(manager: BackgroundWorkerManager, method: str, body: Any) -> None:
    cls = worker(do_work=body) if method == "do_work" else type("Odd", (MessageWorker,), {"topic": "t", method: body})
    with pytest.raises(InvalidWorker, match="is a generator, so calling it does nothing; expected a method"):
        manager.add(cls)


def handing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as most decorators do: pass on all arguments."""

    @wraps(function)
    def call(*arguments: object, **more: object) -> object:
        return function(*arguments, **more)

    return call


def injecting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the context to a method that does without it."""

    @wraps(function)
    def call(self: object, context: WorkerContext) -> object:
        return function(self)

    return call


def adding(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the method with one more argument."""

    @wraps(function)
    def call(*arguments: object) -> object:
        return function(*arguments, "more")

    return call


def alone(self: object) -> None:
    pass


def lonely() -> None:
    pass


def working(self: object, context: WorkerContext) -> None:
    pass


def taking(self: object, message: Message, context: WorkerContext) -> None:
    pass


def taker(**attributes: Any) -> Any:
    return type("Taker", (MessageWorker,), {"topic": "things", **attributes})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("max_attemps", "max_attempts"),
        ("maxAttempts", "max_attempts"),
        ("time_out", "timeout"),
        ("tiemout", "timeout"),
        ("enable", "enabled"),
        ("catchup", "catch_up"),
        ("on_loss", "on_lost"),
        ("run_on_start", "run_on_first_start"),
        ("nmae", "name"),
        ("crno", "cron"),
        ("time_zone", "timezone"),
    ],
)
def test_a_misspelled_attribute_of_a_periodic_worker_is_refused_with_the_intended_name(
    manager: BackgroundWorkerManager, misspelt: str, meant: str
) -> None:
    with pytest.raises(InvalidWorker, match=f"Sample has an attribute '{misspelt}'.* Did you mean '{meant}'?"):
        manager.add(worker(**{misspelt: 5}))


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("batchsize", "batch_size"),
        ("concurency", "concurrency"),
        ("back_off", "backoff"),
        ("max_attempt", "max_attempts"),
        ("handle_mnay", "handle_many"),
    ],
)
def test_a_misspelled_attribute_of_a_message_worker_is_refused_with_the_intended_name(
    manager: BackgroundWorkerManager, misspelt: str, meant: str
) -> None:
    with pytest.raises(InvalidWorker, match=f"Taker has an attribute '{misspelt}'.* Did you mean '{meant}'?"):
        manager.add(taker(handle=taking, **{misspelt: 5}))


@pytest.mark.parametrize("misspelt", ["do_wrok", "dowork", "doWork"])
def test_a_misspelled_method_is_reported_before_a_missing_method(
    manager: BackgroundWorkerManager, misspelt: str
) -> None:
    with pytest.raises(InvalidWorker, match=r"Did you mean 'do_work'\?"):
        manager.add(type("Sample", (PeriodicWorker,), {"period": HOUR, misspelt: working}))


def test_a_misspelled_attribute_of_a_base_class_is_found(manager: BackgroundWorkerManager) -> None:
    with pytest.raises(InvalidWorker, match="Other has an attribute 'max_attemps'"):
        manager.add(type("Other", (worker(max_attemps=5),), {}))


@pytest.mark.parametrize("attribute", ["topic", "concurrency", "handle", "handle_many"])
def test_an_attribute_of_message_workers_is_refused_on_a_periodic_worker(
    manager: BackgroundWorkerManager, attribute: str
) -> None:
    with pytest.raises(InvalidWorker, match=f"Sample.{attribute} is for a MessageWorker only; expected period or cron"):
        manager.add(worker(**{attribute: 5}))


def test_an_attribute_that_a_worker_uses_is_its_own(manager: BackgroundWorkerManager) -> None:
    class Spread(PeriodicWorker):
        period = HOUR
        backoff = timedelta(minutes=1)

        def do_work(self, context: WorkerContext) -> None:
            context.stopping.wait(self.backoff.total_seconds())

    manager.add(Spread)


class Busy(Tidy):
    """Has and uses names of its own, and some resemble the engine's."""

    PERIOD = HOUR
    names = ("a", "b")
    api_url = "https://example.com"
    batch_size = 5
    _max_attemps = 1

    def do_work(self, context: WorkerContext) -> None:
        self.handle_one(*self.names)

    def handle_one(self, *names: str) -> None:
        self.enable = names


class Topical(MessageWorker):
    topic = "topical"
    topics = ("books", "users")
    handler = None
    retries = 3

    def handle(self, message: Message, context: WorkerContext) -> None:
        pass

    def handle_all(self) -> None:
        pass


@pytest.mark.parametrize("cls", [Busy, Topical])
def test_a_users_own_attributes_and_helpers_are_accepted(manager: BackgroundWorkerManager, cls: Any) -> None:
    manager.add(cls)
    assert cls.name in manager.names


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (alone, r"do_work\(self\)"),
        (lonely, r"do_work\(\)"),
        (lambda self: None, r"do_work\(self\)"),
        (lambda self, one, two: None, r"do_work\(self, one, two\)"),
        (staticmethod(working), "@staticmethod do_work"),
        (classmethod(alone), r"do_work\(self\)"),
        (handing_on(alone), r"do_work\(self\)"),
    ],
)
def test_a_method_that_cannot_take_the_context_is_refused(
    manager: BackgroundWorkerManager, method: Any, given: str
) -> None:
    with pytest.raises(InvalidWorker, match=rf"declared as {given}.*expected do_work\(self, context\): it is called"):
        manager.add(worker(do_work=method))


@pytest.mark.parametrize("name", ["handle", "handle_many"])
@pytest.mark.parametrize("method", [alone, working, lambda self, message, context, more: None])
def test_a_handler_that_cannot_take_the_message_and_the_context_is_refused(
    manager: BackgroundWorkerManager, name: str, method: Any
) -> None:
    with pytest.raises(
        InvalidWorker, match=rf"Taker.{name} is declared as .*expected {name}\(self, messages?, context\)"
    ):
        manager.add(taker(**{name: method}))


@pytest.mark.parametrize(
    "method",
    [
        handing_on(some),
        handing_on(handing_on(some_awaited)),
        staticmethod(some),
        partialmethod(some),
        lambda *_: (yield),
    ],
)
def test_a_generator_below_a_decorator_is_refused(manager: BackgroundWorkerManager, method: Any) -> None:
    with pytest.raises(InvalidWorker, match=r"Sample\.do_work is a generator"):
        manager.add(worker(do_work=method))
    with pytest.raises(InvalidWorker, match=r"Taker\.handle is a generator"):
        manager.add(taker(handle=method))


@pytest.mark.parametrize(
    "method",
    [
        injecting(alone),
        handing_on(working),
        staticmethod(lambda context: None),
        classmethod(working),
        partialmethod(lambda self, number, context: None, 5),
        lambda *_: None,
        lambda self, context, more=1: None,
        adding(lambda self, context, more: None),
        singledispatchmethod(working),
    ],
)
def test_every_method_that_can_take_the_context_is_accepted(manager: BackgroundWorkerManager, method: Any) -> None:
    manager.add(worker(do_work=method))
    assert "sample" in manager.names


@pytest.mark.parametrize("method", [None, 5, property(alone)])
def test_an_attribute_that_is_not_a_method_is_refused(manager: BackgroundWorkerManager, method: Any) -> None:
    with pytest.raises(InvalidWorker, match=r"; expected a method: write def do_work\(self, context\)"):
        manager.add(worker(do_work=method))


def needing(self: object, users: object) -> None:
    pass


@pytest.mark.parametrize("make", [worker, lambda **more: taker(handle=taking, **more)])
def test_a_constructor_that_needs_arguments_is_refused_and_any_other_is_accepted(
    manager: BackgroundWorkerManager, make: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidWorker, match=r"\(users\) needs arguments; expected a class"):
        manager.add(make(__init__=needing))
    manager.add(make(__init__=lambda self, users=None, *more: None))


@pytest.mark.parametrize("thing", [Tidy(), "tidy", None, object, int, lambda: None])
def test_a_class_that_is_not_a_worker_is_refused(manager: BackgroundWorkerManager, thing: Any) -> None:
    with pytest.raises(InvalidWorker, match="is not a worker class; expected a subclass of PeriodicWorker"):
        manager.add(thing)


def test_a_second_worker_of_the_same_name_is_refused_and_both_are_named(manager: BackgroundWorkerManager) -> None:
    manager.add(Tidy)
    with pytest.raises(DuplicateWorker) as refused:
        manager.add(worker(name="tidy"))
    assert str(refused.value) == (
        f"There is a worker named 'tidy' already ({__name__}.Tidy), so {__name__}.Sample cannot be added: "
        "give one of them another `name`, or add it once."
    )
    with pytest.raises(DuplicateWorker):
        manager.add(Tidy)
    assert manager.workers["tidy"] is Tidy


def test_a_worker_can_be_removed_and_added_again(manager: BackgroundWorkerManager) -> None:
    manager.add(Tidy)
    manager.remove("tidy")
    assert "tidy" not in manager.workers
    with pytest.raises(UnknownWorker, match="There is no worker named 'tidy'"):
        manager.remove("tidy")
    manager.add(Tidy)


def test_each_application_has_workers_of_its_own(manager: BackgroundWorkerManager, tmp_path: Path) -> None:
    other = make_app(f"sqlite:///{tmp_path / 'other.sqlite'}").extensions["background_workers"]
    manager.add(Tidy)
    assert "tidy" not in other.workers


# -- a blueprint's own package ----------------------------------------------------------------------


BLUEPRINT = """
from flask import Blueprint, Flask
from reviews.workers import ReviewDigestWorker

from background import current_workers

blueprint = Blueprint("reviews", __name__)


@blueprint.record
def register_workers(state):
    with state.app.app_context():
        current_workers.add(ReviewDigestWorker)
"""

WORKERS = """
from datetime import timedelta

from background import PeriodicWorker


class ReviewDigestWorker(PeriodicWorker):
    period = timedelta(hours=1)

    def do_work(self, context):
        context.logger.info("digesting")
"""


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "reviews"
    package.mkdir()
    (package / "__init__.py").write_text(BLUEPRINT)
    (package / "workers.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("reviews", "reviews.workers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("reviews")
def test_a_blueprints_own_package_registers_its_worker_and_importing_it_registers_nothing(app: Flask) -> None:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    import reviews  # type: ignore[import-not-found]

    assert "review_digest_worker" not in manager.workers
    app.register_blueprint(reviews.blueprint)
    assert "review_digest_worker" in manager.workers
    assert manager.trigger("review_digest_worker").state == "succeeded"
    manager.stop()


# -- registering is not starting --------------------------------------------------------------------

PROBE = """
import os, socket, sqlite3, sys, threading

def refuse(*arguments, **options):
    raise AssertionError("a connection was opened")

sqlite3.connect = sqlite3.dbapi2.connect = refuse
socket.socket.connect = refuse
before = set(os.listdir("."))
from support.fleet import Hourly, make_app
for url in sys.argv[1:]:
    app = make_app(url.replace("postgresql:", "postgresql+psycopg:"), Hourly)
    manager = app.extensions["background_workers"]
    assert "hourly" in manager.workers
    assert not manager.is_started
assert threading.active_count() == 1, threading.enumerate()
assert not [name for name in sys.modules if name.startswith("apscheduler")], "APScheduler was imported"
assert set(os.listdir(".")) == before, "a file was made"
print("nothing was opened")
"""


@pytest.mark.promise
def test_making_the_app_opens_no_thread_no_connection_and_no_file(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/absent.sqlite", "postgresql://reader@127.0.0.1:1/nothing"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("DATABASE_URL", "FLASK_APP"):
        environment.pop(name, None)
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, *urls],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert probe.stdout == "nothing was opened\n", probe.stderr
    assert list(tmp_path.iterdir()) == []
