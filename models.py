"""The shop's tables, and the statements on its users and orders."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from string import ascii_lowercase, ascii_uppercase
from typing import Any
from uuid import uuid4

from flask_security import UserMixin, hash_password
from flask_sqlalchemy import SQLAlchemy
from passlib.exc import UnknownHashError
from sqlalchemy import (
    BigInteger,
    BindParameter,
    CheckConstraint,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    MetaData,
    Row,
    Select,
    String,
    Text,
    Update,
    and_,
    bindparam,
    cast,
    false,
    func,
    literal_column,
    not_,
    or_,
    select,
    text,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import VARCHAR
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    InstrumentedAttribute,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
    scoped_session,
    synonym,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import UserDefinedType

from background.database.clock import UtcDateTime, now


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)
# A plain `Mapped[datetime]` is an aware UTC moment on both engines.
Base.registry.update_type_annotation_map({datetime: UtcDateTime})


def ordered_text(length: int) -> String:
    """Text compared by its code points on both engines, so that one index serves order and prefix search."""
    return String(length).with_variant(VARCHAR(length, collation="C"), "postgresql")


def new_uniquifier() -> str:
    """Return a new `fs_uniquifier`. Sessions and links contain it, so they become invalid when it changes."""
    return uuid4().hex


class RandomText(FunctionElement[str]):
    """A random text, different in each row. Rows that SQL or an earlier release adds get one, too."""

    inherit_cache = True


@compiles(RandomText, "sqlite")
def _on_sqlite(*_: Any, **__: Any) -> str:
    return "(lower(hex(randomblob(16))))"


@compiles(RandomText, "postgresql")
def _on_postgresql(*_: Any, **__: Any) -> str:
    return "replace(gen_random_uuid()::text, '-', '')"


class User(UserMixin, db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(ordered_text(254), unique=True)  # as `forms.normalized_email` returns it
    name: Mapped[str] = mapped_column(ordered_text(120))
    password: Mapped[str | None] = mapped_column("password_hash", String(255), key="password")  # None: not chosen yet
    password_hash = synonym("password")
    active: Mapped[bool] = mapped_column(default=True, server_default=true())  # an admin may disable the account
    fs_uniquifier: Mapped[str] = mapped_column(
        String(64), unique=True, default=new_uniquifier, server_default=RandomText()
    )
    confirmed_at: Mapped[datetime | None]
    tf_primary_method: Mapped[str | None] = mapped_column(String(64))  # of two-factor login
    tf_totp_secret: Mapped[str | None] = mapped_column(String(255))
    tf_last_counter: Mapped[int | None]  # of the last code, so that each code is accepted once
    status: Mapped[str] = mapped_column(String(10), default="active", server_default="active")
    is_admin: Mapped[bool] = mapped_column(default=False, server_default=false())
    is_viewer: Mapped[bool] = mapped_column(default=False, server_default=false())  # sees the workers' pages
    created_at: Mapped[datetime] = mapped_column(default=now())
    last_login_at: Mapped[datetime | None]  # type: ignore[assignment]

    # Concurrency: another request may change the password or end the sessions. A change to a user that was read before
    # raises StaleDataError, so one of several such requests succeeds.
    __mapper_args__ = {"version_id_col": fs_uniquifier, "version_id_generator": False}

    def verify_and_update_password(self, password: str) -> bool:
        """Return whether the password is right. A hash of another kind, as of an earlier release, is never right."""
        try:
            return bool(super().verify_and_update_password(password))
        except UnknownHashError:
            hash_password(password)  # takes as long as a wrong password
            return False

    @property
    def sees_workers(self) -> bool:
        return self.is_admin or self.is_viewer

    @property
    def is_deleted(self) -> bool:
        """True if the user deleted the account. The row stays, as other rows refer to it."""
        return "@" not in self.email


_name = func.lower(User.name)
_last_seen_at = func.coalesce(User.last_login_at, User.created_at)
# Literals, not parameters: the database must see the value to use a partial index.
# A migration that rebuilds `users` on SQLite, in a batch, must create the indexes on expressions again.
_is_active = User.status == literal_column("'active'")
_is_passive = User.status == literal_column("'passive'")

User.__table__.append_constraint(CheckConstraint(User.status.in_(["active", "passive"]), name="status"))
Index("ix_users_last_seen_at_of_active", _last_seen_at, postgresql_where=_is_active, sqlite_where=_is_active)
Index("ix_users_id_of_passive", User.id, postgresql_where=_is_passive, sqlite_where=_is_passive)
Index("ix_users_lower_name", _name, User.id)


class HealthSample(db.Model):  # type: ignore[name-defined, misc]
    """One measurement of the health worker, taken each minute."""

    __tablename__ = "health_samples"

    id: Mapped[int] = mapped_column(primary_key=True)
    taken_at: Mapped[datetime] = mapped_column(index=True)
    database_ms: Mapped[float] = mapped_column(Float)  # of one round trip
    disk_free_bytes: Mapped[int] = mapped_column(BigInteger)
    messages_waiting: Mapped[int]
    messages_dead: Mapped[int]


class AuditEntry(db.Model):  # type: ignore[name-defined, misc]
    """One change by an admin or by a command, recorded before it takes effect."""

    __tablename__ = "audit_entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now(), index=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))  # None for a command
    action: Mapped[str] = mapped_column(String(100))
    details: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(String(45))  # a command has the name of its machine
    operator: Mapped[str | None] = mapped_column(String(100))  # the operating system's user who called a command
    outcome: Mapped[str | None] = mapped_column(String(200))  # written after the action

    user: Mapped[User | None] = relationship()


class RateLimit(db.Model):  # type: ignore[name-defined, misc]
    """The number of attempts within the window that ends at `expires_at`."""

    __tablename__ = "rate_limits"

    key: Mapped[str] = mapped_column(ordered_text(200), primary_key=True)
    hits: Mapped[int]
    expires_at: Mapped[datetime] = mapped_column(index=True)


@dataclass(frozen=True)
class UserPage:
    """Some users, and the `after` of the next page (None on the last one)."""

    users: list[User]
    after: str | None


class UserRepository:
    """The statements on users. It commits only the slices of a sweep."""

    slice_size = 5_000

    def __init__(self, session: Session | scoped_session[Any]) -> None:
        self.session = session

    def get(self, user_id: int) -> User | None:
        return self.session.get(User, user_id)

    def by_email(self, email: str) -> User | None:
        return self.session.scalar(select(User).where(User.email == email))

    def add(self, name: str, email: str, password: str | None) -> User:
        """Add a user unless the e-mail is taken. Return the user of this e-mail. `password` is a hash.

        Both cases run the same statements and take the same time.
        Concurrency: other requests may add the same e-mail. One of them adds the user.
        """
        insert: Any = postgresql.insert if self._postgresql else sqlite.insert
        new = insert(User).values(name=name, email=email, password=password)
        self.session.execute(new.on_conflict_do_nothing(index_elements=[User.email]))
        return self.session.scalars(select(User).where(User.email == email)).one()

    def make_admin(self, user_id: int) -> bool:
        """Make the user an admin, and discard the password: a stranger may have chosen it.

        Return False if the user is an admin already, does not exist, is disabled, or has not confirmed the e-mail.
        """
        user = and_(User.id == user_id, not_(User.is_admin), User.active, User.confirmed_at.is_not(None))
        return self._change(user, is_admin=True, is_viewer=False, password=None)

    def unmake_admin(self, user_id: int) -> bool:
        """Take the admin rights away. Return False if the user is not an admin, or is the last one.

        Concurrency: two admins may unmake each other. Each request first locks all admins, so the second one sees that
        one admin is left.
        """
        other = aliased(User)
        self.session.execute(select(User.id).where(User.is_admin).order_by(User.id).with_for_update())
        is_another = select(other.id).where(other.is_admin, other.id != user_id).exists()
        return self._change(and_(User.id == user_id, User.is_admin, is_another), is_admin=False)

    def make_viewer(self, user_id: int) -> bool:
        """Let the user see the workers' pages, without the right to change anything.

        Return False if the user sees them already, does not exist, is disabled, or has not confirmed the e-mail.
        """
        user = and_(User.id == user_id, not_(User.is_admin), not_(User.is_viewer), User.active)
        return self._change(and_(user, User.confirmed_at.is_not(None)), is_viewer=True)

    def unmake_viewer(self, user_id: int) -> bool:
        return self._change(and_(User.id == user_id, User.is_viewer), is_viewer=False)

    def disable(self, user_id: int) -> bool:
        """Keep the user from logging in. Return False for an admin, so that an active admin remains."""
        return self._change(and_(User.id == user_id, User.active, not_(User.is_admin)), active=False)

    def enable(self, user_id: int) -> bool:
        return self._change(and_(User.id == user_id, not_(User.active), User.email.contains("@")), active=True)

    def end_sessions(self, user_id: int) -> bool:
        return self._change(User.id == user_id)

    def delete(self, user: User) -> bool:
        """Remove the personal data of the user. Return False for an admin, or if the user was changed meanwhile."""
        known = and_(User.id == user.id, User.fs_uniquifier == user.fs_uniquifier, not_(User.is_admin))
        nothing = dict.fromkeys(("password", "confirmed_at", "last_login_at", "tf_primary_method", "tf_totp_secret"))
        return self._change(
            known, email=f"deleted {user.id}", name="Deleted user", active=False, is_viewer=False, **nothing
        )

    def _change(self, users: ColumnElement[bool], **values: Any) -> bool:
        """Change the matching user, and end the user's sessions. Return whether a user matched."""
        statement = update(User).where(users).values(**values, fs_uniquifier=new_uniquifier())
        return bool(_rows_changed(self.session, statement.execution_options(synchronize_session=False)))

    def record_login(self, user_id: int, at: datetime, let_in_by: str | None = None) -> bool:
        """Write the login, and make the user active.

        Concurrency: another request may change the password. Return False if `fs_uniquifier` is no longer `let_in_by`.
        """
        user = User.id == user_id if let_in_by is None else and_(User.id == user_id, User.fs_uniquifier == let_in_by)
        return bool(_rows_changed(self.session, update(User).where(user).values(last_login_at=at, status="active")))

    def use_code(self, user_id: int, counter: int) -> bool:
        """Note the counter of a code of the second factor. Return False if this code or a later one was used.

        Concurrency: other requests may send the same code. One of them raises the counter.
        """
        is_new = or_(User.tf_last_counter.is_(None), User.tf_last_counter < counter)
        used = update(User).where(User.id == user_id, is_new).values(tf_last_counter=counter)
        return bool(_rows_changed(self.session, used))

    def update_inactive_user_statuses(
        self, cutoff: datetime, after_slice: Callable[[int, int, int], None] | None = None, after_id: int = 0
    ) -> int:
        """Set active users last seen before `cutoff`, with an id above `after_id`, to passive. Return their number.

        `after_slice(done, total, last_id)` must commit after each slice. Without it the repository commits.
        """
        if self.session.scalar(_oldest_stale, {"cutoff": cutoff}) is None:
            return 0
        slices = self._slices_of_stale(cutoff, after_id)
        total = sum(size for _, size, _ in slices)
        done = changed = 0
        for ids, size, last_id in slices:
            changed += self._set_passive(ids, cutoff)
            done += size
            if after_slice is None:
                self.session.commit()
            else:
                after_slice(done, total, last_id)
        return changed

    def _slices_of_stale(self, cutoff: datetime, after_id: int) -> list[tuple[str, int, int]]:
        """Return slices of ids, each with its size and its last id.

        The ids ascend, as the rows lie on disk: each page is written once.

        The ids of a slice stay in the database's own text for a list. Python only passes them on.
        """
        # The cutoff is a literal: for an unknown one, PostgreSQL plans to read the whole table. `id + 0` keeps SQLite
        # from reading the whole table in the order of its key, to avoid a sort.
        place = func.row_number().over(order_by=User.id + 0) - 1
        numbered = (
            select(User.id, place.op("/", precedence=8)(self.slice_size).label("slice"))
            .where(_stale(bindparam("cutoff", cutoff, type_=UtcDateTime, literal_execute=True)), User.id + 0 > after_id)
            .subquery()
        )
        ids = cast(func.array_agg(numbered.c.id), Text) if self._postgresql else func.json_group_array(numbered.c.id)
        slices = select(ids, func.count(), func.max(numbered.c.id)).group_by(numbered.c.slice)
        return [(ids, size, last_id) for ids, size, last_id in self.session.execute(slices.order_by(numbered.c.slice))]

    def _set_passive(self, ids: str, cutoff: datetime) -> int:
        """Set stale users of the slice passive. Return their number.

        Concurrency: a login may come between the read and this statement, or hold the row now. So the statement asks
        again whether the user is stale, and a user who logged in meanwhile stays active.
        """
        among = "= ANY(:ids)" if self._postgresql else "IN (SELECT value FROM json_each(:ids))"
        listed = bindparam("ids", ids, type_=_Integers() if self._postgresql else None)
        statement = (
            update(User)
            .where(text(f"users.id {among}").bindparams(listed), _stale(cutoff))
            .values(status="passive")
            .execution_options(synchronize_session=False)
        )
        return _rows_changed(self.session, statement)

    @property
    def _postgresql(self) -> bool:
        return self.session.get_bind(User).dialect.name == "postgresql"

    def search(
        self, status: str | None = None, prefix: str = "", after: str | None = None, limit: int = 50
    ) -> UserPage:
        """Return a page of users of that status, by id.

        With a prefix, users whose e-mail begins with it come first, then users whose name does. Every page is a range
        of one index or two, so the last is as fast as the first. `after` is the `after` of the page before.
        """
        prefix = prefix.strip().translate(_FOLD)
        part, last_id, last = _parse_position(after)
        found: list[User] = []
        if not prefix:
            found = self._by_id(status, last_id, limit + 1)
        elif part != "name":
            found = self._by_email(status, prefix, last, limit + 1)
        if prefix and len(found) <= limit:
            start = (last, last_id) if part == "name" else None
            found += self._by_name(status, prefix, start, limit + 1 - len(found))
        page = found[:limit]
        return UserPage(page, _position(page[-1], prefix) if len(found) > limit else None)

    def _by_id(self, status: str | None, last_id: int, limit: int) -> list[User]:
        return self._take(select(User).where(User.id > last_id).order_by(User.id), status, limit)

    def _by_email(self, status: str | None, prefix: str, last: str, limit: int) -> list[User]:
        query = select(User).where(_begins(User.email, prefix), User.email > last).order_by(User.email)
        return self._take(query, status, limit)

    def _by_name(self, status: str | None, prefix: str, start: tuple[str, int] | None, limit: int) -> list[User]:
        query = select(User).where(_begins(_name, prefix), not_(_begins(User.email, prefix))).order_by(_name, User.id)
        if start:
            query = query.where(tuple_(_name, User.id) > tuple_(*start))
        return self._take(query, status, limit)

    def _take(self, query: Select[User], status: str | None, limit: int) -> list[User]:
        if status is not None:
            query = query.where({"active": _is_active, "passive": _is_passive}.get(status, false()))
        return list(self.session.scalars(query.limit(limit)))


