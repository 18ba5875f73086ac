"""The life of one machine: started, cut off at any change, started again on what its disk kept, until all is calm."""

from __future__ import annotations

from typing import Protocol

from tests.support.sim.disk import Model
from tests.support.sim.world import PowerCut, World

FOLDERS = ("state", "trainer")  # which the packages make
FIRST = 0.1  # of the lives begin with the first start ever
CUTS = (0, 1, 1, 1, 2, 2, 3, 5)
JUMPS = (0, 0, 1, 2)
REACH = (3, 30, 100, 200)  # changes to the disk, up to which the next cut comes: soon after the start, or later


class Machine(Protocol):
    """What runs on the machine."""

    def run(self) -> None: ...

    def stop(self) -> None: ...


class Story(Protocol):
    """A scenario: what happens, and what must be right."""

    def boot(self) -> Machine: ...

    def calm(self) -> None: ...

    def meanwhile(self, files: Model) -> None: ...

    def at_end(self, machine: Machine) -> None: ...


class Life:
    """Runs a story. Cuts come at the changes that the seed says, until `calm_s`; at `end_s` it ends."""

    def __init__(
        self,
        world: World,
        story: Story,
        calm_s: float,
        end_s: float,
        plain: bool,
        jumps: bool = True,
        first: float = FIRST,
    ) -> None:
        """`plain`: without cuts. `jumps`: whether the wall clock may be set. `first`: how often it is the first start."""
        self._world, self._story, self._first = world, story, first
        self._cuts = [self._cut() for _ in range(0 if plain else world.dice.choice(CUTS))]
        for _ in range(world.dice.choice(JUMPS) if jumps and not plain else 0):
            world.after(world.dice.uniform(0, calm_s), self._jump)
        self._calm = False
        world.after(calm_s, self._become_calm)
        world.after(end_s, self._end)

    def _cut(self) -> tuple[int, bool]:
        dice = self._world.dice
        return dice.randrange(1, dice.choice(REACH)), dice.random() < 0.8

    def _jump(self) -> None:
        """Somebody sets the wall clock."""
        self._world.clock.offset += self._world.dice.choice((-1, 1)) * self._world.dice.choice((5, 3600, 400 * 86400))
        self._world.say(f"the clock says {self._world.clock.now():.0f}")

    def _become_calm(self) -> None:
        self._world.say("from now on everything works")
        self._calm = True
        self._world.disk.cut_before(0)
        self._story.calm()

    def _end(self) -> None:
        self._world.ended = True

    def go(self, template: Model | None) -> Model:
        """Live through it, beginning with what is on this disk, mostly; raises Violation. What is on it in the end."""
        world, disk = self._world, self._world.disk
        files = Model.with_folders(*FOLDERS) if template is None or world.maybe(self._first) else template.kept()
        while True:
            disk.power_on(files)
            cut, power = self._cuts.pop() if self._cuts and not self._calm else (0, True)
            disk.cut_before(cut)
            world.say("start")
            machine = self._story.boot()
            try:
                machine.run()
                self._story.at_end(machine)
                break
            except PowerCut:
                world.say(f"the {'power is cut' if power else 'process is killed'} before change {cut}")
            finally:
                disk.stop()
                machine.stop()
            files = disk.power_off(world.dice if power else None)
            self._story.meanwhile(files)
        return disk.power_off(None)
