"""A new configuration in a running daemon: validated whole, then applied, or refused whole while the old one stays.

Law: nothing is half applied. What can be known before is looked at before; what then fails while it is applied (a model
that does not load) costs that part alone, is said in an event, and everything else serves on. No item is lost: files stay
where they are, requests go to the pipeline that takes the place of theirs, or are answered with an error.

The file is looked at once a second instead of being watched: a file that an editor or a deployment replaces, a link that is
turned to another file and a network file system all show in `stat`, and not all of them in inotify.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged import config
from edged.config import ConfigError, Settings
from edged.connection import session_expiry_s, subscriptions
from edged.control import THREAD
from edged.core.reload import Change, compare
from edged.meaning import responding, store_limits
from edged.pipeline import Pipeline
from edged.sources import Item, Source
from edged.store import StoreError
from edged.within import within

if TYPE_CHECKING:
    from edged.daemon import Daemon

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the file; it is loaded when two of them see the same
STOP_S_MAX = 10.0  # for what a pipeline has in hand to be finished
REFUSED_CHARS_MAX = 4000  # of a reason in an event
Signature = tuple[int, int, int, int]


class Refused(Exception):
    """The new configuration is not taken on; the message says why and what to do."""


class Reloader:
    """Loads the configuration again when the file changes or somebody asks. All but `ask` on the control loop."""

    def __init__(self, path: Path | None, daemon: Daemon) -> None:
        """`path`: the file that the settings came from; None: there is none, and nothing is ever loaded again."""
        self._path, self._daemon = path, daemon  # and beside `path` the overrides that it names
        self._seen = self._pending = self._signature()
        self._looked = daemon.clock.monotonic()
        self._asked = False
        self.loaded_at = daemon.clock.now()
        self.refused = ""  # why the newest configuration is not in use; empty: it is

    def ask(self) -> None:
        """Load it, changed or not, at the next tick. May be called on any thread."""
        self._asked = True

    def status(self) -> dict[str, Any]:
        """What `edged status` shows."""
        path = None if self._path is None else str(self._path)
        return {"path": path, "loaded_at": self.loaded_at, "refused": self.refused or None}

    def tick(self) -> None:
        """Look whether there is something to load."""
        now = self._daemon.clock.monotonic()
        if self._path is None or (not self._asked and now - self._looked < LOOK_S):
            return
        self._looked = now
        signature = self._signature()
        if not self._asked and (signature == self._seen or signature != self._pending):
            self._pending = signature  # it is still being written, or nothing has happened
            return
        self._asked, self._seen = False, signature
        self._pending = signature
        self._daemon.herald.reloading()
        try:
            self._load(self._path)
        finally:
            self._daemon.herald.reloaded()

    def _signature(self) -> tuple[Signature | None, Signature | None]:
        return _signature(self._path), _signature(self._daemon.settings.device.overrides)

    def _load(self, path: Path) -> None:
        d = self._daemon
        try:
            new = config.load(path)
            change = decide(d.settings, new)
        except (ConfigError, Refused) as error:
            self._refuse(str(error))
            return
        self.refused, self.loaded_at = "", d.clock.now()
        if not change.keys:
            log.info("configuration: %s says what is in use already", path)
            return
        log.info("configuration: %s differs in %s", path, ", ".join(change.keys))
        try:
            Application(d, new, change).run()
        except Exception as error:  # a bug of ours, somewhere between the two configurations
            log.exception("configuration")
            self._refuse(f"it could not be applied whole ({type(error).__name__}: {error}): restart edged")
            return
        d.store.count("configs_loaded")
        d.control.say("config_loaded", f"{path}: {', '.join(change.keys)}", keys=list(change.keys))

    def begun_without(self, reason: str) -> None:
        """The daemon started without the overrides, because of this."""
        self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        d = self._daemon
        self.refused = reason[:REFUSED_CHARS_MAX]
        d.store.count("configs_refused")
        log.error("configuration: refused, the one before stays in use: %s", reason)
        d.control.say("config_refused", f"the configuration before stays in use: {self.refused}")


def _signature(path: Path | None) -> Signature | None:
    try:
        stat = path.stat() if path is not None else None
    except OSError:  # being replaced, or gone
        return None
    return None if stat is None else (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)


def decide(old: Settings, new: Settings) -> Change:
    """What `new` changes; raises Refused when this daemon cannot take it on."""
    change = compare(old.model_dump(mode="json"), new.model_dump(mode="json"))
    if change.restart:
        raise Refused(f"{', '.join(change.restart)} cannot change while edged runs: restart edged, or undo this change")
    reasons = [*_seeds(new, change), *_sources(new, change), *_responders(new)]
    if reasons:
        raise Refused("\n".join(reasons))
    return change


def _seeds(new: Settings, change: Change) -> Iterator[str]:
    """What can be told of a seed without reading all of it."""
    from edged.named import faults
    from edged.releases import BadRelease, read_manifest

    for name in (*change.slots.begun, *change.slots.adjusted):
        slot = new.slots[name]
        if slot.adapter is not None:
            yield from faults(name, slot.adapter)
        if slot.seed is None:
            continue
        try:
            manifest = read_manifest(slot.seed)
        except BadRelease as error:
            yield f"slots.{name}.seed: {error}"
            continue
        for entry in manifest.files.values():
            path = slot.seed / entry.path
            if not path.is_file() or path.stat().st_size != entry.bytes:
                yield f"slots.{name}.seed: {path}: not there with its {entry.bytes} bytes; copy the release folder again"
        if slot.isolation == "process" and manifest.kind != "llm":
            yield f'slots.{name}.isolation = "process": only language models run so, and the seed is of kind {manifest.kind}'


def _sources(new: Settings, change: Change) -> Iterator[str]:
    import importlib.util
    import os

    for name in change.pipelines.begun:
        source = new.pipelines[name].source
        if source.type == "directory":
            folder = next(f for f in (source.path, *source.path.absolute().parents) if f.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                yield f"pipelines.{name}.source.path = {str(source.path)!r}: {folder} is no folder that edged may write to"
        elif source.type == "rtsp" and importlib.util.find_spec("av") is None:
            yield f"pipelines.{name}.source: RTSP needs the package `av`: install edged with [rtsp]"
    folders: dict[Path, str] = {}
    for name, pipeline in new.pipelines.items():
        if pipeline.source.type == "directory":
            first = folders.setdefault(pipeline.source.path.absolute(), name)
            if first != name:
                yield f"pipelines.{name}.source.path is the folder of pipelines.{first} too: give each its own"


def _responders(new: Settings) -> Iterator[str]:
    seen: dict[tuple[str, str], str] = {}
    for name, responder in new.responders.items():
        first = seen.setdefault((responder.tier, responder.task), name)
        if first != name:
            yield f"responders.{name} answers the same tier and task as responders.{first}: remove one"


class Application:
    """One change, being applied."""

    def __init__(self, daemon: Daemon, new: Settings, change: Change) -> None:
        self._d, self._old, self._new, self._change = daemon, daemon.settings, new, change
        self._left: list[tuple[str | tuple[str, str], Item]] = []  # whose items they were, and what is to be done yet

    def run(self) -> None:
        """From the sources to the sinks, as a stop does; then the other way round."""
        d, change = self._d, self._change
        self._end()
        for name in change.slots.removed:
            d.updater.remove(name)
            d.slots.pop(name).stop()
            del d.slot_configs[name]
        for name in change.slots.added:
            d.slots[name] = d.make_slot(name)
        d.slot_configs.update(self._new.slots)
        d.settings = self._new
        d.store.limit(store_limits(self._new))
        d.updater.configure(self._new.host.fetch_retry_s)
        for name in change.slots.added:
            d.updater.add(name)
        for name in (*change.slots.changed, *change.slots.adjusted):
            d.updater.change(name, load=name in change.slots.changed)
        self._adjust()
        begun = self._begin()
        d.control.configure(self._new)
        d.link.subscribe(subscriptions(self._new))
        d.link.keep_session(session_expiry_s(self._new))
        self._hand_over()
        self._start_sources(begun)

    def _end(self) -> None:
        """End the sources and pipelines that go, all at once; keep what they had not finished."""
        d, change = self._d, self._change
        sources = {name: d.sources.pop(name) for name in change.pipelines.ended if name in d.sources}
        pipelines: list[tuple[str | tuple[str, str], Pipeline]] = [
            *((name, d.pipelines.pop(name)) for name in change.pipelines.ended),
            *((key, d.responders.pop(key)) for key in map(self._key_before, change.responders.ended)),
        ]
        for _, pipeline in pipelines:
            pipeline.finish()
        hung: list[str] = []
        for name, source in sources.items():
            if not within(STOP_S_MAX, f"source of {name}", source.stop):
                hung.append(f"source of {name}")
            d.beats.beat(THREAD)
        for key, pipeline in pipelines:
            self._left += [(key, item) for item in pipeline.stop(STOP_S_MAX)]
            hung += pipeline.running()
            d.beats.beat(THREAD)
        if hung:  # they end after what they have in hand, and touch nothing of what comes now
            d.store.count("threads_left_behind", len(hung))
            log.error("configuration: still at work after %.0f s: %s", STOP_S_MAX, ", ".join(hung))

    def _key_before(self, name: str) -> tuple[str, str]:
        return self._old.responders[name].tier, self._old.responders[name].task

    def _adjust(self) -> None:
        """Those that go on read their configuration. The policy that holds is made of it by the control loop."""
        d, change = self._d, self._change
        for name in change.pipelines.adjusted:
            d.pipelines[name].config = self._new.pipelines[name]
        for name in change.responders.adjusted:
            pipeline = d.responders[self._key_before(name)]
            responder = self._new.responders[name]
            pipeline.config = responding(responder)
            pipeline.policy = replace(
                responder.policy, escalate=responder.policy.escalate and bool(responder.escalate_to)
            )

    def _begin(self) -> list[tuple[str, Source]]:
        """The pipelines that come, running, and their sources, which are not."""
        d, change = self._d, self._change
        sources = []
        for name in change.pipelines.begun:
            pipeline = d.make_pipeline(name, self._new)
            pipeline.start()
            d.pipelines[name] = pipeline
            source = d.make_source(name, self._new)
            if source is not None:
                sources.append((name, source))
        for name in change.responders.begun:
            pipeline = d.make_responder(name, self._new)
            pipeline.start()
            d.responders[self._new.responders[name].tier, self._new.responders[name].task] = pipeline
        return sources

    def _hand_over(self) -> None:
        """Requests that nobody has answered go on in the pipeline of the same name."""
        d = self._d
        for key, item in self._left:
            if item.request is None and item.asked is None:
                continue  # its source has it still, and brings it again
            pipeline = d.pipelines.get(key) if isinstance(key, str) else d.responders.get(key)
            takes = pipeline is not None and (item.asked is not None or pipeline.config.source.type == "mqtt")
            if takes and pipeline is not None and pipeline.offer(item):
                d.store.count("requests_handed_over")
                continue
            try:
                self._turn_away(item, "busy" if takes else "the configuration has no such pipeline any more")
            except StoreError as error:  # not acknowledged: it comes again with the next connection
                d.store.count("store_errors")
                log.error("configuration: %s: %s", item.name, error)

    def _turn_away(self, item: Item, reason: str) -> None:
        d = self._d
        if item.request is not None:
            d.store.count("requests_refused")
            prompt = (item.prompt and item.prompt.prompt) or None
            d.control.answer(item.request, error=f"{reason}; ask again later", generation_prompt=prompt)
        else:
            d.store.count("escalations_unanswered")  # its owner keeps the question and asks again
        item.settle("")

    def _start_sources(self, sources: list[tuple[str, Source]]) -> None:
        d = self._d
        for name, source in sources:
            try:
                source.start()
            except Exception as error:  # of whatever kind a source has; the others serve on
                log.exception("pipeline %s: its source does not start", name)
                d.store.count("sources_not_started")
                d.control.say("source_not_started", f"{name}: {error}", pipeline=name)
                source.stop()
                continue
            d.sources[name] = source
