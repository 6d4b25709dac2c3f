"""The metrics for Prometheus: figures of the fleet from any instance, and requests of the answering process."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from flask import Flask, abort, request
from flask.testing import FlaskClient
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from sqlalchemy import Engine, insert, make_url, update
from support.databases import close, on_sqlite, text
from support.fleet import HOUR, Fleet, Hourly, make_app, statements, stop, wait_until
from support.processes import ROOT, margin
from support.proxy import Proxy
from werkzeug.middleware.proxy_fix import ProxyFix

from background import BackgroundWorkerManager, MessageWorker
from background.database import tables
from background.database.clock import steady
from background.history.browsing.topics import Topic
from background.history.records import STATES
from background.history.status import WorkerStatus
from background.ledger.counters import DURATIONS
from background.monitoring import fleet_figures as figures
from background.monitoring import prometheus

PROMTOOL = shutil.which("promtool")
promtool_is_there = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")

Labels = frozenset[tuple[str, str]]


class Letters(MessageWorker):
    topic = "letters"

    def handle(self, message: Any, context: Any) -> None: ...


class Samples:
    """The samples of a scrape, as Prometheus' own Python client reads them."""

    def __init__(self, exposition: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(exposition)}
        self._found: dict[str, dict[Labels, float]] = {}
        for family in self.families.values():
            for sample in family.samples:
                series = self._found.setdefault(sample.name, {})
                assert frozenset(sample.labels.items()) not in series, f"{sample} is there twice"
                series[frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, /, **labels: str) -> float | None:
        return self._found.get(name, {}).get(frozenset(labels.items()))

    def labels(self, name: str, label: str) -> set[str]:
        return {dict(series)[label] for series in self._found.get(name, {})}


def scrape(app: Flask, **query: str) -> Samples:
    response = app.test_client().get("/metrics", query_string=query)
    assert response.status_code == 200
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return Samples(response.text)


def count(app: Flask, *rows: tuple[str, str, str, int, float], age: timedelta = timedelta()) -> None:
    """Insert rows of the totals: worker, kind, label, count, seconds."""
    latest = {"latest_at": datetime.now(UTC) - age}
    names = ("worker", "kind", "label", "count", "seconds")
    with manager_of(app).stores.main.engine.begin() as connection:
        connection.execute(insert(tables.totals), [dict(zip(names, row, strict=True)) | latest for row in rows])


def manager_of(app: Flask) -> BackgroundWorkerManager:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


# -- the fleet -------------------------------------------------------------------------------------


def test_the_totals_are_counters_and_histograms_with_the_same_buckets_for_every_worker(fleet: Fleet) -> None:
    app = fleet.app(Hourly)
    count(
        app,
        ("sweep", "state", "succeeded", 7, 40.0),
        ("sweep", "state", "timed out", 2, 0.5),
        ("sweep", "duration", "0.1", 6, 0.25),
        ("sweep", "duration", "inf", 3, 40.25),
        ("sweep", "lateness", "5", 9, 18.0),
        ("other", "duration", "7", 1, 6.5),  # from a release with different buckets
        age=timedelta(hours=1),
    )
    samples = scrape(app)
    ended = {
        state: samples.value("background_executions_total", worker="sweep", state=state)
        for state in samples.labels("background_executions_total", "state")
    }
    assert ended.pop("succeeded") == 7
    assert ended.pop("timed out") == 2
    assert ended == dict.fromkeys(["failed", "lost", "handed back", "cancelled", "skipped", "missed"], 0)
    took = "background_execution_duration_seconds"
    bounds = ["0.05", "0.1", "5", "7", "10", "3600", "+Inf"]
    assert [samples.value(f"{took}_bucket", worker="sweep", le=le) for le in bounds] == [0, 6, 6, 6, 6, 6, 9]
    assert [samples.value(f"{took}_bucket", worker="other", le=le) for le in bounds] == [0, 0, 0, 1, 1, 1, 1]
    assert len(samples.labels(f"{took}_bucket", "le")) == len(DURATIONS) + 2
    assert samples.value(f"{took}_sum", worker="sweep") == 40.5
    assert samples.value(f"{took}_count", worker="sweep") == 9
    assert samples.value("background_execution_lateness_seconds_sum", worker="sweep") == 18
    assert 3600 <= (samples.value("background_seconds_since_last_success", worker="sweep") or 0) < 3630
    assert samples.value("background_seconds_since_last_success", worker="other") is None


