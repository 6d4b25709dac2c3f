"""Refuses changes that a page of another site sends, and redirects that lead to another site."""

from urllib.parse import SplitResult, urlsplit

from flask import abort, request

from ..errors import spelled_out
from ..host.logs import logger_of

log = logger_of(__name__)

HARMLESS = ("GET", "HEAD", "OPTIONS")
_OWN = ("same-origin", "none")  # "none": the user typed the address, or opened a bookmark
_PORTS = {"http": 80, "https": 443}
_LONGEST = 200


def refuse_foreign() -> None:
    """Respond with 403 if a page of another site (another scheme, host or port) requests a change.

    A browser names the sender in Sec-Fetch-Site, else in Origin, else in Referer. No page can forge these headers. A
    client that sends none of these headers is not a modern browser, and no page can press its buttons.
    """
    if request.method in HARMLESS:
        return
    if (sender := _foreign_sender()) is not None:
        log.warning("Refused %s %s: sent with %s", request.method, spelled_out(request.path[:_LONGEST]), sender)
        abort(
            403,
            f"This request came with {sender}; expected a request of a page at {request.host_url}. "
            "Press the button on the dashboard itself. A proxy in front must pass the Host header on.",
        )


def _foreign_sender() -> str | None:
    """Return the header that shows a foreign page. None if no header does."""
    if site := request.headers.get("Sec-Fetch-Site"):  # right even if a proxy changed the Host header
        return None if site in _OWN else _shown("Sec-Fetch-Site", site)
    for header in ("Origin", "Referer"):
        if (sent := request.headers.get(header)) is not None:
            return None if _is_own(sent) else _shown(header, sent)
    return None


def _shown(header: str, value: str) -> str:
    return f"{header} {spelled_out(value[:_LONGEST])!r}"


def _is_own(sender: str) -> bool:
    """Return whether the address `sender` has this request's host and port. False for "null", which a sandbox sends.

    A proxy may have removed the encryption. So the scheme is foreign only if it is less secure than this request's.
    """
    try:
        theirs, ours = urlsplit(sender), urlsplit(f"//{request.host}")
        usual = _PORTS.get(theirs.scheme)
        if usual is None or not theirs.hostname or (request.is_secure and theirs.scheme == "http"):
            return False
        return _place(theirs, usual) == _place(ours, usual)
    except ValueError:  # not a port, or not an address
        return False


def _place(address: SplitResult, usual_port: int) -> tuple[str | None, int]:
    return address.hostname, usual_port if address.port is None else address.port


def is_own_path(target: str) -> bool:
    """Return whether a redirect to `target` stays on this host.

    Browsers read `//host` and `/\\host` as addresses of another host, and drop a tab.
    """
    is_path = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return is_path and target.isprintable()
