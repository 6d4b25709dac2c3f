"""The clock of the cases that measure in this process."""

import time


def clock() -> float:
    """Return seconds, of the wall or of this process's processor time."""
    return _clock()


def count_processor_time() -> None:
    """Measure the processor time of this process. A busy machine lengthens it less, and no wait counts."""
    global _clock
    _clock = time.process_time


_clock = time.perf_counter
