"""Pages for people who operate a fleet."""

from .blueprint import dashboard

__all__ = ["dashboard"]
