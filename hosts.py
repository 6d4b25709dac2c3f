"""The addresses of a request: the visitor behind the proxies, the requested host, and this machine."""

from urllib.parse import urlsplit, urlunsplit

from flask import Flask, Response, current_app, redirect, request
from werkzeug.exceptions import BadHost, SecurityError
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import RequestRedirect

from background.monitoring.peer import is_of_this_machine

PROBES = ("health", "metrics")
"""The blueprints that answer any host. A probe requests the address of a process, and its response has no link."""

OTHER_MACHINE = (
    "This is a demo, so it answers programs on its own machine only; set DATABASE_URL for an application of your "
    "own, or DEMO_ON_NETWORK=true to show the demo to other machines.\n"
)


def trust_proxies(app: Flask) -> None:
    """Take the visitor's address, scheme and host from the last PROXIES entries of X-Forwarded-*."""
    if number := app.config["PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, number, number, number)  # type: ignore[method-assign]


def guard(app: Flask) -> None:
    """Refuse other hosts, and other machines that request a demo. Call this before other `before_request` functions."""
    app.before_request(refuse_host)
    app.before_request(keep_demo_here)
    app.after_request(keep_redirect_here)


def refuse_host() -> None:
    """Raise a 400 for a mangled host, and in production for another host than PUBLIC_URL's.

    Flask's own TRUSTED_HOSTS replaces the host of PUBLIC_URL.
    """
    if isinstance(request.routing_exception, BadHost | SecurityError):
        raise request.routing_exception
    if not request.host:
        raise BadHost
    config = current_app.config
    if not config["PRODUCTION"] or not config["PUBLIC_URL"] or config["TRUSTED_HOSTS"] or request.blueprint in PROBES:
        return
    own = (urlsplit(config["PUBLIC_URL"]).hostname or "").encode("idna").decode()
    if urlsplit(f"//{request.host}").hostname != own:
        raise SecurityError("This application has another address.")


def keep_demo_here() -> Response | None:
    """Answer 403 to another machine that requests the demo shop, unless DEMO_ON_NETWORK allows it."""
    config = current_app.config
    if not config["DATABASE_IS_EMBEDDED"] or config["DEMO_ON_NETWORK"] or is_of_this_machine(request):
        return None
    return Response(OTHER_MACHINE, 403, mimetype="text/plain")


def keep_redirect_here(response: Response) -> Response:
    """Remove the host from a redirect of the URL map, as for a missing or a doubled slash.

    A browser may keep such a redirect for ever, and its host came from the request.
    """
    if isinstance(request.routing_exception, RequestRedirect) and response.location:
        _scheme, _host, path, query, _fragment = urlsplit(response.location)
        target = urlunsplit(("", "", f"/{path.lstrip('/')}", query, ""))
        response.location, response.data = target, redirect(target).data
    return response


def root_of_links() -> str | None:
    """Return the root URL of the links in a mail, for its payload.

    In production it is PUBLIC_URL or none, because a visitor may send any Host header.
    """
    config = current_app.config
    return config["PUBLIC_URL"] or (None if config["PRODUCTION"] else request.url_root)
