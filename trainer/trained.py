"""The ledger of what has trained: which samples a training of a model has had, and every image that it has learned from.

    DATA_DIR/trained/MODEL/RUN-HASH.begun.json    a training began: its samples
    DATA_DIR/trained/MODEL/RUN-HASH.ended.json    it was judged: it passed, or was refused
    DATA_DIR/trained/MODEL/images-000001.npz      images that were learned from and are in no file before it

Law of this file: a record is written whole, once, and never changed or removed. A training that is begun again, or whose
end is told twice, writes nothing new. `trainer ready` counts by the first two (`had`), holdouts are kept apart from the
third (`read_images`): pixels leave this host when a job has ended (the devices keep them), and their thumbnails stay.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edged.wire.manifest import TrainingManifest
from trainer.config import TrainerConfig
from trainer.core.neighbours import SIDE, Sketches
from trainer.core.provenance import taken_at
from trainer.files import write_json, write_whole
from trainer.jobfile import JobError

if TYPE_CHECKING:
    from trainer.sketches import Item

log = logging.getLogger(__name__)

BEGUN_MAX = 3  # trainings of a sample that were never judged: after these it calls for no further one
IMAGES_MAX = 1_000_000  # of the newest that are compared with: a kilobyte each
_NAME_MAX = 80  # characters of a run's name in a file's
_BEGUN, _ENDED, _IMAGES = ".begun.json", ".ended.json", "images-"


class LedgerError(JobError):
    """A record of the ledger cannot be read; the message names it."""


@dataclass(frozen=True, slots=True)
class Images:
    """What a model has learned from: hashes, thumbnails (n, SIDE, SIDE) as whole grey levels, devices and times."""

    sha256: tuple[str, ...]
    grey: NDArray[np.uint8]
    devices: tuple[str, ...]
    captured: tuple[float, ...]  # 0: not known

    def sketches(self) -> Sketches:
        """Ready to be compared."""
        return Sketches(self.grey.astype(np.float32))


def ledger_of(config: TrainerConfig, model: str) -> Path:
    """The folder of a model's ledger."""
    return config.data_dir / "trained" / model


def begun(config: TrainerConfig, model: str, manifest: TrainingManifest) -> None:
    """A training of these samples begins: said before the model has seen one of them. Raises OSError."""
    path = _record(config, model, manifest, _BEGUN)
    if not path.is_file():
        samples = sorted({each.sha256 for each in manifest.samples})
        write_json(path, {"job": manifest.job, "target": manifest.target, "samples": samples})


def ended(config: TrainerConfig, model: str, manifest: TrainingManifest, outcome: str, now: float) -> None:
    """It came to its end at `now` (seconds since the epoch): judged, its samples are used. Raises OSError.

    One that failed says nothing of its samples: it stays a try of theirs when it had begun, and is none when it had not.
    """
    if outcome == "failed":
        return
    begun(config, model, manifest)
    path = _record(config, model, manifest, _ENDED)
    if not path.is_file():
        write_json(path, {"job": manifest.job, "outcome": outcome, "ts": now})


def had(config: TrainerConfig, model: str) -> set[str]:
    """The samples (SHA-256) that call for no further training: some training that was judged has had them, or BEGUN_MAX
    that were not. Raises LedgerError."""
    used: set[str] = set()
    tries: Counter[str] = Counter()
    for path in sorted(ledger_of(config, model).glob(f"*{_BEGUN}")):
        try:
            samples = [str(each) for each in json.loads(path.read_bytes())["samples"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{path}: {error}; it says what was trained on: restore it from a copy") from None
        if path.with_name(path.name.removesuffix(_BEGUN) + _ENDED).is_file():
            used.update(samples)
        else:
            tries.update(samples)
    return used | {sample for sample, count in tries.items() if count >= BEGUN_MAX}


def read_images(folder: Path) -> Images:
    """All images in the ledger at `folder`, the newest IMAGES_MAX. Raises LedgerError."""
    parts = [_read(path) for path in _files(folder)]
    if not parts:
        return Images((), np.zeros((0, SIDE, SIDE), np.uint8), (), ())
    found = Images(
        tuple(each for part in parts for each in part.sha256)[-IMAGES_MAX:],
        np.concatenate([part.grey for part in parts])[-IMAGES_MAX:],
        tuple(each for part in parts for each in part.devices)[-IMAGES_MAX:],
        tuple(each for part in parts for each in part.captured)[-IMAGES_MAX:],
    )
    left_out = sum(len(part.sha256) for part in parts) - len(found.sha256)
    if left_out:
        log.warning("%s: holdouts are not compared with the oldest %d images that were trained on", folder, left_out)
    return found


def add_images(folder: Path, items: Iterable[Item]) -> int:
    """Add images to the ledger at `folder`, each once; how many were new. One process at a time (`trainer.holdout`).

    Raises LedgerError, SketchError, OSError.
    """
    from trainer.sketches import sketch_file

    known, fresh = set(_hashes(folder)), []
    for item in items:
        if item.sha256 not in known:
            known.add(item.sha256)
            fresh.append(item)
    if not fresh:
        return 0
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda item: sketch_file(item.sha256, item.data), fresh))
    taken = [taken_at(item.provenance) for item in fresh]
    out = io.BytesIO()
    np.savez_compressed(
        out,
        sha256=np.array([item.sha256 for item in fresh], dtype="U64"),
        grey=np.rint(np.stack(made)).astype(np.uint8),
        devices=np.array([device for device, _ in taken], dtype=str),
        captured=np.array([captured or 0.0 for _, captured in taken], dtype=np.float64),
    )
    number = max((int(path.stem.removeprefix(_IMAGES)) for path in _files(folder)), default=0) + 1
    write_whole(folder / f"{_IMAGES}{number:06d}.npz", out.getvalue())
    return len(fresh)


def _record(config: TrainerConfig, model: str, manifest: TrainingManifest, kind: str) -> Path:
    """The file of a record: the same for the same run of the same samples, and for no other."""
    samples = sorted({each.sha256 for each in manifest.samples})
    digest = sha256(json.dumps([manifest.job, samples]).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", manifest.job)[:_NAME_MAX]
    return ledger_of(config, model) / f"{name}-{digest[:16]}{kind}"


def _files(folder: Path) -> list[Path]:
    """The files of images, the oldest first."""
    return sorted(folder.glob(f"{_IMAGES}[0-9]*.npz"))


def _hashes(folder: Path) -> Iterator[str]:
    for path in _files(folder):
        yield from _arrays(path, "sha256")["sha256"].tolist()


def _read(path: Path) -> Images:
    held = _arrays(path, "sha256", "grey", "devices", "captured")
    return Images(
        tuple(held["sha256"].tolist()), held["grey"], tuple(held["devices"].tolist()), tuple(held["captured"].tolist())
    )


def _arrays(path: Path, *names: str) -> dict[str, Any]:
    """Some of a file's arrays; whatever is wrong with it is a LedgerError."""
    try:
        with np.load(path, allow_pickle=False) as held:
            found = {name: held[name] for name in names}
        if len({len(values) for values in found.values()}) != 1:
            raise ValueError("its parts have different lengths")
    except Exception as error:  # zip, zlib, numpy and key errors: all say that the file is damaged
        raise LedgerError(
            f"{path}: {error}; it says what was trained on: restore it, or remove it and begin the holdout anew"
        ) from None
    return found
