"""Holdouts: frozen before the first training, and from then on only ever longer.

    DATA_DIR/holdouts/MODEL.SET.jsonl    the ledger, one entry an image: its hash, its labels' hash, who labelled it, when

What a model has learned from, and so may not judge it, is in the ledger of trainings (`trainer.trained`).
Each entry holds the hash of the entry before it, so that none can be changed or taken out unseen; the images themselves
lie in the labelled folders that the configuration names (`target`: `holdout`, `base`: `holdout_clean`, `test`:
`holdout_test`) and are compared with the ledger before every use. Whoever replaces ledger and images together is found
by what the releases say that they were judged on (`check_releases`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from trainer.chain import START, read_chain, seal
from trainer.chain import locked as _locked
from trainer.config import Model, TrainerConfig
from trainer.core.neighbours import near
from trainer.core.provenance import confidence_of, refusal, taken_at
from trainer.core.split import Times, side
from trainer.datasets import LABELS, DatasetError, LabelledImage, append_folder, frozen_hash, read_folder
from trainer.files import write_whole
from trainer.releases import StoredRelease
from trainer.sketches import sketches_of
from trainer.trained import add_images, ledger_of, read_images

log = logging.getLogger(__name__)

# Set -> the configuration's key of its folder.
FOLDERS = {"target": "holdout", "base": "holdout_clean", "test": "holdout_test"}
GATE = ("target", "base")
NAMED_MAX = 5  # items named in one message


class HoldoutError(DatasetError):
    """A holdout was changed, or an image may not be in it; the message names the entry or image and the fix."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One frozen image. `labels` is the hash of its boxes; `frozen`: seconds since the epoch; `batch`: which freezing."""

    number: int
    batch: int
    sha256: str
    labels: str
    kind: str
    who: str
    release: str
    confidence: float
    device: str
    captured: float | None
    frozen: float
    previous: str
    hash: str = ""

    def sealed(self) -> str:
        """The hash of everything else in the entry, the hash before it too."""
        return seal(asdict(self))


@dataclass(frozen=True, slots=True)
class Taken:
    """What a freezing did: how many images are new, why others are not in (reason -> hashes), how many there are now, and
    the identity of the set."""

    added: int
    refused: dict[str, list[str]] = field(default_factory=dict)
    entries: int = 0
    identity: str = ""


def ledger_path(config: TrainerConfig, model: str, name: str) -> Path:
    """Where the ledger of a set lies; raises HoldoutError for a set that there is not."""
    if name not in FOLDERS:
        raise HoldoutError(f"holdout {name!r}: there is {', '.join(FOLDERS)}")
    return config.holdouts / f"{model}.{name}.jsonl"


def folder_of(settings: Model, name: str) -> Path | None:
    """The labelled folder of a set; None where the configuration names none."""
    folder: Path | None = getattr(settings, FOLDERS[name])
    return folder


def read_ledger(path: Path) -> list[Entry]:
    """The entries of a ledger, none when there is no file; raises HoldoutError naming the line that was changed."""
    return read_chain(
        path, lambda row: Entry(**row), lambda e: f"entry {e.number}, image {e.sha256[:12]}", HoldoutError
    )


def loose(path: Path, name: str, entries: Sequence[Entry], items: Sequence[LabelledImage]) -> list[LabelledImage]:
    """The images of the folder that the ledger does not have; raises HoldoutError for one that it has and that was
    changed or is gone."""
    there = {item.sha256: item for item in items}
    for entry in entries:
        item = there.get(entry.sha256)
        if item is None:
            raise HoldoutError(
                f"holdout {name} has changed: entry {entry.number}, image {entry.sha256[:12]} is gone from the folder; "
                f"put it back: what is frozen in {path} stays"
            )
        if _labels_hash(item) != entry.labels:
            raise HoldoutError(
                f"holdout {name} has changed: entry {entry.number}, image {entry.sha256[:12]} has other labels than when "
                "it was frozen; restore them: a gate that moves judges nothing"
            )
    frozen = {entry.sha256 for entry in entries}
    return [item for item in items if item.sha256 not in frozen]