def test_a_worker_is_counted_from_before_its_first_run(fleet: Fleet) -> None:
    app = fleet.app(Hourly)
    manager_of(app).recovery.look(Hourly)
    samples = scrape(app)
    assert samples.value("background_executions_total", worker="hourly", state="missed") == 0
    assert samples.value("background_seconds_since_last_success", worker="hourly") is None


def test_a_worker_is_running_or_paused_or_overdue(fleet: Fleet) -> None:
    app = fleet.app(Hourly)
    manager_of(app).recovery.look(Hourly)
    day_ago = datetime.now(UTC) - timedelta(days=1)

    def gauges() -> list[float | None]:
        samples = scrape(app)
        states = ("running", "paused", "overdue", "interval_seconds")
        return [samples.value(f"background_worker_{state}", worker="hourly") for state in states]

    assert gauges() == [0, 0, 0, 3600]
    fleet.set("hourly", mark=day_ago, scheduled_at=day_ago)
    assert gauges() == [0, 0, 1, 3600]
    manager_of(app).pause("hourly")
    assert gauges() == [0, 1, 0, None]
    fleet.take_over("hourly")
    assert gauges() == [1, 1, 0, None]


def test_only_living_instances_and_their_clocks_are_listed(fleet: Fleet) -> None:
    app = fleet.app(Hourly)
    now = datetime.now(UTC)
    each = {"pid": 1, "started_at": now, "heartbeat_at": now, "expires_at": now + HOUR}
    rows = [
        each | {"id": "a", "host": "a", "clock_offset": -2.5},  # the offset is added to the host's clock
        each | {"id": "b", "host": "b", "clock_offset": 0.5},
        each | {"id": "c", "host": "b", "clock_offset": -0.25},  # containers may share a host name and a process id
        each | {"id": "d", "host": "d", "clock_offset": 9.0, "expires_at": now - HOUR},
    ]
    with manager_of(app).stores.leases.engine.begin() as connection:
        connection.execute(insert(tables.instances), rows)
    samples = scrape(app)
    assert samples.value("background_instances") == 3
    assert samples.labels("background_clock_offset_seconds", "process") == {"a:1", "b:1"}
    assert samples.value("background_clock_offset_seconds", process="a:1") == 2.5
    assert samples.value("background_clock_offset_seconds", process="b:1") == -0.5


def test_open_messages_are_counted_and_the_oldest_is_timed(fleet: Fleet) -> None:
    app = fleet.app(Letters)
    fleet.enqueue("letters", 1, 2, 3, 4, 5)
    fleet.enqueue("letters", 6, delay=HOUR)
    with fleet.engine.begin() as connection:
        for id, state in ((1, "running"), (2, "dead"), (3, "done")):
            connection.execute(update(tables.messages).where(tables.messages.c.id == id).values(state=state))
        long_ago = datetime.now(UTC) - timedelta(minutes=10)
        connection.execute(update(tables.messages).where(tables.messages.c.id == 4).values(due_at=long_ago))
    samples = scrape(app)
    found = {
        state: samples.value("background_messages", topic="letters", state=state)
        for state in samples.labels("background_messages", "state")
    }
    assert found == {"waiting": 3, "running": 1, "dead": 1}
    assert 600 <= (samples.value("background_message_oldest_seconds", topic="letters") or 0) < 630
    assert samples.value("background_topic_paused", topic="letters") == 0
    manager_of(app).messages.pause("letters")
    samples = scrape(app)
    assert samples.value("background_message_oldest_seconds", topic="letters") == 0
    assert samples.value("background_topic_paused", topic="letters") == 1


