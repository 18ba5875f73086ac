"""How good the labels of a model are, before anybody trains on them: who says what, how sure, who disagrees, what repeats.

Reads, judges nothing away: what training leaves out is decided by `trainer.datasets`, by the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any, Protocol

from sqlalchemy import Connection, select

from trainer.core.neighbours import groups, members, stack
from trainer.core.provenance import Rows, agree, confidence_of, dissent, is_disputed, is_own
from trainer.database import samples as table
from trainer.datasets import LabelledImage
from trainer.fleet import opinions_of
from trainer.sketches import SketchError, sketch_file

EXAMPLES_MIN = 300  # of a class, below which a detector hardly learns it
SHOWN_MAX = 20  # disagreements and groups that are listed; all are counted
STATES = ("labelled", "claimed", "used", "archived")  # in which a sample has a label

Pixels = Callable[[str], bytes | None]  # an image file's bytes by their hash; None: not here


@dataclass(frozen=True, slots=True)
class Sample:
    """A labelled sample: `label` as in `core.provenance`, `confidence` of the label."""

    id: str
    sha256: str
    device: str
    label: Rows
    confidence: float
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two opinions on one sample that say different things. `disputed`: it does not train until a person decides."""

    sample: str
    sha256: str
    label_by: str
    label_confidence: float
    other_by: str
    other_confidence: float
    disputed: bool


