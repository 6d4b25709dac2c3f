"""Pages of the dashboard, and their buttons."""
