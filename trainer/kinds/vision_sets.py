"""The images of a vision model's training: which train, stop, calibrate and judge, each in one set only."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.config import Model
from trainer.datasets import (
    Apart,
    DatasetError,
    LabelledImage,
    Selected,
    choose_replay,
    hold_back,
    read_folder,
    select_samples,
)
from trainer.evaluate import Labelled, image_sha256
from trainer.holdout import check_frozen, near_duplicates
from trainer.jobfile import TrainJob

if TYPE_CHECKING:
    from trainer.tuners.yolo import Example

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sets:
    """All images of a job, apart from each other. `validation` and `validation_replay` are of the training side, new and
    old ones: they say when to stop."""

    selected: Selected
    validation: list[LabelledImage]
    replay: list[LabelledImage]
    validation_replay: list[LabelledImage]
    calibration: list[LabelledImage]
    target: list[LabelledImage]
    base: list[LabelledImage]
    holdout_sha256: dict[str, str]


def read_sets(job: TrainJob, settings: Model) -> Sets:
    """All images of a job, no image in two sets; raises DatasetError where the configured folders overlap."""
    target, base = read_folder(settings.holdout), read_folder(settings.holdout_clean)
    test = read_folder(settings.holdout_test) if settings.holdout_test is not None else []
    sets = {"target": target, "base": base, **({"test": test} if test else {})}
    hashes = {name: check_frozen(job.config, job.model, name, items, time.time()) for name, items in sets.items()}
    judges = [*target, *base, *test]
    held_out = frozenset(item.sha256 for item in judges)
    folder = read_folder(settings.calibration)
    shared = [item for item in folder if item.sha256 in held_out]
    if shared:
        raise DatasetError(
            f"{settings.calibration}: {len(shared)} of its images are in a holdout ({shared[0].sha256[:12]}...): "
            "what calibrates cannot judge; take them out of one of the two"
        )
    past = read_folder(settings.replay) if settings.replay is not None else []
    trained = {item.sha256 for item in past}.intersection(item.sha256 for item in folder)
    if trained:
        raise DatasetError(
            f"{settings.calibration}: {len(trained)} of its images are in {settings.replay} ({min(trained)[:12]}...): "
            "on what the weights have learned they look surer than they are; take them out of the calibration"
        )
    again = near_duplicates(folder, judges)
    if any(again):
        log.warning("%d calibration images are left out: nearly the same pictures are in a holdout", sum(again))
        folder = [item for item, known in zip(folder, again, strict=True) if not known]
    selected = select_samples(
        job.manifest,
        job.samples,
        labels=settings.labels,
        confidence_min=settings.label_confidence_min,
        held_out=held_out | frozenset(item.sha256 for item in folder),
        calibration_share=settings.calibration_share,
        apart=Apart(judges, folder, settings.split_guard_s),
        split=settings.split_rules(),
        thin=settings.near_duplicates == "thin",
        kind=settings.kind,
    )
    count = round(settings.replay_ratio * len(selected.training))
    apart = [*judges, *folder, *selected.calibration]
    excluded = frozenset(item.sha256 for item in [*apart, *selected.training])
    replay = choose_replay(past, count, settings.seed, excluded, apart)
    found = Sets(selected, [], replay, [], [*folder, *selected.calibration], target, base, hashes)
    return _stopped_by_a_share(found, settings) if settings.patience else found


def _stopped_by_a_share(sets: Sets, settings: Model) -> Sets:
    """The same sets, but that a share of what would train says when to stop: of the old images too, because by new ones
    alone the epoch that forgot most would look best."""
    rules, share = settings.split_rules(), settings.validation_share
    new, validation = hold_back(sets.selected.training, share, rules)
    if not validation:
        log.warning(
            "patience = %d: all of %d epochs are trained, because none of %d new images can be held back: they are nearly "
            "the same, or were taken together; give more", settings.patience, settings.epochs, len(new),
        )  # fmt: skip
        return sets
    again = near_duplicates(sets.replay, validation)
    fresh = [item for item, known in zip(sets.replay, again, strict=True) if not known]
    replay, old = hold_back(fresh, share, rules)
    trains = near_duplicates(old, new)
    replay += [item for item, known in zip(old, trains, strict=True) if known]
    old = [item for item, known in zip(old, trains, strict=True) if not known]
    selected = replace(sets.selected, training=new)
    return replace(sets, selected=selected, validation=validation, replay=replay, validation_replay=old)


def examples(items: list[LabelledImage], settings: Model, replayed: frozenset[str] = frozenset()) -> list[Example]:
    """What the tuner reads; `replayed` are the hashes of what the base has learned from."""
    from trainer.tuners.yolo import Example

    found = []
    for item in items:
        truth = item.decode(settings.labels, settings.kind)
        boxes = truth.boxes if settings.kind == "detect" else None
        old = item.sha256 in replayed
        found.append(Example(item.sha256, item.data, truth.classes, boxes, truth.outlines, old))
    return found


def untrained(items: list[LabelledImage], trained: list[LabelledImage], settings: Model) -> list[Labelled]:
    """The calibration's images, decoded, without those whose pixels were trained on under another file's hash."""
    known = {image_sha256(item.decode(settings.labels, settings.kind).image) for item in trained}
    decoded = [item.decode(settings.labels, settings.kind) for item in items]
    fresh = [item for item in decoded if image_sha256(item.image) not in known]
    if len(fresh) < len(decoded):
        log.warning("%d calibration images are left out: their pixels are trained on", len(decoded) - len(fresh))
    return fresh


def provenance(items: list[LabelledImage]) -> dict[str, int]:
    """How many labels came from whom: "person ann", "model yolo-big"."""
    counts: dict[str, int] = {}
    for item in items:
        who = f"{item.provenance.get('kind', 'unknown')} {item.provenance.get('who', '')}".strip()
        counts[who] = counts.get(who, 0) + 1
    return dict(sorted(counts.items()))