@dataclass(slots=True)
class Report:
    """Everything that `trainer samples report` says. Counts are of samples, but of boxes (or texts) in `classes`."""

    model: str
    samples: int = 0
    provenance: list[dict[str, Any]] = field(default_factory=list)
    confidence_min: float = 0.0
    below_floor: int = 0
    own_predictions: int = 0
    disagreements: int = 0
    disputed: int = 0
    disagreement_list: list[Disagreement] = field(default_factory=list)
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    imbalance: float | None = None
    absent: list[str] = field(default_factory=list)
    few: list[str] = field(default_factory=list)
    too_few_to_judge: list[str] = field(default_factory=list)
    examples_min: int = EXAMPLES_MIN
    class_boxes_min: int = 0
    devices: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Statement(Protocol):
    """What somebody said about pixels: a pool's record."""

    @property
    def id(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def label(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def confidence(self) -> float: ...
    @property
    def verdict(self) -> str: ...
    def provenance(self) -> dict[str, Any]: ...


def from_database(connection: Connection, model: str) -> list[Sample]:
    """The samples of a model that have a label, as the devices' catalogues say."""
    query = (
        select(table).where(table.c.model == model, table.c.state.in_(STATES)).order_by(table.c.captured, table.c.id)
    )
    rows = connection.execute(query).all()
    said = opinions_of(connection, [row.id for row in rows])
    return [
        Sample(
            row.id, row.sha256, row.device, row.label, row.label_confidence,
            {**(row.provenance or {}), "opinions": said.get(row.id, [])},
        )
        for row in rows
    ]  # fmt: skip


def from_folder(items: Iterable[LabelledImage]) -> list[Sample]:
    """The images of a labelled folder."""
    return [
        Sample(
            str(item.provenance.get("sample") or item.sha256[:12]), item.sha256, str(item.provenance.get("device") or ""),
            [{"label": box.label, "box": list(box.box)} for box in item.boxes], confidence_of(item.provenance),
            item.provenance,
        )
        for item in items
    ]  # fmt: skip


def from_statements(given: Iterable[Statement]) -> list[Sample]:
    """What a pool holds, but for what people rejected."""
    return [
        Sample(each.id, each.sha256, each.device, each.label, each.confidence, each.provenance())
        for each in given
        if each.verdict != "rejected"
    ]


def report(
    model: str,
    samples: Sequence[Sample],
    pixels: Pixels,
    *,
    labels: Sequence[str],
    confidence_min: float,
    class_boxes_min: int,
) -> Report:
    """What there is to know; `labels` are the model's classes, `pixels` gives what of the images is here."""
    found = Report(model, len(samples), confidence_min=confidence_min, class_boxes_min=class_boxes_min)
    found.provenance = _by_labeller(samples)
    found.below_floor = sum(not sample.confidence >= confidence_min for sample in samples)
    found.own_predictions = sum(is_own(model, sample.provenance, sample.device) for sample in samples)
    listed = _disagreements(samples, confidence_min)
    found.disagreements, found.disputed = len(listed), sum(each.disputed for each in listed)
    found.disagreement_list = sorted(listed, key=lambda each: (not each.disputed, each.sample))[:SHOWN_MAX]
    found.near_duplicates = _near_duplicates(samples, pixels)
    _balance(found, samples, labels)
    found.devices = _by_device(samples, confidence_min)
    return found


def _labeller(provenance: Mapping[str, Any]) -> tuple[str, str, str]:
    return tuple(str(provenance.get(key) or "") for key in ("kind", "who", "release"))  # type: ignore[return-value]


def _named(provenance: Mapping[str, Any]) -> str:
    kind, who, release = _labeller(provenance)
    return " ".join(part for part in (kind, release or who) if part) or "unknown"


def _by_labeller(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Who labelled how many, and how sure he was; the most first."""
    sure: dict[tuple[str, str, str], list[float]] = {}
    for sample in samples:
        sure.setdefault(_labeller(sample.provenance), []).append(sample.confidence)
    rows = [
        {"kind": kind or "unknown", "who": who, "release": release, "samples": len(values)}
        | {"confidence_mean": round(fmean(values), 4), "confidence_min": round(min(values), 4)}
        for (kind, who, release), values in sure.items()
    ]
    return sorted(rows, key=lambda row: (-row["samples"], row["kind"], row["who"], row["release"]))


def _disagreements(samples: Sequence[Sample], confidence_min: float) -> list[Disagreement]:
    """Opinions on the way to a label that say something else, and labels of the same pixels that do."""
    found = []
    for sample in samples:
        others = dissent(sample.label, sample.provenance, confidence_min)
        disputed = is_disputed(sample.label, sample.provenance, sample.confidence, confidence_min)
        for other in others:
            found.append(_between(sample, _named({"kind": "model", **other}), confidence_of(other), disputed))
    alike: dict[str, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(sample.sha256, []).append(sample)
    for several in alike.values():
        for first, second in combinations(several, 2):
            sure = min(first.confidence, second.confidence) >= confidence_min
            if sure and not _same(first.label, second.label):
                person = "person" in (first.provenance.get("kind"), second.provenance.get("kind"))
                found.append(_between(first, _named(second.provenance), second.confidence, not person))
    return found


def _same(first: Rows, second: Rows) -> bool:
    try:
        return agree(first, second)
    except (KeyError, TypeError, ValueError):  # a classifier's label has no box
        return sorted(str(row.get("label")) for row in first) == sorted(str(row.get("label")) for row in second)


def _between(sample: Sample, other: str, confidence: float, disputed: bool) -> Disagreement:
    return Disagreement(
        sample.id, sample.sha256, _named(sample.provenance), sample.confidence, other, confidence, disputed
    )


def _near_duplicates(samples: Sequence[Sample], pixels: Pixels) -> dict[str, Any]:
    """Groups of pictures that look the same, among those whose pixels are here and decode."""
    first = {sample.sha256: sample for sample in reversed(samples)}
    names, thumbnails, absent = [], [], 0
    for digest, sample in sorted(first.items(), key=lambda pair: pair[1].id):
        data = pixels(digest)
        try:
            if data is None:
                raise SketchError("not here")
            thumbnails.append(sketch_file(digest, data))
            names.append(sample.id)
        except SketchError:
            absent += 1
    found = sorted(members(groups(stack(thumbnails))), key=lambda group: (-len(group), group))
    return {
        "compared": len(names),
        "not_compared": absent,
        "groups": len(found),
        "repeats": sum(len(group) - 1 for group in found),
        "largest": [[names[index] for index in group[:SHOWN_MAX]] for group in found[:SHOWN_MAX]],
    }


def _balance(found: Report, samples: Sequence[Sample], labels: Sequence[str]) -> None:
    examples, images = Counter[str](), Counter[str]()
    for sample in samples:
        named = [str(row["label"]) for row in sample.label if "label" in row]
        examples.update(named)
        images.update(set(named))
    names = [*labels, *sorted(set(examples) - set(labels))]
    found.classes = {name: {"examples": examples[name], "images": images[name]} for name in names}
    there = [count for count in examples.values() if count]
    found.imbalance = round(max(there) / min(there), 2) if there else None
    found.absent = [name for name in names if not examples[name]]
    found.few = [name for name in names if examples[name] < EXAMPLES_MIN]
    found.too_few_to_judge = [name for name in names if examples[name] < found.class_boxes_min]


def _by_device(samples: Sequence[Sample], confidence_min: float) -> list[dict[str, Any]]:
    held: dict[str, list[Sample]] = {}
    for sample in samples:
        held.setdefault(sample.device, []).append(sample)
    return [
        {
            "device": device or "none",
            "samples": len(several),
            "below_floor": sum(not sample.confidence >= confidence_min for sample in several),
            "confidence_mean": round(fmean(sample.confidence for sample in several), 4),
            "classes": len({str(row["label"]) for sample in several for row in sample.label if "label" in row}),
        }
        for device, several in sorted(held.items())
    ]
