"""The headers of every answer, and the forms that they allow."""

from flask import Flask
from flask.testing import FlaskClient
from support.account_forms import Login, Make, token_on
from support.databases import on_sqlite
from support.shop import PASSWORD


@on_sqlite
def test_every_answer_forbids_foreign_and_inline_content(app: Flask, client: FlaskClient) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.add_url_rule("/fault", view_func=lambda: 1 / 0)
    paths = {"/": 200, "/login": 200, "/static/style.css": 200, "/nowhere": 404, "/logout": 405}
    for path, code in {**paths, "/account": 302, "/fault": 500}.items():
        response = client.get(path, buffered=True)
        assert response.status_code == code
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'; form-action 'self'" in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert "Strict-Transport-Security" not in response.headers
        secure = client.get(path, base_url="https://localhost", buffered=True)
        assert secure.headers["Strict-Transport-Security"] == "max-age=31536000"


@on_sqlite
def test_no_cache_keeps_a_page_made_for_one_visitor(client: FlaskClient, make_user: Make, login: Login) -> None:
    assert "Cache-Control" not in client.get("/").headers
    login(client, make_user())
    for path in ("/", "/account", "/admin/users", "/nowhere"):
        assert client.get(path).headers["Cache-Control"] == "no-store", path
    assert client.get("/static/style.css", buffered=True).headers.get("Cache-Control") != "no-store"


@on_sqlite
def test_a_form_over_https_is_accepted_with_the_referrer_that_our_policy_allows(
    app: Flask, client: FlaskClient
) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    token = token_on(client, "/login", base_url="https://localhost")
    form = {"csrf_token": token, "email": "nat@example.com", "password": PASSWORD}
    for referrer, code in [("https://localhost/login", 200), ("https://evil.example/", 400), (None, 400)]:
        headers = {"Referer": referrer} if referrer else {}
        assert client.post("/login", data=form, base_url="https://localhost", headers=headers).status_code == code
