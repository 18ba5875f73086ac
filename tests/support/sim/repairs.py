"""A store that was damaged, under power cuts: set aside, begun anew, recovered; and files that are written whole.

Nothing that may still be read is lost: each sample that was kept is in the store, or its pixels lie in a folder beside it
with the database that knew it. What was recovered stays. A file that was written is there, whole.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edged import dataset, enroll, orders, trust
from edged.core.toml_keys import with_keys
from edged.releases import BadRelease, Releases, verify
from edged.store import NewSample, Store, StoreLimits
from edged.store.integrity import MARKER, SUSPECT, blobs_of, open_store, set_asides
from edged.wire.bundle import decode
from edged.wire.manifest import ReleaseRef
from tests.support.sim.disk import File, Folder, Model
from tests.support.sim.engine import make
from tests.support.sim.life import Life
from tests.support.sim.world import PowerCut, Violation, World
from trainer.files import write_whole
from trainer.keys import Key
from trainer.releases import Registry, ReleaseError

WRITERS: dict[
    str, tuple[Callable[[Path, str], None], str]
] = {  # in the state folder -> what writes it, and how it is then
    "dataset.jsonl": (lambda path, text: dataset.write(path, [text]), "%s"),
    "of the trainer": (lambda path, text: write_whole(path, text.encode()), "%s"),
    "1.root.json": (lambda path, text: trust.write_durably(path, text.encode()), "%s"),
    "orders/local-1.json": (lambda path, text: orders.place(path.parents[1], path.stem, text, {}), '{"kind": "%s"}'),
}
ANYBODY = ("keep", "keep", "export", "install", "register", "begin", "enroll", "key")  # what needs no daemon
STEPS = (*ANYBODY, "suspect", "recover", "recover", "close")
BUNDLE = decode((Path(__file__).parents[2] / "wire" / "bundles" / "v1.json").read_bytes())
IDENTITY = {
    "ca.crt": BUNDLE.ca.encode(),
    "own.crt": BUNDLE.own.certificate.encode(),
    "own.key": BUNDLE.own.key.encode(),
}


class Machine:
    """One start."""

    def __init__(self, story: Repairs) -> None:
        self.story = story
        self.store: Store | None = None

    def run(self) -> None:
        story, world = self.story, self.story.world
        story.suspected = False  # this start knows of it, and looks at everything before it forgets it
        fresh = not set_asides(story.state) and not story.damaged and not (story.state / "blobs" / "ff").is_dir()
        if story.rotten:  # what a cut may spoil is done now
            story.rotten = False
            world.disk.cut_before(world.dice.choice((0, world.dice.randrange(1, 40))))
        if fresh and world.maybe(0.5):  # a command was faster than the first start
            store = self.store = Store(story.state)
            story.in_use = False
        else:
            opened = open_store(story.state, StoreLimits(), world.clock.now())
            store = self.store = opened.store
            world.say(f"set aside: {opened.broken}" if opened.broken else "opened")
            orders.Orders(story.state, store, SimpleNamespace(), lambda *_: None)  # type: ignore[arg-type]
            story.in_use = world.disk.on
        world.need_power()
        story.look_into(store)
        for _ in range(world.dice.randrange(1, 7)):
            step = world.dice.choice(STEPS if story.in_use else ANYBODY)
            world.clock.elapsed += 1
            world.say(step)
            getattr(story, step)(store)
            world.need_power()
            if step == "close":
                break
        if not story.calmed:
            raise PowerCut

    def stop(self) -> None:
        if self.store is not None:
            self.store._db.close()


class Repairs:
    """One seed."""

    def __init__(self, world: World, outside: Path, plain: bool) -> None:
        self.world, self.outside, self.plain = world, outside, plain
        self.state = world.disk.root / "state"
        self.kept: dict[str, bytes] = {}  # in the store
        self.aside: dict[str, bytes] = {}  # in a database that was set aside
        self.writing: dict[str, str] = {}  # file -> what was last begun to be written
        self.written: dict[str, str] = {}  # and what was last written
        self.installed: list[ReleaseRef] = []
        self.registered: dict[str, Path] = {}
        self.begun: list[Path] = []
        self.enrolling = self.enrolled = ""
        self.keys: dict[Path, bytes] = {}
        self.in_use = self.suspected = self.calmed = self.damaged = self.rotten = False
        self.starts = 0
        world.disk.links(world.maybe(0.5))

    def boot(self) -> Machine:
        """The daemon starts."""
        self.starts += 1
        self.calmed = self.starts > 5
        self._look()
        return Machine(self)

    def meanwhile(self, files: Model) -> None:
        """Without power: a page of the database rots."""
        state = files.top.now.get("state")
        if self.plain or not isinstance(state, Folder) or not self.world.maybe(0.5):
            return
        database = state.now.get("edged.db")
        # With something pending it was no power cut: the system went on.
        if isinstance(database, File) and not database.pending and len(database.durable) > 8192 and self.kept:
            self.world.say("the database is damaged")
            self.damaged = self.rotten = True
            database.durable = database.durable[:100] + b"\xff" * 60 + database.durable[160:]

    def calm(self) -> None:
        """Time plays no part here."""

    def at_end(self, machine: Machine) -> None: ...

    # What is done.

    def keep(self, store: Store) -> None:
        number = self.world.dice.getrandbits(60)
        content, now = f"pixels {number} ".encode() * 60, self.world.clock.now()
        sample = NewSample(
            id=f"sample-{number:x}", pipeline="line", task="detect", model="eye", release="eye@1.0", state="captured",
            reason="", decision="escalate", confidence=0.3, inclusion_probability=1.0,
            sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), prediction=[], item="", captured=now,
        )  # fmt: skip
        store.capture(sample, content)
        if self.world.disk.on:
            self.kept[sample.id] = content

    def export(self, _store: Store) -> None:
        name = self.world.dice.choice(sorted(WRITERS))
        (write, form), text = WRITERS[name], f"{self.world.dice.getrandbits(60)} " * 100
        if not (self.state / name).parent.is_dir():
            return  # no daemon was ever here to take an order
        self.writing[name] = form % text
        write(self.state / name, text)
        if self.world.disk.on:
            self.written[name] = form % text

    def _source(self) -> tuple[ReleaseRef, Path]:
        made = make(f"phi@1.{self.world.dice.randrange(1000)}")
        folder = self.outside / made.ref.release
        return made.ref, folder if folder.exists() else made.write_to(folder)

    def install(self, _store: Store) -> None:
        """A seed."""
        ref, source = self._source()
        Releases(self.state / "releases").install(source)
        if self.world.disk.on:
            self.installed.append(ref)

    def register(self, _store: Store) -> None:
        """A release, with the trainer."""
        ref, source = self._source()
        Registry(self.state / "registry").register(source)
        if self.world.disk.on:
            self.registered[ref.release] = source

    def enroll(self, _store: Store) -> None:
        """A machine gets an identity, another one than before."""
        self.enrolling = f"cam-{self.world.dice.randrange(1000)}"
        config = self.state / "edged.toml"
        bundle = BUNDLE.model_copy(update={"device": self.enrolling})
        folder = self.state / "identity" / self.enrolling
        before = config.read_text() if config.exists() else None
        named = enroll._keys(bundle, folder)
        text = with_keys(before or "", named)
        enroll.carry_out(enroll.Plan(bundle, folder, IDENTITY, config, before, text, named))
        if self.world.disk.on:
            self.enrolled = self.enrolling

    def key(self, _store: Store) -> None:
        """The trainer gets a key."""
        key = Key("timestamp", Ed25519PrivateKey.from_private_bytes(self.world.dice.randbytes(32)))
        path = key.save(self.state / "trust" / "keys", None)
        if self.world.disk.on:
            self.keys[path] = path.read_bytes()

    def begin(self, _store: Store) -> None:
        """What is fetched into such a folder must not be lost with its name."""
        releases = Releases(self.state / "releases")
        folder = releases.folder(make(f"phi@2.{self.world.dice.randrange(1000)}").ref)
        releases.begin(folder)
        if self.world.disk.on:
            self.begun.append(folder)

    def suspect(self, store: Store) -> None:
        store.suspect()
        if self.world.disk.on:
            self.suspected = True

    def recover(self, store: Store) -> None:
        for file in set_asides(self.state):
            if file.exists():
                store.recover(file, self.world.clock.now())
        if self.world.disk.on:
            self.kept |= {name: data for name, data in self.aside.items() if store.sample(name) is not None}
            self.aside = {name: data for name, data in self.aside.items() if name not in self.kept}

    def close(self, store: Store) -> None:
        store.close()
        if self.world.disk.on:
            self.in_use = self.suspected = False

    # What must be right.

    def _look(self) -> None:
        """Before anything is opened: what the last start left."""
        marker = self.state / MARKER
        if self.in_use and not marker.exists():
            raise Violation("nothing says that the last start did not end in order")
        if self.suspected and marker.read_text() != SUSPECT:
            raise Violation("nothing says that damage was met")
        for name, text in self.written.items():
            path = self.state / name
            if not path.exists() or path.read_text() not in (text, self.writing[name]):
                raise Violation(f"{name} was written, and is {'damaged' if path.exists() else 'gone'}")
            self.written[name] = path.read_text()
        for path, content in self.keys.items():
            if not path.exists() or path.read_bytes() != content:
                raise Violation(f"{path.name} was saved, and is {'damaged' if path.exists() else 'gone'}")
        self._look_at_identity()
        for ref in self.installed:
            try:
                verify(self.state / "releases" / f"{ref.release}-{ref.sha256[:12]}", ref)
            except BadRelease as error:
                raise Violation(f"{ref.release} was installed: {error}") from None
        for name, source in self.registered.items():
            try:
                stored = Registry(self.state / "registry").get(name).folder
            except ReleaseError as error:
                raise Violation(f"{name} was registered: {error}") from None
            for path in source.iterdir():
                if (stored / path.name).read_bytes() != path.read_bytes():
                    raise Violation(f"{name} was registered, and its {path.name} is damaged")
        for folder in self.begun:
            if not folder.is_dir():
                raise Violation(f"{folder.name} was begun, and is gone")
        if self.kept and not (self.state / "edged.db").exists() and not set_asides(self.state):
            raise Violation("the database is gone")
        blobs = [self.state / "blobs", *(blobs_of(path) for path in set_asides(self.state))]
        for sample, content in (self.kept | self.aside).items():
            name = hashlib.sha256(content).hexdigest()
            places = [folder / name[:2] / name for folder in blobs]
            if not any(path.exists() and path.read_bytes() == content for path in places):
                raise Violation(f"the pixels of {sample} are nowhere")
        if self.aside and not any(path.exists() for path in set_asides(self.state)):
            raise Violation("the database that was set aside is gone")

    def _look_at_identity(self) -> None:
        config = self.state / "edged.toml"
        if not config.exists():
            if self.enrolled:
                raise Violation(f"{self.enrolled} was enrolled, and its configuration is gone")
            return
        found = tomllib.loads(config.read_text())
        name, folder = found["device"]["id"], Path(found["broker"]["key"]).parent
        if self.enrolling and name not in (self.enrolled, self.enrolling):
            raise Violation(f"{self.enrolled} was enrolled, {self.enrolling} was begun, and this is {name}")
        if any(not (folder / file).exists() or (folder / file).read_bytes() != IDENTITY[file] for file in IDENTITY):
            raise Violation(f"this is {name}, and its identity is damaged")
        self.enrolled = name

    def look_into(self, store: Store) -> None:
        """After a start."""
        there = any(path.exists() for path in set_asides(self.state))
        for sample in list(self.kept):
            found = store.sample(sample)
            if found is None and there:
                self.aside[sample] = self.kept.pop(sample)
            elif found is None or store.blob(found.sha256) is None:
                raise Violation(f"{sample} was kept, and is gone")


def run(world: World, outside: Path, template: Model | None) -> Model:
    """One seed; raises Violation. `template`: a disk to begin with, None: an empty one. The disk that is left."""
    return Life(world, Repairs(world, outside, template is None), 1e6, 2e6, plain=template is None, first=0.3).go(
        template
    )
