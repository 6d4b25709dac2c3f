"""The dashboard in the shop: for admins only, and with the shop's token in each form."""

import pytest
from support.databases import on_sqlite
from support.fleet import Hourly


class Talker(Hourly):
    pass


@pytest.fixture
def admin(app, manager, client, make_user, login):
    """Give the client, logged in as an admin. There is one more worker."""
    manager.add(Talker)
    login(client, make_user(is_admin=True))
    return client


def page(client, path: str, status: int = 200) -> str:
    response = client.get(path)
    assert response.status_code == status, path
    return response.text


@on_sqlite
def test_only_admins_see_and_control_the_workers(app, client, make_user, login):
    values = {"name": "talker", "id": 1}
    rules = [rule for rule in app.url_map.iter_rules() if rule.endpoint.startswith("background.")]
    rules = [rule for rule in rules if rule.endpoint != "background.static"]  # each page of the shop uses its script
    assert len(rules) >= 11
    with app.test_request_context():
        requests = [
            (app.url_for(rule.endpoint, **{key: values[key] for key in rule.arguments}), method)
            for rule in rules
            for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}
        ]
    for path, method in requests:
        assert client.open(path, method=method).location.startswith("/login"), path
    login(client, make_user())
    for path, method in requests:
        assert client.open(path, method=method).status_code == 403, path
    assert 'href="/workers/"' not in page(client, "/account")


@on_sqlite
def test_every_form_has_the_token_that_it_needs(app, admin):
    app.config["WTF_CSRF_ENABLED"] = True
    text = page(admin, "/workers/")
    assert text.count('method="post"') == text.count('name="csrf_token" value="ey') + text.count(
        'name="csrf_token" value="I'
    )
    assert admin.post("/workers/worker/talker/pause").status_code == 400
