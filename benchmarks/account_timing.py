"""Response times of the account forms, for e-mails with an account and for e-mails without one.

    python -m benchmarks.account_timing --engine postgresql

Needs requirements-dev.txt, because it starts its own PostgreSQL. It sends the requests in random order, and each from
another network, so that no limit refuses them. The times include no network. A p-value below 0.01 shows a difference
between the two classes. --csv prints every sample instead.
"""

import argparse
import gc
import random
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count, product
from math import exp, sqrt

from flask import Flask
from flask.testing import FlaskClient
from flask_security import hash_password

from app import create_app
from migrations.schema import upgrade
from models import User, db

from .harness.databases import database

PASSWORD = "correct horse battery staple"
FORMS = ("login", "register", "forgot")
CLASSES = ("known", "unknown")
WARM_UP = 20

Sample = tuple[str, str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], required=True)
    parser.add_argument("--samples", type=int, default=250, help="of each class")
    parser.add_argument("--csv", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    with database(arguments.engine) as url:
        samples = list(measured(url, arguments.samples))
    if arguments.csv:
        print("form,class,ms", *(f"{form},{kind},{ms:.3f}" for form, kind, ms in samples), sep="\n")
    else:
        summarize(samples, arguments.engine)


def measured(url: str, number: int) -> Iterator[Sample]:
    app = create_app({"DATABASE_URL": url, "SECRET_KEY": "x" * 40, "WTF_CSRF_ENABLED": False, "LOG_LEVEL": "ERROR"})
    try:
        with app.app_context():
            upgrade()
            fill(number + WARM_UP)
        client, networks = app.test_client(), count(1)
        wanted = list(product(FORMS, CLASSES, range(number)))
        random.shuffle(wanted)
        gc.collect()
        gc.freeze()  # like gunicorn.conf.py
        for index, form, kind in product(range(number, number + WARM_UP), FORMS, CLASSES):
            ask(client, form, kind, index, next(networks))
        for form, kind, index in wanted:
            yield form, kind, ask(client, form, kind, index, next(networks))
    finally:
        close(app)


def fill(number: int) -> None:
    password, at = hash_password(PASSWORD), datetime.now(UTC)
    for form in FORMS:
        for index in range(number):
            email = email_of(form, "known", index)
            db.session.add(User(email=email, name="Nat", password=password, created_at=at, confirmed_at=at))
    db.session.commit()


def email_of(form: str, kind: str, index: int) -> str:
    return f"{form}.{kind:_<7}.{index:06}@example.com"  # equally long


def ask(client: FlaskClient, form: str, kind: str, index: int, network: int) -> float:
    """Post the form. Return the milliseconds."""
    email = email_of(form, kind, index)
    path, fields, code = {
        "login": ("/login", {"email": email, "password": "wrong horse"}, 200),
        "register": (
            "/register",
            {"name": "Nat", "email": email, "password": PASSWORD, "password_confirm": PASSWORD},
            302,
        ),
        "forgot": ("/account/reset", {"email": email}, 200),
    }[form]
    origin = {"REMOTE_ADDR": f"10.{network >> 16}.{network >> 8 & 255}.{network & 255}"}
    client.delete_cookie("session")
    began = time.perf_counter()
    answer = client.post(path, data=fields, environ_overrides=origin)
    milliseconds = (time.perf_counter() - began) * 1000
    assert answer.status_code == code, answer.text
    return milliseconds


def close(app: Flask) -> None:
    app.extensions["background_workers"].stop()
    with app.app_context():
        db.session.remove()
        db.engine.dispose()


# ---- Statistics


def summarize(samples: Sequence[Sample], engine: str) -> None:
    print(f"{engine}: medians in ms, and the p-values of two tests that both classes are the same")
    print(f"{'form':10} {'samples':>8} {'known':>8} {'unknown':>8} {'rank p':>8} {'distance p':>11}")
    for form in FORMS:
        known, unknown = ([ms for of, kind, ms in samples if (of, kind) == (form, each)] for each in CLASSES)
        medians = f"{statistics.median(known):8.2f} {statistics.median(unknown):8.2f}"
        print(f"{form:10} {len(known):8} {medians} {by_rank(known, unknown):8.3f} {by_distance(known, unknown):11.3f}")


def by_rank(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the p-value of the test by Mann and Whitney, for samples without ties."""
    sorted_other = sorted(other)
    above = sum(bisect_left(sorted_other, each) for each in one)
    expected = len(one) * len(other) / 2
    deviation = sqrt(len(one) * len(other) * (len(one) + len(other) + 1) / 12)
    return 2 * (1 - statistics.NormalDist().cdf(abs(above - expected) / deviation))


def by_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the p-value of the test by Kolmogorov and Smirnov."""
    first, second = sorted(one), sorted(other)
    gaps = [abs(bisect_right(first, x) / len(first) - bisect_right(second, x) / len(second)) for x in first + second]
    root = sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * max(gaps)
    terms = [(-1) ** (k - 1) * exp(-2 * k * k * scaled * scaled) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * sum(terms)))


if __name__ == "__main__":
    main()
