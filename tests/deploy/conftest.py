"""These tests run on the shop: its application, and a database with its schema."""

from support.shop import template_postgresql, template_sqlite  # noqa: F401 - fixtures
