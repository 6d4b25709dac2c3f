"""The demo shop, and the commands that fill a database: `flask init-db`, `flask demo --users 1000000`."""

import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import islice, product
from random import Random
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from flask_security import hash_password
from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError

import security_log
from background.cli.shared import examples
from background.database.clock import now
from background.database.dialects.encodings import storable
from config import address, may_serve
from forms import normalized_email
from migrations import schema
from models import User, new_uniquifier

log = logging.getLogger(__name__)

ADMIN = "admin@example.com"  # of the demo shop only: production refuses to start with this admin
MOST_USERS = 100_000_000
BATCH = 10_000  # users for each transaction

CONTENTS: set[Callable[[Connection], None]] = set()
"""Functions that each write more of the first content, unless the database has it already."""

# Name, days since the account was made, days since the last login (None: never).
USERS = [
    ("Ada Lovelace", 400, 1),
    ("Grace Hopper", 380, 3),
    ("Mary Somerville", 350, 12),
    ("Emmy Noether", 300, 29),
    ("Hedy Lamarr", 280, 31),
    ("Katherine Johnson", 260, 45),
    ("Alan Turing", 200, 90),
    ("Sofia Kovalevskaya", 120, None),
    ("Évariste Galois", 60, None),
    ("Srinivasa Ramanujan", 5, None),
]

FIRST_NAMES = "Alice Bruno Chiara Dmitri Elif Farah Goran Hanna Igor Jonas Kenji Lucia Mina Noor Olga Pablo"
LAST_NAMES = "Abbott Bauer Costa Dumont Eriksen Fischer Garcia Haddad Ivanova Jansen Kaya Lindgren"


def register_commands(app: Flask) -> None:
    app.cli.add_command(init_db)
    app.cli.add_command(reset_password)
    app.cli.add_command(demo)


@click.command("init-db", epilog=examples("flask init-db --admin ada@example.com"))
@click.option("--admin", metavar="EMAIL", default="admin@localhost", show_default=True, help="The e-mail of the admin.")
@with_appcontext
def init_db(admin: str) -> None:
    """Create the admin.

    The database must have its schema. The demo shop's admin loses its rights.
    """
    email = _own_address(admin)
    with _ready_engine() as engine:
        try:
            with engine.begin() as connection:
                created = _create_admin(connection, email)
            security_log.record("right given", created)
        except IntegrityError:
            _refuse_customer(engine, email)
            click.echo(f"The admin {email} exists already. Nothing was changed.")
        with engine.begin() as connection:
            retire = update(User).where(User.email == ADMIN, User.is_admin).values(is_admin=False).returning(User.id)
            if retired := connection.scalar(retire):
                security_log.record("right taken", retired)
                click.echo(f"The demo shop's {ADMIN} is no longer an admin.")


def _refuse_customer(engine: Engine, email: str) -> None:
    with engine.connect() as connection:
        is_admin = connection.scalar(select(User.is_admin).where(User.email == email))
    if not is_admin:
        raise click.ClickException(
            f"{email} has an account without admin rights; expected an e-mail without an account, or an admin's. "
            f"An admin can give the rights on the page of users."
        )


@click.command("reset-password", epilog=examples("flask reset-password ada@example.com"))
@click.argument("email")
@with_appcontext
def reset_password(email: str) -> None:
    """Give the user EMAIL a new password, and show it once.

    The user's sessions end. The e-mail counts as confirmed, and logging in no longer asks for a code.
    """
    password = secrets.token_urlsafe(12)
    with suppress(ValueError):
        email = normalized_email(email)
    with _ready_engine() as engine, engine.begin() as connection:
        access = {"password": hash_password(password), "confirmed_at": func.coalesce(User.confirmed_at, now())}
        ended = {"fs_uniquifier": new_uniquifier(), "tf_primary_method": None, "tf_totp_secret": None}
        account = User.email == email, User.email.contains("@")  # a deleted account has none
        change = update(User).where(*account).values(**access, **ended).returning(User.id)
        changed = connection.scalar(change) if storable(email, engine.dialect) == email else None
        if changed is None:
            raise click.ClickException(
                f"No user has the e-mail {email!r}; expected the e-mail of an account. "
                "`flask init-db --admin EMAIL` makes an admin."
            )
        click.echo(f"\n  The password of {email} is {password} (shown this once)\n")
        sys.stdout.flush()
    security_log.record("password changed", changed)


