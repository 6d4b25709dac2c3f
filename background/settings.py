"""The engine's settings. Each has a default, a cast and a meaning, and is checked in every application."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from .errors import InvalidConfig


class Setting(NamedTuple):
    """One setting. `cast` raises ValueError, TypeError, KeyError or OverflowError for a wrong value."""

    default: Any
    cast: Callable[[Any], Any]
    expected: str
    meaning: str
    is_secret: bool = False
    """True for a value that no error may show."""


_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
PREFIXES = ("WORKERS_", "MESSAGES_", "METRICS_")
_CUTOFF = 0.8  # from 0 to 1, for difflib. An application may have its own settings with these prefixes
BOOLEAN = "true or false (also 1/0, yes/no, on/off)"
DAYS = "a number of days above 0 and at most 36500"


def boolean(value: Any) -> bool:
    """Cast true/false, 1/0, yes/no and on/off."""
    return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]


def number(most: float, least: float = 0.0) -> Callable[[Any], float]:
    """Return a cast for numbers above 0, from `least` to `most`."""

    def cast(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError(value)
        amount = float(value)
        if not (math.isfinite(amount) and amount > 0 and least <= amount <= most):
            raise ValueError(value)
        return int(amount) if amount.is_integer() else amount

    return cast


def whole(most: int) -> Callable[[Any], int]:
    """Return a cast for whole numbers from 1 to `most`."""

    def cast(value: Any) -> int:
        amount = number(most)(value)
        if not isinstance(amount, int):
            raise ValueError(value)
        return amount

    return cast


def printable(least: int, most: int) -> Callable[[Any], str]:
    """Return a cast for printable texts of `least` to `most` characters."""

    def cast(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most or not value.isprintable():
            raise ValueError(value)
        return value

    return cast


def token(value: Any) -> str:
    """Cast a text that a header can carry."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value):
        raise ValueError(value)
    return value


SETTINGS = {
    "WORKERS_ENABLED": Setting(True, boolean, BOOLEAN, "whether a serving process runs the background workers"),
    "WORKERS_HEARTBEAT_SECONDS": Setting(
        None,
        number(86_400, least=0.01),
        "a number of seconds from 0.01 to 86400",
        "how often an instance renews its lease (unset: 2, or a quarter of the lease)",
    ),
    "WORKERS_LEASE_SECONDS": Setting(
        10,
        number(86_400, least=0.5),
        "a number of seconds from 0.5 to 86400",
        "how long an instance counts as alive without a heartbeat",
    ),
    "WORKERS_SHUTDOWN_SECONDS": Setting(
        20,
        number(86_400),
        "a number of seconds above 0 and at most 86400",
        "how long a stop waits for running work",
    ),
    "WORKERS_HISTORY_DAYS": Setting(14, number(36_500), DAYS, "how long the executions of a worker are kept"),
    "WORKERS_THREADS": Setting(
        10, whole(1_000), "a whole number from 1 to 1000", "how many runs a process has at once"
    ),
    "MESSAGES_MAX_BYTES": Setting(
        262_144, whole(1_000_000_000), "a whole number of bytes from 1 to 1000000000", "how long a payload may be"
    ),
    "MESSAGES_KEY_DAYS": Setting(14, number(36_500), DAYS, "how long the key of a done message refuses a new message"),
    "LOCK_PREFIX": Setting("", printable(0, 100), "at most 100 printable characters", "precedes the name of each lock"),
    "METRICS_TOKEN": Setting(
        None,
        token,
        "printable ASCII without spaces",
        "the bearer token that a scrape of /metrics must send (unset: only this machine may scrape)",
        is_secret=True,
    ),
    "RELEASE": Setting(
        None,
        printable(1, 100),
        "a text of 1 to 100 printable characters",
        "the name of this release in the list of instances",
    ),
}


def settle(config: MutableMapping[str, Any]) -> None:
    """Give each setting of the engine its default or its cast value. Raises InvalidConfig for a wrong value."""
    refuse_misspelled(config, SETTINGS)
    cast_all(config, SETTINGS)
    _settle_heartbeat(config)


def cast_all(config: MutableMapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Give each of the `settings` its default or its cast value. Raises InvalidConfig for the first wrong value."""
    for name, setting in settings.items():
        value = config.setdefault(name, setting.default)
        if value is not None or setting.default is not None:
            config[name] = cast(name, value, setting)


def cast(name: str, value: Any, setting: Setting) -> Any:
    """Return the cast value, or raise InvalidConfig. The error does not show a secret."""
    try:
        return setting.cast(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        shown = "a value that is not shown" if setting.is_secret else repr(value)
        raise InvalidConfig(
            f"{name} is {shown}; expected {setting.expected}. "
            "Correct it where the application is configured (the environment, instance/config.py), or leave it out."
        ) from None


def refuse_misspelled(names: Iterable[str], settings: Iterable[str], prefixes: tuple[str, ...] = PREFIXES) -> None:
    """Raise InvalidConfig for a name with one of the `prefixes` that looks like a misspelled setting."""
    known = list(settings)
    for name in names:
        is_ours = name.startswith(prefixes) and name not in known
        if is_ours and (close := get_close_matches(name, known, n=1, cutoff=_CUTOFF)):
            raise InvalidConfig(f"There is no setting {name}. Did you mean {close[0]}?")


def _settle_heartbeat(config: MutableMapping[str, Any]) -> None:
    lease = config["WORKERS_LEASE_SECONDS"]
    if config["WORKERS_HEARTBEAT_SECONDS"] is None:
        config["WORKERS_HEARTBEAT_SECONDS"] = min(2, lease / 4)
    heartbeat = config["WORKERS_HEARTBEAT_SECONDS"]
    if lease <= 2 * heartbeat:
        raise InvalidConfig(
            f"WORKERS_LEASE_SECONDS is {lease}; expected more than twice WORKERS_HEARTBEAT_SECONDS ({heartbeat}), so "
            "that an instance keeps its claims if one heartbeat is late. Raise the lease or lower the heartbeat."
        )
