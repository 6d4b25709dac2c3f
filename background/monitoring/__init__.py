"""What machines ask: health, metrics, and the timing of requests."""

from .health import health
from .metrics import metrics

__all__ = ["health", "metrics"]
