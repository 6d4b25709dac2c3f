"""These tests run on the shop: its application, and a database with its schema."""

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
