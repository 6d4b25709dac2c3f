"""The shop in a real browser, mostly on a phone's narrow screen."""

import shutil
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from passlib.totp import TOTP
from support.account_forms import NEW, link_in, send_mails
from support.servers import served
from support.shop import PASSWORD

from tests.shop.test_dashboard_browser import violations

CHROMIUM = shutil.which("chromium")
GAVE_UP = "net::ERR_ABORTED"  # the browser aborted it, because it went on to another page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH (apt install chromium)"),
]


@pytest.fixture
def address(app) -> Iterator[str]:
    """Serve the app with the forms' tokens on. Give its address."""
    app.config["WTF_CSRF_ENABLED"] = True
    with served(app) as address:
        yield address


@pytest.fixture
def complaints() -> list[str]:
    """Collect the browser's console messages and failed requests."""
    return []


@pytest.fixture
def page(address, complaints):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=address, viewport={"width": 390, "height": 844})
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.extend([request.url] * (request.failure != GAVE_UP)))
        yield page
        browser.close()


def assert_usable(page) -> None:
    """Check that the page fits screens of several widths, and that it is accessible."""
    page.wait_for_load_state("load")
    for width in (1024, 768, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.url
        assert page.locator("header").bounding_box()["height"] < 100, "at most two rows"
    assert violations(page) == [], page.url


def press(page, name: str) -> None:
    """Press the button or link of that name in the page's content."""
    main = page.get_by_role("main")
    main.get_by_role("button", name=name, exact=True).or_(main.get_by_role("link", name=name)).first.click()


def change(page, name: str) -> None:
    """Open the menu of the only shown user, and press the button of that name."""
    page.locator("summary").click()
    assert_usable(page)
    press(page, name)


def log_in(page, email: str) -> None:
    page.get_by_label("E-mail").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Log in")
    page.get_by_role("button", name="Log out").wait_for()


def test_a_user_changes_forgets_and_chooses_the_password_and_deletes_the_account(
    app, page, make_user, outbox, complaints
):
    make_user(email="nat@example.com")
    page.goto("/login")
    page.get_by_label("E-mail").fill("nat@example.com")
    page.get_by_label("Password").fill("wrong horse")
    press(page, "Log in")
    page.get_by_text("Wrong e-mail or password").wait_for()
    assert_usable(page)
    press(page, "Forgot your password?")
    assert_usable(page)
    page.get_by_label("E-mail").fill("nat@example.com")
    press(page, "Send the link")
    page.get_by_text("We have sent a mail to nat@example.com.").wait_for()
    [mail] = send_mails(app, outbox)
    page.goto(link_in(mail))
    page.get_by_label("Password", exact=True).fill("natnatnat")
    page.get_by_label("Password again").fill("natnatnat")
    press(page, "Save")
    page.get_by_text("This password is easy to guess.").wait_for()
    assert_usable(page)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    press(page, "Save")
    log_in(page, "nat@example.com")
    page.get_by_role("link", name="My account").click()
    assert_usable(page)
    press(page, "Change password")
    page.get_by_label("Current password").fill("wrong horse")
    page.get_by_label("New password", exact=True).fill(NEW)
    page.get_by_label("New password again").fill(NEW)
    press(page, "Change password")
    page.get_by_text("This is not your password.").wait_for()
    assert_usable(page)
    page.goto("/account")
    press(page, "Delete my account")
    assert_usable(page)
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Delete my account")
    page.get_by_text("Your account has been deleted.").wait_for()
    page.get_by_role("link", name="Log in").wait_for()
    assert complaints == []


def test_an_admin_sets_up_an_app_and_logs_in_with_its_code(app, page, make_user, complaints):
    make_user(email="admin@example.com", is_admin=True)
    page.goto("/login")
    log_in(page, "admin@example.com")
    page.get_by_role("link", name="My account").click()
    press(page, "Set up two-factor login")
    assert_usable(page)
    press(page, "Set up an app")
    page.get_by_role("img", name="The key for the app").wait_for()
    assert_usable(page)
    app_on_the_phone = TOTP(key=page.locator("code").inner_text(), format="base32")
    page.get_by_label("Code").fill(app_on_the_phone.generate().token)
    press(page, "Turn on")
    page.get_by_text("Each login now asks for a code.").wait_for()
    page.get_by_role("button", name="Log out").click()
    page.goto("/login")
    page.get_by_label("E-mail").fill("admin@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Log in")
    page.get_by_label("Code").fill("000000")
    press(page, "Log in")
    page.get_by_text("This code is not valid.").wait_for()
    assert_usable(page)
    page.get_by_label("Code").fill(app_on_the_phone.generate(time.time() + 30).token)  # each code is accepted once
    press(page, "Log in")
    page.get_by_role("button", name="Log out").wait_for()
    assert complaints == []


def test_an_admin_who_comes_back_enters_the_password_before_a_change(app, page, make_user, complaints):
    app.config["SECURITY_FRESHNESS"] = timedelta(seconds=1)
    make_user(email="admin@example.com", is_admin=True)
    make_user(email="nat@example.com", name="Nat")
    page.goto("/login")
    log_in(page, "admin@example.com")
    page.goto("/admin/users?q=nat")
    page.wait_for_timeout(1100)
    change(page, "Disable the account of Nat")
    page.get_by_text("Please enter your password again.").wait_for()
    assert_usable(page)
    app.config["SECURITY_FRESHNESS"] = timedelta(minutes=15)
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Continue")
    change(page, "Disable the account of Nat")
    page.get_by_text("is logged out, and cannot log in again").wait_for()
    assert_usable(page)
    change(page, "Enable the account of Nat")
    page.get_by_text("nat@example.com can log in again.").wait_for()
    assert complaints == []


def test_the_shop_is_used_by_keyboard_alone(app, page, make_user, complaints):
    make_user(email="nat@example.com")
    page.goto("/login")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("nat@example.com")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Log out").wait_for()
    page.wait_for_load_state()  # a loading element may take the focus
    page.get_by_role("button", name="Log out").focus()
    page.keyboard.press("Enter")
    page.get_by_text("You have been logged out.").wait_for()
    assert complaints == []
