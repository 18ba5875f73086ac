"""What a release is: its identity, its files by hash, and everything needed to run and judge it.

Also the training manifest: exactly which samples a job trains on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import total_ordering
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from edged.wire.blocks import BLOCKS_MAX, block_bytes, block_count
from edged.wire.measured import ConfidenceHistogram

Kind = Literal["detect", "segment", "classify", "llm", "lora"]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

RISK_ROWS_MAX = 256  # of a release's risk table

_RELEASE = re.compile(r"(?P<name>[a-z0-9][a-z0-9_-]{0,62})@(?P<version>\d{1,9}(\.\d{1,9}){0,3})")


@total_ordering
class ReleaseId:
    """`name@1.10`: versions compare as numbers, so 1.10 is newer than 1.9. Raises ValueError on anything else."""

    __slots__ = ("name", "version")

    def __init__(self, text: str) -> None:
        match = _RELEASE.fullmatch(text)
        if match is None:
            raise ValueError(f"release {text!r}: expected name@MAJOR.MINOR, for example digits@1.4")
        self.name = match["name"]
        self.version = tuple(int(part) for part in match["version"].split("."))

    def __str__(self) -> str:
        return f"{self.name}@{'.'.join(map(str, self.version))}"

    def __repr__(self) -> str:
        return f"ReleaseId({str(self)!r})"

    def _key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, self.version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReleaseId) and self._key() == other._key()

    def __lt__(self, other: ReleaseId) -> bool:
        return self._key() < other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def next(self) -> ReleaseId:
        """The release after this one: the last number of the version plus one."""
        return ReleaseId(f"{self.name}@{'.'.join(map(str, (*self.version[:-1], self.version[-1] + 1)))}")


def _canonical(text: str) -> str:
    return str(ReleaseId(text))


Release = Annotated[str, AfterValidator(_canonical)]


class Strict(BaseModel):
    """Base of everything inside a release: what is not known is refused, because a release is signed as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReleaseRef(BaseModel):
    """Points at one release and pins its manifest's bytes. Part of messages too, so what is not known is ignored: two
    references to the same bytes are equal, and an old device follows a newer trainer."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    release: Release
    sha256: SHA256


class FileEntry(Strict):
    """One file of a release; `path` is a plain file name inside the release's folder. `blocks`: the SHA-256 of each block
    of `block_bytes` (the last one may be shorter), so that every one is checked as it arrives."""

    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    sha256: SHA256
    bytes: Annotated[int, Field(ge=0, le=64 * 2**30)]
    block_bytes: int
    blocks: Annotated[list[SHA256], Field(max_length=BLOCKS_MAX)]

    @model_validator(mode="after")
    def _whole(self) -> FileEntry:
        length, count = block_bytes(self.bytes), block_count(self.bytes)
        if (self.block_bytes, len(self.blocks)) != (length, count):
            raise ValueError(
                f"{self.path}: a file of {self.bytes} bytes has {count} blocks of {length} bytes, "
                f"not {len(self.blocks)} of {self.block_bytes}"
            )
        return self

    @classmethod
    def of(cls, path: str, size: int, content: Iterable[Any]) -> FileEntry:
        """The entry of a file of `size` bytes whose `content` comes block by block (`block_bytes(size)` each)."""
        whole, hashes = hashlib.sha256(), []
        for block in content:
            whole.update(block)
            hashes.append(hashlib.sha256(block).hexdigest())
        return cls(path=path, sha256=whole.hexdigest(), bytes=size, block_bytes=block_bytes(size), blocks=hashes)


class Thresholds(Strict):
    """Detection thresholds: answers score at least `score`; boxes of one class overlapping more than `iou` are one."""

    score: Annotated[float, Field(ge=0, le=1)] = 0.25
    iou: Annotated[float, Field(ge=0, le=1)] = 0.7


class Novelty(Strict):
    """Reference of the inputs that this release was calibrated on: a Mahalanobis distance to the nearest of `centres`
    (points of ImageStats, as `core.confidence` orders them) beyond `limit` means that the calibration cannot be
    trusted."""

    centres: Annotated[list[list[float]], Field(min_length=1)]
    inverse_covariance: list[list[float]]
    limit: Annotated[float, Field(gt=0)]


class Scaling(Strict):
    """A raw score made a probability: p = 1 / (1 + exp(-(logit(score) / temperature + bias))), never falling in it.

    Temperature scaling (Guo et al., "On calibration of modern neural networks", 2017) with a bias, as in Platt 1999.
    """

    temperature: Annotated[float, Field(gt=0)]
    bias: float = 0.0


class BoxCalibration(Strict):
    """How a box's score becomes the probability that this box is right: a class with enough examples has its own
    scaling (`classes`, by index into the release's labels), all others share `pooled`."""

    pooled: Scaling
    classes: dict[int, Scaling] = {}
    items: int = 0  # how many boxes it was fitted on


class RiskTable(Strict):
    """What accepting costs: of the answers with a probability of at least `thresholds[i]`, on inputs that are not novel,
    at most the share `bounds[i]` is wrong. All bounds hold together with the probability `confidence`, for inputs like
    the `items` that they were counted on, none of which fitted anything else (docs/confidence.md). Thresholds rise.
    """

    thresholds: Annotated[list[float], Field(min_length=1, max_length=RISK_ROWS_MAX)]
    bounds: Annotated[list[float], Field(min_length=1, max_length=RISK_ROWS_MAX)]
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    items: int = 0


class Calibration(Strict):
    """How evidence becomes the probability of being right; fitted by the trainer, on data used for nothing else.

    `logistic`: for frames, p = 1 / (1 + exp(-(bias + sum(weights * (x - mean) / scale)))) over the named features.
    `scaled`: for texts, `answers` applied to exp(mean log-probability of the tokens).
    `uncalibrated`: too little data; the policy then escalates within its budget.
    """

    method: Literal["logistic", "scaled", "uncalibrated"] = "uncalibrated"
    features: list[str] = []
    mean: list[float] = []
    scale: list[float] = []
    weights: list[float] = []
    bias: float = 0.0
    items: int = 0  # how many it was fitted on
    novelty: Novelty | None = None
    boxes: BoxCalibration | None = None
    answers: Scaling | None = None
    risk: RiskTable | None = None
    # Of the items that only counted for `risk`: how many had a probability in each bin (measured.CONFIDENCE_BINS). What
    # devices report is compared with it (docs/drift.md).
    confidence_histogram: ConfidenceHistogram = []


class ReleaseManifest(Strict):
    """Everything a device needs to run a release, verify it and prove it. Stored as `release.json` beside the files.

    `files` maps a role to a file: `model` (or `adapter`), `golden_input_N`, `golden_output` and so on, by engine.
    """

    schema_version: Literal[1] = 1
    release: Release
    kind: Kind
    engine: str
    files: dict[str, FileEntry]
    base: ReleaseRef | None = None  # a LoRA adapter's base
    labels: list[str] = []
    input_size: tuple[int, int] | None = None  # (height, width) of the model's input in pixels
    thresholds: Thresholds = Thresholds()
    calibration: Calibration = Calibration()
    evaluation: dict[str, Any] = {}
    lineage: dict[str, Any] = {}
    created: str  # ISO 8601, UTC

    @field_validator("files")
    @classmethod
    def _paths_differ(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        paths = [entry.path for entry in files.values()]
        if len(set(paths)) != len(paths) or "release.json" in paths:
            raise ValueError("two files of a release share a path, or one is called release.json")
        return files


class TrainingSample(Strict):
    """One sample of a training manifest: which device holds it, its pixels by hash, its label and who gave it."""

    id: str
    device: str
    sha256: SHA256
    label: dict[str, Any]
    provenance: dict[str, Any]


class TrainingManifest(Strict):
    """Exactly what a training job may train on (L7): nothing else is pulled, nothing else is used."""

    job: str
    model: str
    source: Release  # the release being improved
    target: Release
    created: str
    config: dict[str, Any]
    samples: list[TrainingSample]
    adapter: str | None = (
        None  # that the fleet runs on `source`, for a new one to be judged against; "": none; None: unknown
    )