@pytest.mark.parametrize("label", ["soon", "nan", "-5", "1=2", "1,2=3", "", "1e1", "Infinity"])
def test_a_total_whose_label_a_user_typed_is_left_out_of_the_buckets(fleet: Fleet, label: str) -> None:
    app = fleet.app(Hourly)
    count(app, ("hourly", "duration", "0.1", 2, 0.2), ("hourly", "duration", label, 5, 0.5))
    samples = scrape(app)
    assert samples.value("background_execution_duration_seconds_bucket", worker="hourly", le="0.1") == 2
    assert samples.labels("background_execution_duration_seconds_bucket", "le") == {
        *map("{:g}".format, DURATIONS),
        "+Inf",
    }


def test_a_scrape_costs_as_many_queries_for_many_workers_as_for_one(fleet: Fleet) -> None:
    app = fleet.app(Hourly, Letters)

    def queries() -> int:
        with statements(Engine) as seen:
            scrape(app)
        # An execution is read by the claim in force only, never by the history.
        assert not [statement for statement in seen if f"FROM {tables.executions.name}" in statement]
        return len(seen)

    count(app, ("hourly", "state", "succeeded", 1, 1.0))
    scrape(app)
    before = queries()
    for number in range(40):
        worker = type(f"Worker{number}", (Hourly,), {})
        manager_of(app).add(worker)
        manager_of(app).recovery.look(worker)
        count(app, (worker.name, "state", "succeeded", 1, 1.0), (worker.name, "duration", str(number), 1, 1.0))
    assert queries() == before <= 5
    assert len(scrape(app).labels("background_executions_total", "worker")) == 41


# -- many workers, and many instances --------------------------------------------------------------


