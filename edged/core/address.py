"""Whether an address is one that a server may be asked at, with a key. Pure."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


class BadEndpoint(ValueError):
    """An address, a key or a certificate cannot be used; the message names it and the fix."""


def check_url(url: str, *, plain: bool) -> None:
    """Raises BadEndpoint for what is no address of a server, and for plain HTTP to another machine unless `plain`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # brackets, a port that is none
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise BadEndpoint("expected an address such as https://llm.plant.example:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise BadEndpoint("a password has no place in an address: put the key into a file and name that")
    if parts.scheme == "http" and not plain and not _loopback(host):
        raise BadEndpoint(
            f"plain HTTP to {host}: what goes there can be read on the way; use https, or set allow_plain = true"
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
