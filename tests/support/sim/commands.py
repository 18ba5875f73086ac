"""A store that commands open on a machine where no daemon was ever started, killed and cut off: what was kept stays."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edged.store import NewSample, Store
from tests.support.sim.disk import Model
from tests.support.sim.life import Life
from tests.support.sim.world import PowerCut, Violation, World

STARTS = 6


class Machine:
    """One command."""

    def __init__(self, story: Commands) -> None:
        self.story = story
        self.store: Store | None = None

    def run(self) -> None:
        story, world = self.story, self.story.world
        self.store = store = Store(story.state)
        story.look_into(store)
        content = f"pixels {world.dice.getrandbits(60)}".encode()
        sample = NewSample(
            id=f"sample-{story.starts}", pipeline="line", task="detect", model="eye", release="eye@1.0", state="captured",
            reason="", decision="escalate", confidence=0.3, inclusion_probability=1.0,
            sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), prediction=[], item="",
            captured=world.clock.now(),
        )  # fmt: skip
        store.capture(sample, content)
        if world.disk.on:
            world.say(f"kept {sample.id}")
            story.kept[sample.id] = content
        if world.maybe(0.5):
            store.close()
        if story.starts < STARTS:
            raise PowerCut  # the next command, after whatever the seed says

    def stop(self) -> None:
        if self.store is not None:
            self.store._db.close()


class Commands:
    """One seed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.state: Path = world.disk.root / "state"
        self.kept: dict[str, bytes] = {}
        self.starts = 0

    def boot(self) -> Machine:
        """A person types a command."""
        self.starts += 1
        if self.kept and not (self.state / "edged.db").exists():
            raise Violation("the database is gone")
        return Machine(self)

    def look_into(self, store: Store) -> None:
        """After a start."""
        for sample_id, content in self.kept.items():
            found = store.sample(sample_id)
            path = store.blob(found.sha256) if found is not None else None
            if path is None or path.read_bytes() != content:
                raise Violation(f"{sample_id} was kept, and is gone")

    def meanwhile(self, files: Model) -> None: ...

    def calm(self) -> None: ...

    def at_end(self, machine: Machine) -> None: ...


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. The disk that is left."""
    return Life(world, Commands(world), 1e6, 2e6, plain=template is None, first=1.0).go(template)
