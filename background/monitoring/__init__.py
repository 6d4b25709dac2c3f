"""Endpoints for machines: health and metrics."""

from .health import health
from .metrics import metrics

__all__ = ["health", "metrics"]
