"""The schema's history (Alembic by Flask-Migrate), its check at the start, and the demo shop."""
