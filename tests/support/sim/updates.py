"""Updates under power cuts: a fleet that changes its mind, good and bad releases, adapters, a poor network.

A good model always serves; a bad release is never tried twice; what was fetched whole is not fetched again; and when
everything has calmed down, the device runs what is desired.
"""

from __future__ import annotations

from pathlib import Path

from edged.config import Device as DeviceConfig
from edged.config import Host, Settings, Slot, Trust
from edged.core.update import State
from edged.engines.base import EngineError, GenerateRequest, generate_all
from edged.store import StoreLimits
from edged.wire import messages, topics
from edged.wire.manifest import ReleaseRef
from tests.support.sim.bus import Broker, Faults
from tests.support.sim.device import URL, Device, Network, Watch
from tests.support.sim.disk import Model
from tests.support.sim.engine import Made, make
from tests.support.sim.life import Life
from tests.support.sim.world import Violation, World

PROBATION_S, RETRY_S = 6.0, 3.0
CALM_S, END_S = 60.0, 120.0  # when faults end, and when the device must be where it is meant to be
LOOPED = "restarted too often"


class Updates(Watch):
    """One seed."""

    def __init__(self, world: World, outside: Path, plain: bool) -> None:
        """`plain`: nothing happens but the first start."""
        self.world, dice = world, world.dice
        self.made: dict[str, Made] = {}
        self.judged: dict[str, str] = {}  # bad releases that the device knows to be bad, as far as the world can tell
        self.rev = 0
        self.network = Network(world, dice.choice((0.0, 0.1, 0.4)))
        self.broker = Broker(world, Faults.drawn(dice, 20.0))
        seed = self._made(make("phi@1.0"))
        self.models = [seed] + [
            self._made(make(f"phi@1.{n}", dice.choice(("", "", "", "load", "answer", "item")))) for n in range(1, 4)
        ]
        # Released anew: nothing of it is fetched but its manifest, once the other is here.
        self.models.append(self._made(make("phi@2.0", self.models[1].fault, like=self.models[1].ref.release)))
        self.adapters = [
            self._made(make(f"style@1.{n}", dice.choice(("", "", "load", "answer")), on=dice.choice(self.models).ref))
            for n in range(2)
        ]
        folder = outside / "phi"
        if not folder.exists():
            seed.write_to(folder)
        slot = Slot(seed=folder, probation_s=PROBATION_S, isolation="daemon", swap=dice.choice(("beside", "replace")))
        self.settings = Settings(
            device=DeviceConfig(id="dev", site="sim", state_dir=world.disk.root / "state"),
            slots={"phi": slot}, host=Host(url=URL, carrier="https", fetch_retry_s=RETRY_S), trust=Trust(unsigned=True),
        )  # fmt: skip
        self.final = (seed, None) if plain else self._plan()

    def _made(self, made: Made) -> Made:
        self.made[made.ref.sha256] = made
        self.network.publish(made)
        return made

    def _plan(self) -> tuple[Made, Made | None]:
        """What the fleet wants, and when; returns the last of it, which is good."""
        dice, at = self.world.dice, 0.0
        again = [self.models[1], self.models[-1]]  # with the same files
        choices = dice.choice((self.models, self.models, dice.sample(self.models, 2), again))  # all, or to and fro
        for _ in range(dice.randrange(1, 5)):
            model, adapter = dice.choice(choices), dice.choice([None, None, *self.adapters])
            self.world.after(at, lambda model=model, adapter=adapter: self._desire(model, adapter))  # type: ignore[misc]
            at += dice.choice((0.5, 3.0, 10.0, 15.0))
        model = dice.choice([made for made in self.models if made.good])
        fitting = [made for made in self.adapters if made.good and made.base == model.ref]
        adapter = dice.choice([None, *fitting])
        self.world.after(at, lambda: self._desire(model, adapter))
        return model, adapter

    def _desire(self, model: Made, adapter: Made | None) -> None:
        self.rev += 1
        self.world.say(f"desired {self.rev}: {model.ref.release} {adapter.ref.release if adapter else ''}")
        desired = messages.Desired(
            id=f"desired-{self.rev}", ts=self.world.clock.now(), boot="host", seq=self.rev, rev=self.rev,
            models={"phi": model.ref}, adapters={"phi": adapter.ref} if adapter else {},
        )  # fmt: skip
        self.broker.publish(topics.DESIRED(site="sim", dev="dev").topic, messages.encode(desired), retain=True)

    def boot(self) -> Device:
        """The daemon starts."""
        return Device(self.world, self.broker, self.network, self.settings, StoreLimits(), self)

    def calm(self) -> None:
        """From now on everything works."""
        self.broker.faults = Faults()
        self.network.broken = 0.0

    # What must be right.

    def proving(self, ref: ReleaseRef) -> None:
        self.world.say(f"proving {ref.release}")
        if ref.sha256 in self.judged:
            raise Violation(f"{ref.release} is tried again; it was known to be bad: {self.judged[ref.sha256]}")

    def at_rest(self, device: Device) -> None:
        self.world.need_power()
        slot = device.slots["phi"]
        if slot.live is None:
            if device.idle and not slot.vacated:
                raise Violation("no model serves")
            return
        made, records = self.made[slot.live.ref.sha256], device.store.updates()
        if not made.good and records["phi"]["state"] not in (State.SWITCHED, State.REVERTING):
            raise Violation(f"{made.ref.release} serves, which is bad ({made.fault}): {records['phi']}")
        for target, record in records.items():
            candidate = record["candidate"] and self.made[record["candidate"]["sha256"]]
            if not candidate or candidate.good or LOOPED in record["reason"] or record["retry_at"]:
                continue
            if record["state"] in (State.FAILED, State.REVERTING, State.REVERTED) and record["reason"]:
                if candidate.ref.sha256 not in self.judged and device.store.bad(candidate.ref.sha256) is not None:
                    self.world.say(f"{target}: {candidate.ref.release} is bad: {record['reason']}")
                self._judge(candidate, record["reason"])
        self._item(device)

    def _judge(self, made: Made, reason: str) -> None:
        if made.base is None or "adapter" not in reason:  # an adapter whose base is not here says nothing about it
            self.judged.setdefault(made.ref.sha256, reason)

    def _item(self, device: Device) -> None:
        with device.slots["phi"].lease(0) as live:
            try:
                generate_all(live.generator, GenerateRequest("an item"))
            except EngineError:
                device.updater.engine_error("phi")

    def at_end(self, device: Device) -> None:
        """Everything works, and has for a while."""
        live, (model, adapter) = device.slots["phi"].live, self.final
        assert live is not None
        records = device.store.updates()
        if live.ref != model.ref:
            if not self._looped(device, model):
                raise Violation(f"{live.ref.release} serves, {model.ref.release} is desired: {records}")
        elif live.adapter != (adapter.ref if adapter else None) and not self._looped(device, adapter):
            raise Violation(f"{live.adapter} serves, {adapter and adapter.ref.release} is desired: {records}")

    def _looped(self, device: Device, made: Made | None) -> bool:
        """So many cuts during its update that they were held against it."""
        return made is not None and LOOPED in (device.store.bad(made.ref.sha256) or "")


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. `template`: a disk to begin with, None: an empty one. The disk that is left."""
    story = Updates(world, outside, template is None)
    return Life(world, story, CALM_S, END_S, plain=template is None).go(template)