def check_frozen(config: TrainerConfig, model: str, name: str, items: Sequence[LabelledImage], now: float) -> str:
    """The identity of a set that is about to judge; freezes it where nothing is frozen yet, which is before the first
    training. Raises HoldoutError when it was changed, or holds an image that may not judge."""
    path = ledger_path(config, model, name)
    with _locked(config.holdouts):
        entries = read_ledger(path)
        if not entries:
            _refuse_loose(path, items, _admit(config, model, name, items, offered=False))
            _append(path, entries, items, now)
            return frozen_hash(items)
    more = loose(path, f"{model}/{name}", entries, items)
    if more:
        raise HoldoutError(
            f"holdout {model}/{name} has changed: {len(more)} images ({more[0].sha256[:12]}...) are not frozen; run "
            f"`trainer holdout extend {model} --set {name}`, or take them out of the folder"
        )
    return frozen_hash(items)


def take(
    config: TrainerConfig, model: str, name: str, offered: Sequence[LabelledImage], now: float, *, first: bool
) -> Taken:
    """Freeze a set for the first time, or extend it: what lies in its folder, and what of `offered` may judge, which is
    copied there. Raises HoldoutError, DatasetError; a run that was killed is finished by the next."""
    path, folder = ledger_path(config, model, name), folder_of(config.model(model), name)
    if folder is None:
        raise HoldoutError(f"models.{model}.{FOLDERS[name]} is not set: name the folder that the set shall lie in")
    with _locked(config.holdouts):
        entries = read_ledger(path)
        if first and entries:
            raise HoldoutError(f"holdout {model}/{name} is frozen since its first entry: use `trainer holdout extend`")
        if not first and not entries:
            raise HoldoutError(f"holdout {model}/{name} is not frozen yet: use `trainer holdout freeze`")
        held = read_folder(folder) if (folder / LABELS).is_file() else []
        new = loose(path, f"{model}/{name}", entries, held)
        _refuse_loose(path, new, _admit(config, model, name, new, offered=False))
        known = {item.sha256 for item in held}
        reasons = _admit(config, model, name, offered, offered=True)
        refused: dict[str, list[str]] = {}
        for item, reason in zip(offered, reasons, strict=True):
            if reason or item.sha256 in known:
                refused.setdefault(reason or "duplicate", []).append(item.sha256)
            else:
                known.add(item.sha256)
                new.append(item)
        fresh = [item for item in new if item.sha256 not in {each.sha256 for each in held}]
        append_folder(folder, fresh)  # before the ledger: killed in between, the next run freezes what lies there
        _append(path, entries, new, now)
        return Taken(len(new), refused, len(entries) + len(new), frozen_hash([*held, *fresh]))


def remember(config: TrainerConfig, model: str, items: Sequence[LabelledImage]) -> int:
    """Note that the model is trained on these; how many were new. Raises LedgerError, SketchError,
    OSError."""
    with _locked(config.holdouts):
        return add_images(ledger_of(config, model), items)


def states(entries: Sequence[Entry], items: Sequence[LabelledImage]) -> set[str]:
    """The identity of the set after each freezing."""
    there = {item.sha256: item for item in items}
    upto, identities = [], set()
    for index, entry in enumerate(entries):
        upto.append(there[entry.sha256])
        if index + 1 == len(entries) or entries[index + 1].batch != entry.batch:
            identities.add(frozen_hash(upto))
    return identities


def check_releases(known: Set[str], name: str, releases: Sequence[StoredRelease]) -> list[str]:
    """The releases whose judges were in none of the states `known` of the set: it was replaced."""
    wrong = []
    for stored in releases:
        judged = (stored.manifest.evaluation.get("holdout_sha256") or {}).get(name)
        if judged is not None and judged not in known:
            wrong.append(stored.ref.release)
    return wrong


def _admit(config: TrainerConfig, model: str, name: str, items: Sequence[LabelledImage], *, offered: bool) -> list[str]:
    """Why each image may not be in the set; "" for one that may. What is not `offered` lies in the set's folder already:
    then it is the calibration that yields (trainer.train)."""
    if not items:
        return []
    settings = config.model(model)
    reasons = [refusal(model, item.provenance, settings.label_confidence_min) for item in items]
    for index, item in enumerate(items):
        if not reasons[index]:
            try:
                item.decode(settings.labels, settings.kind)
            except DatasetError:
                reasons[index] = "unusable"
    rows = [index for index, reason in enumerate(reasons) if not reason]
    kept = [items[index] for index in rows]
    for index, reason in zip(rows, _not_apart(config, model, name, kept, offered), strict=True):
        reasons[index] = reason
    return reasons


