"""A device in a world: the product's store, outbox, control loop, updater and fetching, on a disk that forgets.

Put together as `edged.daemon` does it, without its threads: what they do is done in turn (`Inbox`, `Worker`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged import acts, connection, delivery, golden, handover, in_service
from edged.carriers import Https
from edged.clock_steps import ClockSteps
from edged.config import Settings
from edged.control import Control
from edged.core.update import State
from edged.delivery import Delivery
from edged.engines.base import EngineError, EngineOptions, open_engine
from edged.fetch import Fetcher, FetchError
from edged.metrics import Window
from edged.orders import Orders
from edged.part import Part
from edged.prove import Proof, ProveFailed
from edged.releases import BadRelease, Releases, read_manifest, reference
from edged.slot import Slot
from edged.stamp import Stamp
from edged.storage import StorageWatch
from edged.store import StoreLimits
from edged.store.integrity import open_store
from edged.told import Told
from edged.updater import Updater
from edged.uploads import Uploads
from edged.wire.manifest import ReleaseManifest, ReleaseRef
from tests.support.sim.bus import Broker, Link
from tests.support.sim.disk import Model
from tests.support.sim.engine import Made
from tests.support.sim.world import Inbox, PowerCut, Violation, Worker, World

URL = "http://trainer"
CHUNK_BYTES = 700


class Watched(Releases):
    """Tells the network what is removed on purpose."""

    network: Network

    def keep_only(self, refs: list[ReleaseRef]) -> list[str]:
        kept = {self.folder(ref) for ref in refs}
        self.network.whole = {path: data for path, data in self.network.whole.items() if path.parent in kept}
        return super().keep_only(refs)


@dataclass(slots=True)
class Answer:
    """An HTTP response as `edged.fetch` sees one."""

    status_code: int
    headers: dict[str, str]
    parts: Callable[[], Iterator[bytes]]

    def iter_raw(self) -> Iterator[bytes]:
        return self.parts()

    def iter_bytes(self, _size: int = 0) -> Iterator[bytes]:
        return self.parts()


class Network(Fetcher):
    """The product's fetching over a network that breaks off. `uploaded`: what the trainer has of this device's pixels."""

    def __init__(self, world: World, broken: float) -> None:
        self.world, self.broken = world, broken
        self.files: dict[str, bytes] = {}
        self.uploaded: dict[str, bytes] = {}
        self.whole: dict[Path, bytes] = {}  # what was fetched and not removed

    def part(self) -> type[Part]:
        """The product's file on its way here, which tells when it is whole."""
        network = self

        class Noted(Part):
            def finish(self) -> None:
                super().finish()
                if network.world.disk.on:
                    network.whole[self.target] = self.target.read_bytes()

        return Noted

    def brought(self, folder: Path) -> None:
        """A release is here: all of it stays, also what was linked."""
        if self.world.disk.on:
            self.whole |= {path: path.read_bytes() for path in folder.iterdir() if path.suffix != ".part"}

    def look(self) -> None:
        """After a start: what was fetched whole is still there."""
        for target, content in self.whole.items():
            if not target.exists() or target.read_bytes() != content:
                raise Violation(f"{target}: was fetched, and has to be fetched again")

    def publish(self, made: Made) -> None:
        self.files[f"{URL}/releases/{made.ref.release}/release.json"] = made.files["release.json"]
        for entry in ReleaseManifest.model_validate_json(made.files["release.json"]).files.values():
            self.files[f"{URL}/blobs/{entry.sha256}"] = made.files[entry.path]

    @contextmanager
    def _request(self, method: str, url: str, **options: Any) -> Iterator[Any]:
        self.world.need_power()
        if self.world.maybe(self.broken):
            raise FetchError(f"{url}: nobody answers")
        if method == "PUT":
            body = b"".join(options["content"])
            self.uploaded[url.rpartition("/")[2]] = body
            yield Answer(201, {}, lambda: iter(()))
            self.world.need_power()
            return
        content = self.files.get(url)
        if content is None:
            raise FetchError(f"{url}: the server answered 404", 404)
        ranged = options.get("headers", {}).get("Range", f"bytes=0-{len(content) - 1}")
        start, last = map(int, ranged.removeprefix("bytes=").split("-"))
        wanted = last + 1
        end = self.world.dice.randrange(start, wanted) if self.world.maybe(self.broken) else wanted

        def parts() -> Iterator[bytes]:
            for at in range(start, end, CHUNK_BYTES):
                self.world.need_power()
                yield content[at : min(at + CHUNK_BYTES, end)]
            if end < wanted:
                raise FetchError(f"{url}: the connection broke")

        told = {
            "Content-Range": f"bytes {start}-{last}/{len(content)}",
            "Content-Length": str(wanted - start),
        }
        yield Answer(206 if wanted - start < len(content) else 200, told, parts)