class _Integers(UserDefinedType[str]):
    """PostgreSQL's own text for a list of integers.

    PostgreSQL compares each row with each element of the list, unless it plans with the list as a constant. A text that
    is cast to a list is no constant.
    """

    cache_ok = True
    render_bind_cast = True

    def get_col_spec(self, **_: Any) -> str:
        return "integer[]"


def _stale(cutoff: datetime | BindParameter[datetime]) -> ColumnElement[bool]:
    return and_(_is_active, _last_seen_at < cutoff)


# One probe of the partial index: a run with nothing to do costs almost nothing at any size. Without the order, a plan
# that does not know the cutoff reads the table, and expects a stale user soon.
_oldest_stale = select(User.id).where(_stale(bindparam("cutoff", type_=UtcDateTime))).order_by(_last_seen_at).limit(1)


# Under the C collation the databases fold only ASCII. NUL is removed, as PostgreSQL refuses it.
_FOLD = str.maketrans(ascii_uppercase, ascii_lowercase, "\0")


def _begins(column: ColumnElement[str] | InstrumentedAttribute[str], prefix: str) -> ColumnElement[bool]:
    """Match a prefix as a range of the column's order. LIKE has wildcards, and does not always use an index."""
    return and_(column >= prefix, column < prefix + "\U0010ffff")


