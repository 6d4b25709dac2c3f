"""Distinguishes requests from this machine and requests from other machines."""

from ipaddress import ip_address

from flask import Request

_OF_PROXIES = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Forwarded", "Via")


def is_of_this_machine(request: Request) -> bool:
    """Return whether a program on this machine sent the request, and no proxy passed it on.

    A proxy that adds none of its usual headers looks like such a program.
    """
    if any(name in request.headers for name in _OF_PROXIES):
        return False
    # ProxyFix replaces the address of the connection, and keeps it here.
    connection = request.environ.get("werkzeug.proxy_fix.orig", request.environ)
    try:
        address = ip_address(connection.get("REMOTE_ADDR") or "")
    except ValueError:  # only a proxy uses a Unix socket
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
