"""The owner's keys, made under power cuts: once they are made they are there, whole; before that, nothing is."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.sim.disk import Model
from tests.support.sim.life import Life
from tests.support.sim.world import PowerCut, Violation, World
from trainer import ceremony
from trainer.keys import Key
from trainer.repository import exists


class Machine:
    """One evening with the keys."""

    def __init__(self, story: Ceremonies) -> None:
        self.story = story

    def run(self) -> None:
        story = self.story
        if story.made or exists(story.folder):
            return
        # Of the world's own chance, so that a seed is the same run every time.
        ceremony.Key.new = lambda role: Key(role, Ed25519PrivateKey.from_private_bytes(story.world.dice.randbytes(32)))  # type: ignore[method-assign]
        _, files = ceremony.create(story.folder, story.media, lambda _path: "correct horse battery")
        if story.world.disk.on:
            story.world.say("made")
            story.made = {path: path.read_bytes() for path in [*story.folder.rglob("*.*"), *files]}
        raise PowerCut

    def stop(self) -> None: ...


class Ceremonies:
    """One seed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = world.disk.root / "trainer" / "trust"
        self.media = [world.disk.root / "state" / f"medium{number}" for number in range(3)]
        self.made: dict[Path, bytes] = {}

    def boot(self) -> Machine:
        """What the last power cut left."""
        for path, content in self.made.items():
            if not path.exists() or path.read_bytes() != content:
                raise Violation(f"{path.name} was made, and is {'damaged' if path.exists() else 'gone'}")
        if not self.made and exists(self.folder):
            self.world.say("made, and nobody was told")
        return Machine(self)

    def meanwhile(self, files: Model) -> None: ...

    def calm(self) -> None: ...

    def at_end(self, machine: Machine) -> None: ...


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. The disk that is left."""
    return Life(world, Ceremonies(world), 1e6, 2e6, plain=template is None, first=1.0).go(template)
