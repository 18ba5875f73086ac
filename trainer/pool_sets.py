"""The pool as training takes it: labelled images, and a manifest by ids with a folder of pixels named by their hash."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer.core.labels import names
from trainer.datasets import LabelledBox, LabelledImage
from trainer.files import write_whole
from trainer.formats.base import size_of
from trainer.pool import Pool, PoolError, Record, Wanted


@dataclass(frozen=True, slots=True)
class Images:
    """Images with the label that counts, and why others were left out, counted."""

    items: list[LabelledImage]
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class Listed:
    """A manifest, and why images of the pool are not in it, counted."""

    manifest: TrainingManifest
    left_out: dict[str, int]


def labelled_images(
    pool: Pool, wanted: Wanted, *, labels: Collection[str] | None = None, confidence_floor: float = 0.0
) -> Images:
    """The images of the pool with boxes, outlines and provenance; a classification is a box around the whole image.

    Left out and counted: what `Pool.labelled` leaves out, texts, classes that are not in `labels`, damaged objects.
    """
    chosen = pool.labelled(wanted, confidence_floor=confidence_floor)
    left_out, items = dict(chosen.left_out), []
    for record in chosen.records:
        reason = _unfit(record, labels)
        if not reason:
            try:
                data = pool.read(record.sha256)
                boxes = tuple(_labelled(row) for row in _boxes(record, data))
                items.append(LabelledImage(record.sha256, data, boxes, record.provenance()))
                continue
            except PoolError:
                reason = "object_bad"
        left_out[reason] = left_out.get(reason, 0) + 1
    return Images(items, left_out)


def training_manifest(
    pool: Pool, wanted: Wanted, *, source: str, target: str, created: str, config: dict[str, Any],
    labels: Collection[str] | None = None, confidence_floor: float = 0.0,
) -> Listed:  # fmt: skip
    """A manifest of the wanted labels, by the ids of their records; its job is named by what is in it.

    Left out and counted as in `labelled_images`, but texts are in.
    """
    chosen = pool.labelled(wanted, confidence_floor=confidence_floor)
    left_out, rows = dict(chosen.left_out), []
    for record in chosen.records:
        reason = "" if record.task == "text" else _unfit(record, labels)
        if not reason:
            try:
                label = {"boxes": _boxes(record, pool.read(record.sha256)), "confidence": record.confidence}
                said = record.provenance() | {"asked_by": ""}
                sample = TrainingSample(
                    id=record.id, device=record.device, sha256=record.sha256, label=label, provenance=said
                )
                rows.append(sample)
                continue
            except PoolError:
                reason = "object_bad"
        left_out[reason] = left_out.get(reason, 0) + 1
    mark = sha256("\n".join(row.id for row in rows).encode()).hexdigest()[:12]
    manifest = TrainingManifest(
        job=f"{wanted.model}-pool-{mark}", model=wanted.model, source=source, target=target, created=created,
        config=config, samples=rows,
    )  # fmt: skip
    return Listed(manifest, left_out)


def copy_objects(pool: Pool, manifest: TrainingManifest, folder: Path) -> int:
    """Put a manifest's pixels into `folder`, each named by its hash (as `trainer train --samples` takes them), for a
    training on another host. Raises PoolError, OSError. Returns how many."""
    digests = sorted({sample.sha256 for sample in manifest.samples})
    for digest in digests:
        data = pool.read(digest)
        # Copies, no links: who changes a file there must not change the pool's.
        if not (folder / digest).is_file() or (folder / digest).read_bytes() != data:
            write_whole(folder / digest, data)
    return len(digests)


def _unfit(record: Record, labels: Collection[str] | None) -> str:
    if record.task == "text":
        return "text"
    return "unknown_label" if labels is not None and names(record.label) - set(labels) else ""


def _boxes(record: Record, data: bytes) -> list[dict[str, Any]]:
    if record.task != "classify":
        return [dict(row) for row in record.label]
    size = size_of(data)
    if size is None:
        raise PoolError(f"record {record.id}: its {len(data)} bytes do not decode as a picture")
    return [{**row, "box": [0.0, 0.0, float(size[0]), float(size[1])]} for row in record.label]


def _labelled(row: Mapping[str, Any]) -> LabelledBox:
    x1, y1, x2, y2 = row["box"]
    return LabelledBox(row["label"], (x1, y1, x2, y2), tuple(tuple(part) for part in row.get("polygons", ())))
