"""A process of simulated devices: `python -m trainer.simulate.process FIRST LAST RESPONDERS`, the plan on standard input.

It says once a second on standard output what it has done, a line of JSON, and goes when its input ends: so it ends in order
with whoever started it, and also when that one is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trainer.simulate.device import Device
from trainer.simulate.link import CONNECTING_MAX
from trainer.simulate.plan import Plan
from trainer.simulate.responder import Responder
from trainer.simulate.tally import Tally

TELL_S = 1.0
GOODBYE_S = 20.0  # for what is said at the end
GOODBYES_A_STEP = 50  # devices that take their leave before others have their turn


class Crew:
    """The devices of this process, and the responders."""

    def __init__(self, plan: Plan, numbers: range, responders: range) -> None:
        self._plan, self._numbers, self._numbered = plan, numbers, responders
        trail = plan.trail / f"{numbers.start}.ids" if plan.trail is not None else None
        self.tally = Tally(trail)
        self._pool = ThreadPoolExecutor(CONNECTING_MAX, thread_name_prefix="connect")
        self._members: list[Device | Responder] = []

    async def run(self, leaving: asyncio.Event) -> None:
        """Come one by one, stay until `leaving` is set, and take leave."""
        telling = asyncio.create_task(self._tell())
        try:
            for number in self._numbered:
                self._add(Responder(self._plan, number, self.tally, self._pool))
            await self._come(leaving)
            await leaving.wait()
            await self._leave()
        finally:
            telling.cancel()
            self._say("left")
            self.tally.close()
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _come(self, leaving: asyncio.Event) -> None:
        pause_s = len(self._numbers) and self._plan.devices / len(self._numbers) / self._plan.connects_s
        begun = asyncio.get_running_loop().time()
        for place, number in enumerate(self._numbers):
            wait_s = begun + place * pause_s - asyncio.get_running_loop().time()
            if leaving.is_set():
                return
            await asyncio.sleep(max(0.0, wait_s))
            self._add(Device(self._plan, number, self.tally, self._pool))

    def _add(self, member: Device | Responder) -> None:
        self._members.append(member)
        member.start()

    async def _leave(self) -> None:
        devices_first = sorted(self._members, key=lambda each: isinstance(each, Responder))
        for place, member in enumerate(devices_first):
            member.leave()
            if place % GOODBYES_A_STEP == 0:
                await asyncio.sleep(0.01)
        deadline = time.monotonic() + GOODBYE_S
        while time.monotonic() < deadline and not all(each.settled() for each in self._members):
            await asyncio.sleep(0.05)
        unsettled = sum(not each.settled() for each in self._members)
        self.tally.count("goodbyes_unheard", unsettled)
        for member in self._members:
            member.close()

    async def _tell(self) -> None:
        while True:
            self._say("here")
            await asyncio.sleep(TELL_S)

    def _say(self, state: str) -> None:
        told: dict[str, Any] = self.tally.told()
        online = sum(isinstance(each, Device) and each.online for each in self._members)
        with suppress(BrokenPipeError):  # whoever started us is gone: we leave in order all the same
            print(json.dumps({"state": state, "online": online, **told}), flush=True)


async def _run(plan: Plan, numbers: range, responders: range) -> None:
    loop, leaving = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, leaving.set)

    def ended() -> None:
        if not os.read(sys.stdin.fileno(), 1):
            loop.remove_reader(sys.stdin)
            leaving.set()

    loop.add_reader(sys.stdin, ended)
    await Crew(plan, numbers, responders).run(leaving)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started us says when
    first, last, responders = map(int, sys.argv[1:4])
    plan = Plan.model_validate_json(sys.stdin.buffer.readline())
    asyncio.run(_run(plan, range(first, last), range(1, responders + 1)))


if __name__ == "__main__":
    main()
