"""The dashboard of the workers, as its server responds: on both databases, for every role, for any input."""

import json
import re
from datetime import UTC, datetime, timedelta
from html import unescape

import pytest
from flask import Flask
from sqlalchemy import Engine, insert, select, update
from support.databases import close, on_postgresql, on_sqlite
from support.fleet import Hourly, last_hour, make_app, statements
from support.pages import Counting, Mailing, page, said

from background import InvalidSchedule, PeriodicWorker, WorkerContext
from background.dashboard import dashboard
from background.dashboard.access import Access
from background.database import tables
from background.schedule.parsing import typed_schedule

EVIL = '<script>alert("1")</script>'


class Talker(PeriodicWorker):
    """Says something <b>bold</b>."""

    period = timedelta(minutes=10)
    ends_well = True
    run_on_first_start = True

    def do_work(self, context: WorkerContext) -> None:
        context.logger.warning("Saying %s", EVIL)
        if not self.ends_well:
            raise ValueError(EVIL)


class Measuring(Hourly):
    period = timedelta(minutes=1)


@pytest.fixture
def app(database_url):
    app = make_app(database_url, Talker, Measuring, Counting, Mailing)
    yield app
    close(app)


def press(client, path: str, **form: str) -> str:
    """Submit a form and return the page that it leads to."""
    response = client.post(path, data={"next": "/workers/", **form})
    assert response.status_code == 303, response.text
    return client.get(response.location).text


