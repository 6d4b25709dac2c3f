"""The differences of SQLite and PostgreSQL."""
