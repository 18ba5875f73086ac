"""A file as blocks: which bytes are which block, and how one is fetched over a carrier that loses, repeats and reorders.

Law of this file: it knows numbers and times, never bytes; whoever holds the bytes checks a block against its hash in the
signed release before he says that it `arrived`.
"""

from __future__ import annotations

from collections.abc import Iterable

BLOCK_BYTES = 64 << 10
BLOCKS_MAX = 1024  # of one file: its list stays below 70 KiB of `release.json`
# With its topic it stays below the broker's packet limit of 1 MiB: files up to 512 MiB.
MQTT_BLOCK_BYTES_MAX = 512 << 10
WINDOW = 8  # blocks that a device has asked for and that have not come
REFILL = WINDOW // 2  # it asks for more when this many places are free: devices that ask together are served together
# Longer than a trainer holds a block back for slower devices and a window takes over a slow link: little is ever lost.
TIMEOUT_S, TIMEOUT_S_MIN, TIMEOUT_S_MAX = 15.0, 10.0, 60.0
OVERTAKEN = 2  # requests: when a block of a request so much later is here, this one was probably lost


def block_bytes(size: int) -> int:
    """Bytes of each block of a file of `size` bytes: 64 KiB up to 64 MiB, beyond that the next power of two with which
    there are at most BLOCKS_MAX."""
    length = BLOCK_BYTES
    while length * BLOCKS_MAX < size:
        length *= 2
    return length


def block_count(size: int) -> int:
    """How many blocks a file of `size` bytes has; none when it is empty."""
    return -(-size // block_bytes(size))


def span(number: int, size: int) -> tuple[int, int]:
    """First byte of a block, and the one after its last."""
    length = block_bytes(size)
    return min(number * length, size), min((number + 1) * length, size)


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Blocks that follow each other, as (first, one after the last)."""
    out: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if out and out[-1][1] == number:
            out[-1] = (out[-1][0], number + 1)
        else:
            out.append((number, number + 1))
    return out


class Transfer:
    """Which blocks of one file are missing and which were asked for; every time is seconds of one rising clock.

    At most WINDOW are asked for at once. What does not come is asked for again: after a silence that grows with every try
    and is measured by how fast blocks have come (RFC 6298), and without one when it was overtaken by later requests.
    """

    def __init__(self, missing: Iterable[int], now: float) -> None:
        self.missing = set(missing)
        self.outstanding: dict[int, tuple[int, float]] = {}  # block -> the request that asked for it last, and when
        self.asked_again = 0
        self._request = self._newest = 0
        self._heard = self._timer = (
            now  # when a block came last, or was first hoped for; when the silence began to count
        )
        self._gap: float | None = None
        self._variance = 0.0
        self._tries = 0

    @property
    def done(self) -> bool:
        """Whether every block is here."""
        return not self.missing

    def silent_s(self, now: float) -> float:
        """For how long none has come of those asked for."""
        return now - self._heard if self.outstanding else 0.0

    def patience_s(self, now: float) -> float:
        """How long there is nothing to ask for unless one comes; 0: `ask` now."""
        if self._free() or not self.outstanding:
            return 0.0
        timeout = self._timeout()
        overtaken = (at for request, at in self.outstanding.values() if self._overtaken(request))
        return max(0.0, min(self._timer, min(overtaken, default=now)) + timeout - now)

    def ask(self, now: float) -> list[int]:
        """The blocks to ask for now, at most WINDOW and the earliest first; none when there is nothing to ask for. Who could
        not ask says so with `unasked`."""
        if self.outstanding and self._timer + self._timeout() <= now:
            self._tries += 1
            again = set(self.outstanding)
        else:
            timeout = self._timeout()
            again = {n for n, (r, at) in self.outstanding.items() if self._overtaken(r) and at + timeout <= now}
        new = self._new() if self._free() else []
        if not again and not new:
            return []
        if not self.outstanding:
            self._heard = now
        self._timer = now
        self._request += 1
        self.asked_again += len(again)
        numbers = sorted(again) + new
        self.outstanding |= dict.fromkeys(numbers, (self._request, now))
        return numbers

    def unasked(self) -> None:
        """Nobody has heard, or may have heard, what was asked for (the connection is another one): ask for it anew."""
        self.outstanding.clear()

    def arrived(self, number: int, now: float) -> bool:
        """A block came and is right; false when it was here before."""
        if number not in self.missing:
            return False
        self.missing.discard(number)
        request = self.outstanding.pop(number, None)
        if request is not None:
            self._newest = max(self._newest, request[0])
            self._measure(now - self._heard)
        self._heard = self._timer = now
        self._tries = 0
        return True

    def _measure(self, gap: float) -> None:
        if self._gap is None:
            self._gap, self._variance = gap, gap / 2
        else:
            self._variance += (abs(gap - self._gap) - self._variance) / 4
            self._gap += (gap - self._gap) / 8

    def _timeout(self) -> float:
        base = TIMEOUT_S if self._gap is None else self._gap + 4 * self._variance
        return min(max(base, TIMEOUT_S_MIN) * 2.0 ** min(self._tries, 10), TIMEOUT_S_MAX)

    def _overtaken(self, request: int) -> bool:
        return request + OVERTAKEN <= self._newest

    def _free(self) -> bool:
        waiting = len(self.missing) - len(self.outstanding)
        return waiting > 0 and (WINDOW - len(self.outstanding) >= REFILL or not self.outstanding)

    def _new(self) -> list[int]:
        return sorted(self.missing - self.outstanding.keys())[: WINDOW - len(self.outstanding)]
