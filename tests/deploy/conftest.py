"""These tests run on the shop: its application, and a database with its schema."""

from support.shop import app, compiled_templates, template_postgresql, template_sqlite  # noqa: F401 - fixtures
