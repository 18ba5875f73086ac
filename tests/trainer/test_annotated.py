"""What Label Studio and FiftyOne made of our exports comes back as it was corrected there.

`tests/support/annotated` holds their own software's real output; its README says how it was made. Each of them was given
`LABELS`, and there somebody corrected the first picture.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainer.cli import app
from trainer.config import load_config
from trainer.core.labels import Task
from trainer.database import Database
from trainer.pool import Pool, Record, Wanted

ANNOTATED = Path(__file__).parents[1] / "support" / "annotated"
PICTURES = ANNOTATED / "pictures"
CAT = {"label": "cat", "box": [4.0, 5.0, 24.0, 35.0]}
DOG = {"label": "dog", "box": [30.0, 6.0, 50.5, 40.0]}
TENT = {"label": "cat", "box": [4.0, 5.0, 24.0, 35.0], "polygons": [[4.0, 5.0, 24.0, 5.0, 14.0, 35.0]]}
KITE = {"label": "dog", "box": [30.0, 6.0, 50.5, 40.0], "polygons": [[30.0, 20.0, 40.25, 6.0, 50.5, 20.0, 40.25, 40.0]]}
LABELS: dict[Task, list[tuple[dict[str, Any], ...]]] = {
    "detect": [(CAT, DOG), (DOG,), ()],
    "segment": [(TENT, KITE), (KITE,), ()],
    "classify": [({"label": "cat"},), ({"label": "dog"},), ({"label": "cat"},)],
}


def pooled(config: Path, kind: Task) -> Pool:
    """The pool of that configuration with the three pictures, labelled by a model."""
    settings = load_config(config)
    pool = Pool(Database(settings.database_at), settings.pool)
    items = []
    for number, label in enumerate(LABELS[kind]):
        data = (PICTURES / f"{number}.png").read_bytes()
        sure = 0.9 - number / 10
        items.append((Record(sha256(data).hexdigest(), "eye", kind, label, "model", "big1", "teacher@1.0", sure), data))
    pool.add(items, 1.0)
    return pool


CORRECTED: dict[Task, tuple[dict[str, Any], ...]] = {
    "detect": (CAT | {"box": [4.0, 5.0, 14.0, 35.0]}, DOG | {"label": "cat"}),
    "segment": (
        TENT | {"box": [4.0, 5.0, 24.0, 43.2], "polygons": [[4.0, 5.0, 24.0, 5.0, 14.0, 43.2]]}, KITE | {"label": "cat"},
    ),
    "classify": ({"label": "dog"},),
}  # fmt: skip


def run(config: Path, *arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--config", str(config), "--json"])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def configured(folder: Path, kind: Task) -> tuple[Path, Pool]:
    config = folder / "trainer.toml"
    config.write_text(
        f'data_dir = "data"\n[models.eye]\nkind = "{kind}"\ncheckpoint = "eye.pt"\nlabels = ["cat", "dog"]\n'
        'imgsz = 32\nholdout = "h"\nholdout_clean = "hc"\ncalibration = "c"\n'
    )
    return config, pooled(config, kind)


def counts_now(pool: Pool) -> dict[int, Record]:
    """Picture -> the record whose label counts."""
    numbers = {sha256((PICTURES / f"{number}.png").read_bytes()).hexdigest(): number for number in range(3)}
    return {numbers[record.sha256]: record for record in pool.labelled(Wanted(model="eye")).records}


def alike(found: tuple[dict[str, Any], ...], wanted: tuple[dict[str, Any], ...], tolerance_px: float) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    for row, right in zip(found, wanted, strict=True):
        if "box" in right:
            assert row["box"] == pytest.approx(right["box"], abs=tolerance_px)
        for polygon, outline in zip(row.get("polygons", []), right.get("polygons", []), strict=True):
            assert polygon == pytest.approx(outline, abs=tolerance_px)


# FiftyOne writes the outlines of COCO in whole pixels, and YOLO with six digits.
@pytest.mark.parametrize(
    ("made", "format_", "kind", "tolerance_px"),
    [
        ("fiftyone/coco-detect", "coco", "detect", 1e-6),
        ("fiftyone/coco-segment", "coco", "segment", 0.51),
        ("fiftyone/yolo-detect", "yolo", "detect", 1e-4),
        ("fiftyone/yolo-segment", "yolo", "segment", 1e-4),
        ("fiftyone/classify", "yolo", "classify", 0.0),
        ("labelstudio/coco-detect", "coco", "detect", 1e-6),
        ("labelstudio/coco-segment", "coco", "segment", 1e-6),
        ("labelstudio/yolo-detect", "yolo", "detect", 1e-6),
        ("labelstudio/yolo-segment", "yolo", "segment", 1e-6),
    ],
)
def test_what_was_corrected_there_is_imported(
    tmp_path: Path, made: str, format_: str, kind: Task, tolerance_px: float
) -> None:
    config, pool = configured(tmp_path, kind)
    told = run(config, "samples", "import", ANNOTATED / made, "--format", format_, "--model", "eye", "--who", "ann")
    assert (told["task"], told["read"], told["added"], told["problems"]) == (kind, 3, 3, {})
    now = counts_now(pool)
    assert {record.who for record in now.values()} == {"ann"}
    for number, wanted in enumerate((CORRECTED[kind], *LABELS[kind][1:])):
        alike(now[number].label, wanted, tolerance_px)


@pytest.mark.parametrize("kind", list(LABELS))
def test_what_was_judged_in_label_studio_is_taken_back(tmp_path: Path, kind: Task) -> None:
    """Its open edition names who judged by a number only: `--who` says it."""
    config, pool = configured(tmp_path, kind)
    project = ANNOTATED / "labelstudio" / f"project-{kind}.json"
    told = run(config, "samples", "review", "--take", project, "--model", "eye", "--who", "ann")
    assert told["problems"] == 0
    rejected = int(kind == "classify")
    assert (told["corrected"], told["accepted"], told["rejected"]) == (1, 2 - rejected, rejected)
    now = counts_now(pool)
    assert {record.who for record in now.values()} == {"ann"} and len(now) == 3 - rejected
    alike(now[0].label, CORRECTED[kind], 1e-6)
    alike(now[1].label, LABELS[kind][1], 1e-6)


def test_classes_without_pictures_say_what_is_missing(tmp_path: Path) -> None:
    """Label Studio's "YOLO", without "with images"."""
    config, _ = configured(tmp_path, "detect")
    (tmp_path / "bare" / "images").mkdir(parents=True)
    (tmp_path / "bare" / "classes.txt").write_text("cat\ndog\n")
    asked = ["samples", "import", str(tmp_path / "bare"), "--format", "yolo", "--model", "eye", "--config", str(config)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code != 0 and "export it with its pictures" in done.output
