"""The pages of the fleet and of the messages in a real browser."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from support.fleet import last_hour

from background.database import tables
from background.ledger.leases import Instance
from models import db
from tests.shop.test_dashboard_browser import (  # the same shop, served anew for this file
    CHROMIUM,
    address,
    app,
    browser,
    database,
    focused,
    hurry,
    opened,
    session,
    violations,
)

__all__ = ["address", "app", "browser", "database", "opened", "session"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH (apt install chromium)"),
]

LEASE = timedelta(minutes=5)


def bury(app: Any, count: int, topic: str) -> list[int]:
    """Insert `count` dead letters of a topic without a handler. Return their ids."""
    now = datetime.now(UTC)
    row = {"topic": topic, "payload": '{"order": 7}', "state": "dead", "attempt": 3, "enqueued_at": now, "due_at": now}
    with app.app_context(), db.engine.begin() as connection:
        new = insert(tables.messages).values([{**row, "finished_at": now}] * count).returning(tables.messages.c.id)
        ids = list(connection.execute(new).scalars())
        failure = {"attempt": 3, "at": now, "instance_name": "web-1:41", "error": "Traceback\nOSError: <no> mail"}
        connection.execute(insert(tables.message_errors), [{"message": id, **failure} for id in ids])
    return ids


def states_of(app: Any, topic: str) -> list[str]:
    query = select(tables.messages.c.state).where(tables.messages.c.topic == topic).order_by(tables.messages.c.id)
    with app.app_context(), db.engine.connect() as connection:
        return list(connection.execute(query).scalars())


def test_a_dead_letter_is_retried_and_the_remaining_letters_are_discarded_together(app, opened):
    first, *_ = bury(app, 3, "returns")
    page = opened("/workers/messages?topic=returns&state=dead")
    assert violations(page) == []
    page.get_by_role("link", name=str(first), exact=True).click()
    page.wait_for_url(f"**/messages/{first}")
    page.get_by_text("OSError: <no> mail").first.wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("1 message waits again.").wait_for()
    assert states_of(app, "returns") == ["waiting", "dead", "dead"]

    page.goto("/workers/messages?topic=returns&state=dead")
    page.get_by_text("All 2 that match").click()
    page.get_by_role("button", name="Discard all").click()
    page.get_by_text("Nothing was changed. Tick the box first").wait_for()
    page.get_by_text("All 2 that match").click()
    box = page.get_by_label("Yes, all that match")
    box.check()
    page.clock.run_for(6_000)
    assert box.is_checked()
    page.get_by_role("button", name="Discard all").click()
    page.get_by_text("2 messages are discarded.").wait_for()
    assert states_of(app, "returns") == ["waiting", "discarded", "discarded"]


def test_messages_are_found_selected_and_moved_by_keyboard(app, opened):
    bury(app, 3, "letters")
    page = opened("/workers/messages")
    page.get_by_role("heading", name="Errors of dead messages").wait_for()
    page.get_by_label("Topic", exact=True).select_option("letters")
    page.get_by_label("Payload contains").fill('"ORDER": 7')
    page.keyboard.press("Enter")
    page.get_by_text("3 messages match.").wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Select all on this page").focus()
    page.keyboard.press("Enter")
    boxes = page.get_by_role("checkbox", name="Select message")
    assert [box.is_checked() for box in boxes.all()] == [True] * 3
    boxes.first.uncheck()
    page.get_by_label("to the topic").select_option("mail")
    page.get_by_role("button", name="Move", exact=True).click()
    page.get_by_text("2 messages wait in mail.").wait_for()
    assert focused(page) == "move-selected"


def test_messages_are_found_and_changed_without_a_script(app, opened):
    first, *_ = bury(app, 3, "parcels")
    page = opened("/workers/messages?topic=parcels", java_script_enabled=False)
    assert page.get_by_role("button", name="Select all on this page").count() == 0
    page.get_by_label(f"Select message {first}").check()
    page.get_by_role("button", name="Discard", exact=True).click()
    page.get_by_text("1 message is discarded.").wait_for()
    assert states_of(app, "parcels") == ["discarded", "dead", "dead"]


def test_the_page_of_a_message_worker_is_accessible_and_pauses_its_topic(app, opened):
    bury(app, 3, "mail")
    page = opened("/workers/worker/mail_worker")
    page.get_by_text("OSError: <no> mail").wait_for()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == []
    page.get_by_role("button", name="Pause mail").click()
    page.get_by_text("its messages wait").first.wait_for()
    page.get_by_role("button", name="Resume mail").click()
    page.get_by_text("mail is resumed").wait_for()


def test_the_messages_fit_a_phone(app, opened):
    bury(app, 3, "a_topic_with_a_long_name_that_does_not_break_by_itself")
    page = opened("/workers/messages", viewport={"width": 390, "height": 844})
    for path in ("", "?state=dead", f"/{bury(app, 1, 'returns')[0]}"):
        page.goto(f"/workers/messages{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        assert violations(page) == []


def test_the_topics_are_folded_on_a_phone_until_a_button_in_them_is_used(app, opened):
    bury(app, 1, "mail")
    page = opened("/workers/messages", viewport={"width": 390, "height": 844})
    finder, button = page.get_by_role("heading", name="Find messages"), page.get_by_role("button", name="Pause mail")
    assert finder.bounding_box()["y"] < 400
    assert not button.is_visible()
    page.locator(".bw-fold > summary").click()
    button.click()
    page.get_by_text("its messages wait").first.wait_for()
    assert focused(page) == "Resume mail"
    page.get_by_role("button", name="Resume mail").click()
    page.get_by_text("mail is resumed").wait_for()
    page.set_viewport_size({"width": 1280, "height": 844})
    page.goto("/workers/messages")
    assert button.is_visible()
    assert not page.locator(".bw-fold > summary").is_visible()


def test_a_run_that_was_taken_over_appears_in_two_lanes_with_an_arrow(app, opened):
    tick = last_hour()
    add_worker(app, scheduled_at=tick - timedelta(hours=1))
    page = opened("/workers/timeline")
    page.get_by_role("heading", name="Timeline").wait_for()
    assert page.locator(".bw-arrow.state-lost").count() == 0
    take_over(app, tick)
    hurry(page, lambda: page.locator(".bw-picture .bw-arrow.state-lost").count() == 1)
    names = page.locator(".bw-lanes .bw-lane-name")
    assert {"† first-host:1", "second-host:1"} <= set(names.all_text_contents())
    assert "attempt 2, succeeded" in "".join(page.locator(".bw-picture a title").all_text_contents())
    assert page.evaluate(OVERLAPS) == []
    page.get_by_text("Show as a table").click()
    page.get_by_role("row").filter(has_text="first-host:1").get_by_text("lost").wait_for()
    assert violations(page) == []
    page.get_by_label("Worker", exact=True).select_option(OTHERS)
    page.get_by_role("button", name="Show").click()
    page.wait_for_url(f"**worker={OTHERS}**")
    assert page.get_by_role("row").filter(has_text="newsletter_preview").count() == 0


# The names beside the picture that run into the text behind them, or out of their column.
OVERLAPS = """[...document.querySelectorAll(".bw-label")].filter((label) => {
  const end = label.getBoundingClientRect().right;
  const [first, second] = [...label.children].map((each) => each.getBoundingClientRect());
  return first.right > (second?.left ?? end) || (second?.right ?? 0) > end;
}).map((label) => label.textContent)"""
OTHERS = "recommendations"  # another release's worker, because the app would take over a run of its own worker


def add_worker(app: Any, scheduled_at: datetime) -> None:
    row = {"name": OTHERS, "schedule": "every 3600s", "declared": "every 3600s", "scheduled_at": scheduled_at}
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(insert(tables.workers).values(row))


def take_over(app: Any, tick: datetime) -> None:
    """Insert a run of an instance that dies, and the run of the next instance at the same tick."""
    manager = app.extensions["background_workers"]
    ledger, first, second = (
        manager.stores.ledger,
        Instance(LEASE, "first-host", 1, release="4711abc"),
        Instance(LEASE, "second-host", 1),
    )
    manager.stores.leases.beat(first)
    claim = ledger.claim(OTHERS, tick, "every 3600s", (first.id, first.name))
    with manager.stores.leases.engine.begin() as connection:
        gone = update(tables.instances).where(tables.instances.c.id == first.id)
        connection.execute(gone.values(expires_at=tables.instances.c.heartbeat_at))
    ledger.end(claim, "lost", "its instance is gone", next_attempt=2)
    manager.stores.leases.beat(second)
    again = ledger.claim_pending(OTHERS, tick, (second.id, second.name))
    ledger.end(again, "succeeded")


def test_on_a_phone_the_picture_scrolls_in_its_own_box_also_by_keyboard(opened):
    page = opened("/workers/timeline", viewport={"width": 390, "height": 844})
    box = page.get_by_role("region", name="Picture of the executions")
    assert page.locator(".bw-lanes").bounding_box()["width"] < box.bounding_box()["width"] / 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert box.evaluate("box => box.scrollWidth > box.clientWidth + 300")
    box.focus()
    assert focused(page).startswith("Picture of the executions")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    hurry(page, lambda: box.evaluate("box => box.scrollLeft") > 0)
