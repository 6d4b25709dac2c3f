"""The thread that takes in the fleet's decisions. Unlike the heartbeat's, it may wait for a lock."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

_LAST_LOOK_SECONDS = 1.0


class Looking:
    """Calls `look` in a thread of its own whenever a look is wanted. Looks that wait at the same time become one."""

    def __init__(self, look: Callable[[bool], None], failed: Callable[[Exception], None]) -> None:
        self._look, self._failed = look, failed
        self._wanted: SimpleQueue[bool | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="workers-look", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def want(self, rearm: bool = False) -> None:
        """Have the thread look soon. With `rearm` it also sets every wake-up again."""
        self._wanted.put(rearm)

    def stop(self) -> None:
        """Begin no other look. Wait for a look that goes on, but not for long."""
        self._wanted.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST_LOOK_SECONDS)

    def _serve(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            rearm = wanted
            while not self._wanted.empty():
                if (wanted := self._wanted.get()) is None:
                    return
                rearm = rearm or wanted
            try:
                self._look(rearm)
            except Exception as error:  # the thread must live on for the next look
                self._failed(error)
