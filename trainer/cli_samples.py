"""`trainer samples ...`: what devices keep, what is kept here, and own data in and out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trainer.cli_options import (
    ANY,
    Format,
    Labels,
    Limit,
    Model,
    OnlyClass,
    OnlyDevice,
    OnlyKind,
    OnlyModel,
    SureMax,
    SureMin,
    TaskOption,
    known_labels,
    open_pool,
    progress,
    task_of,
    tell,
)
from trainer.terminal import CONFIG, Config, Json, fail, load, open_database, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.pool import Kind

samples_app = typer.Typer(
    help="The samples that devices keep, and the pool of labelled samples that is kept here.", no_args_is_help=True
)


@samples_app.command("list")
def samples_list(
    model: OnlyModel = "",
    state: Annotated[str, typer.Option(help="Only in this state, such as `labelled` or `unresolved`.")] = "",
    device: OnlyDevice = "",
    label: OnlyClass = "",
    confidence_min: SureMin = 0.0,
    confidence_max: SureMax = 1.0,
    pool: Annotated[bool, typer.Option("--pool", help="What is kept here, instead of what devices keep.")] = False,
    limit: Limit = 100,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Samples that devices keep (or, with --pool, labels that are kept here), newest first."""
    settings = load(config)
    if pool:
        _list_pool(settings, model, state, device, label, confidence_min, confidence_max, limit, as_json)
        return
    from trainer.fleet import find_samples

    with open_database(settings).read() as connection:
        rows = find_samples(
            connection, model=model, state=state, device=device, label=label, confidence_min=confidence_min,
            confidence_max=confidence_max, limit=limit,
        )  # fmt: skip
    if not as_json:
        keys = ("id", "device", "model", "state", "label_confidence", "job", "used_by")
        rows = [{**{key: row[key] for key in keys}, "boxes": len(row["label"])} for row in rows]
    show(rows, as_json)


def _list_pool(
    settings: TrainerConfig, model: str, state: str, device: str, label: str, sure_min: float, sure_max: float,
    limit: int, as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from trainer.pool import Wanted

    if state not in ("", "labelled", "rejected"):
        fail(f"--state {state}: in the pool a label is labelled or rejected")
    wanted = Wanted(model, "", device, label, "", state, sure_min, sure_max)
    records = open_pool(settings).records(wanted)[::-1][:limit]
    rows = [{"id": record.id, **asdict(record)} for record in records]
    if not as_json:
        keys = ("id", "model", "task", "verdict", "kind", "who", "confidence", "device", "origin")
        rows = [{**{key: row[key] for key in keys}, "says": said_short(row["label"])} for row in rows]
    show(rows, as_json)


def said_short(label: Any) -> str:
    """A label in a few words."""
    from collections import Counter

    if len(label) == 1 and "text" in label[0]:
        return str(label[0]["text"])[:40]
    counts = Counter(row["label"] for row in label)
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(counts.items())) or "nothing"


@samples_app.command("counts")
def samples_counts(config: Config = CONFIG, as_json: Json = False) -> None:
    """How many samples there are, by model, device and state, and how sure their labels are."""
    from trainer.fleet import sample_counts

    with open_database(load(config)).read() as connection:
        show(sample_counts(connection), as_json)


