"""The adapters that the configuration names, as the updater wants them: below a person's word and below the fleet's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edged.config import Slot
from edged.releases import BadRelease, Releases, read_manifest, reference
from edged.update_record import Record
from edged.wire.manifest import ReleaseRef

log = logging.getLogger(__name__)


class Named:
    """`configs`: the slots as they are configured now, which change under it."""

    def __init__(self, configs: Mapping[str, Slot], say: Callable[..., None]) -> None:
        self._configs, self._say = configs, say
        self._known: dict[str, tuple[Path, ReleaseRef | None]] = {}  # slot -> what its folder was found to hold

    def adapter(self, slot: str) -> ReleaseRef | None:
        """The adapter that this slot's configuration names; None: none, or none that can be read, which is said once."""
        config = self._configs.get(slot)
        folder = config.adapter if config is not None else None
        if folder is None:
            return None
        known = self._known.get(slot)
        if known is None or known[0] != folder:
            known = self._known[slot] = folder, self._read(slot, folder)
        return known[1]

    def look_again(self, slot: str) -> None:
        """The slot's configuration is another: its folder may be too."""
        self._known.pop(slot, None)

    def _read(self, slot: str, folder: Path) -> ReleaseRef | None:
        wrong = next(iter(faults(slot, folder)), None)
        if wrong is None:
            return reference(folder)
        log.error("%s", wrong)
        self._say("bad_adapter", wrong)
        return None


def bring(releases: Releases, config: Slot, record: Record) -> None:
    """An adapter that the configuration names lies on this machine: copy it in. Whether it is trusted is asked as of any
    other. Raises BadRelease, OSError."""
    source = config.adapter
    if record.is_adapter and source is not None and record.candidate == record.named == reference(source):
        releases.install(source)


def faults(slot: str, folder: Path) -> Iterator[str]:
    """What can be told of the release folder of an adapter without reading all of it."""
    try:
        manifest = read_manifest(folder)
    except BadRelease as error:
        yield f"slots.{slot}.adapter: {error}"
        return
    if manifest.kind != "lora" or manifest.base is None or "adapter" not in manifest.files:
        yield f"slots.{slot}.adapter: {folder}: a release of kind {manifest.kind}; name the release of a LoRA adapter"
    for entry in manifest.files.values():
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes:
            yield f"slots.{slot}.adapter: {path}: not there with its {entry.bytes} bytes; copy the release folder again"