def add_executions(engine, *rows: dict) -> None:
    usual = {
        "worker": "talker", "trigger": "schedule", "state": "succeeded", "attempt": 1, "instance_name": "host:1",
        "instance": "abc", "started_at": None, "finished_at": None, "token": None, "through": None, "reason": None,
        "log": None,
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(insert(tables.executions), [usual | row for row in rows])


def add_workers(engine, *names: str) -> None:
    row = {"schedule": "every 60s", "declared": "every 60s", "scheduled_at": datetime.now(UTC)}
    with engine.begin() as connection:
        connection.execute(insert(tables.workers), [{"name": name, **row} for name in names])


# -- looking -------------------------------------------------------------------------------------


@on_sqlite
def test_the_overview_shows_every_worker_with_its_schedule_and_its_last_run(client, manager):
    manager.trigger("talker")
    manager.pause("measuring")
    text = said(page(client, "/workers/"))
    assert "talker Says something <b>bold</b>. Runs every 10 minutes." in text
    assert "succeeded" in text
    assert "paused since" in text
    assert "counting" in text
    assert "Handles the messages of orders" in text
    assert "in " in re.search(r"<time [^>]*data-countdown>([^<]*)", page(client, "/workers/"))[1]
    assert client.get("/workers").location.endswith("/workers/")


@on_sqlite
def test_a_running_worker_is_shown_with_its_instance_and_its_progress(client, manager):
    seen: list[str] = []

    class Looker(Hourly):
        def do_work(self, context):
            context.progress(30, 120)
            context.commit()
            seen.extend(said(page(client, path)) for path in ("/workers/", "/workers/worker/looker"))

    manager.add(Looker)
    with manager.presence.present():
        manager.trigger("looker")
    assert all("30 of 120" in text and re.search(r"running on \S+:\d+, since", text) for text in seen)
    assert len(seen) == 2


@on_sqlite
def test_the_last_outcome_shows_its_attempt(client, manager, engine):
    manager.recovery.look(Talker)
    at = last_hour()
    run = {"tick": at, "started_at": at, "finished_at": at + timedelta(seconds=9)}
    add_executions(engine, {**run, "state": "lost"}, {**run, "attempt": 2})
    for path in ("/workers/", "/workers/worker/talker"):
        assert "succeeded in 9.000 s, attempt 2" in said(page(client, path))


@on_sqlite
def test_the_picture_has_a_description_in_words(client, manager, engine):
    manager.trigger("talker")
    at = last_hour()
    add_executions(
        engine,
        {"tick": at, "started_at": at, "finished_at": at + timedelta(seconds=9), "state": "failed"},
        {"tick": at - timedelta(hours=1), "state": "missed", "attempt": None},
    )
    text = page(client, "/workers/worker/talker")
    assert "The last 3 executions: 1 missed, 1 failed, 1 succeeded; the longest took 9.000 s" in text
    assert f"<title>{at:%Y-%m-%d %H}:00:00 UTC: failed, 9.000 s</title>" in text


def test_the_worker_page_pages_through_the_executions_of_one_state(client, manager, engine):
    manager.trigger("talker")
    first = last_hour() - timedelta(days=10)
    add_executions(
        engine,
        *({"tick": first + timedelta(hours=n // 2), "state": "failed" if n % 3 else "lost"} for n in range(60)),
    )
    ids: list[str] = []
    address: str | None = "/workers/worker/talker?state=failed"
    while address:
        text = page(client, address)
        ids += re.findall(r'id="execution-(\d+)"', text)
        link = re.search(r'rel="next" href="([^"#]*)', text)
        address = unescape(link[1]) if link else None
    assert len(ids) == len(set(ids)) == 40
    assert ids == sorted(ids, key=int, reverse=True)
    assert "No executions" not in page(client, "/workers/worker/talker?before=nonsense&state=nonsense")


@on_sqlite
def test_executions_are_found_by_their_moment_in_any_zone(client, manager, engine):
    manager.recovery.look(Talker)
    noon = datetime(2026, 1, 20, 12, tzinfo=UTC)
    add_executions(engine, *({"tick": noon + timedelta(hours=n)} for n in range(40)))

    def newest(**asked: str) -> str:
        text = client.get("/workers/worker/talker", query_string=asked).text
        assert 'rel="next"' not in text
        return re.search(r'id="execution-\d+">.*?datetime="([^"]*)"', text, re.DOTALL)[1]

    assert newest(until="2026-01-20T15:00") == "2026-01-20T15:00:00+00:00"
    assert newest(until="2026-01-20T15:00", zone="Europe/Berlin") == "2026-01-20T14:00:00+00:00"
    text = page(client, "/workers/worker/talker?until=2026-01-22T00:00&state=succeeded")
    assert 'name="until" value="2026-01-22T00:00"' in text
    older = page(client, unescape(re.search(r'rel="next" href="([^"#]*)', text)[1]))
    assert len(re.findall('id="execution-', text)) + len(re.findall('id="execution-', older)) == 37
    for nonsense in ("until=x", "until=2026-01-20T15:00&zone=x", "until=%00&zone=%00", "until=0001-01-01T00:00"):
        assert "2026-01-22T03:00:00+00:00" in page(client, f"/workers/worker/talker?{nonsense}")


def test_a_rare_state_is_searched_for_in_steps_further_back(client, manager, engine, monkeypatch):
    monkeypatch.setattr("background.history.executions.MOST_SEARCHED", 10)
    manager.recovery.look(Talker)
    first = last_hour() - timedelta(days=10)
    add_executions(
        engine, *({"tick": first + timedelta(hours=n), "state": "failed" if n == 3 else "lost"} for n in range(25))
    )
    address, pages = "/workers/worker/talker?state=failed", []
    while address:
        pages.append(page(client, address))
        link = re.search(r'rel="next" href="([^"#]*)', pages[-1])
        address = unescape(link[1]) if link else None
    assert [len(re.findall(r'id="execution-', text)) for text in pages] == [0, 0, 1]
    assert "None of these" in pages[0]
    assert "No execution is failed." not in pages[0]


@on_sqlite
def test_an_execution_shows_its_error_and_its_log_without_markup_from_them(client, manager, engine, monkeypatch):
    monkeypatch.setattr(Talker, "ends_well", False)
    manager.trigger("talker")
    add_workers(engine, EVIL)
    pages = [page(client, "/workers/"), page(client, "/workers/worker/talker")]
    link = re.search(r'href="(/workers/worker/talker/\d+)"', pages[1])[1]
    pages.append(page(client, link))
    assert f"ValueError: {EVIL}" in said(pages[1]).replace("...", "")
    shown = unescape(pages[2])
    assert "Traceback (most recent call last)" in shown
    assert f"Saying {EVIL}" in shown
    assert not any(EVIL in text or "<b>bold" in text for text in pages)
    assert "&lt;script&gt;" in pages[0]
    page(client, link.replace("talker", "measuring"), 404)
    page(client, "/workers/worker/talker/999999", 404)
    page(client, f"/workers/worker/talker/{2**63}", 404)


def test_an_execution_shows_the_beginning_of_its_cursor_without_markup_from_it(client, manager, engine):
    now = datetime.now(UTC)
    cursors = [json.dumps([EVIL, "\x1b", "long" * 1_000]), "0", None]
    rows = [{"tick": now + timedelta(seconds=n), "cursor": cursor} for n, cursor in enumerate(cursors)]
    add_executions(engine, *rows)
    long, zero, none = (page(client, f"/workers/worker/talker/{id}") for id in (1, 2, 3))
    assert "<code>[&#34;&lt;script&gt;alert(\\&#34;1\\&#34;)" in long
    assert "…</code>" in long
    assert long.count("long") < 250
    assert "<dd><code>0</code></dd>" in zero
    assert "Cursor" not in none


def test_a_worker_shows_its_next_five_ticks_and_where_the_clocks_change(client, manager):
    manager.recovery.look(Talker)
    text = page(client, "/workers/worker/talker").partition('id="next"')[2].partition("</section>")[0]
    found = [datetime.fromisoformat(at) for at in re.findall(r'<li><time datetime="([^"]*)"', text)]
    first = found[0]
    assert found == [first + n * timedelta(minutes=10) for n in range(5)]
    assert manager.history.clock() < first <= manager.history.clock() + timedelta(minutes=10)
    manager.pause("talker")
    text = page(client, "/workers/worker/talker").partition('id="next"')[2].partition("</section>")[0]
    assert "paused since" in said(text)
    assert "<li>" not in text
    manager.reschedule("measuring", cron="30 2 25 10 *", timezone="Europe/Berlin")
    text = said(page(client, "/workers/worker/measuring"))
    assert re.search(r"\w{3} 02:30 CES?T", text)
    if "2026-10-25" in text:
        assert "the clocks show this time twice" in text


@on_sqlite
def test_a_worker_shows_its_success_rate_and_the_percentiles_of_its_runs(client, manager, engine):
    manager.recovery.look(Talker)
    assert "Last 24 hours Nothing is counted yet." in said(page(client, "/workers/worker/talker"))
    now = manager.history.clock()
    for number in range(3):
        tick = now - timedelta(seconds=100 + number)
        run = {"tick": tick, "started_at": tick + timedelta(seconds=2), "finished_at": tick + timedelta(seconds=6)}
        add_executions(engine, {**run, "state": "succeeded" if number else "failed", "reason": "OSError: no"})
    text = said(page(client, "/workers/worker/talker"))
    assert "66.6 % succeeded, of 3 runs." in text
    assert re.search(r"p50 p95 max Duration [34][.\d]* s [34][.\d]* s 4 s Lateness .* 2 s ", text)


@on_sqlite
def test_each_gap_and_each_tick_that_did_not_run_leads_to_the_reason(client, manager, engine):
    manager.recovery.look(Talker)
    noon = datetime(2026, 1, 20, 12, tzinfo=UTC)
    with engine.begin() as connection:
        connection.execute(update(tables.workers).values(scheduled_at=noon - timedelta(hours=1)))
    tens = [{"tick": noon + n * timedelta(minutes=10), "started_at": noon} for n in (0, 4, 5)]
    skipped = {"tick": noon + timedelta(minutes=60), "state": "skipped", "through": noon + timedelta(minutes=80)}
    add_executions(engine, *tens, skipped)
    text = page(client, "/workers/worker/talker?until=2026-01-20T13:35:00")
    links = [unescape(link) for link in re.findall(r'<a [^>]*href="[^"]*at=([^"]*)#why">Why\?</a>', text)]
    assert links == [f"2026-01-20T{at}:00Z" for at in ("11:10", "13:30", "13:20", "12:30")]
    assert "12:10:00 UTC to 2026-01-20 12:30:00 UTC No execution. Why?" in said(text)
    answer = page(client, f"/workers/worker/talker?at={links[-1]}")
    assert "The tick 2026-01-20T12:30:00Z of talker is overdue" in said(answer)
    assert 'value="2026-01-20T12:30:00" data-moment="2026-01-20T12:30:00+00:00"' in answer
    assert "No execution." not in said(page(client, "/workers/worker/talker?state=skipped"))


@on_sqlite
def test_a_tick_whose_execution_is_still_to_come_is_no_gap(client, manager):
    manager.trigger("measuring")
    assert "No execution." not in said(page(client, "/workers/worker/measuring"))


@on_sqlite
def test_errors_are_grouped_with_their_counts_and_a_link_to_the_newest(client, manager, engine):
    manager.recovery.look(Talker)
    assert 'id="errors"' not in page(client, "/workers/worker/talker")
    at = last_hour()
    failed = {"state": "failed", "started_at": at, "finished_at": at, "reason": f"Traceback\nValueError: {EVIL}"}
    add_executions(engine, *({**failed, "tick": at - timedelta(hours=n)} for n in range(3)))
    text = page(client, "/workers/worker/talker")
    assert f"ValueError: {EVIL} 3 {at:%Y-%m-%d %H}:00:00 UTC" in said(text)
    assert EVIL not in text
    newest = max(manager.history.executions("talker"), key=lambda each: each.id)
    assert f'href="/workers/worker/talker/{newest.id}"' in text.partition('id="errors"')[2].partition("</table>")[0]


@on_sqlite
def test_an_execution_leads_to_its_neighbours_and_to_the_other_attempts_at_its_tick(client, manager, engine):
    manager.recovery.look(Talker)
    at = last_hour()
    run = {"tick": at, "started_at": at, "finished_at": at}
    add_executions(engine, {**run, "tick": at - timedelta(hours=1)}, {**run, "state": "lost"}, {**run, "attempt": 2})
    newest, lost, oldest = [f"/workers/worker/talker/{each.id}" for each in manager.history.executions("talker")]
    text = page(client, lost)
    assert f'rel="prev" href="{oldest}"' in text
    assert f'rel="next" href="{newest}"' in text
    assert f'<a href="{newest}">Attempt 2</a>' in text
    assert "Attempt 1 lost" in said(text)
    alone = page(client, oldest)
    assert 'rel="prev"' not in alone
    assert "Attempts at this tick" not in alone
    assert 'rel="next"' not in page(client, newest)
    rows = page(client, "/workers/worker/talker").partition('id="executions"')[2]
    assert [body.count("<tr") for body in rows.split("<tbody>")[1:]] == [2, 1]


@on_sqlite
def test_a_traceback_folds_the_frames_of_the_framework(client, manager, monkeypatch):
    monkeypatch.setattr(Talker, "ends_well", False)
    manager.trigger("talker")
    [record] = manager.history.executions("talker")
    text = page(client, f"/workers/worker/talker/{record.id}")
    folded = re.search(r"<details><summary>(\d+) frames? of the framework</summary><pre>(.*?)</pre>", text, re.DOTALL)
    assert "background/runs/" in folded[2]
    assert __file__ not in folded[2]
    assert __file__ in text
    assert re.search(r'<button [^>]*data-copies="reason"[^>]* hidden>', text)
    assert re.search(r'<time data-exact="20[^"]*Z"[^>]*>20[^<]*Z</time> WARNING Saying &lt;script', text)


@on_sqlite
def test_why_is_answered_for_a_moment_in_any_zone(client, manager):
    manager.trigger("talker")
    text = said(page(client, "/workers/worker/talker?at=2026-01-20T13:00&zone=Europe/Berlin"))
    assert "The tick 2026-01-20T12:00:00Z of talker" in text
    assert "The tick 2026-01-20T13:00:00Z" in said(page(client, "/workers/worker/talker?at=2026-01-20T13:00"))


@on_sqlite
def test_the_answer_about_a_tick_that_ran_leads_to_its_last_execution(client, manager):
    tick = last_hour()
    assert manager.tick("measuring", tick).state == "succeeded"
    text = page(client, f"/workers/worker/measuring?at={tick:%Y-%m-%dT%H:%M:%S}")
    assert '<a href="/workers/worker/measuring/1">See the execution</a>' in text


@on_sqlite
def test_an_invalid_moment_is_reported_beside_the_field(client, manager):
    manager.trigger("talker")

    def ask(**question: str) -> str:
        response = client.get("/workers/worker/talker", query_string=question)
        assert response.status_code == 200
        return said(response.text)

    for at in ("yesterday", "0001-01-01T00:00", "9999-12-31T23:59:59-23:59", "\0", EVIL, "2026"):
        assert f"{at!r} is not a moment" in ask(at=at)
    for zone in ("../etc", "Europe", "\0", EVIL):
        assert "is not in the time zone database" in ask(at="2026-01-01", zone=zone)


@on_sqlite
def test_an_unknown_worker_is_a_page_not_found(client, manager):
    for name in ("unknown", "%00", "a" * 300, "%F0%9F%90%A2", "%ff", "countings"):
        page(client, f"/workers/worker/{name}", 404)
        for action in ("run", "pause", "resume", "reschedule"):
            assert client.post(f"/workers/worker/{name}/{action}").status_code == 404


@on_sqlite
def test_a_worker_of_another_release_is_shown_without_buttons(client, manager, engine):
    add_workers(engine, "stranger")
    text = page(client, "/workers/worker/stranger")
    assert "not in this release" in text
    assert "Another release has this worker" in text
    assert "/workers/worker/stranger/run" not in text + page(client, "/workers/")
    response = client.post("/workers/worker/stranger/pause")
    assert response.status_code == 409
    assert "is not in this release" in response.text


@on_sqlite
def test_a_message_worker_has_a_page_with_its_figures_and_errors(client, manager, engine):
    clock = manager.history.clock()
    row = {"topic": "mail", "payload": "1", "enqueued_at": clock, "due_at": clock, "attempt": 0, "postponed": None}
    more = ({}, {"due_at": clock + timedelta(hours=1), "postponed": 2}, {"attempt": 1}, {"state": "dead"})
    with engine.begin() as connection:
        for id, columns in enumerate(more, start=1):
            connection.execute(insert(tables.messages).values(row | columns | {"id": id}))
        failure = {"attempt": 1, "at": clock, "error": "OSError: <jam>"}
        connection.execute(insert(tables.message_errors), [failure | {"message": id} for id in (3, 4)])
    text = page(client, "/workers/worker/mailing")
    facts = {
        key: " ".join(re.sub(r"<[^>]*>", " ", value).split())
        for key, value in re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", text, re.S)
    }
    counts = {"Waiting": "3 , 1 of them delayed", "Running": "0", "Retrying": "1", "Postponed": "1", "Dead": "1"}
    assert facts.items() >= {**counts, "Topic": "mail", "Declared": "in Mailing"}.items()
    assert text.count("OSError: &lt;jam&gt;") == 2
    assert 'href="/workers/messages?topic=mail&amp;state=dead#messages"' in text
    assert "since" not in facts
    manager.pause("mailing")
    text = page(client, "/workers/worker/mailing")
    assert "its messages wait" in text
    assert 'aria-label="Resume mail"' in text
    assert client.post("/workers/worker/mailing/pause").status_code == 404


@on_sqlite
def test_the_page_of_a_message_worker_takes_a_constant_number_of_statements(client, manager, engine):
    page(client, "/workers/worker/mailing")
    counts = []
    for number in (1, 50):
        clock = manager.history.clock()
        row = {"topic": "mail", "payload": "1", "enqueued_at": clock, "due_at": clock, "state": "dead"}
        with engine.begin() as connection:
            connection.execute(insert(tables.messages), [row] * number)
        with statements(Engine) as sent:
            page(client, "/workers/worker/mailing")
        counts.append(len(sent))
    assert counts[0] == counts[1] <= 20


def test_an_invalid_address_causes_no_error(client, manager):
    manager.trigger("talker")
    nonsense = (
        "endpoint=x&_scheme=x&_external=1&_method=x&_anchor=x&name=x&id=x",
        "before=2026-01-01~-99999999999999999999",
    )
    more = (
        "before=2026-01-01~999999999999999999999",
        f"state={EVIL}&edit={EVIL}&schedule={EVIL}&timezone=%00",
        "q=%00",
    )
    for query in (*nonsense, *more, "page=-1", "page=99999999999999999999", "at=%00&zone=%00", "%ff=%ff"):
        for path in ("/workers/", "/workers/worker/talker"):
            assert EVIL not in page(client, f"{path}?{query}")


@on_sqlite
def test_many_workers_are_paged_and_found_by_name(client, engine):
    add_workers(engine, *(f"worker_{number:03}" for number in range(60)))
    first, last = page(client, "/workers/"), page(client, "/workers/?page=999")
    assert "worker_059" in last
    assert "worker_059" not in first
    assert "Page 1 of 4" in first
    assert re.findall(r'id="row-([^"]*)"', page(client, "/workers/?q=_02")) == [f"worker_{n:03}" for n in range(20, 30)]
    assert "No worker&#39;s name contains" in page(client, f"/workers/?q={EVIL}").replace("'", "&#39;")
    page(client, "/workers/?page=-1&q=%00")
    page(client, "/workers/?page=1e999")


def test_a_page_costs_as_many_statements_with_60_workers_as_with_3(client, manager, engine):
    def cost(path: str) -> int:
        page(client, path)
        with statements(Engine) as seen:
            page(client, path)
        return len(seen)

    manager.trigger("talker")
    [run] = manager.history.executions("talker")
    worker = "/workers/worker/talker"
    paths = ("/workers/", worker, f"{worker}?state=failed", f"{worker}?at=2026-01-20T12:00Z", f"{worker}/{run.id}")
    paths += ("/workers/timeline", "/workers/instances")
    before = [cost(path) for path in paths]
    names = [f"worker_{number:03}" for number in range(57)]
    add_workers(engine, *names)
    at = last_hour()
    add_executions(
        engine,  # not at the newest tick, which is a gap on the timeline, before and now
        *({"worker": name, "tick": at - timedelta(hours=1 + n)} for name in (*names, "talker") for n in range(30)),
    )
    assert [cost(path) for path in paths] == before
    assert max(before) <= 20


# -- steering ------------------------------------------------------------------------------------


def test_the_first_instance_that_sees_a_request_runs_it(client, manager):
    assert "talker will run as soon as an instance is alive. No instance is alive now." in press(
        client, "/workers/worker/talker/run"
    )
    assert "talker is running already, or will run next." in press(client, "/workers/worker/talker/run")
    with manager.presence.present():
        assert "measuring will run within" in press(client, "/workers/worker/measuring/run")


@on_sqlite
def test_pause_and_resume_report_their_changes_and_repeating_them_changes_nothing(client, manager):
    assert "talker is paused" in press(client, "/workers/worker/talker/pause")
    assert "was paused already" in press(client, "/workers/worker/talker/pause")
    assert manager.stores.ledger.look("talker").paused_at
    assert "talker is resumed" in press(client, "/workers/worker/talker/resume")
    assert "was not paused" in press(client, "/workers/worker/talker/resume")


@on_sqlite
def test_a_schedule_is_changed_and_reset_with_one_click(client, manager):
    path = "/workers/worker/talker/reschedule"
    assert "talker runs every 90 seconds from now on." in press(client, path, schedule="1m30s")
    assert "talker runs every 90 seconds already." in press(client, path, schedule="90")
    assert "schedule changed" in page(client, "/workers/worker/talker")
    text = press(client, path, schedule="30 2 * * *", timezone="Europe/Berlin")
    assert "talker runs at 30 2 * * * (Europe/Berlin) from now on." in text
    assert "Reset to every 10 minutes" in text
    text = press(client, path, declared="1")
    assert "talker runs every 10 minutes from now on." in text
    assert "Reset to" not in text
    assert not manager.stores.ledger.look("talker").overridden


@on_sqlite
def test_the_next_ticks_of_a_typed_schedule_are_shown_before_it_is_saved(client, manager):
    manager.recovery.look(Talker)
    path, form = "/workers/worker/talker/reschedule", {"schedule": "30 2 * * *", "timezone": "Europe/Berlin"}
    text = press(client, path, preview="1", **form)
    panel = text.partition('id="ticks-talker"')[2].partition("</details>")[0]
    found = [datetime.fromisoformat(at) for at in re.findall(r'<li><time datetime="([^"]*)"', panel)]
    assert found == typed_schedule("30 2 * * *", "Europe/Berlin").following(manager.history.clock(), 5)
    assert "02:30 CE" in panel
    assert 'value="30 2 * * *"' in text
    assert "aria-invalid" not in text
    assert not manager.stores.ledger.look("talker").overridden
    assert "is neither a period nor a cron" in unescape(press(client, path, preview="1", schedule="soon"))


@on_postgresql
def test_a_change_that_the_database_refuses_is_reported(client, manager, engine):
    manager.recovery.look(Talker)
    with engine.begin() as connection:
        connection.execute(select(tables.workers).where(tables.workers.c.name == "talker").with_for_update())
        assert "The database did not make this change" in press(client, "/workers/worker/talker/pause")
    assert "talker is paused" in press(client, "/workers/worker/talker/pause")


WRONG = [
    ("", "", "The schedule is empty"),
    ("soon", "", "'soon' is neither a period nor a cron"),
    ("0", "", "'0' is out of range"),
    ("9" * 100, "", "is out of range"),
    ("1 fortnight", "", "is neither a period"),
    ("-5 min", "", "is neither a period"),
    ("10 min", "Europe/Berlin", "A period has no time zone"),
    ("61 * * * *", "", "has the minute '61'"),
    ("30 2 31 2 *", "", "a day that one of its months has"),
    ("0 0 * * *", "Europe/Berln", "Did you mean 'Europe/Berlin'?"),
    ("0 0 * * *", "\0", "is not in the time zone database"),
    ("* " * 100, "", "expected at most 150"),
    (EVIL, "", "is neither a period"),
    ("\0", "", "is neither a period"),
]


@on_sqlite
def test_a_wrong_schedule_is_shown_again_with_a_sentence_beside_it(client, manager):
    manager.recovery.look(Talker)
    for schedule, timezone, sentence in WRONG:
        here = "/workers/worker/talker?state=failed"
        text = press(client, "/workers/worker/talker/reschedule", schedule=schedule, timezone=timezone, next=here)
        error = re.search(r'<p class="bw-error" id="error-talker">(.*?)</p>', text)
        assert error, schedule
        assert sentence in unescape(error[1])
        field = re.search(r'<input [^>]*id="schedule-talker"[^>]*>', text)[0]
        assert 'aria-invalid="true"' in field
        assert unescape(re.search(r'value="([^"]*)"', field)[1]).strip() == schedule.strip()[:200]
        assert EVIL not in text
        assert re.search(r'name="next" value="([^"]*)"', text)[1] == here
    assert 'id="error-talker"' in press(client, "/workers/worker/talker/reschedule", schedule="?")
    assert not manager.stores.ledger.look("talker").overridden


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("90s", 90), ("1.5", 1.5), ("10 min", 600), ("10 minutes", 600), ("1h30m", 5400),
        ("1 h, 30 min", 5400),
        ("every 2 hours", 7200), ("every minute", 60), ("1d", 86_400), ("1 week", 604_800), ("1500 ms", 1.5),
        (" 5 SEC ", 5), ("1h 2m 3s 4ms 5ms", 3723.009),
    ],
)  # fmt: skip
def test_a_period_is_read_in_the_usual_notations(text, seconds):
    assert typed_schedule(text).period == timedelta(seconds=seconds)


def test_a_cron_is_read_with_its_time_zone():
    assert str(typed_schedule("*/5 8-17 * * mon-fri", " Europe/Berlin ")) == "cron */5 8-17 * * MON-FRI Europe/Berlin"
    with pytest.raises(InvalidSchedule, match="has 6 fields"):
        typed_schedule("0 0 2 * * *")


@on_sqlite
def test_a_button_leads_back_to_pages_of_the_dashboard_only(client):
    path = "/workers/worker/talker/pause"
    for target in (
        "//evil.example/workers/",
        "https://evil.example/",
        "/workers/\\evil",
        "/workers/\r\nX: y",
        "/users",
    ):
        assert client.post(path, data={"next": target}).location == "/workers/"
    assert client.post(path).location == "/workers/"
    assert client.post(path, data={"next": "/workers/?page=2"}).location == "/workers/?page=2"


@on_sqlite
def test_the_dashboard_has_a_layout_in_an_app_without_its_own(app, manager, tmp_path):
    bare = Flask("bare", root_path=str(tmp_path))
    bare.secret_key = "test"
    bare.config.update(app.config)
    bare.extensions["background_workers"] = manager
    bare.register_blueprint(dashboard(lambda: None))
    text = page(bare.test_client(), "/workers/")
    assert "<title>Workers · Background workers</title>" in text
    assert "talker" in text
    assert "Bookstore" not in text


# -- cancelling ----------------------------------------------------------------------------------


def test_the_button_cancels_the_run_that_the_page_shows(app, client, manager):
    shown: list[str] = []

    class Looker(Hourly):
        def do_work(self, context):
            path = f"/workers/worker/looker/{context.claim.execution}"
            for each in ("/workers/", "/workers/worker/looker", path):
                assert 'id="cancel-looker"' in page(client, each)
            token = re.search(r'name="run" value="([0-9]+)"', page(client, path))[1]
            assert int(token) == context.token
            shown.append(said(press(client, "/workers/worker/looker/cancel", run=str(context.token + 1))))
            shown.append(said(press(client, "/workers/worker/looker/cancel", run=token)))
            shown.extend(said(page(client, each)) for each in ("/workers/", "/workers/worker/looker", path))
            assert 'id="cancel-looker"' not in page(client, path)
            context.raise_if_stopping()

    app.extensions["background_dashboard"] = Access(lambda: True, lambda: "<ada>")
    manager.add(Looker)
    execution = manager.trigger("looker")
    assert execution.state == "cancelled"
    other, done, *pages = shown
    assert "That run of looker has ended already." in other
    assert "The run of looker is cancelled: it is asked to stop, and can commit for at most 10 s." in done
    assert all("Cancelled by <ada> at 20" in each and "it has been asked to stop" in each for each in pages)
    ended = said(page(client, f"/workers/worker/looker/{execution.claim.execution}"))
    assert "cancelled" in ended
    assert "Cancelled by <ada> at 20" in ended
    assert "Cancelled by <ada> at 20" in said(page(client, "/workers/worker/looker?state=cancelled"))
    assert "cancelled" in said(page(client, "/workers/timeline?table=1"))


@on_sqlite
def test_a_form_without_a_run_cancels_nothing(client, manager):
    assert client.post("/workers/worker/talker/cancel", data={"run": "x"}).status_code == 400
    assert "has ended already" in press(client, "/workers/worker/talker/cancel", run="9" * 30)
