"""Which addresses a browser may open: only those of hosts that somebody named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

HOSTS_MAX = 100
URL_CHARS_MAX = 2048
DEFAULT_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})(:\d{1,5})?\Z")


class BadHosts(ValueError):
    """An allow-list that cannot be used; the message names the entry and the fix."""


class HostRefused(ValueError):
    """An address that may not be opened; the message says why."""


class AllowedHosts:
    """The hosts that may be reached: `name` on the usual ports, `name:port` on that one, `*.name` for those below it."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Raises BadHosts; an empty list allows nothing."""
        if isinstance(hosts, str):
            raise BadHosts(f'allowed_hosts {hosts!r}: write a list, ["{hosts}"]')
        self.hosts = tuple(dict.fromkeys(host.lower() for host in hosts))
        if len(self.hosts) > HOSTS_MAX:
            raise BadHosts(f"allowed_hosts: {len(self.hosts)} of them, at most {HOSTS_MAX}")
        for host in self.hosts:
            if not _NAME.match(host):
                raise BadHosts(
                    f"allowed_hosts: {host!r} is no host; write plant.example, plant.example:8080 or *.plant.example"
                )

    def allow(self, host: str, port: int) -> bool:
        """Whether this host may be reached on this port."""
        host = host.lower().rstrip(".")
        usual = port in DEFAULT_PORTS.values()
        for each in self.hosts:
            name, _, own = each.partition(":")
            below = name.startswith("*.") and host.endswith(name[1:]) and host != name[2:]
            if (host == name or below) and (port == int(own) if own else usual):
                return True
        return False

    def check(self, url: str) -> str:
        """The address, to be opened. Raises HostRefused."""
        if len(url) > URL_CHARS_MAX or not url.isprintable():
            raise HostRefused(f"an address of {len(url)} characters; at most {URL_CHARS_MAX} printable ones are opened")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise HostRefused(f"{url}: {error}") from None
        if parts.scheme not in DEFAULT_PORTS:
            raise HostRefused(f"{url[:200]}: only http and https addresses are opened, not {parts.scheme or 'none'}:")
        if parts.username is not None or parts.password is not None or "\\" in url:
            raise HostRefused(f"{parts.scheme}://...{host}: an address with a name or password in it is not opened")
        if not self.allow(host, port or DEFAULT_PORTS[parts.scheme]):
            allowed = ", ".join(self.hosts) or "none"
            raise HostRefused(f"{url[:200]}: host {parts.netloc[:200]} is not allowed; allowed are: {allowed}")
        return url
