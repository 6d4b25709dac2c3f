"""The dashboard in a real browser: it is live, does not disturb its user, and is accessible."""

import os
import re
import shutil
import sqlite3
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from sqlalchemy import insert, select, update
from support import busy_app as lively
from support.databases import close
from support.fleet import wait_until
from support.processes import PATIENCE
from support.servers import served
from support.shop import PASSWORD, PASSWORD_HASH

import background
from background import PeriodicWorker
from background.database import tables
from background.registry import declared_schedule
from models import User, db

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[2]
AXE = ROOT / "tests" / "support" / "axe.min.js"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH (apt install chromium)"),
]


@pytest.fixture(scope="module")
def database(template_sqlite, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dashboard") / "bookstore.sqlite"
    shutil.copyfile(template_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def other_address(nursery, database) -> Iterator[str]:
    """Serve the same shop from another process. Give its address."""
    with nursery.started(database, "run", "--port", "0", FLASK_APP=lively.__file__) as process:
        yield process.wait_for(r"Running on (http://\S+)")[1]


@pytest.fixture(scope="module")
def app(database) -> Iterator[Flask]:
    app = lively.create_app(database)
    with app.app_context():
        admin = {"email": "admin@example.com", "name": "Ada", "is_admin": True, "confirmed_at": datetime.now(UTC)}
        db.session.add(User(**admin, password=PASSWORD_HASH))
        db.session.commit()
    app.extensions["background_workers"].start()
    yield app
    lively.steps.release(lively.STEPS)
    close(app)


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session(browser, address) -> Any:
    """Give the cookies of a logged-in admin. A cookie belongs to the host, so it is valid for both servers."""
    context = browser.new_context(base_url=address)
    log_in(context.new_page())
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def opened(browser, address, session) -> "Iterator[Callable[..., Page]]":
    """Open a page of the dashboard as an admin. At the end the browser must not have complained about any page."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(path: str, base_url: str = address, **options: Any) -> "Page":
        context = browser.new_context(**{"base_url": base_url, "storage_state": session, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{page.url}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
        if options.get("java_script_enabled", True):
            page.clock.install()  # the page's time passes, and the test can speed it up
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def log_in(page: "Page") -> None:
    page.goto("/login?next=/workers/")
    page.get_by_label("E-mail").fill("admin@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("main").get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Background workers").wait_for()


def row(page: "Page", name: str) -> Any:
    return page.locator(f"#row-{name}")


def wait_for_refresh(page: "Page") -> None:
    clock = page.locator("[data-live]").get_attribute("data-clock")
    hurry(page, lambda: page.locator("[data-live]").get_attribute("data-clock") != clock)


def hurry(page: "Page", is_true: Callable[[], bool]) -> None:
    """Let the page's time pass quickly until `is_true()`, but not during a request, which would time out."""
    asking: set[Any] = set()
    page.on("request", lambda request: asking.add(request))
    for over in ("requestfinished", "requestfailed"):
        page.on(over, lambda request: asking.discard(request))

    def look() -> bool:
        if not asking:
            page.clock.run_for(2_000)
        return is_true()

    wait_until(look)


def focused(page: "Page") -> str:
    """Return the label or id of the focused element. A new page's scripts, which move the focus, have run before."""
    page.wait_for_load_state("domcontentloaded")
    return page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


# -- it is live ------------------------------------------------------------------------------------


def test_an_admin_runs_a_worker_and_watches_its_progress(opened):
    page = opened("/", storage_state=None)
    log_in(page)
    page.get_by_role("button", name="Run now: catalogue_import").click()
    page.get_by_text("catalogue_import will run within").wait_for()
    bar = page.get_by_role("progressbar", name="Progress of catalogue_import")
    for step in range(lively.STEPS):
        hurry(page, page.get_by_text(f"{step * 1000:,} of 4,000").is_visible)
        assert bar.evaluate("bar => bar.position") == step / lively.STEPS
        lively.steps.release()
    hurry(page, bar.is_hidden)
    row(page, "catalogue_import").get_by_text("succeeded", exact=True).wait_for()
    assert re.search(r"^now$|^in \d+ (min|s)", row(page, "stock_count").locator("[data-countdown]").inner_text())


def test_a_pause_is_seen_on_the_page_of_another_instance(opened, other_address):
    here, there = opened("/workers/"), opened("/workers/worker/stock_count", other_address)
    there.get_by_role("button", name="Pause stock_count").wait_for()
    here.get_by_role("button", name="Pause stock_count").click()
    here.get_by_text("stock_count is paused").wait_for()
    there.get_by_role("button", name="Resume stock_count").click()  # the change came without a click
    there.get_by_text("stock_count is resumed").wait_for()
    here.get_by_role("button", name="Pause stock_count").wait_for()


def test_times_are_shown_in_the_browsers_zone(opened):
    page = opened("/workers/worker/price_check", timezone_id="Asia/Tokyo", locale="en-GB")
    tick = page.locator("time[data-countdown]")
    hour, minute = re.search(r"(\d\d):(\d\d):00 UTC", tick.get_attribute("title") or "").groups()
    shown = page.locator(f'time[datetime="{tick.get_attribute("datetime")}"]:not([data-countdown])').inner_text()
    assert f"{(int(hour) + 9) % 24:02}:{minute}:00" in shown
    page.get_by_label("Up to the tick, in Asia/Tokyo").fill("2026-01-20T12:00:00")
    wait_for_refresh(page)
    page.get_by_role("button", name="Show these executions").click()
    page.get_by_text("No execution up to this tick.").wait_for()
    page.get_by_label("At which moment, in Asia/Tokyo?").fill("2026-01-20T12:00:00")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("The tick 20 Jan 2026, 10:30:00 of price_check").wait_for()
    assert page.get_by_label("At which moment, in Asia/Tokyo?").input_value() == "2026-01-20T12:00"


def test_a_traceback_and_a_log_are_copied_whole_with_moments_in_utc(app, opened):
    manager = app.extensions["background_workers"]
    wait_until(lambda: manager.history.executions("newsletter_preview", state="failed"), "a failure")
    [failed, *_] = manager.history.executions("newsletter_preview", state="failed")
    path = f"/workers/worker/newsletter_preview/{failed.id}"
    permissions = ["clipboard-read", "clipboard-write"]
    page = opened(path, permissions=permissions, timezone_id="Asia/Tokyo")
    assert page.get_by_text("background/runs/").first.is_hidden()
    page.get_by_text("of the framework").first.click()
    page.get_by_text("background/runs/").first.wait_for()
    wait_for_refresh(page)
    assert page.get_by_text("background/runs/").first.is_visible()
    page.get_by_role("button", name="Copy the error").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == failed.reason.rstrip("\n")
    logged = manager.history.log(failed.id)
    moment = logged.partition(" ")[0]
    hour = f"{(int(moment[11:13]) + 9) % 24:02}"
    assert page.locator("#log").inner_text().startswith(f"{hour}{moment[13:-1]}")
    page.get_by_role("button", name="Copy the log").click()
    wait_until(lambda: page.evaluate("navigator.clipboard.readText()") == logged, "the copied log")
    page = opened(path, java_script_enabled=False)
    assert page.get_by_role("button", name="Copy the error").is_hidden()
    page.get_by_text("of the framework").first.click()
    assert page.get_by_text("background/runs/").first.is_visible()


def test_a_previewed_schedule_shows_its_next_ticks_and_is_saved_with_enter(opened):
    page = opened("/workers/worker/stock_count")
    page.get_by_label("Reschedule stock_count").click()
    page.get_by_label("Period or cron").fill("20 min")
    page.get_by_role("button", name="Preview the schedule of stock_count").click()
    page.get_by_text("Its next ticks would be:").wait_for()
    assert page.locator("#ticks-stock_count li").count() == 5
    assert focused(page) == "Save the schedule of stock_count"
    page.keyboard.press("Enter")
    page.get_by_text("stock_count runs every 20 minutes from now on.").wait_for()
    page.get_by_role("button", name="Reset to every 30 minutes: stock_count").click()
    page.get_by_text("stock_count runs every 30 minutes from now on.").wait_for()


def test_a_hidden_page_sends_no_request_and_sends_one_as_soon_as_it_is_visible(opened):
    page = opened("/workers/")
    show(page, "hidden")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_response("/workers/"):
        show(page, "visible")


def show(page: "Page", state: str) -> None:
    page.evaluate(
        "state => { Object.defineProperty(document, 'visibilityState', { value: state, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange')); }",
        state,
    )


def test_the_page_reports_a_silent_server_and_an_ended_session(opened):
    page = opened("/workers/")
    page.route("**/workers/", lambda route: route.fulfill(status=200, body="Not this page"))
    status = page.get_by_role("status")
    hurry(page, status.get_by_text("Not refreshed since").is_visible)
    page.unroute("**/workers/")
    hurry(page, status.get_by_text("Not refreshed since").is_hidden)
    page.context.clear_cookies()
    hurry(page, status.get_by_text("You are no longer logged in").is_visible)
    page.get_by_role("link", name="Log in again").click()
    page.get_by_label("E-mail").wait_for()


# -- it does not disturb its user -----------------------------------------------------------------


def test_typed_text_and_opened_and_focused_elements_survive_a_refresh(opened):
    page = opened("/workers/")
    page.get_by_label("Reschedule newsletter_preview").click()
    field = row(page, "newsletter_preview").get_by_label("Period or cron")
    field.fill("1 fort")
    wait_for_refresh(page)
    page.keyboard.type("night")
    assert field.input_value() == "1 fortnight"
    row(page, "newsletter_preview").get_by_label("Time zone of a cron").focus()
    wait_for_refresh(page)
    assert field.input_value() == "1 fortnight"
    assert focused(page) == "timezone-newsletter_preview"
    page.keyboard.press("Enter")
    page.get_by_text("'1 fortnight' is neither a period nor a cron").wait_for()
    assert field.input_value() == "1 fortnight"
    wait_for_refresh(page)
    field.fill("1 s")
    page.keyboard.press("Enter")
    page.get_by_text("newsletter_preview runs every second already.").wait_for()
    wait_until(lambda: focused(page) == "Reschedule newsletter_preview", "the focus on what opens the form")


def test_everything_is_done_by_keyboard_alone(opened):
    page = opened("/workers/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    order = ["Run now: price_check", "Pause price_check", "Reschedule price_check"]
    seen: list[str] = []
    while focused(page) != order[-1]:
        page.keyboard.press("Tab")
        seen.append(focused(page))
        assert len(seen) < 60
    assert seen[-3:] == order
    page.keyboard.press("Shift+Tab")
    wait_for_refresh(page)
    assert focused(page) == "Pause price_check"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.get_by_text("price_check is paused").wait_for()
    page.locator("#pause-price_check:focus").wait_for()
    assert focused(page) == "Resume price_check"
    page.keyboard.press("Space")
    page.get_by_text("price_check is resumed").wait_for()
    page.locator("#pause-price_check:focus").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert focused(page) == "schedule-price_check"


# -- it is accessible ------------------------------------------------------------------------


def test_without_a_script_a_worker_is_run_and_rescheduled_by_forms(opened):
    page = opened("/workers/", java_script_enabled=False)
    assert " UTC" in row(page, "stock_count").locator("time:not([data-countdown])").first.inner_text()
    page.get_by_role("button", name="Run now: stock_count").click()
    page.get_by_text("stock_count will run within").wait_for()
    wait_until(lambda: page.reload() and "succeeded" in row(page, "stock_count").inner_text(), "the run")
    page.get_by_role("link", name="stock_count").click()
    page.get_by_label("Reschedule stock_count").click()
    page.get_by_label("Period or cron").fill("20 min")
    page.get_by_role("button", name="Save the schedule of stock_count").click()
    page.get_by_text("stock_count runs every 20 minutes from now on.").wait_for()
    page.get_by_role("button", name="Reset to every 30 minutes: stock_count").click()
    page.get_by_text("stock_count runs every 30 minutes from now on.").wait_for()


PLACES = (
    "/workers/",
    "/workers/timeline",
    "/workers/charts",
    "/workers/instances",
    "/workers/messages",
    "/workers/worker/stock_count",
)


def test_every_page_is_accessible_and_fits_a_phone(app, opened):
    app.extensions["background_workers"].reschedule("price_check", timedelta(minutes=20))
    page = opened("/workers/worker/newsletter_preview")
    execution = page.locator("tbody th a").first.get_attribute("href")
    preview = "/workers/worker/stock_count?edit=stock_count&schedule=30+2+*+*+*&timezone=Europe/Berlin"
    more = ("/workers/timeline?table=1", "/workers/worker/stock_count?at=2026-01-20T12:00Z", preview)
    for path in (*PLACES, execution, *more, "/workers/?edit=stock_count&schedule=soon"):
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto(path)
        assert violations(page) == [], path
        for width in (1024, 900, 390):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    assert violations(page) == []  # the last width is narrow
    assert page.get_by_label("Period or cron").locator("visible=true").bounding_box()["width"] > 300
    page.get_by_role("button", name="Reset to at 30 2 * * * (Europe/Berlin): price_check").click()
    page.get_by_text("price_check runs at 30 2 * * * (Europe/Berlin) from now on.").wait_for()


def test_the_banner_of_a_fleet_without_an_instance_is_accessible_and_fits_a_phone(app, database, opened, tmp_path):
    copy = sqlite3.connect(tmp_path / "copy.sqlite")
    with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as original, closing(copy):
        original.backup(copy)
    silent = lively.create_app(f"sqlite:///{tmp_path / 'copy.sqlite'}")
    with served(silent) as address:
        page = opened("/workers/", address)
        for path in PLACES:
            page.goto(f"{address}{path}")
            page.get_by_text("No instance is alive").wait_for()
            assert violations(page) == [], path
            page.set_viewport_size({"width": 390, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        page.close()  # before the server stops, because the page fetches its news from there
    close(silent)


def violations(page: "Page") -> list[str]:
    """Return the violations of WCAG 2 A and AA that axe-core finds in the page, dark and light."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found: list[str] = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # no colour is in transition
        run = page.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'] })")
        found += [
            f"{scheme}, {each['id']}: {node['html']} {node['failureSummary']}"
            for each in run["violations"]
            for node in each["nodes"]
        ]
    return found


def test_the_axis_of_a_chart_is_in_the_browsers_zone_and_its_table_opens_by_the_keyboard(app, opened):
    app.extensions["background_workers"].trigger("stock_count")
    page = opened("/workers/charts", timezone_id="Asia/Kolkata", locale="en-GB")
    times = page.locator("[data-time]").all_text_contents()
    assert {each[3:] for each in times} == {"30"}, "half an hour from UTC"
    page.get_by_role("link", name="7 days").click()
    assert re.fullmatch(r"\d+ \w{3,4}|\w{3,4} \d+", page.locator("[data-day]").first.text_content())
    table = page.get_by_role("table").first
    assert table.is_hidden()
    page.get_by_text("Show as a table").first.focus()
    page.keyboard.press("Enter")
    table.wait_for()
    assert violations(page) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# -- it is dark or light ---------------------------------------------------------------------


def test_the_browsers_preference_chooses_the_theme_without_a_script(opened):
    for path in ("/workers/", "/admin/users"):
        dark = opened(path, java_script_enabled=False, color_scheme="dark")
        light = opened(path, java_script_enabled=False, color_scheme="light")
        assert brightness(dark) < 40 < 200 < brightness(light)
        assert dark.get_by_role("button", name="Dark theme").is_hidden()


def test_the_switch_changes_the_theme_of_all_pages_and_is_kept_until_it_is_changed_back(opened):
    page = opened("/workers/", color_scheme="light")
    switch = page.get_by_role("button", name="Dark theme")
    assert switch.get_attribute("aria-pressed") == "false"
    switch.focus()
    page.keyboard.press("Enter")
    assert switch.get_attribute("aria-pressed") == "true"
    for path in ("/admin/users", "/workers/timeline"):
        page.goto(path, wait_until="commit")
        page.locator("body").wait_for(state="attached")
        assert page.evaluate("document.documentElement.dataset.bsTheme") == "dark", "before the page is complete"
        assert brightness(page) < 40
    switch.click()
    page.emulate_media(color_scheme="dark")
    wait_until(lambda: brightness(page) < 40, "the browser's preference is in force again")
    assert page.evaluate("localStorage.length") == 0


def test_each_colour_of_the_dashboard_has_a_name():
    style = (Path(background.__file__).parent / "dashboard" / "static" / "dashboard.css").read_text(encoding="utf-8")
    names, others = style.split("}", 1)
    assert "--bw-text: light-dark(" in names
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgb\(", others) == []


def brightness(page: "Page") -> int:
    """Return the mean of red, green and blue of the page's background."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3


PICTURES = {
    "overview": "/workers/",
    "timeline": "/workers/timeline",
    "charts": "/workers/charts",
    "instances": "/workers/instances",
    "messages": "/workers/messages",
    "worker": "/workers/worker/newsletter_preview",
    "execution": "/workers/worker/newsletter_preview/{execution}",
    "message": "/workers/messages/{message}",
}
"""The pages in docs/operating.md, each with its address."""
SIDE_BY_SIDE = """<div style="display: grid; grid-template-columns: 1280px 390px; gap: 20px; width: 1690px">%s</div>"""


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS names no folder to write the pictures to")
def test_the_documents_have_pictures_of_each_page_on_a_desktop_and_a_phone_light_and_dark(app, browser, opened):
    folder = Path(os.environ["SCREENSHOTS"])
    for worker in lively.WORKERS:
        live_through_a_day(app, worker)
    shown_rows = {"message": write_letters(app), "execution": failed_run(app)}
    while app.extensions["background_workers"].stores.roll_up.step():
        pass
    page = opened("/workers/")
    page.get_by_role("button", name="Pause price_check").click()
    page.get_by_role("button", name="Run now: catalogue_import").click()
    lively.steps.release(3)
    hurry(page, page.get_by_text("3,000 of 4,000").is_visible)
    sheet = browser.new_page(device_scale_factor=0.6, viewport={"width": 1706, "height": 1724})
    for name, path in PICTURES.items():
        pictures: list[str] = []
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                shown = opened(path.format(**shown_rows), color_scheme=scheme, viewport={"width": width, "height": 844})
                pictures.append(b64encode(shown.screenshot()).decode())
                shown.context.close()
        sheet.set_content(SIDE_BY_SIDE % "".join(f'<img src="data:image/png;base64,{each}">' for each in pictures))
        sheet.locator("img").last.wait_for()
        sheet.screenshot(path=folder / f"{name}.png")
    lively.steps.release()
    page.get_by_role("button", name="Resume price_check").click()


def failed_run(app: Flask) -> int:
    """Wait for a run that failed by itself, and give it a cursor. Return its id."""
    failed = (tables.executions.c.state == "failed", tables.executions.c.log.is_not(None))
    query = select(tables.executions.c.id).where(*failed, tables.executions.c.worker == "newsletter_preview")
    with app.app_context():
        wait_until(lambda: db.session.scalars(query).first() or db.session.rollback(), "a run that failed")
        id = db.session.scalars(query).first()
        db.session.execute(
            update(tables.executions).where(tables.executions.c.id == id).values(cursor='{"reader": 3141}')
        )
        db.session.commit()
    return id


def write_letters(app: Flask) -> int:
    """Insert messages of several states. Return the id of a dead one."""
    now, topic, dead = datetime.now(UTC), tables.messages, {"state": "dead", "attempt": 5}
    states = [{"state": "done", "attempt": 1}] * 6 + [{"state": "waiting", "attempt": 0}, dead, dead, dead]
    error = "Traceback (most recent call last):\n  ...\nsmtplib.SMTPServerDisconnected: Connection unexpectedly closed"
    rows = []
    for number, state in enumerate(states):
        at = now - timedelta(minutes=90 - 7 * number)
        finished = None if state["state"] == "waiting" else at + timedelta(seconds=number)
        due = at if finished else now + timedelta(hours=2)
        payload = f'{{"order": {4711 + number}, "to": "reader-{number}@example.com"}}'
        rows.append(
            {"topic": "mail", "payload": payload, "enqueued_at": at, "due_at": due, "finished_at": finished, **state}
        )
    with app.app_context(), db.engine.begin() as connection:
        ids = list(connection.execute(insert(topic).values(rows).returning(topic.c.id)).scalars())
        failures = [
            {"message": ids[-1 - number], "attempt": attempt, "at": now, "instance_name": "web-1:41", "error": error}
            for number in range(3)
            for attempt in range(1, 3)
        ]
        connection.execute(insert(tables.message_errors), failures)
    return ids[-1]


def live_through_a_day(app: Flask, worker: type[PeriodicWorker]) -> None:
    """Insert executions of the past day, as if the fleet had run all the time."""
    schedule, at = declared_schedule(worker), datetime.now(UTC) - timedelta(minutes=1)
    rows: list[dict[str, Any]] = []
    for number in range(50):
        at = schedule.previous(at - timedelta(microseconds=1))
        state = {7: "failed", 23: "failed", 24: "lost", 41: "timed out"}.get((number + len(worker.name) * 5) % 60)
        took = timedelta(milliseconds=90 + (number * 7919 % 31) ** 2)
        row = {"worker": worker.name, "tick": at, "trigger": "schedule", "state": state or "succeeded", "attempt": 1}
        rows.append(
            {**row, "instance": "web-1", "instance_name": "web-1:41", "started_at": at, "finished_at": at + took}
        )
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(insert(tables.executions), rows)
        connection.execute(update(tables.workers).values(scheduled_at=at))
