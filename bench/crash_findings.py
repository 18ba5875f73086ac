"""What lies on a device's disk after it was ended: every acknowledged sample once, every file as its hash says."""

from __future__ import annotations

import re
from pathlib import Path

import cv2

from edged.files import sha256_of
from edged.releases import BadRelease, Releases, verify
from edged.store import Sample, Store
from edged.store.integrity import set_asides
from edged.update_record import Record
from tests.support.models import PLAIN, STRANGE

LEFT = (".part", ".new", ".tmp")
MEANS_IT = (PLAIN + STRANGE) / 2  # between a picture that is asked about and one that is not


NOT_KEPT = re.compile(r"pipeline \S+: (\S+): not kept as a sample")  # which a device says when its disk is full


def findings(state: Path, inbox: Path, log: str) -> dict[str, int]:
    """How often each thing that must not be was found; the device does not run. `log`: all that it has said."""
    # By its log and not by its counter: a kill takes what was counted in the last second with it.
    not_kept = set(NOT_KEPT.findall(log))
    store = Store(state)
    try:
        samples = list(store.samples(limit=1 << 30))
        verified = store.verify()
        records = [Record.model_validate(record) for record in store.updates().values()]
    finally:
        store.close()
    by_item: dict[str, list[Sample]] = {}
    for sample in samples:
        by_item.setdefault(sample.item, []).append(sample)
    missing = wrong = 0
    for path in (inbox / "done").iterdir():
        image = cv2.imread(str(path))
        if path.name.endswith("-good.png") and image is not None and image.mean() > MEANS_IT:
            missing += path.name not in by_item and path.name not in not_kept
            wrong += any(sample.sha256 != sha256_of(path) for sample in by_item.get(path.name, []))
    releases = Releases(state / "releases")
    damaged = 0
    for ref in (ref for record in records for ref in (record.active, record.previous) if ref is not None):
        try:
            verify(releases.folder(ref), ref)
        except BadRelease:
            damaged += 1
    blobs = {path.name for path in (state / "blobs").rglob("*") if path.is_file()}
    return {
        "acknowledged pictures without a sample": missing,
        "samples twice": sum(len(found) > 1 for item, found in by_item.items() if item),
        "samples with other bytes than their picture": wrong,
        "blobs that are not what their hash says": len(verified.bad_blobs),
        "half files among the blobs": sum(name.endswith(LEFT) for name in blobs),
        "samples whose blob is gone": sum(sample.sha256 not in blobs for sample in samples if sample.bytes),
        "damaged releases": damaged,
        "databases set aside": len(set_asides(state)),
    }
