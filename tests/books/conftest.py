"""These tests are about books and orders. An application without the shop deletes them."""

from support.shop import (  # noqa: F401 - fixtures
    app,
    compiled_templates,
    engine,
    login,
    make_user,
    outbox,
    template_postgresql,
    template_sqlite,
)

from tests.books.rows import make_book  # noqa: F401 - a fixture
