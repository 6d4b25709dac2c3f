"""The shop as a stranger, a customer and an admin see it: its pages, its forms, and requests to its routes."""

import re
from collections import defaultdict
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

from flask import Flask
from flask.testing import FlaskClient
from hypothesis import strategies as st
from sqlalchemy import delete, update
from support.bad_input import Known, Page, bodies, encoded, fields, headers, in_path, texts
from support.shop import PASSWORD, PASSWORD_HASH
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect, Rule
from werkzeug.test import TestResponse

from background.database.clock import now
from models import RateLimit, User, db


class Visitors:
    """A stranger, a customer and an admin. Each visit restores a login or a right that was lost meanwhile."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.clients = {name: app.test_client() for name in ("", "customer", "admin")}
        self.fields: dict[str, Known] = defaultdict(dict)
        self.arguments: dict[str, set[str]] = defaultdict(set)
        self.answers: set[int] = set()
        self.is_changed = True

    def client(self, name: str) -> FlaskClient:
        if self.is_changed:
            self.is_changed = False
            self._forgive()
            for each in ("customer", "admin"):
                self._log_in(each)
            self.clients[""].delete_cookie("session")
        return self.clients[name]

    def _log_in(self, name: str) -> None:
        client, email = self.clients[name], f"{name}@example.com"
        is_there = {"customer": "/account", "admin": "/admin/users"}[name]
        if client.get(is_there).status_code != 200:
            self._restore(email, is_admin=name == "admin")
            client.delete_cookie("session")
            answer = client.post("/login", data={"email": email, "password": PASSWORD})
            assert answer.status_code == 302, answer.text

    def _forgive(self) -> None:
        with self.app.app_context():
            db.session.execute(delete(RateLimit))
            db.session.commit()

    def _restore(self, email: str, is_admin: bool) -> None:
        rights = {
            "password": PASSWORD_HASH,
            "active": True,
            "status": "active",
            "is_admin": is_admin,
            "confirmed_at": now(),
        }
        with self.app.app_context():
            db.session.execute(update(User).where(User.email == email).values(**rights))
            db.session.commit()

    def look_around(self, name: str) -> dict[str, str]:
        """Return the pages that this visitor can reach, by their address, at most a few for each endpoint."""
        pages: dict[str, str] = {}
        seen: dict[str, int] = defaultdict(int)
        waiting = [rule.rule for rule in self.rules() if "GET" in rule.methods and not rule.arguments]
        for path in waiting:  # which grows
            endpoint = self.learn(path)
            answer = self.ask(name, "GET", path)
            seen[endpoint] += 1
            if answer.status_code == 200:
                pages[path] = answer.text if answer.mimetype in ("text/html", "image/svg+xml") else ""
            page = Page(answer.text if answer.mimetype == "text/html" else "")
            for action, known in page.forms:
                for where in (self.learn(urljoin(path, action), "POST"), endpoint):
                    self.fields[where].update(known)
            links = (urljoin(path, link).partition("#")[0] for link in page.links)
            waiting += [link for link in dict.fromkeys(links) if link not in waiting and seen[self.learn(link)] < 4]
        return pages

    def endpoints(self, name: str) -> set[str]:
        return {self.learn(path) for path in self.look_around(name)}

    def learn(self, path: str, method: str = "GET") -> str:
        """Return the endpoint of an address, and remember its arguments as existing ones."""
        parts = urlsplit(path)
        for way in (method, "POST", "GET"):
            with suppress(HTTPException, RequestRedirect):
                endpoint, arguments = self.app.url_map.bind("localhost").match(parts.path, way)
                for name, value in arguments.items():
                    self.arguments[name].add(str(value))
                return str(endpoint)
        return ""

    def rules(self) -> list[Rule]:
        return sorted(self.app.url_map.iter_rules(), key=lambda rule: rule.rule)

    def ask(self, name: str, method: str, path: str, **body) -> TestResponse:
        answer = self.client(name).open(path, method=method, base_url="http://localhost", **body)
        self.is_changed |= method not in ("GET", "HEAD")
        self.check(answer, path)
        return answer

    def check(self, answer: TestResponse, path: str) -> None:
        self.answers.add(answer.status_code)
        assert answer.status_code < 500 or (answer.status_code == 503 and path.startswith("/health/")), answer.text
        if location := answer.headers.get("Location"):
            assert re.match(r"/(?![/\\])", location.removeprefix("http://localhost")), location
        if answer.mimetype == "text/html":
            assert Page(answer.text).injected == []


@st.composite
def requests(draw: st.DrawFn, visitors: Visitors, rule: Rule, method: str) -> tuple[str, str, dict[str, Any]]:
    """Draw a visitor, an address and the parameters of a request to the rule. Most name existing rows."""

    def argument(match: re.Match[str]) -> str:
        there = sorted(visitors.arguments[match[1]]) or ["1"]
        return in_path(draw(st.sampled_from(there * 3) | texts))

    path = re.sub(r"<(?:[^<>]*:)?([^<>:]+)>", argument, rule.rule)
    known = visitors.fields[rule.endpoint]
    query = encoded(draw(st.just([]) | fields(known)))
    more = {} if method == "GET" else draw(bodies(known))
    name = draw(st.sampled_from(["admin", "", "admin", "customer"]))
    return name, f"{path}?{query}" if query else path, {**more, "headers": draw(headers())}