class Watch:
    """Told of what must be right at any time; raises Violation."""

    def proving(self, ref: ReleaseRef) -> None: ...

    def at_rest(self, device: Device) -> None: ...

    def meanwhile(self, files: Model) -> None:
        """Nothing happens to the disk without power."""


class Device:
    """One start of the daemon; it lives until the power goes or the world ends."""

    def __init__(
        self, world: World, broker: Broker, network: Network, settings: Settings, limits: StoreLimits, watch: Watch
    ) -> None:
        self.world, self.watch = world, watch
        self.workers: list[Worker] = []
        self._stopped = False
        acts.ThreadPoolExecutor = handover.ThreadPoolExecutor = self._worker  # type: ignore[misc, assignment]
        acts.prove = self._prove  # type: ignore[assignment]
        in_service._after = self._after
        clock, state = world.clock, settings.device.state_dir
        self.opened = open_store(state, limits, clock.now())
        self.store = self.opened.store
        outgoing = Told(settings.device.site, settings.device.id, Stamp(clock))
        network.look()
        self.releases = Watched(state / "releases")
        self.releases.network = network
        inbox = Inbox(world, self._at_rest)
        self.link = Link(broker, connection.subscriptions(settings), inbox)
        delivery.Part = network.part()  # type: ignore[misc]
        https = Https(network, lambda: [settings.host.url or ""], self._count)
        carrier = Delivery({"https": https}, lambda: settings.host, self.releases, clock, self._count, lambda: None)
        self.carrier = carrier
        uploads = Uploads(network, None, settings.device.site, settings.device.id, clock, self._count, carrier.pace)  # type: ignore[arg-type]
        self.slots = {name: Slot(name) for name in settings.slots}
        self.outgoing = outgoing
        self.control = Control(
            settings, self.store, self.link, outgoing, clock, Window(clock.now()), uploads, {}, {},  # type: ignore[arg-type]
        )  # fmt: skip
        self.updater = self.control.updater = Updater(
            self.slots, dict(settings.slots), self.releases, self.store, clock, acts.Carrier(self._fetch),
            post=inbox.put, report=self.control.report, say=self.control.say, retry_s=settings.host.fetch_retry_s,
        )  # fmt: skip
        self.control.orders = Orders(state, self.store, self.updater, self.control.tell_command)
        storage = StorageWatch(self.opened, clock, lambda kind, text, **more: None)
        steps = ClockSteps(clock, self.store)
        self.control.at_tick |= {"clock": steps.tick, "storage": storage.tick}
        self.control.wall = steps.wall

    def _fetch(self, ref: ReleaseRef, folder: Path, cancelled: Callable[[], bool]) -> None:
        self.carrier.fetch(ref, folder, cancelled)
        self.releases.network.brought(folder)

    def _count(self, name: str, n: int = 1) -> None:
        self.store.count(name, n)

    def run(self) -> None:
        """Until the power goes (PowerCut) or the world has ended."""
        self.updater.start()
        self.control.run()

    def stop(self) -> None:
        """What the process leaves behind: nothing that is written may reach the disk."""
        self.link.gone()
        for worker in self.workers:
            worker.shutdown()
        self._stopped = True
        with suppress(Exception, PowerCut):
            self.store.close()

    @property
    def idle(self) -> bool:
        """Whether nothing waits for a worker."""
        return all(worker.idle for worker in self.workers)

    def _worker(self, **_: object) -> Worker:
        self.workers.append(Worker(self.world))
        return self.workers[-1]

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self.world.after(seconds, lambda: None if self._stopped else act())

    def _at_rest(self) -> None:
        if self.world.ended:
            self.control.stop()
        self.watch.at_rest(self)

    def _prove(
        self, folder: Path, options: EngineOptions, _seconds: float, base: Path | None, cancelled: Callable[[], bool],
        _memory_max: int | None,
    ) -> Proof:  # fmt: skip
        """What the child process does, here."""
        self.world.need_power()
        cancelled()
        try:
            manifest = read_manifest(folder)
            self.watch.proving(reference(folder))
            loaded = base or folder
            engine = open_engine(loaded, read_manifest(loaded), options)
            if base is not None:
                engine.attach(folder / manifest.files["adapter"].path)  # type: ignore[union-attr]
            count = golden.check(engine, folder, manifest)
        except (EngineError, BadRelease, OSError, ValueError) as error:
            raise ProveFailed(str(error)) from None
        return Proof(0.1, 0.1, count)

    def states(self) -> dict[str, State]:
        """target -> how its update stands, as it is saved."""
        return {target: State(record["state"]) for target, record in self.store.updates().items()}
