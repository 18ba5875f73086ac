"""Folders that a trainer makes, under power cuts: an export, a checkpoint, an adapter. What was made is there, whole."""

from __future__ import annotations

from pathlib import Path

from tests.support.sim.disk import Model
from tests.support.sim.life import Life
from tests.support.sim.world import PowerCut, Violation, World
from trainer.formats.base import whole_folder
from trainer.tuners.scratch import Scratch, replace_folder

STARTS = 5
FILES = ("weights.bin", "config.json", "inner/labels.txt")


class Machine:
    """One start: something is made."""

    def __init__(self, story: Folders) -> None:
        self.story = story

    def run(self) -> None:
        story, world = self.story, self.story.world
        for _ in range(world.dice.randrange(1, 4)):
            step = world.dice.choice(("export", "checkpoint", "adapter"))
            world.say(step)
            getattr(story, step)()
            world.need_power()
        if story.starts < STARTS:
            raise PowerCut

    def stop(self) -> None: ...


class Folders:
    """One seed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.root = world.disk.root / "trainer"
        self.made: dict[Path, dict[str, bytes]] = {}
        self.adapters: list[dict[str, bytes]] = []  # that may lie in the one place for them
        self.adapted = False
        self.starts = 0

    def boot(self) -> Machine:
        """What the last cut left."""
        self.starts += 1
        for folder, files in self.made.items():
            if (found := _read(folder)) != files:
                raise Violation(f"{folder.name} was made, and is {'damaged' if found else 'gone'}")
        whole = Scratch(self.root / "scratch", "the same work").last()
        if any(folder.parent.name == "checkpoints" for folder in self.made) and whole is None:
            raise Violation("a checkpoint was completed, and there is none to go on from")
        found, old = _read(self.root / "adapter"), _read(self.root / ".adapter.old")
        if found and found not in self.adapters:
            raise Violation("the adapter is damaged")
        if self.adapted and found not in self.adapters and old not in self.adapters:
            raise Violation("the adapter is gone")
        return Machine(self)

    def _fill(self, folder: Path) -> dict[str, bytes]:
        files = {name: f"{name} {self.world.dice.getrandbits(60)} ".encode() * 80 for name in FILES}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return files

    def export(self) -> None:
        folder = self.root / f"export-{self.world.dice.getrandbits(40):x}"
        with whole_folder(folder) as beside:
            files = self._fill(beside)
        if self.world.disk.on:
            self.made[folder] = files

    def checkpoint(self) -> None:
        scratch = Scratch(self.root / "scratch", "the same work")
        folder = scratch.checkpoints / f"step-{len(self.made) + self.starts * 100}"
        if folder.exists():
            return
        files = self._fill(folder)
        scratch.complete(folder)
        if self.world.disk.on:
            self.made[folder] = files | {"complete.json": (folder / "complete.json").read_bytes()}

    def adapter(self) -> None:
        beside = self.root / f".adapter-{self.world.dice.getrandbits(40):x}"
        files = self._fill(beside)
        self.adapters.append(files)
        replace_folder(beside, self.root / "adapter")
        if self.world.disk.on:
            self.adapters, self.adapted = [files], True

    def meanwhile(self, files: Model) -> None: ...

    def calm(self) -> None: ...

    def at_end(self, machine: Machine) -> None: ...


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. The disk that is left."""
    return Life(world, Folders(world), 1e6, 2e6, plain=template is None, first=1.0).go(template)
