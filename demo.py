"""The demo shop, and the commands that fill a database: `flask init-db`, `flask demo --users 1000000`."""

import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice, product
from random import Random
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from werkzeug.security import generate_password_hash

from background.database.dialects.encodings import storable
from background.errors import InvalidConfig
from config import address, may_serve
from migrations import schema
from models import User

log = logging.getLogger(__name__)

ADMIN = "admin@example.com"  # of the demo shop only: production refuses to start with this admin
NO_PASSWORD = "!"  # noqa: S105 - this is not a hash, so no demo user can log in
MOST_USERS = 100_000_000
BATCH = 10_000  # users that one transaction adds

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


def refuse_in_production() -> None:
    """Raise InvalidConfig where the demo shop's admin is an admin in production. Needs an application context."""
    if not current_app.config["PRODUCTION"]:
        return
    with current_app.extensions["sqlalchemy"].engine.connect() as connection:
        if connection.scalar(select(User.id).where(User.email == ADMIN, User.is_admin)) is not None:
            raise InvalidConfig(
                f"The demo shop's {ADMIN} is an admin of this database in production; expected an admin of yours. "
                f"Make one with `flask init-db --admin you@your.shop`, which removes that admin's rights."
            )


@click.command("init-db")
@click.option("--admin", default="admin@localhost", show_default=True, help="The e-mail of the admin.")
@with_appcontext
def init_db(admin: str) -> None:
    """Create the admin.

    The database must have its schema. The demo shop's admin loses its rights.
    """
    email = _own_address(admin)
    with _ready_engine() as engine:
        try:
            with engine.begin() as connection:
                _create_admin(connection, email)
        except IntegrityError:
            _refuse_customer(engine, email)
            click.echo(f"The admin {email} exists already. Nothing was changed.")
        with engine.begin() as connection:
            retire = update(User).where(User.email == ADMIN, User.is_admin).values(is_admin=False)
            if connection.execute(retire).rowcount:
                click.echo(f"The demo shop's {ADMIN} is no longer an admin.")


def _refuse_customer(engine: Engine, email: str) -> None:
    with engine.connect() as connection:
        is_admin = connection.scalar(select(User.is_admin).where(User.email == email))
    if not is_admin:
        raise click.ClickException(
            f"{email} has an account without admin rights; expected an e-mail without an account, or an admin's. "
            f"An admin can give the rights on the page of users."
        )


@click.command("reset-password")
@click.argument("email")
@with_appcontext
def reset_password(email: str) -> None:
    """Give the user EMAIL a new password, and show it once.

    The user's sessions end.
    """
    email, password = email.strip().lower(), secrets.token_urlsafe(12)
    password_hash = generate_password_hash(password, User.password_method)
    with _ready_engine() as engine, engine.begin() as connection:
        changed = update(User).where(User.email == email).values(password_hash=password_hash)
        if storable(email, engine.dialect) != email or not connection.execute(changed).rowcount:
            raise click.ClickException(
                f"No user has the e-mail {email!r}; expected the e-mail of an account. "
                "`flask init-db --admin EMAIL` makes an admin."
            )
        click.echo(f"\n  The password of {email} is {password} (shown this once)\n")
        sys.stdout.flush()


@click.command("demo")
@click.option("--users", "number", default="10000", show_default=True, help="The number of users to add.")
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
    """Give the engine of a database that is ready. An error of the database in the block becomes one sentence."""
    ensure_ready()
    engine: Engine = current_app.extensions["sqlalchemy"].engine
    with schema.reaching(engine.url):
        yield engine


def _own_address(given: str) -> str:
    try:
        email = address(given.strip().lower())
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
                "password_hash": NO_PASSWORD,
                "created_at": at - timedelta(days=created),
                "last_login_at": None if last is None else at - timedelta(days=last),
            }
            for i, (name, created, last) in enumerate(USERS, start=1)
        ],
    )


def _create_admin(connection: Connection, email: str) -> None:
    """Create the admin. Show the password before the commit, so that the password of a saved admin is never lost."""
    password = secrets.token_urlsafe(12)
    password_hash = generate_password_hash(password, User.password_method)
    connection.execute(insert(User).values(email=email, name="Admin", is_admin=True, password_hash=password_hash))
    click.echo(f"\n  The admin is {email}, the password {password} (shown this once)\n")
    sys.stdout.flush()


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
        yield {
            "email": f"{given}.{family}.{number}@example.com".lower(),
            "name": f"{given} {family}",
            "password_hash": NO_PASSWORD,
            "created_at": seen_at - timedelta(days=number % 500 if number % 7 else 0),
            "last_login_at": seen_at if number % 7 else None,
        }
