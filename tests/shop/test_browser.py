"""The shop in a real browser, mostly on a phone's narrow screen."""

import shutil
from collections.abc import Iterator

import pytest
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
    assert violations(page) == [], page.url


def press(page, name: str) -> None:
    """Press the button or link of that name in the page's content."""
    main = page.get_by_role("main")
    main.get_by_role("button", name=name, exact=True).or_(main.get_by_role("link", name=name)).first.click()


def log_in(page, email: str) -> None:
    page.get_by_label("E-mail").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Log in")
    page.get_by_role("button", name="Log out").wait_for()


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
