"""The engine's settings. Each has a default, a cast and a meaning, and is checked in every application."""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .errors import InvalidConfig


class Setting(NamedTuple):
    """One setting. `cast` raises ValueError, TypeError, KeyError or OverflowError for a wrong value."""

    default: Any
    cast: Callable[[Any], Any]
    expected: str
    meaning: str
    is_secret: bool = False
    """True for a value that no error may show."""


Kind = tuple[Callable[[Any], Any], str]
"""A cast, and the values that it expects."""

_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
PREFIXES = ("WORKERS_", "MESSAGES_", "METRICS_", "ALERT_", "PING_")
SECRET_PREFIX = "whsec_"  # noqa: S105 - it precedes a secret
_LEAST_KEY = 24  # bytes, as Standard Webhooks asks for
_MADE_KEY = "`python3 -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\"`"
_CUTOFF = 0.8  # from 0 to 1, for difflib. An application may have its own settings with these prefixes


def _boolean(value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[str(value).strip().lower()]


def _token(value: Any) -> str:
    """Cast a text that a header can carry."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value):
        raise ValueError(value)
    return value


def address(value: Any) -> str:
    """Cast the address of a service: http:// or https://, a host, and no user."""
    parts = urlsplit(value if isinstance(value, str) and re.fullmatch(r"[!-~]+", value) else "")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.port == 0:
        raise ValueError(value)
    return str(value)


def _address_of_each(value: Any) -> str:
    if "{worker}" not in address(value):
        raise ValueError(value)
    return str(value)


_E_MAIL = re.compile(r"[^\s@,]+@[^\s@,]+")


def _e_mails(value: Any) -> tuple[str, ...]:
    """Cast e-mails, with commas in between, to a tuple without a repeated e-mail."""
    found = value.split(",") if isinstance(value, str) else value
    if not all(isinstance(each, str) and each.isprintable() and _E_MAIL.fullmatch(each.strip()) for each in found):
        raise ValueError(value)
    return tuple(dict.fromkeys(each.strip() for each in found))


def _signing_key(value: Any) -> str:
    """Cast a secret of Standard Webhooks."""
    key = base64.b64decode(value.removeprefix(SECRET_PREFIX), validate=True)
    if not value.startswith(SECRET_PREFIX) or len(key) < _LEAST_KEY:
        raise ValueError(value)
    return str(value)


def _amount(value: Any, least: float, most: int) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    amount = float(value)
    if not (math.isfinite(amount) and amount > 0 and least <= amount <= most):
        raise ValueError(value)
    return int(amount) if amount.is_integer() else amount


def number(unit: str, most: int, least: float = 0.0) -> Kind:
    """Return the kind of numbers of this `unit` above 0, from `least` to `most`."""
    expected = f"a number of {unit} {f'from {least} to' if least else 'above 0 and at most'} {most}"
    return partial(_amount, least=least, most=most), expected


def whole(most: int) -> Kind:
    """Return the kind of whole numbers from 1 to `most`."""

    def cast(value: Any) -> int:
        amount = _amount(value, 1, most)
        if not isinstance(amount, int):
            raise ValueError(value)
        return amount

    return cast, f"a whole number from 1 to {most}"


def printable(least: int, most: int) -> Kind:
    """Return the kind of printable texts of `least` to `most` characters."""

    def cast(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most or not value.isprintable():
            raise ValueError(value)
        return value

    return cast, f"{least} to {most} printable characters"


BOOLEAN: Kind = _boolean, "true or false (also 1/0, yes/no, on/off)"
TOKEN: Kind = _token, "printable ASCII without spaces"
DAYS = number("days", 36_500)

SETTINGS = {
    "WORKERS_ENABLED": Setting(True, *BOOLEAN, "whether a serving process runs the background workers"),
    "WORKERS_HEARTBEAT_SECONDS": Setting(
        None,
        *number("seconds", 86_400, least=0.01),
        "how often an instance renews its lease (unset: 2, or a quarter of the lease)",
    ),
    "WORKERS_LEASE_SECONDS": Setting(
        10, *number("seconds", 86_400, least=0.5), "how long an instance counts as alive without a heartbeat"
    ),
    "WORKERS_SHUTDOWN_SECONDS": Setting(
        20, *number("seconds", 86_400), "how long work may run on after a stop, or after a user cancelled it"
    ),
    "WORKERS_HISTORY_DAYS": Setting(14, *DAYS, "how long the executions of a worker are kept"),
    "WORKERS_THREADS": Setting(10, *whole(1_000), "how many runs a process has at once"),
    "MESSAGES_MAX_BYTES": Setting(262_144, *whole(1_000_000_000), "how long a payload may be, in bytes"),
    "MESSAGES_KEY_DAYS": Setting(14, *DAYS, "how long the key of a done message refuses a new message"),
    "LOCK_PREFIX": Setting("", *printable(0, 100), "precedes the name of each lock"),
    "METRICS_TOKEN": Setting(
        None,
        *TOKEN,
        "the bearer token that a scrape of /metrics must send (unset: only this machine may scrape)",
        is_secret=True,
    ),
    "ALERT_MAIL": Setting(
        None, _e_mails, "e-mails, with commas in between", "who gets a mail when an incident opens and when it ends"
    ),
    "ALERT_WEBHOOK": Setting(
        None,
        address,
        "http:// or https:// and a host",
        "the address that gets a POST when an incident opens and when it ends; it needs ALERT_WEBHOOK_SECRET",
        is_secret=True,
    ),
    "ALERT_WEBHOOK_SECRET": Setting(
        None,
        _signing_key,
        f"{SECRET_PREFIX} and at least {_LEAST_KEY} bytes in base64, such as the output of {_MADE_KEY}",
        "signs each POST to ALERT_WEBHOOK, by the scheme of Standard Webhooks",
        is_secret=True,
    ),
    "ALERT_AFTER_FAILURES": Setting(3, *whole(100), "how many failures of a worker in a row open an incident"),
    "PING_URL": Setting(
        None,
        _address_of_each,
        "http:// or https://, a host, and {worker} in the place of the worker's name",
        "the dead-man's switch that gets a ping when a run starts, succeeds or fails",
        is_secret=True,
    ),
    "RELEASE": Setting(None, *printable(1, 100), "the name of this release in the list of instances"),
}


def settle(config: MutableMapping[str, Any]) -> None:
    """Give each setting of the engine its default or its cast value. Raises InvalidConfig for a wrong value."""
    refuse_misspelled(config, SETTINGS)
    cast_all(config, SETTINGS)
    _settle_heartbeat(config)
    if config["ALERT_WEBHOOK"] and not config["ALERT_WEBHOOK_SECRET"]:
        raise InvalidConfig(
            "ALERT_WEBHOOK is set, and ALERT_WEBHOOK_SECRET is not; expected both, because the receiver needs a "
            f"signature to tell an alert from a forgery. Set ALERT_WEBHOOK_SECRET to the output of {_MADE_KEY}."
        )


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
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
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
