"""`trainer release`: make, register, sign, list, show and revoke releases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer import cli_mirror, cli_registration
from trainer.checkpoints import MODEL_ID
from trainer.terminal import CONFIG, Config, Json, fail, load, show

if TYPE_CHECKING:
    from edged.wire.manifest import ReleaseManifest

release_app = typer.Typer(help="The registry of releases.", no_args_is_help=True)
release_app.command("registrations")(cli_registration.registrations)
release_app.command("mirror")(cli_mirror.mirror)


@release_app.command("add")
def release_add(
    folder: Annotated[Path, typer.Argument(help="Folder with the files and their release.json.")],
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Register a release, and sign it where there are keys (`trainer keys init`).

    The same bytes again change nothing; other bytes under the same version are refused.
    """
    from trainer.keys import TrustError
    from trainer.releases import Registry, ReleaseError
    from trainer.signing import register

    settings = load(config)
    try:
        ref = register(settings, Registry(settings.releases), folder)
    except (ReleaseError, TrustError, OSError) as error:
        fail(str(error))
    show(ref.model_dump(mode="json"), as_json)


@release_app.command("make")
def release_make(
    model: Annotated[str, typer.Argument(help="A model of the configuration, models.NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, made anew.")],
    version: Annotated[str, typer.Option(help="The release's version.")] = "1.0",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Make the first release of a model from its checkpoint: ONNX, int8, calibration, golden set.

    Labels, size, thresholds and the calibration images come from models.NAME. Register it with `release add`.
    """
    from edged.engines.base import EngineError
    from trainer.calibrate import ITEMS_MIN
    from trainer.config import ConfigError
    from trainer.datasets import DatasetError, read_folder
    from trainer.export.gguf_architectures import ExportError
    from trainer.package import package_vision

    settings = load(config)
    try:
        chosen = settings.model(model)
        calibration = [image.decode(chosen.labels, chosen.kind) for image in read_folder(chosen.calibration)]
        manifest = package_vision(
            chosen.checkpoint,
            out,
            f"{model}@{version}",
            labels=chosen.labels,
            imgsz=chosen.imgsz,
            calibration=calibration,
            thresholds=chosen.thresholds(),
            seed=chosen.seed,
        )
    except (ConfigError, DatasetError, ExportError, EngineError, ValueError, OSError) as error:
        fail(str(error))
    items = manifest.calibration.items
    if manifest.calibration.method == "uncalibrated":
        told = f"NOT calibrated: of {items} images {ITEMS_MIN} are needed, and devices accept none of its answers"
    else:
        told = f"calibrated on {items} images"
    _made(manifest, out, f"{manifest.release}: {out}, {told}", as_json)


@release_app.command("make-phi")
def release_make_phi(
    out: Annotated[Path, typer.Argument(help="Folder to write, made anew.")],
    model_id: Annotated[str, typer.Option(help="A Phi of the Hugging Face hub, or a folder.")] = MODEL_ID,
    name: Annotated[str | None, typer.Option(help="The release's name; none: the last part of the model's.")] = None,
    version: Annotated[str, typer.Option(help="The release's version.")] = "1.0",
    quantization: Annotated[str, typer.Option(help="As llama.cpp calls it.")] = "Q4_K_M",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Golden prompt, whose answer every device must give; may be repeated.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help='Questions that trained nothing, {"prompt": ..., "answer": ...} a line: how sure it may be.'),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the first release of a language model from its checkpoint: GGUF, quantised, golden set, calibration."""
    from edged.engines.base import EngineError
    from trainer.checkpoints import CheckpointError, find_checkpoint
    from trainer.export.gguf import ExportError
    from trainer.package import GOLDEN_PROMPTS, package_gguf, read_expected
    from trainer.releases import ReleaseError

    try:
        manifest = package_gguf(
            find_checkpoint(model_id), out, f"{name or Path(model_id).name.lower()}@{version}",
            prompts=prompt or GOLDEN_PROMPTS, quantization=quantization, lineage={"source": model_id},
            calibration=read_expected(calibration) if calibration else (),
        )  # fmt: skip
    except (CheckpointError, ExportError, EngineError, ReleaseError, ValueError, OSError) as error:
        fail(str(error))
    fitted = manifest.calibration
    sure = fitted.method if fitted.method == "uncalibrated" else f"calibrated on {fitted.items} answers"
    told = f"{manifest.release}: {out}, {manifest.files['model'].bytes} bytes ({quantization}) of {model_id}"
    _made(manifest, out, f"{told}, {_near(manifest)}, {sure}", as_json)


def _made(manifest: ReleaseManifest, out: Path, text: str, as_json: bool) -> None:
    """Say what was made: for people in a line, for programs also its files and how they were judged."""
    from trainer.core.parity import PARITY_KEY
    from trainer.releases import reference

    if not as_json:
        typer.echo(text)
        return
    fitted, entries = manifest.calibration, manifest.files.items()
    said = {
        **reference(out).model_dump(mode="json"),
        "path": str(out),
        "kind": manifest.kind,
        "calibration": fitted.method,
        "items": fitted.items,
        "bytes": manifest.files["model"].bytes,
        "files": {role: {"path": each.path, "bytes": each.bytes, "sha256": each.sha256} for role, each in entries},
        "parity": manifest.lineage[PARITY_KEY],
    }
    show(said, as_json=True)


def _near(manifest: ReleaseManifest) -> str:
    """On what the files were compared with their checkpoint."""
    from trainer.core.parity import PARITY_KEY

    reports = manifest.lineage[PARITY_KEY]
    return f"as its checkpoint on {reports[-1]['items']} texts ({', '.join(each['format'] for each in reports)})"


@release_app.command("list")
def release_list(
    name: Annotated[str | None, typer.Argument(help="Only releases of this model.")] = None,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Every registered release, oldest version first, and whether devices may install it."""
    from trainer.keys import TrustError
    from trainer.releases import Registry
    from trainer.signing import listing, repository_of

    settings = load(config)
    try:
        show(listing(Registry(settings.releases), repository_of(settings), name), as_json)
    except (TrustError, OSError) as error:
        fail(str(error))


@release_app.command("sign")
def release_sign(
    release: Annotated[str, typer.Argument(help="name@version, registered")],
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Let devices install a release that was registered before there were keys. Idempotent."""
    from trainer.keys import TrustError
    from trainer.releases import Registry, ReleaseError
    from trainer.signing import repository_of, sign

    settings = load(config)
    try:
        repository = repository_of(settings)
        if repository is None:
            fail(f"{settings.trust.folder}: no keys are here; make them with `trainer keys init`")
        sign(repository, Registry(settings.releases).get(release))
    except (ReleaseError, TrustError, OSError) as error:
        fail(str(error))
    if as_json:
        show({"release": release, "signed": True}, as_json=True)
    else:
        typer.echo(f"{release} is signed")


@release_app.command("revoke")
def release_revoke(
    release: Annotated[str, typer.Argument(help="name@version")],
    reason: Annotated[str, typer.Option(help="Why, for whoever meets it later.")],
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Let no device install a release any more, for good. Devices that run it go on until they are told another."""
    from edged.wire.manifest import ReleaseId
    from trainer.keys import TrustError
    from trainer.signing import repository_of

    settings = load(config)
    try:
        repository = repository_of(settings)
        if repository is None:
            fail(f"{settings.trust.folder}: no keys are here; without signatures there is nothing to revoke")
        signed = repository.revoke(str(ReleaseId(release)), reason)
    except (TrustError, ValueError, OSError) as error:
        fail(str(error))
    if as_json:
        show({"release": release, "revoked": True, "was_signed": signed}, as_json=True)
        return
    was = "is not signed any more" if signed else "was not signed, and will not be"
    typer.echo(f"{release} {was}; give devices that run it another: `trainer fleet status`, `trainer fleet set`")


@release_app.command("show")
def release_show(release: Annotated[str, typer.Argument(help="name@version")], config: Config = CONFIG) -> None:
    """A release's manifest: files, calibration, evaluation, lineage."""
    from trainer.releases import Registry, ReleaseError

    try:
        show(Registry(load(config).releases).get(release).manifest.model_dump(mode="json"), as_json=True)
    except ReleaseError as error:
        fail(str(error))
