"""What the gate judges of a release: all that can be measured, and of the rest why it could not be.

A model that does not load, answers NaN or does not belong to the holdout is no error here: it is evidence.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edged.engines.base import Detector, EngineError, EngineOptions, Image, open_engine
from edged.wire.manifest import ReleaseManifest
from trainer.core.evaluation import Evaluation
from trainer.core.gate import Evidence, Parity
from trainer.core.targets import Footprint
from trainer.evaluate import Labelled, evaluate
from trainer.files import sha256_of
from trainer.footprint import Profile, measure_all
from trainer.golden import write_detect_golden
from trainer.releases import MANIFEST, ReleaseError, canonical_bytes, file_entry

GOLDEN_IMAGES = 4  # that a release without a golden set is measured on


def gather(
    folder: Path,
    manifest: ReleaseManifest,
    target: Sequence[Labelled],
    base: Sequence[Labelled],
    *,
    weights_sha256: str,
    calibration_ece: float | None = None,
    export_before: float | None = None,
    parity: Sequence[Parity] = (),
    profiles: Sequence[Profile] = (),
    options: EngineOptions | None = None,
) -> Evidence:
    """Run the release in `folder` on both holdouts with the engine that devices run, and in a child for each profile.

    `export_before`: `Evaluation.quality` of the file before quantisation on `target`. The folder needs only the files that
    the manifest names: a golden set and a release.json are made beside for the measuring when they are not there.
    """
    failures: list[str] = []
    found: dict[str, Evaluation] = {}
    try:
        engine = open_engine(folder, manifest, options or EngineOptions())
        try:
            if not isinstance(engine, Detector):
                raise EngineError(f"release {manifest.release} is of kind {manifest.kind}; it is not scored on images")
            for what, items in (("target", target), ("base", base)):
                found[what] = evaluate(engine, items, manifest.thresholds, manifest.release, kind=manifest.kind)
        finally:
            engine.close()
    except (EngineError, ValueError, OSError) as error:
        failures.append(str(error) or type(error).__name__)
    model = folder / manifest.files["model"].path
    after = found["target"].quality if "target" in found else None
    images = [item.image for item in target[:GOLDEN_IMAGES]]
    return Evidence(
        model_sha256=sha256_of(model) if model.is_file() else "",
        weights_sha256=weights_sha256,
        target=found.get("target"),
        base=found.get("base"),
        calibration_method=manifest.calibration.method,
        calibration_ece=calibration_ece,
        export_before=export_before,
        export_after=after,
        failures=tuple(failures),
        parity=parity,
        model_bytes=model.stat().st_size if model.is_file() else None,
        footprints=footprints(folder, manifest, profiles, images),
    )


def footprints(
    folder: Path, manifest: ReleaseManifest, profiles: Sequence[Profile], images: Sequence[Image]
) -> tuple[Footprint, ...]:
    """What the release takes under each profile; a release without a golden set gets one of `images` for it."""
    if not profiles:
        return ()
    try:
        with _whole(folder, manifest, images) as complete:
            return measure_all(complete, profiles)
    except (EngineError, ReleaseError, ValueError, OSError) as error:
        return tuple(Footprint(profile.target.profile, error=str(error)) for profile in profiles)


@contextmanager
def _whole(folder: Path, manifest: ReleaseManifest, images: Sequence[Image]) -> Iterator[Path]:
    """A folder with the release's files, a golden set and a manifest that names them."""
    if (folder / MANIFEST).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=".measured-", dir=folder.parent) as name:
        beside = Path(name)
        for entry in manifest.files.values():
            _link(folder / entry.path, beside / entry.path)
        files = dict(manifest.files)
        if not any(role.startswith("golden") for role in files):
            engine = open_engine(beside, manifest, EngineOptions())
            try:
                if not isinstance(engine, Detector):
                    raise EngineError(
                        f"release {manifest.release} has no golden set; a generator's is made when packed"
                    )
                roles = write_detect_golden(beside, engine, images, manifest.thresholds.score)
            finally:
                engine.close()
            files |= {role: file_entry(beside / path) for role, path in roles.items()}
        whole = manifest.model_copy(update={"files": files})
        (beside / MANIFEST).write_bytes(canonical_bytes(whole))
        yield beside


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