def _not_apart(
    config: TrainerConfig, model: str, name: str, items: Sequence[LabelledImage], offered: bool
) -> list[str]:
    """Why images that decode are not apart from training, calibration and the other sets."""
    settings = config.model(model)
    sketches = sketches_of(items)
    trained = read_images(ledger_of(config, model))
    replay = _folder(settings.replay)
    learned = (near(sketches, trained.sketches()) >= 0) | (near(sketches, sketches_of(replay)) >= 0)
    others = [each for other in FOLDERS if _other_side(other, name) for each in _folder(folder_of(settings, other))]
    if offered:
        others += _folder(settings.calibration)
    elsewhere = near(sketches, sketches_of(others)) >= 0
    times = Times(zip(trained.devices, trained.captured, strict=True))
    share = settings.test_share if name == "test" else settings.gate_share
    found = []
    for index, item in enumerate(items):
        device, captured = taken_at(item.provenance)
        if learned[index]:
            found.append("near_training")
        elif times.beside(device, captured, settings.split_guard_s):
            found.append("beside_training")
        elif elsewhere[index]:
            found.append("near_other_set")
        elif share and device and captured and not _falls(settings, item.sha256, device, captured, name):
            found.append("other_side")
        else:
            found.append("")
    return found


def _other_side(other: str, name: str) -> bool:
    return (other in GATE) != (name in GATE)


def _falls(settings: Model, digest: str, device: str, captured: float, name: str) -> bool:
    return side(settings.split_rules(), digest, device, captured) == ("test" if name == "test" else "gate")


def _folder(folder: Path | None) -> list[LabelledImage]:
    return read_folder(folder) if folder is not None and (folder / LABELS).is_file() else []


_FIXES = {
    "no_provenance": 'say who labelled it ("provenance": {"kind": "person", "who": ...}, or a model with its release)',
    "own_prediction": "it is the model's own prediction: have a person or another model label it",
    "below_label_confidence": "its label is below label_confidence_min: have a person look at it",
    "near_training": "the model has learned from it, or from nearly the same picture: a gate would only test memory",
    "beside_training": "the same device took a training image at nearly the same time",
    "near_other_set": "nearly the same picture calibrates, or is in the other set",
    "other_side": "by its device and time it is on another side of the split",
    "unusable": "it does not decode, has a label that the model does not have, or is not labelled as its kind of model "
    "needs (segment: an outline of each object, classify: one class)",
}


def _refuse_loose(path: Path, items: Sequence[LabelledImage], reasons: Sequence[str]) -> None:
    """Raise for images that lie in a holdout's folder and may not."""
    bad = [(item.sha256[:12], reason) for item, reason in zip(items, reasons, strict=True) if reason]
    if bad:
        shown = "; ".join(f"{digest}: {reason}, {_FIXES[reason]}" for digest, reason in bad[:NAMED_MAX])
        more = f" and {len(bad) - NAMED_MAX} more" if len(bad) > NAMED_MAX else ""
        raise HoldoutError(
            f"holdout {path.stem}: {len(bad)} of {len(items)} images may not judge: {shown}{more}. Correct them, or take "
            "them out of the folder"
        )


def _append(path: Path, entries: Sequence[Entry], items: Sequence[LabelledImage], now: float) -> None:
    """Write the ledger with these images added, whole or not at all."""
    previous = entries[-1].hash if entries else START
    batch = entries[-1].batch + 1 if entries else 0
    made = list(entries)
    for item in items:
        device, captured = taken_at(item.provenance)
        said = {key: str(item.provenance.get(key) or "") for key in ("kind", "who", "release")}
        entry = Entry(
            number=len(made), batch=batch, sha256=item.sha256, labels=_labels_hash(item), **said,
            confidence=confidence_of(item.provenance), device=device, captured=captured, frozen=now, previous=previous,
        )  # fmt: skip
        made.append(Entry(**{**asdict(entry), "hash": entry.sealed()}))
        previous = made[-1].hash
    if len(made) > len(entries):
        lines = (json.dumps(asdict(entry), sort_keys=True) for entry in made)
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def _labels_hash(item: LabelledImage) -> str:
    return frozen_hash([item])


def near_duplicates(items: Sequence[LabelledImage], others: Sequence[LabelledImage]) -> list[bool]:
    """For each image whether one of `others` is a near-duplicate; raises SketchError."""
    return [bool(each) for each in np.asarray(near(sketches_of(items), sketches_of(others)) >= 0)]