def _position(user: User, prefix: str) -> str:
    if not prefix:
        return f"id:{user.id}:"
    if user.email.startswith(prefix):
        return f"email:{user.id}:{user.email}"
    return f"name:{user.id}:{user.name.translate(_FOLD)}"


def _parse_position(after: str | None) -> tuple[str, int, str]:
    """Return the part, the id and the text of a position. An invalid one is the beginning."""
    part, _, rest = (after or "").replace("\0", "").partition(":")
    last_id, _, last = rest.partition(":")
    if last_id.isascii() and last_id.isdigit() and len(last_id) < 10:
        return part, int(last_id), last
    return "", 0, ""


def _rows_changed(session: Session | scoped_session[Any], statement: Update) -> int:
    """Execute the statement. Return the number of changed rows."""
    return session.execute(statement).rowcount  # type: ignore[attr-defined, no-any-return]


# ---- The shop: an application without the shop ends here


class Book(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "books"
    __table_args__ = (
        CheckConstraint("price_cents >= 0", name="price_cents"),
        CheckConstraint("stock >= 0", name="stock"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200), index=True)
    author: Mapped[str] = mapped_column(String(200))
    isbn: Mapped[str | None] = mapped_column(String(17), unique=True)
    description: Mapped[str] = mapped_column(Text, default="", server_default="")
    price_cents: Mapped[int]
    stock: Mapped[int] = mapped_column(default=0, server_default="0")


class Order(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "orders"
    __table_args__ = (
        CheckConstraint("quantity > 0", name="quantity"),
        CheckConstraint("price_cents >= 0", name="price_cents"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    book_id: Mapped[int] = mapped_column(ForeignKey("books.id"), index=True)
    quantity: Mapped[int]
    price_cents: Mapped[int]  # of one copy, when the order was placed
    # received -> confirmed (its books are taken from the stock) or sold out. The release before messages wrote
    # "placed", and took the books at once. It may still write while both releases run.
    status: Mapped[str] = mapped_column(String(10), default="received", server_default="placed")
    created_at: Mapped[datetime] = mapped_column(default=now())

    user: Mapped[User] = relationship(backref="orders")
    book: Mapped[Book] = relationship()


class OrderRepository:
    """The statements on orders. It commits nothing."""

    def __init__(self, session: Session | scoped_session[Any]) -> None:
        self.session = session

    def get(self, order_id: int) -> Order | None:
        """Return the order with its user and book."""
        return self.session.get(Order, order_id, options=[joinedload(Order.user), joinedload(Order.book)])

    def place(self, user_id: int, book_id: int, quantity: int) -> int | None:
        """Write an order at the book's current price. Return its id, or None if the stock is too small.

        `settle` takes the books from the stock, and decides whether there are enough.
        """
        price = self.session.scalar(select(Book.price_cents).where(Book.id == book_id, Book.stock >= quantity))
        if price is None:
            return None
        order = Order(user_id=user_id, book_id=book_id, quantity=quantity, price_cents=price)
        self.session.add(order)
        self.session.flush()
        return order.id

    def settle(self, order_ids: Collection[int]) -> list[int]:
        """Confirm the received orders, or mark them sold out. Return the ids of the orders that were still open.

        Concurrency: another instance may settle orders of the same books. Each instance first locks all its books in
        the order of their ids, so there is no deadlock. NO KEY UPDATE lets customers place orders meanwhile.
        """
        ordered = select(Order.book_id).where(Order.id.in_(order_ids))
        books = select(Book.id).where(Book.id.in_(ordered)).order_by(Book.id)
        self.session.execute(books.with_for_update(key_share=True))
        return [order_id for order_id in order_ids if self._settle(order_id)]

    def _settle(self, order_id: int) -> bool:
        """Settle one order, and return whether it was open.

        Concurrency: another instance may settle the same order. One of them finds it received, and takes only books
        that the stock has.
        """
        order = self._change(order_id, "received", "confirmed")
        if order is None:
            return False
        if not self._take_stock(order.book_id, order.quantity):
            self._change(order_id, "confirmed", "sold out")
        return True

    def _change(self, order_id: int, status: str, to: str) -> Row[int, int] | None:
        return self.session.execute(
            update(Order)
            .where(Order.id == order_id, Order.status == status)
            .values(status=to)
            .returning(Order.book_id, Order.quantity)
            .execution_options(synchronize_session=False)
        ).one_or_none()

    def _take_stock(self, book_id: int, quantity: int) -> bool:
        statement = (
            update(Book)
            .where(Book.id == book_id, Book.stock >= quantity)
            .values(stock=Book.stock - quantity)
            .execution_options(synchronize_session=False)
        )
        return bool(_rows_changed(self.session, statement))
