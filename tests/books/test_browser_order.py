"""A reader orders a book in a real browser."""

from sqlalchemy import select
from support.account_forms import link_in, send_mails
from support.fleet import wait_until
from support.shop import PASSWORD

from models import Book, User, db
from tests.shop.test_browser import (  # noqa: F401 - some are fixtures
    address,
    assert_usable,
    change,
    complaints,
    log_in,
    page,
    press,
    pytestmark,
)


def test_a_new_reader_registers_logs_in_and_orders_and_the_admin_sees_the_new_user(
    app, manager, page, make_user, outbox, complaints
):
    make_user(email="admin@example.com", is_admin=True)
    make_user(email="a.very.long.address.of.some.reader@a.department.of.a.company.example.com", name="N" * 120)
    with app.app_context():
        db.session.add(Book(title="Middlemarch", author="George Eliot", price_cents=1250, stock=2))
        db.session.commit()

    page.goto("/")
    assert_usable(page)
    press(page, "See the books")
    assert_usable(page)
    press(page, "Middlemarch")
    press(page, "Log in and order")
    press(page, "Register")
    assert_usable(page)
    page.get_by_label("Name").fill("Nat")
    page.get_by_label("E-mail").fill("Nat@Example.com")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    press(page, "Register")
    page.get_by_text("We have sent a mail to nat@example.com.").wait_for()
    assert_usable(page)
    [mail] = send_mails(app, outbox)
    page.goto(link_in(mail))
    assert_usable(page)
    page.get_by_label("Password").fill(PASSWORD)
    press(page, "Confirm")
    page.get_by_text("Your email has been confirmed.").wait_for()
    press(page, "See the books")
    press(page, "Middlemarch")

    page.get_by_label("Quantity").fill("2")
    press(page, "Order")
    page.get_by_text("Thank you, your order is placed.").wait_for()
    page.get_by_text("being processed").wait_for()
    assert_usable(page)
    manager.start()
    wait_until(lambda: outbox.exists() and len(list(outbox.glob("*.eml"))) == 2, "the mails")
    page.reload()
    page.get_by_text("confirmed").wait_for()
    assert_usable(page)
    press(page, "Middlemarch")
    page.get_by_text("sold out").wait_for()
    assert_usable(page)

    page.get_by_role("button", name="Log out").click()
    page.get_by_role("link", name="Log in").click()
    log_in(page, "admin@example.com")
    page.get_by_role("link", name="Users", exact=True).click()
    assert_usable(page)
    page.get_by_label("Search by the beginning of the e-mail or name").fill("nat")
    page.get_by_label("Status").select_option("Active")
    press(page, "Search")
    page.get_by_text("nat@example.com").wait_for()
    assert_usable(page)
    change(page, "Send a reset link to Nat")
    page.get_by_text("A password reset link is on its way").wait_for()
    page.get_by_role("link", name="Audit").click()
    page.get_by_text("admin.send_password_link").wait_for()
    assert_usable(page)
    page.get_by_role("link", name="My account").click()
    page.get_by_text("Last login").wait_for()
    assert_usable(page)

    assert complaints == []
    with app.app_context():
        user = db.session.scalars(select(User).where(User.email == "nat@example.com")).one()
        assert [order.quantity for order in user.orders] == [2]
