"""A rollout under power cuts of the trainer, with a fleet whose reports are lost, doubled and late.

A release that is bad never reaches a device outside the canary; what the trainer acknowledged is in its database; it says
nothing twice in different words; and when all is calm, every device runs what the rollout came to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import select

from edged.link import Inbound
from edged.wire import messages, topics
from tests.support.sim.bus import Broker, Faults, Link
from tests.support.sim.disk import Model
from tests.support.sim.engine import Made, make
from tests.support.sim.life import Life
from tests.support.sim.world import Inbox, Violation, World
from trainer import coordinator as module
from trainer import worker
from trainer.config import Drift, Rollout, TrainerConfig
from trainer.config_network import Broker as BrokerConfig
from trainer.coordinator import Coordinator
from trainer.core.placement import HostFacts
from trainer.core.rollout import Phase
from trainer.core.rollout import Rollout as State
from trainer.database import Database, desired, events, requests, rollouts
from trainer.orders import place
from trainer.releases import Registry, ReleaseError

CALM_S, END_S, TURN_S = 45.0, 240.0, 2.0
SETTLED_S = 15.0  # after its end, in which devices come to where they are told to be
WINDOW_S, ITEMS = 6.0, 20
RULES = {
    "watch_s": 15.0, "items_min": 30, "audits_planned": 0, "extend_max": 2, "install_s_max": 60.0, "failed_grace_s": 3.0,
}  # fmt: skip
STEPS = ([0.4, 1.0], [0.2, 0.6, 1.0])
SLOT = "phi"
# With TLS and without a certificate for blocks, a trainer has no second connection with a thread of its own.
ONE_CONNECTION = BrokerConfig(ca=Path("ca.pem"), certificate=Path("trainer.pem"), key=Path("trainer.key"))
KINDS = ("good", "good", "fails", "reverts", "errors")  # what the new release is like
WIDE = (Phase.ROLLING, Phase.DONE)
SETTLED = ("committed", "failed", "reverted")  # updates that are no longer on their way


@dataclass(slots=True)
class Peer:
    """A device of the fleet, as its messages show it."""

    name: str
    bad: bool  # the new release does not work here
    active: str = "phi@1.0"
    update: str = "idle"
    rev: int = 0
    said: int = 0


class Trainer:
    """One start of `trainer serve`, without its HTTP server."""

    def __init__(self, world: World, broker: Broker, story: Rollouts) -> None:
        self.story = story
        inbox = Inbox(world, lambda: story.at_rest(self), TURN_S)
        module.Link = lambda _options, subscriptions, will: Link(broker, subscriptions, inbox)  # type: ignore[assignment, misc, return-value]
        module.Server = lambda *_values, **_more: SimpleNamespace(  # type: ignore[assignment, misc]
            start=lambda: None, stop=lambda: None, url="http://trainer"
        )
        worker.host_facts = lambda name, _folder: HostFacts(name, 2, 8 << 30, 4 << 30, 90 << 30, ())
        config = TrainerConfig(
            name="trainer",
            site="sim",
            data_dir=story.folder,
            rollout=story.rules,
            broker=ONE_CONNECTION,
            drift=Drift(enabled=False),
        )
        self.coordinator = Coordinator(config, story.folder / "trainer.toml")
        self.database, self.link = self.coordinator.host.database, self.coordinator.link
        self.link.acknowledged = story.acknowledged  # type: ignore[attr-defined]

    def run(self) -> None:
        self.story.look(self.database)
        self.coordinator.run()

    def stop(self) -> None:
        if self.link in self.link._broker.links:  # type: ignore[attr-defined]
            self.link.gone()  # type: ignore[attr-defined]
        self.database.close()


class Rollouts:
    """One seed."""

    def __init__(self, world: World, outside: Path, plain: bool) -> None:
        self.world, dice = world, world.dice
        self.folder = world.disk.root / "trainer"
        self.trainer: Trainer | None = None
        self.kind = dice.choice(KINDS)
        self.aborted, self.pauses = dice.random() < 0.15, dice.random() < 0.2
        limit = dice.choice((0, 0, 1, 2))
        self.rules = Rollout.model_validate({**RULES, "steps": dice.choice(STEPS), "disruption_max": limit})
        self.order = ""
        self.registered: dict[str, Any] = {}
        self.heard: set[str] = set()  # events that the trainer acknowledged
        self.said: dict[tuple[str, int], str] = {}  # (device, rev) -> what it desired
        self.canary: tuple[str, ...] = ()
        self.fleet: tuple[str, ...] = ()  # whom the rollout is for: who had been heard of when it began
        self.phase, self.since = Phase.PENDING, 0.0
        self.looked_at, self.calmed = -1, False
        self.told_when_paused: set[str] = set()
        self.broker = Broker(world, Faults.drawn(dice, 25.0))
        names = [f"d{number}" for number in range(0 if plain else dice.randrange(1, 6))]
        share = dice.choice((1.0, 0.5))
        self.peers = {name: Peer(name, self.kind != "good" and dice.random() < share) for name in names}
        self.releases = {name: self._made(outside, make(name)) for name in ("phi@1.0", "phi@1.1")}
        self.plain = plain
        self.broker.listen(topics.DESIRED.filter(), self._desired)
        for peer in self.peers.values():
            world.after(dice.random(), lambda peer=peer: self._live(peer))  # type: ignore[misc]
        world.after(0.5, self._register)
        if not plain:
            world.after(4.0, self._start)
            if self.aborted:
                world.after(dice.uniform(10, CALM_S), self._abort)
            if self.pauses:
                world.after(dice.uniform(5, CALM_S), lambda: self._order("pause"))
                world.after(dice.uniform(CALM_S, 2 * CALM_S), self._resume)

    def _made(self, outside: Path, made: Made) -> Path:
        folder = outside / made.ref.release
        return folder if folder.exists() else made.write_to(folder)

    def boot(self) -> Trainer:
        """The trainer starts."""
        self.trainer = Trainer(self.world, self.broker, self)
        return self.trainer

    def calm(self) -> None:
        """From now on everything works."""
        self.broker.faults, self.calmed, self.since = Faults(), True, self.world.clock.elapsed

    def meanwhile(self, files: Model) -> None:
        """Nothing happens to the disk without power."""

    # The people.

    def _running(self) -> Coordinator | None:
        return self.trainer.coordinator if self.trainer is not None and self.world.disk.on else None

    def _register(self) -> None:
        coordinator = self._running()
        for name, folder in self.releases.items():
            if name not in self.registered and coordinator is not None:
                if self.plain and name == "phi@1.1":
                    continue
                ref = coordinator.host.registry.register(folder)
                if self.world.disk.on:
                    self.world.say(f"registered {name}")
                    self.registered[name] = ref
        self.world.after(2.0, self._register)

    def _start(self) -> None:
        """Order it until it is accepted."""
        coordinator = self._running()
        if coordinator is not None and "phi@1.1" in self.registered:
            with coordinator.host.database.read() as connection:
                answer = connection.execute(select(requests.c.answer).where(requests.c.id == self.order)).scalar()
                begun = connection.execute(select(rollouts.c.id)).first()
            if begun is not None:
                return
            if not self.order or (answer is not None and "error" in answer):
                self.world.say(f"start the rollout ({answer})")
                order = place(
                    coordinator.host.database, "rollout_start", {"release": "phi@1.1", "unjudged": "simulated"}
                )
                if self.world.disk.on:
                    self.order = order
        self.world.after(3.0, self._start)

    def _abort(self) -> None:
        self._order("abort")

    def _resume(self) -> None:
        """As long as it is paused: the order may come when nobody carries it out."""
        if self.phase is Phase.PAUSED:
            self._order("resume")
        self.world.after(5.0, self._resume)

    def _order(self, what: str) -> None:
        coordinator = self._running()
        if coordinator is None:
            return
        with coordinator.host.database.read() as connection:
            found = connection.execute(select(rollouts.c.id)).scalar()
        if found:
            self.world.say(f"{what} the rollout")
            place(coordinator.host.database, f"rollout_{what}", {"rollout": found})

    # The fleet.

    def _stamp(self) -> dict[str, Any]:
        number = self.world.dice.getrandbits(60)
        return {"id": f"m{number:x}", "ts": self.world.clock.now(), "boot": "peer", "seq": 1}

    def _publish(self, address: topics.Address, message: messages.Message) -> None:
        self.broker.publish(address.topic, messages.encode(message), address.retain)

    def _live(self, peer: Peer) -> None:
        """A window of metrics, now and then an event, and the report once more."""
        where = {"site": "sim", "dev": peer.name}
        if peer.said == 0:
            self._publish(topics.STATE(**where), messages.State(**self._stamp(), state="online", device=peer.name))
        now, wrong = self.world.clock.now(), self.kind == "errors" and peer.bad and peer.active == "phi@1.1"
        metrics = messages.Metrics(
            **self._stamp(), start=now - WINDOW_S, end=now, pipeline="line", release=peer.active, items=ITEMS,
            accepted=ITEMS, errors=ITEMS // 2 if wrong else 0,
        )  # fmt: skip
        self._publish(topics.METRICS(**where), metrics)
        self._publish(topics.EVENT(**where), messages.Event(**self._stamp(), kind="news", text=peer.name))
        self._report(peer)
        self.world.after(WINDOW_S, lambda: self._live(peer))

    def _report(self, peer: Peer) -> None:
        peer.said += 1
        model = messages.ModelReport(active=peer.active, update=peer.update)
        report = messages.Reported(**self._stamp(), desired_rev=peer.rev, models={SLOT: model})
        self._publish(topics.REPORTED(site="sim", dev=peer.name), report)

    def _desired(self, topic: str, payload: bytes) -> None:
        _, fields, told = messages.decode(topic, payload)
        assert isinstance(told, messages.Desired)
        peer, release = self.peers[fields["dev"]], told.models[SLOT].release
        known = self.said.setdefault((peer.name, told.rev), release)
        if known != release:
            raise Violation(f"{peer.name}: revision {told.rev} was {known}, and is {release} now")
        if release == "phi@1.1" and self.canary and peer.name not in self.canary and self._must_not_widen():
            raise Violation(f"{peer.name} is told to run a release that is bad on {self._bad_canaries()}; {self.kind}")
        if told.rev > peer.rev:
            peer.rev = told.rev
            self.world.say(f"{peer.name} shall run {release} ({told.rev})")
            self._update(peer, release)

    def _update(self, peer: Peer, release: str) -> None:
        rev, before = peer.rev, peer.active
        if release == before:
            peer.update = "idle"
            self._report(peer)
            return

        def becomes(update: str, active: str) -> None:
            if peer.rev == rev:
                peer.update, peer.active = update, active
                self._report(peer)

        wrong = peer.bad and release == "phi@1.1" and self.kind in ("fails", "reverts")
        steps: list[tuple[str, str]] = [("downloading", before), ("switched", release), ("committed", release)]
        if wrong:
            steps[1:] = [("failed", before)] if self.kind == "fails" else [("switched", release), ("reverted", before)]
        at = 0.0
        for update, active in steps:
            at += self.world.dice.choice((0.2, 3.0))
            self.world.after(at, lambda update=update, active=active: becomes(update, active))  # type: ignore[misc]

    def acknowledged(self, message: Inbound) -> None:
        """The trainer has taken a message in."""
        _, _, said = messages.decode(message.topic, message.payload)
        if isinstance(said, messages.Event):
            self.heard.add(said.id)

    # What must be right.

    def _bad_canaries(self) -> list[str]:
        return [name for name in self.canary if self.peers[name].bad]

    def _must_not_widen(self) -> bool:
        """Whether the canary shows that the release is bad: any failure; of errors, those of the whole group count."""
        bad = self._bad_canaries()
        return bool(bad) and len(self.fleet) > len(self.canary)

    def at_rest(self, trainer: Trainer) -> None:
        self.world.need_power()
        if self.world.ended:
            trainer.coordinator.stop()
        if self.looked_at == self.world.disk.operations:
            if self.calmed and self.phase in (Phase.DONE, Phase.ABORTED, Phase.HELD):
                self.world.ended |= self.world.clock.elapsed - self.since > SETTLED_S
            return
        self.looked_at = self.world.disk.operations
        with trainer.database.read() as connection:
            row = connection.execute(select(rollouts)).first()
            told = {
                each.device: each.models.get(SLOT, {}).get("release") for each in connection.execute(select(desired))
            }
        if row is None:
            if self.phase is not Phase.PENDING:
                raise Violation(f"the rollout is forgotten; it was {self.phase}")
            return
        phase = Phase(row.phase)
        state = State.from_dict(row.state)
        self.canary, self.fleet = state.canary, state.devices
        if phase is not self.phase:
            self.world.say(f"{self.phase} -> {phase}: {row.state['reason']}")
            self.phase, self.since = phase, self.world.clock.elapsed
        if phase in WIDE and self._must_not_widen():
            bad = f"the release is bad on {self._bad_canaries()} ({self.kind})"
            raise Violation(f"{phase}, though {bad}: {row.state['reason']}")
        new = sorted(device for device, release in told.items() if release == "phi@1.1")
        given = [] if phase in (Phase.ABORTING, Phase.ABORTED) else sorted(state.told)
        if new != given:
            raise Violation(f"{phase}, and {new} are told to run the release, not {given}")
        beyond = sorted(set(given) - set(state.reach))
        if beyond:
            raise Violation(f"{phase}, and {beyond} are told before their step")
        busy = [name for name in given if self.peers[name].update not in SETTLED]
        if self.rules.disruption_max and len(busy) > self.rules.disruption_max:
            raise Violation(f"{busy} are on their way, {self.rules.disruption_max} may be")
        if self.phase is Phase.PAUSED and set(given) - self.told_when_paused:
            raise Violation(f"told while it was paused: {set(given) - self.told_when_paused}")
        if phase is not Phase.PAUSED:
            self.told_when_paused = set(given)

    def look(self, database: Database) -> None:
        """After a start: what was acknowledged is there."""
        with database.read() as connection:
            known = set(connection.execute(select(events.c.id)).scalars())
            orders = set(connection.execute(select(requests.c.id)).scalars())
        if self.heard - known:
            raise Violation(f"acknowledged and not in the database: {self.heard - known}")
        if self.order and self.order not in orders:
            raise Violation("the order to start is forgotten")
        for name, ref in self.registered.items():
            try:
                stored = Registry(self.folder / "releases").get(name)
            except ReleaseError as error:
                raise Violation(f"{name} was registered: {error}") from None
            whole = {path.name: path.read_bytes() for path in self.releases[name].iterdir()}
            if stored.ref != ref or {path.name: path.read_bytes() for path in stored.folder.iterdir()} != whole:
                raise Violation(f"{name} was registered, and is damaged")

    def at_end(self, trainer: Trainer) -> None:
        """Everything works, and has for a while."""
        if self.plain:
            return
        if self.phase not in (Phase.DONE, Phase.ABORTED, Phase.HELD):
            raise Violation(f"the rollout is {self.phase}: {self.peers}")
        running = {peer.name: peer.active for peer in self.peers.values()}
        if self.phase is Phase.DONE and any(
            running[name] != "phi@1.1" and not self.peers[name].bad for name in self.fleet
        ):
            raise Violation(f"done, and {running} run")
        if self.phase is Phase.ABORTED and "phi@1.1" in running.values():
            raise Violation(f"aborted, and {running} run")


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. `template`: a disk to begin with, None: an empty one. The disk that is left."""
    story = Rollouts(world, outside / "rollouts", template is None)
    return Life(world, story, CALM_S, END_S, plain=template is None, jumps=False).go(template)