@samples_app.command("import")
def samples_import(
    path: Annotated[Path, typer.Argument(help="The data set: its folder, or its JSON, YAML or JSONL file.")],
    format_: Format,
    model: Model,
    task: TaskOption = "",
    labels: Labels = "",
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW for a class; repeatable.")] = None,
    images: Annotated[Path | None, typer.Option(help="The pictures' folder, where it is not a usual one.")] = None,
    kind: Annotated[str, typer.Option(help="Who labelled it: person or model.")] = "person",
    who: Annotated[str, typer.Option(help="Their name. Default: the file's.")] = "",
    release: Annotated[str, typer.Option(help="The labelling model's name@version.")] = "",
    confidence: Annotated[float, typer.Option(min=0, max=1, help="How sure the labels are.")] = 1.0,
    device: Annotated[str, typer.Option(help="The camera or device that the pictures are of.")] = "",
    to: Annotated[
        Path | None,
        typer.Option(help="A new labelled folder instead of the pool: for a holdout, calibration or replay."),
    ] = None,
    allow_incomplete: Annotated[
        bool,
        typer.Option(help="Take pictures with unusable rows too: what their other rows leave open counts as empty."),
    ] = False,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Take own labelled data into the pool. What cannot be used is named, and its picture left out; what is known changes
    nothing."""
    from trainer.exchange import KINDS, Source, convert, import_all, read
    from trainer.formats.base import FormatError
    from trainer.pool import PoolError

    settings = load(config)
    if kind not in KINDS:
        fail(f"--kind {kind}: use person or model")
    if kind == "model" and not (who or release):
        fail("--kind model: say which one, with --who or --release name@version")
    source = Source(model, cast("Kind", kind), who or release or f"import of {path.name}", release, confidence, device)
    allowed = known_labels(settings, model, labels)
    try:
        reading = read(
            format_, path, task=task_of(settings, model, task, format_), known=allowed, rename=_renames(rename),
            images=images, incomplete=allow_incomplete,
        )  # fmt: skip
        with progress(f"import of {path.name}", reading.total) as step:
            if to is not None:
                summary = convert(reading, source, to, step)
            else:
                summary = import_all(open_pool(settings), reading, source, time.time(), step)
    except (FormatError, PoolError) as error:
        fail(str(error))
    except OSError as error:
        stays = "nothing is left of it" if to is not None else "what was taken in stays: start it again"
        fail(f"{error.filename or to or settings.pool}: {error.strerror}; {stays}")
    tell(summary, as_json, {"model": model, "format": format_, "task": reading.task, "path": str(path)})
    if not summary.read:
        fail(f"{path}: nothing could be taken in")


@samples_app.command("export")
def samples_export(
    out: Annotated[Path, typer.Argument(help="A new folder to write.")],
    format_: Format,
    model: Model,
    task: TaskOption = "",
    labels: Labels = "",
    device: OnlyDevice = "",
    label: OnlyClass = "",
    kind: OnlyKind = "",
    confidence_min: SureMin = 0.0,
    confidence_max: SureMax = 1.0,
    val_share: Annotated[float, typer.Option(min=0, max=1, help="yolo: the share of pictures in val, by hash.")] = 0.1,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Write the pool's labels of a model for other tools: the one label of each picture that counts."""
    from trainer.exchange import export_all
    from trainer.formats.base import FormatError
    from trainer.pool import Wanted

    settings = load(config)
    known = known_labels(settings, model, labels or (ANY if model not in settings.models else ""))
    wanted = Wanted(
        model, task_of(settings, model, task, format_) or "", device, label, kind, "labelled", confidence_min,
        confidence_max,
    )  # fmt: skip
    pool = open_pool(settings)
    found = len(pool.records(wanted))
    if not found:
        fail(f"--model {model}: the pool has no such label to write; `trainer samples list --pool` shows what is there")
    try:
        with progress(f"export to {out.name}", found) as step:
            summary = export_all(pool, wanted, format_, out, known or [], val_share=val_share, step=step)
    except FormatError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror}; nothing was written")
    tell(summary, as_json, {"model": model, "format": format_, "path": str(out)})


@samples_app.command("manifest")
def samples_manifest(
    out: Annotated[Path, typer.Argument(help="The manifest to write, for `trainer train --manifest`.")],
    model: Model,
    source: Annotated[str, typer.Option(help="The release to improve. Default: the newest registered one.")] = "",
    target: Annotated[str, typer.Option(help="The release to make. Default: the next version.")] = "",
    device: OnlyDevice = "",
    label: OnlyClass = "",
    kind: OnlyKind = "",
    confidence_min: SureMin = 0.0,
    ids: Annotated[list[str] | None, typer.Option("--id", help="Only this record of the pool; repeatable.")] = None,
    copy_to: Annotated[Path | None, typer.Option(help="Put the pixels here too, for training on another host.")] = None,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Write which labels of the pool to train on; `trainer train --manifest OUT --samples FOLDER` takes it."""
    from dataclasses import replace

    from trainer.config import ConfigError
    from trainer.files import write_whole
    from trainer.pool import PoolError, Wanted
    from trainer.pool_sets import copy_objects, training_manifest
    from trainer.releases import Registry, ReleaseError

    settings = load(config)
    try:
        own = settings.model(model)
        registry = Registry(settings.releases)
        stored = registry.list(model)
        if not source and not stored:
            fail(f"--model {model}: no release of it is registered (`trainer release add`); give --source")
        source = source or stored[-1].ref.release
        wanted = Wanted(
            model, own.kind, device, label, kind, "labelled", confidence_min, 1.0, frozenset(ids) if ids else None
        )
        pool = open_pool(settings)
        listed = training_manifest(
            pool, wanted, source=source, target=target or str(registry.next_version(model)),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), config=own.model_dump(mode="json"),
            labels=own.labels, confidence_floor=own.label_confidence_min,
        )  # fmt: skip
        others = [each for each in pool.records(replace(wanted, task="")) if each.task != own.kind]
        if others:
            listed.left_out["other_task"] = len(others)
        if not listed.manifest.samples:
            fail(f"--model {model}: the pool has no label to train on{_reasons(listed.left_out)}")
        write_whole(out, listed.manifest.model_dump_json(indent=2).encode())
        if copy_to is not None:
            copy_objects(pool, listed.manifest, copy_to)
    except (ConfigError, ReleaseError, PoolError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror}")
    result = {
        "manifest": str(out), "samples": str(copy_to or pool.objects), "job": listed.manifest.job,
        "source": listed.manifest.source, "target": listed.manifest.target, "count": len(listed.manifest.samples),
        "left_out": listed.left_out,
    }  # fmt: skip
    show(result, as_json)


def _reasons(left_out: dict[str, int]) -> str:
    return f" (left out: {left_out})" if left_out else ": import or pull some"


def _renames(given: list[str] | None) -> dict[str, str]:
    found = {}
    for each in given or []:
        old, equals, new = each.partition("=")
        if not old or not equals or not new:
            fail(f"--rename {each}: use OLD=NEW")
        found[old] = new
    return found
