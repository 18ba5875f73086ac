"""`trainer export`: a checkpoint as the file that a device runs, compared with the checkpoint before it is handed out."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import EXIT_FAILED, Json, fail, show

if TYPE_CHECKING:
    from edged.engines.base import Image
    from trainer.core.parity import Exported

PARITY_FILE = "parity.json"
PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
GOLDEN_MAX = 16  # images or texts
FORMATS = {"onnx": "int8", "gguf": "Q4_K_M", "gguf-lora": "f32"}  # with the precision that is taken when none is named


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .pt of ultralytics, a Hugging Face folder or hub id, or the folder of a PEFT adapter."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files; those of an earlier export are replaced.")],
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="onnx: fp32, fp16, int8, int8-dynamic. gguf: f32, f16, or as llama.cpp calls it (Q8_0, ...)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images that trained nothing: the activations' ranges of int8.")
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(
            help="What parity is judged on: a folder of images, or of .txt and .jsonl (`prompt`) files. Default: built-in "
            "texts; of --calibration images that set no ranges."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="gguf-lora: the base's folder. Default: what the adapter says.")
    ] = None,
    imgsz: Annotated[int | None, typer.Option(help="Side of the images. Default: what the .pt was trained on.")] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Boxes above this count in parity.")] = 0.25,
    as_json: Json = False,
) -> None:
    """Export a model and compare it with its checkpoint; `parity.json` beside the files says how near it is.

    Status 0: it computes the same. 1: it does not, and nothing is kept.
    """
    if form not in FORMATS:
        fail(f"--format {form}: use {', '.join(FORMATS)}")
    _check_place(checkpoint, out)
    chosen = precision or FORMATS[form]
    from edged.engines.base import EngineError
    from trainer.checkpoints import CheckpointError
    from trainer.export.gguf_architectures import ExportError

    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        beside = Path(scratch) / "out"
        try:
            if form == "gguf-lora":
                exported = _lora(checkpoint, base, beside, golden)
            elif form == "gguf":
                exported = _gguf(checkpoint, beside, chosen, golden)
            elif Path(checkpoint).suffix == ".pt":
                exported = _vision(Path(checkpoint), beside, chosen, calibration, golden, imgsz, score)
            else:
                exported = _phi(checkpoint, beside, chosen, golden)
        except (ExportError, EngineError, CheckpointError, ValueError, OSError) as error:
            fail(str(error))
        if exported.passed:
            try:
                _keep(exported, beside, out)
            except OSError as error:
                fail(f"--out {out}: {error.strerror}")
    _tell(exported, out, as_json)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def _check_place(checkpoint: str, out: Path) -> None:
    """Say at once what is wrong with the folder, not after the export."""
    source = Path(checkpoint)
    if source.exists() and out.resolve() in (source.resolve(), source.resolve().parent):
        fail(f"--out {out}: the checkpoint lies there; choose another folder")
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: a file; name a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fail(f"--out {out}: Not a directory on the way there; name a folder")
    except OSError as error:
        fail(f"--out {out}: {error.strerror}")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        fail(f"--out {out}: nothing can be written there")


def _keep(exported: Exported, beside: Path, out: Path) -> None:
    from trainer.files import write_json

    write_json(beside / PARITY_FILE, {"files": dict(exported.roles), "parity": exported.lineage()})
    out.mkdir(exist_ok=True)
    # Of what is there only the files of an earlier export are ours to take away.
    earlier = _earlier(out)
    (out / PARITY_FILE).unlink(missing_ok=True)
    for name in earlier:
        (out / name).unlink(missing_ok=True)
    # The word that all is there comes last.
    for path in sorted(beside.iterdir(), key=lambda path: path.name == PARITY_FILE):
        path.replace(out / path.name)


def _earlier(out: Path) -> list[str]:
    """The names of the files that an earlier export left in the folder."""
    try:
        told = json.loads((out / PARITY_FILE).read_bytes())
        return [name for name in told["files"].values() if Path(name).name == name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def _tell(exported: Exported, out: Path, as_json: bool) -> None:
    told: dict[str, Any] = {
        "passed": exported.passed,
        "files": {role: str(out / name) for role, name in exported.roles.items()} if exported.passed else {},
        "parity": exported.lineage(),
        "notes": list(exported.notes),
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        rows = [
            {
                "format": report.format, "compared": row.what, "metric": row.metric, "value": row.value,
                "at most": row.tolerance, "verdict": "passed" if row.passed else "FAILED",
            }
            for report in exported.parity
            for row in report.rows
        ]  # fmt: skip
        show(rows, as_json=False)
        for note in exported.notes:
            typer.echo(f"note: {note}")
        for role, path in told["files"].items():
            typer.echo(f"{role}: {path}")
    if not exported.passed:
        typer.echo("trainer: the export computes something else than its checkpoint; nothing was kept", err=True)
        raise typer.Exit(EXIT_FAILED)


def _vision(
    checkpoint: Path, beside: Path, precision: str, calibration: Path | None, golden: Path | None, imgsz: int | None,
    score: float,
) -> Exported:  # fmt: skip
    from edged.wire.manifest import Thresholds
    from trainer.export.golden_images import Parts, part
    from trainer.export.vision import CALIBRATION_MAX, export_vision

    if precision == "int8" and calibration is None:
        raise ValueError("--precision int8 needs --calibration FOLDER, images of the work that trained nothing")
    given = read_images(calibration, CALIBRATION_MAX + GOLDEN_MAX) if calibration is not None else []
    if golden is not None:
        parts = Parts(tuple(given), tuple(read_images(golden, GOLDEN_MAX)))
    elif given:
        parts = part(given, int8=precision == "int8", golden_max=GOLDEN_MAX)
    else:
        raise ValueError("parity needs --golden FOLDER (or --calibration FOLDER) with images that the model answers")
    return export_vision(
        checkpoint, beside, precision, golden=parts.golden, calibration=parts.ranges, imgsz=imgsz,
        thresholds=Thresholds(score=score),
    )  # fmt: skip


def _phi(checkpoint: str, beside: Path, precision: str, golden: Path | None) -> Exported:
    from trainer.checkpoints import find_checkpoint
    from trainer.export.onnx_phi import export_phi_as

    # Language models have no static int8: their activations' ranges differ from token to token.
    return export_phi_as(
        find_checkpoint(checkpoint), beside, "int8-dynamic" if precision == "int8" else precision, read_texts(golden)
    )


def _gguf(checkpoint: str, beside: Path, precision: str, golden: Path | None) -> Exported:
    from trainer.checkpoints import find_checkpoint
    from trainer.export.language import export_text_gguf

    return export_text_gguf(find_checkpoint(checkpoint), beside, precision, read_texts(golden))


def _lora(adapter: str, base: str | None, beside: Path, golden: Path | None) -> Exported:
    from trainer.checkpoints import find_checkpoint
    from trainer.export.language import base_of, export_text_lora

    return export_text_lora(Path(adapter), find_checkpoint(base or base_of(Path(adapter))), beside, read_texts(golden))


def read_images(folder: Path, most: int) -> list[Image]:
    """At most `most` pictures (height, width, 3) BGR below `folder`, evenly spread over the sorted names.

    Raises ValueError for a folder without pictures, or a picture that cannot be read.
    """
    import cv2
    import numpy as np

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder}: no pictures ({', '.join(sorted(PICTURES))}) are in it")
    images: list[Image] = []
    for index in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)):
        image = cv2.imread(str(paths[index]))
        if image is None:
            raise ValueError(f"{paths[index]}: cannot be read as a picture; take it out")
        images.append(np.asarray(image, np.uint8))
    return images


def read_texts(golden: Path | None) -> tuple[str, ...]:
    """The built-in golden texts and those in the .txt and .jsonl files of a folder; raises ValueError for an empty one."""
    from trainer.export.parity import GOLDEN_TEXTS

    if golden is None:
        return GOLDEN_TEXTS
    texts: list[str] = []
    for path in sorted(golden.rglob("*")) if golden.is_dir() else [golden]:
        if path.suffix == ".txt":
            texts.append(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            texts += [text for line in path.read_text(encoding="utf-8").splitlines() if (text := _prompt(path, line))]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{golden}: no texts are in it; put .txt files or .jsonl files with a `prompt` there")
    return (GOLDEN_TEXTS[0], *texts[: GOLDEN_MAX - 1])


def _prompt(path: Path, line: str) -> str:
    try:
        return str(json.loads(line)["prompt"]) if line.strip() else ""
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: a line is no object with a prompt ({error}): correct it") from None
