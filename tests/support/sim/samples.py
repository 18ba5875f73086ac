"""Samples under power cuts: captured, asked about, labelled, claimed, uploaded, used, archived, evicted.

Whatever the device has acknowledged stays so: a sample whose capture returned is there with its pixels, a verdict that was
acknowledged is its label, a command that is done has been carried out. And when all is calm, every question has its answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edged.config import Delivery, Host, Pipeline, Settings, Slot, Trust
from edged.config import Device as DeviceConfig
from edged.link import Inbound
from edged.store import NewSample, OutboxFull, StorageFull, StoreLimits
from edged.wire import messages, topics
from tests.support.sim.bus import Broker, Faults
from tests.support.sim.device import URL, Device, Network, Watch
from tests.support.sim.disk import Model
from tests.support.sim.life import Life
from tests.support.sim.world import Violation, World

CALM_S, END_S = 40.0, 130.0
ASK_AGAIN_S = 5.0
BOX = {"label": "cat", "box": [1.0, 2.0, 3.0, 4.0], "score": 0.9}
GOES = ("rejected", "unresolved")  # verdicts after which a sample may be given up
DONE = {"claim": ("claimed", "used", "archived"), "used": ("used", "archived"), "archive": ("archived",)}
CLAIMED = ("labelled", "claimed", "used", "archived")


@dataclass(slots=True)
class Kept:
    """What the world knows of a sample."""

    content: bytes
    asked: bool
    verdict: str = ""  # that was given, whether or not it has arrived
    labelled: bool = False  # its verdict was acknowledged
    told: list[str] = field(default_factory=list)  # what it was ordered to be
    done: str = ""  # the last order that was confirmed


class Samples(Watch):
    """One seed."""

    def __init__(self, world: World, plain: bool) -> None:
        self.world, dice = world, world.dice
        self.kept: dict[str, Kept] = {}
        self.device: Device | None = None
        self.checked = False
        self.orders: dict[str, messages.SamplesCommand] = {}
        self.tight = dice.random() < 0.3
        self.network = Network(world, dice.choice((0.0, 0.3)))
        self.broker = Broker(world, Faults.drawn(dice, 15.0))
        self.broker.listen(topics.ESCALATION.filter(), self._asked)
        self.broker.listen(topics.COMMAND_STATE.filter(), self._heard)
        self.settings = Settings(
            device=DeviceConfig(id="dev", site="sim", state_dir=world.disk.root / "state"), slots={"eye": Slot()},
            pipelines={"line": Pipeline(slot="eye", source={"type": "mqtt"}, escalate_to=("big",))},  # type: ignore[arg-type]
            host=Host(url=URL, carrier="https"), delivery=Delivery(retry_s=3.0, retry_s_max=6.0), trust=Trust(unsigned=True),
        )  # fmt: skip
        for number in range(0 if plain else dice.randrange(3, 12)):
            world.after(dice.uniform(0, CALM_S), lambda number=number: self._capture(number))  # type: ignore[misc]
        for at in range(8, int(END_S) - 40, 8) if not plain else ():
            world.after(float(at), self._order)

    def boot(self) -> Device:
        """The daemon starts."""
        limits = StoreLimits(blob_bytes_max=6000 if self.tight else 1 << 30)
        self.device, self.checked = Device(self.world, self.broker, self.network, self.settings, limits, self), False
        self.device.link.acknowledged = self._acknowledged
        if self.device.opened.broken:
            raise Violation(f"the database is damaged: {self.device.opened.broken.reason}")
        return self.device

    def calm(self) -> None:
        """From now on everything works."""
        self.broker.faults = Faults()
        self.network.broken = 0.0

    # What the others do.

    def _capture(self, number: int) -> None:
        """An item that the model is not sure of: as `edged.capture` keeps it."""
        device, dice, now = self.device, self.world.dice, self.world.clock.now()
        if device is None or not self.world.disk.on:
            return
        content = f"pixels of {dice.randrange(number + 1)} ".encode() * dice.choice((40, 150))  # some show the same
        asked = dice.random() < 0.8
        sample = NewSample(
            id=f"sample-{number}", pipeline="line", task="detect", model="eye", release="eye@1.0",
            state="escalated" if asked else "captured", reason="unsure", decision="escalate", confidence=0.3,
            inclusion_probability=1.0, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content),
            prediction=[BOX], item=f"{number}.jpg", captured=now, label_by=now + 1e9 if asked else None,
        )  # fmt: skip
        question = device.outgoing.escalation(sample, content, "big") if asked else None
        device.store.set_value("budget/line", {"spent": number}, durable=False)
        try:
            try:
                device.store.capture(sample, content, question)
            except StorageFull:
                device.store.evict(len(content))
                device.store.capture(sample, content, question)
        except (StorageFull, OutboxFull):
            return
        if self.world.disk.on:  # who gave the item knows that it was taken
            self.world.say(f"kept {sample.id} {'and asked' if asked else ''}")
            self.kept[sample.id] = Kept(content, asked)
            device.control.wake()

    def _asked(self, topic: str, payload: bytes) -> None:
        """A responder in the next tier."""
        question: Any = messages.decode(topic, payload)[2]
        # Without an entry its capture never returned.
        kept, dice = self.kept.get(question.sample) or Kept(b"", True, "unresolved"), self.world.dice
        kept.verdict = kept.verdict or dice.choice(("labelled", "labelled", "labelled", *GOES))
        label = [messages.Box(**BOX)] if kept.verdict == "labelled" else []
        provenance = messages.Provenance(kind="model", who="big", release="big@1.0")
        verdict = messages.Verdict(
            **self._stamp(), sample=question.sample, status=kept.verdict, label=label, confidence=0.9,  # type: ignore[arg-type]
            provenance=provenance, opinions=[],
        )  # fmt: skip
        address = topics.VERDICT(site="sim", dev="dev")
        self.world.after(dice.choice((0.1, 3.0)), lambda: self.broker.publish(address.topic, messages.encode(verdict)))

    def _stamp(self) -> dict[str, Any]:
        return {"id": f"m{self.world.dice.getrandbits(60):x}", "ts": self.world.clock.now(), "boot": "host", "seq": 1}

    def _acknowledged(self, message: Inbound) -> None:
        _, _, said = messages.decode(message.topic, message.payload)
        if isinstance(said, messages.Verdict):
            self.world.say(f"verdict on {said.sample} acknowledged: {said.status}")
            if said.sample in self.kept:
                self.kept[said.sample].labelled = True

    def _order(self) -> None:
        """The trainer moves samples on, one step at a time, and says it again until it is done."""
        if self.orders:
            return
        wanted: dict[str, list[str]] = {}
        for sample, kept in self.kept.items():
            following = {"": "claim", "claim": "used", "used": "archive"}.get(kept.done)
            if kept.labelled and kept.verdict == "labelled" and following and self.world.maybe(0.7):
                wanted.setdefault(following, []).append(sample)
        for action, samples in wanted.items():
            order = messages.SamplesCommand(
                **self._stamp(), action=action, job="job", samples=samples, upload_url=f"{URL}/samples", release="eye@1.1"  # type: ignore[arg-type]
            )  # fmt: skip
            self.orders[order.id] = order
            for sample in samples:
                self.kept[sample].told.append(action)
            self._tell(order)

    def _tell(self, order: messages.SamplesCommand) -> None:
        if order.id in self.orders:
            topic = topics.COMMAND(site="sim", dev="dev", type="samples", id=order.id).topic
            self.broker.publish(topic, messages.encode(order))
            self.world.after(ASK_AGAIN_S, lambda: self._tell(order))

    def _heard(self, topic: str, payload: bytes) -> None:
        said: Any = messages.decode(topic, payload)[2]
        order = self.orders.get(said.command)
        if order is None or said.state != "done":
            return
        del self.orders[said.command]
        self.world.say(f"{order.action} done: {said.detail}")
        for sample in order.samples:
            kept = self.kept[sample]
            # What was used may be given up: before it is archived, or before an order whose answer was lost comes again.
            given_up = self.tight and order.action in ("used", "archive") and sample in said.detail["unknown"]
            if sample not in said.detail["moved"] and not given_up:
                raise Violation(f"{sample} was labelled, and cannot be moved ({order.action}): {said.detail}")
            arrived = self.network.uploaded.get(hashlib.sha256(kept.content).hexdigest())
            if order.action == "claim" and arrived != kept.content:
                raise Violation(f"{sample} is claimed, and its pixels have not arrived")
            kept.done = order.action

    # What must be right.

    def at_rest(self, device: Device) -> None:
        self.world.need_power()
        if not self.checked:
            self.checked = True
            self._look(device)

    def at_end(self, device: Device) -> None:
        """Everything works, and has for a while."""
        self._look(device)
        for sample_id, kept in self.kept.items():
            sample = device.store.sample(sample_id)
            if sample is not None and sample.state == "escalated":
                raise Violation(
                    f"{sample_id} is still without an answer ({kept.verdict or 'it was never asked about'})"
                )
        if self.orders:
            raise Violation(f"not carried out: {self.orders}")
        if device.store.depth() != (0, 0):
            left = device.store._db.read("SELECT topic, expires, due, attempts, error FROM outbox")
            raise Violation(f"left in the outbox at {self.world.clock.now()}: {[tuple(row) for row in left]}")

    def _look(self, device: Device) -> None:
        """After a start: everything that was acknowledged is there."""
        store, tell = device.store, self._missing
        for sample_id, kept in self.kept.items():
            sample = store.sample(sample_id)
            if sample is None:
                if not self.tight or (kept.asked and kept.verdict not in GOES and "used" not in kept.told):
                    raise Violation(f"{sample_id} is gone: {kept}")
                continue
            path = store.blob(sample.sha256)
            if path is None or path.read_bytes() != kept.content:
                raise Violation(
                    f"{sample_id} is {sample.state}, its pixels are {'gone' if path is None else 'damaged'}"
                )
            if kept.done and sample.state not in DONE[kept.done]:
                raise tell(sample_id, f"{kept.done} was confirmed", sample.state)
            if kept.labelled and sample.state not in (CLAIMED if kept.verdict == "labelled" else GOES):
                raise tell(sample_id, f"the verdict {kept.verdict} was acknowledged", sample.state)
            if kept.asked and sample.state == "captured":
                raise tell(sample_id, "it was asked about", sample.state)
        found = {path.name for path in (self.settings.device.state_dir / "blobs").glob("*/*")}
        rows = {row["sha256"] for row in store._db.read("SELECT sha256 FROM blob")}
        if found != rows:
            raise Violation(f"files without a row: {found - rows}, rows without a file: {rows - found}")

    def _missing(self, sample: str, what: str, state: str) -> Violation:
        return Violation(f"{sample}: {what}, and it is {state}")


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. `template`: a disk to begin with, None: an empty one. The disk that is left."""
    story = Samples(world, template is None)
    return Life(world, story, CALM_S, END_S, plain=template is None).go(template)