@click.command("demo", epilog=examples("flask demo", "flask demo --users 1000000"))
@click.option(
    "--users", "number", metavar="INTEGER", default="10000", show_default=True, help="The number of users to add."
)
@with_appcontext
def demo(number: str) -> None:
    """Add users, a tenth of them stale, for trying the shop at size."""
    number_of_users = _number_of_users(number)
    with _ready_engine() as engine:
        with engine.begin() as connection:
            _fill(connection)
        add_users(engine, number_of_users, datetime.now(UTC))


def ensure_ready() -> None:
    """Prepare the embedded database with the demo shop, or check the database of DATABASE_URL.

    Only the first start shows the password. A server's later starts log how to make a new password.
    """
    is_new = False

    def fill(connection: Connection) -> None:
        nonlocal is_new
        is_new = True
        open_shop(connection)

    schema.ensure_ready(fill)
    if current_app.config["DATABASE_IS_EMBEDDED"] and not is_new and may_serve():
        log.info("The first start showed the admin's password; `flask reset-password %s` makes a new one", ADMIN)


def open_shop(connection: Connection) -> None:
    """Write the embedded database's first content, in the transaction that makes its tables."""
    at = datetime.now(UTC)
    _fill(connection)
    _welcome_users(connection, at)
    _create_admin(connection, ADMIN)


@contextmanager
def _ready_engine() -> Iterator[Engine]:
    """Give the engine of a ready database. A database error in the block becomes one sentence."""
    ensure_ready()
    engine: Engine = current_app.extensions["sqlalchemy"].engine
    with schema.reaching(engine.url):
        yield engine


def _own_address(given: str) -> str:
    try:
        email = normalized_email(address(given.strip()))
    except ValueError:
        email = ADMIN
    if email == ADMIN or len(email) > 254:
        raise click.ClickException(f"--admin is {given!r}; expected an e-mail address of yours, in ASCII.")
    return email


def _number_of_users(given: str) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:10]) <= MOST_USERS):
        raise click.ClickException(f"--users is {given!r}; expected a whole number from 1 to {MOST_USERS}.")
    return int(given)


def _fill(connection: Connection) -> None:
    for fill in CONTENTS:
        fill(connection)


def _welcome_users(connection: Connection, at: datetime) -> None:
    connection.execute(
        insert(User),
        [
            {
                "email": f"user{i}@example.com",
                "name": name,
                "created_at": at - timedelta(days=created),
                "confirmed_at": at - timedelta(days=created),
                "last_login_at": None if last is None else at - timedelta(days=last),
            }
            for i, (name, created, last) in enumerate(USERS, start=1)
        ],
    )


def _create_admin(connection: Connection, email: str) -> int:
    """Create the admin, and return the id.

    Show the password before the commit, so that the password of a saved admin is never lost.
    """
    password = secrets.token_urlsafe(12)
    admin = {"email": email, "name": "Admin", "is_admin": True, "confirmed_at": datetime.now(UTC)}
    add = insert(User).values(**admin, password=hash_password(password)).returning(User.id)
    created: int = connection.execute(add).scalar_one()
    click.echo(f"\n  The admin is {email}, the password {password} (shown this once)\n")
    sys.stdout.flush()
    return created


def add_users(engine: Engine, count: int, at: datetime) -> None:
    """Append `count` users. Every tenth is stale, and the ages are mixed.

    Concurrency: SQLite has one writer, so other processes wait for a batch.
    """
    with engine.connect() as connection:
        highest = connection.scalar(select(func.max(User.id))) or 0
    users = _demo_users(highest + 1, count, at)
    with click.progressbar(length=count, label=f"Adding {count} users") as bar:
        while batch := list(islice(users, BATCH)):
            with engine.begin() as connection:
                connection.execute(insert(User), batch)
            bar.update(len(batch))
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE users")


def _demo_users(first: int, count: int, at: datetime) -> Iterator[dict[str, Any]]:
    """Yield users. The number in the e-mail is above every id, so above the number of every earlier demo user."""
    random = Random(first)  # noqa: S311 - the same numbers give the same users
    names = list(product(FIRST_NAMES.split(), LAST_NAMES.split()))
    for number in range(first, first + count):
        given, family = random.choice(names)
        days = random.randint(32, 431) if number % 10 == 0 else random.randint(1, 26)
        seen_at = at - timedelta(days, random.randrange(86_400))
        created_at = seen_at - timedelta(days=number % 500 if number % 7 else 0)
        yield {
            "email": f"{given}.{family}.{number}@example.com".lower(),
            "name": f"{given} {family}",
            "created_at": created_at,
            "confirmed_at": created_at,
            "last_login_at": seen_at if number % 7 else None,
        }