def test_the_buckets_of_many_workers_are_added_up_unless_a_scrape_asks_for_each(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = fleet.app(Hourly, Letters)
    manager_of(app).recovery.look(Hourly)
    count(
        app,
        ("hourly", "state", "succeeded", 5, 4.5),
        ("hourly", "state", "lost", 1, 1.0),
        ("hourly", "state", "skipped", 3, 0.0),
        ("hourly", "duration", "0.1", 4, 0.5),
        ("hourly", "duration", "5", 2, 5.0),
        ("hourly", "duration", "soon", 0, 0.0),  # a user typed it
        ("retired", "state", "succeeded", 2, 6.55),
        ("retired", "duration", "0.1", 1, 0.05),
        ("retired", "duration", "7", 1, 6.5),  # from a release with different buckets
        ("retired", "lateness", "inf", 3, 3000.0),
    )
    few = scrape(app)
    monkeypatch.setattr(figures, "_MANY_WORKERS", 0)
    many, full = scrape(app), scrape(app, detail="full")
    took, ended = "background_execution_duration_seconds", "background_executions_total"

    def buckets(samples: Samples, **labels: str) -> list[float | None]:
        return [samples.value(f"{took}_bucket", le=le, **labels) for le in ("0.05", "0.1", "5", "7", "10", "+Inf")]

    assert buckets(many) == [0, 5, 7, 8, 8, 8]
    assert many.value("background_execution_lateness_seconds_bucket", le="+Inf") == 3
    assert buckets(many, worker="hourly") == buckets(few) == buckets(full) == [None] * 6
    for samples in (few, full):
        assert buckets(samples, worker="hourly") == [0, 4, 6, 6, 6, 6]
        assert buckets(samples, worker="retired") == [0, 1, 1, 2, 2, 2]
        assert len(samples.labels(ended, "state")) == 8
    for samples in (few, full, many):
        assert [samples.value(f"{took}_{part}", worker="hourly") for part in ("count", "sum")] == [6, 5.5]
        assert [samples.value(f"{took}_{part}", worker="retired") for part in ("count", "sum")] == [2, 6.55]
        late = "background_execution_lateness_seconds"
        assert [samples.value(f"{late}_{part}", worker="retired") for part in ("count", "sum")] == [3, 3000]
        assert samples.value(f"{took}_sum") is samples.value(f"{took}_count") is None  # a sum would count twice
        assert (samples.value("background_seconds_since_last_success", worker="hourly") or -1) >= 0
    states = {state: many.value(ended, worker="hourly", state=state) for state in many.labels(ended, "state")}
    assert states == {"succeeded": 5, "lost": 1, "failed": 0, "skipped": 3, "missed": 0}


@pytest.mark.parametrize(("workers", "are_many"), [(250, False), (1_000, True)])
def test_a_scrape_has_at_most_a_megabyte_and_is_the_text_of_the_client_library(workers: int, are_many: bool) -> None:
    exposition = prometheus.of_fleet(invented(workers, are_many))
    assert len(exposition) <= 1_000_000
    assert generate_latest(Families(exposition.decode())) == exposition


class Families(Collector):
    """The families of a text, as the client library reads them."""

    def __init__(self, exposition: str) -> None:
        self.found = list(text_string_to_metric_families(exposition))

    def collect(self) -> list[Metric]:
        return self.found


def invented(workers: int, are_many: bool) -> figures.Figures:
    """Return figures of workers, some with names that a user typed into their rows, and with numbers of all sizes."""
    names = [
        'a"b',
        "back\\slash",
        "line\nbreak",
        'x",state="y',
        "ünï} 1",
        *(f"{n:03d}_order_worker" for n in range(5, workers)),
    ]
    rng = Random(7)
    kinds = {"state": [*STATES[1:4], "missed"], "duration": ["0.01", "5", "7", "inf"], "lateness": ["0.5", "inf"]}

    def total(kind: str) -> figures.Total:
        numbers = {label: int(10 ** rng.uniform(0, 7)) for label in kinds[kind]}
        shown = {} if are_many and kind != "state" else numbers
        return figures.Total(shown, sum(numbers.values()), 10 ** rng.uniform(-6, 6), rng.uniform(-1, 1e6))

    totals = {kind: {name: total(kind) for name in names} for kind in kinds}
    status = WorkerStatus("", True, False, None, timedelta(seconds=0.1), None, timedelta(), False, None)
    buckets = {"duration": {"0.01": 10**7, "inf": 3}, "lateness": {"inf": 5}} if are_many else {}
    statuses = [status._replace(name=name) for name in names]
    topics = [Topic('the "mails"\\', None, waiting=10**6, dead=2, oldest_seconds=0.1 + 0.2)]
    return figures.Figures(totals, are_many, buckets, statuses, {"vm:1": -1e-7, "vm:2": 1e7}, 2, topics)


def test_a_scrape_of_the_fleet_and_a_scrape_of_the_process_share_no_series(fleet: Fleet) -> None:
    app = fleet.app(Hourly, Letters)
    manager_of(app).recovery.look(Hourly)
    both, of_fleet = scrape(app), scrape(app, of="fleet")
    with statements(Engine) as seen:
        of_process = scrape(app, of="process")
    assert seen == []
    assert both.families.keys() == of_fleet.families.keys() | of_process.families.keys()
    assert {name.partition("_")[0] for name in of_fleet.families} == {"background"}
    assert {name.partition("_")[0] for name in of_process.families} == {"http"}


@on_sqlite
def test_a_misspelled_part_of_the_metrics_is_refused(client: FlaskClient) -> None:
    for query in ("of=flet", "of=fleet&detail=ful", "detail=none"):
        refused = client.get(f"/metrics?{query}")
        assert refused.status_code == 400
        assert "expected of=fleet, of=process" in refused.text
        assert query.rpartition("=")[2] in refused.text


# -- a database that is away -----------------------------------------------------------------------


def test_while_the_database_is_away_a_scrape_says_so_and_has_the_requests_of_the_process(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(figures, "_ANSWER_SECONDS", 0.3)
    proxy = Proxy(make_url(postgresql_url))
    app = make_app(text(proxy.url), Hourly)
    try:
        wait_until(lambda: scrape(app).value("background_up") == 1, "its first figures")
        caplog.clear()
        for away in (proxy.refuse, proxy.silence):
            away()
            for _ in range(2):
                began = steady()
                samples = scrape(app)
                assert steady() - began < 0.3 + margin()
                assert samples.value("background_up") == 0
                assert {name.partition("_")[0] for name in samples.families} == {"background", "http"}
                assert "background_instances" not in samples.families
            proxy.heal()
            wait_until(lambda: scrape(app).value("background_up") == 1, "the database's return")
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len([line for line in said if line.startswith("No figures of the fleet")]) == 2
    finally:
        proxy.heal()
        stop(app)
        proxy.close()


# -- the requests of a process ---------------------------------------------------------------------


@on_sqlite
def test_requests_are_counted_by_rule_and_never_by_an_invented_path(app: Flask, client: FlaskClient) -> None:
    app.add_url_rule("/books", view_func=list)
    app.add_url_rule("/books/<int:number>", "book", lambda number: [number] if number < 99 else abort(404))
    for path in ("/books/1", "/books/2", "/books/99", "/made/up", "/made/up/too"):
        client.get(path)
    client.open("/books", method="MADEUP")
    samples = scrape(app)
    [process] = samples.labels("http_requests_total", "process")

    def requests(method: str, endpoint: str, status: str) -> float | None:
        labels = {"method": method, "endpoint": endpoint, "status": status, "process": process}
        return samples.value("http_requests_total", **labels)

    assert requests("GET", "/books/<int:number>", "200") == 2
    assert requests("GET", "/books/<int:number>", "404") == 1
    assert requests("GET", "none", "404") == 2
    assert requests("other", "none", "405") == 1
    of_books = {"method": "GET", "endpoint": "/books/<int:number>", "process": process}
    assert samples.value("http_request_duration_seconds_count", **of_books) == 3
    assert samples.value("http_request_duration_seconds_bucket", **of_books, le="+Inf") == 3
    assert 0 < (samples.value("http_request_duration_seconds_sum", **of_books) or 0) < 30


@on_sqlite
def test_a_request_that_fails_or_is_refused_before_its_view_is_also_counted(database_url: str) -> None:
    app = make_app(database_url, TESTING=False)
    app.add_url_rule("/fails", "fails", lambda: 1 / 0)
    app.add_url_rule("/refuses", "refuses", lambda: "never")

    @app.before_request
    def refuse() -> None:
        if request.path == "/refuses":
            abort(403)

    client = app.test_client()
    assert client.get("/fails").status_code == 500
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(ZeroDivisionError):
        client.get("/fails")
    assert client.get("/refuses").status_code == 403
    samples = scrape(app)
    [process] = samples.labels("http_requests_total", "process")
    seen = {
        (endpoint, status): samples.value(
            "http_requests_total", method="GET", endpoint=endpoint, status=status, process=process
        )
        for endpoint, status in (("/fails", "500"), ("/refuses", "403"))
    }
    assert seen == {("/fails", "500"): 2, ("/refuses", "403"): 1}
    close(app)


@on_sqlite
def test_two_apps_of_one_process_count_their_own_requests(database_url: str) -> None:
    one, other = make_app(database_url), make_app(database_url)
    one.test_client().get("/workers/")
    scrape(one)
    assert "/workers/" in scrape(one).labels("http_requests_total", "endpoint")
    scrape(other)
    assert scrape(other).labels("http_requests_total", "endpoint") == {"/metrics"}
    close(one, other)


# -- access --------------------------------------------------------------------------------


@on_sqlite
def test_with_a_token_only_a_scrape_that_sends_it_is_allowed(app: Flask, client: FlaskClient) -> None:
    assert client.get("/metrics").status_code == 200
    app.config["METRICS_TOKEN"] = "s3cret"
    wrong = (
        None,
        "Bearer",
        "Bearer ",
        "Bearer s3cre",
        "Bearer s3cret!",
        "Bearer ä",
        "Basic s3cret",
        "Basic Zm9vOmJhcg==",
    )
    for header in wrong:
        refused = client.get("/metrics", headers={"Authorization": header} if header else {})
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer"), header
        assert "http_requests_total" not in refused.text
        assert "Set-Cookie" not in refused.headers
    for token, header in (("s3cret", "bearer s3cret"), ("abc=def==", "Bearer abc=def==")):
        app.config["METRICS_TOKEN"] = token
        assert client.get("/metrics", headers={"Authorization": header}).status_code == 200


@on_sqlite
def test_without_a_token_only_a_program_on_this_machine_may_scrape_and_no_proxy(app: Flask) -> None:
    def scraped_from(peer: str, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = app.test_client().get("/metrics", headers=named, environ_overrides={"REMOTE_ADDR": peer})
        assert ("background_up" in response.text) == (response.status_code == 200)
        assert ("METRICS_TOKEN" in response.text) == (response.status_code == 403)
        return response.status_code

    for peer in ("127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"):
        assert scraped_from(peer) == 200, peer
    for peer in ("192.0.2.7", "10.0.0.1", "2001:db8::7", "::ffff:192.0.2.7", "", "nonsense"):
        assert scraped_from(peer) == 403, peer
    for header in ("X_Forwarded_For", "Forwarded", "X_Real_IP", "Via"):
        assert scraped_from("127.0.0.1", **{header: "127.0.0.1"}) == 403, header
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    assert scraped_from("192.0.2.7", X_Forwarded_For="127.0.0.1") == 403
    app.config["METRICS_TOKEN"] = "s3cret"
    assert scraped_from("192.0.2.7", Authorization="Bearer s3cret") == 200


# -- promtool --------------------------------------------------------------------------------------


def promtool(*arguments: str, reads: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [str(PROMTOOL), *arguments], input=reads, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


@promtool_is_there
@pytest.mark.parametrize("many", [250, 0])
def test_promtool_finds_nothing_wrong_with_a_scrape(fleet: Fleet, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_MANY_WORKERS", many)
    app = fleet.app(Hourly, Letters)
    manager_of(app).start()
    wait_until(lambda: manager_of(app).presence.instance, "joining")
    manager_of(app).recovery.look(Hourly)
    fleet.enqueue("letters", 1)
    count(
        app,
        ("retired", "state", "succeeded", 7, 40.0),  # also of a worker that this release does not have
        ("retired", "duration", "0.1", 7, 0.25),
        ("retired", "lateness", "inf", 7, 0.25),
    )
    app.test_client().get("/workers/")
    exposition = app.test_client().get("/metrics").text
    assert promtool("check", "metrics", reads=exposition) == (0, "")
    assert len(Samples(exposition).families) >= 14


@promtool_is_there
@pytest.mark.parametrize(
    "arguments", ["check rules background/alerts.yml", "test rules tests/background/monitoring/alerts_test.yml"]
)
def test_the_alerts_are_as_promtool_expects(arguments: str) -> None:
    code, said = promtool(*arguments.split())
    assert code == 0, said


@on_sqlite
def test_every_metric_of_an_alert_is_in_a_scrape(fleet: Fleet) -> None:
    app = fleet.app(Hourly, Letters)
    manager_of(app).start()
    wait_until(lambda: "succeeded" in fleet.states(), "the first run")
    names = {sample.name for family in scrape(app).families.values() for sample in family.samples}
    assert set(figures_of((ROOT / "background" / "alerts.yml").read_text().splitlines())) <= names


def figures_of(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "name:" not in line and "rule_files" not in line:
            yield from re.findall(r"background_\w+", line)
