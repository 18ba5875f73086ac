"""`trainer holdout`: freeze what releases are judged on, extend it, show it, and prove that nothing in it was changed."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig

holdout_app = typer.Typer(
    help="What releases are judged on: frozen before the first training, and only ever extended.", no_args_is_help=True
)

ModelName = Annotated[str, typer.Argument(help="The model, as configured under models.NAME.", metavar="MODEL")]
Set = Annotated[
    str,
    typer.Option(
        "--set",
        help="target (`holdout`), base (`holdout_clean`; of texts `holdout_base`), test (`holdout_test`); calibration.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="A labelled folder whose images are offered, or a dataset.jsonl of texts. Without it: what lies in the set's "
        "own folder or file.",
    ),
]


@holdout_app.command("freeze")
def freeze(
    model: ModelName, name: Set = "target", source: From = None, config: Config = CONFIG, as_json: Json = False
) -> None:
    """Freeze a set for the first time: what may judge is taken, the others are named with the reason."""
    _take(load(config), model, name, source, first=True, as_json=as_json)


@holdout_app.command("extend")
def extend(
    model: ModelName, name: Set = "target", source: From = None, config: Config = CONFIG, as_json: Json = False
) -> None:
    """Add images or texts to a frozen set; what is in it stays as it is."""
    _take(load(config), model, name, source, first=False, as_json=as_json)


@holdout_app.command("retire")
def retire_set(
    model: ModelName,
    reason: Annotated[str, typer.Option(help="Why, for whoever asks later.")],
    name: Set = "target",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Put a frozen set aside whose labels turned out wrong. Its ledger is kept; correct the folder and freeze it anew."""
    from trainer.config import ConfigError
    from trainer.datasets import DatasetError
    from trainer.holdout_retired import retire

    try:
        show(retire(load(config), model, name, reason, time.time()), as_json)
    except (ConfigError, DatasetError, OSError) as error:
        fail(str(error))


@holdout_app.command("show")
def show_sets(model: ModelName, config: Config = CONFIG, as_json: Json = False) -> None:
    """What each set holds: images, classes, who labelled them, from which devices, frozen when."""
    settings = load(config)
    show(_texts(settings, model) or _described(settings, model), as_json)


@holdout_app.command("verify")
def verify(model: ModelName, config: Config = CONFIG, as_json: Json = False) -> None:
    """Compare every frozen set with its images, and with what the releases were judged on. Status 1 when one changed."""
    settings = load(config)
    texts = _texts(settings, model)
    found = {name: row.get("identity", "not frozen") for name, row in (texts or _described(settings, model)).items()}
    if texts is not None:
        show(found, as_json)
        return
    from trainer import holdout
    from trainer.datasets import read_folder
    from trainer.holdout_retired import retired
    from trainer.releases import Registry

    wrong = []
    for name in found:
        entries = holdout.read_ledger(holdout.ledger_path(settings, model, name))
        folder = holdout.folder_of(settings.model(model), name)
        if entries and folder is not None:
            releases = Registry(settings.releases).list(model)
            put_aside = {each for row in retired(settings, model, name) for each in row["identities"]}
            known = holdout.states(entries, read_folder(folder)) | put_aside
            wrong += [
                f"{release} was judged on a {name} set that this ledger never was"
                for release in holdout.check_releases(known, name, releases)
            ]
    if wrong:
        fail("; ".join(wrong) + ". The ledger or the folder was replaced: restore both from a copy")
    show(found, as_json)


def _texts(settings: TrainerConfig, model: str) -> dict[str, dict[str, Any]] | None:
    """Each set of a language model in numbers, None for another model; ends the program where one was changed."""
    from trainer import text_holdout
    from trainer.config import ConfigError
    from trainer.holdout import HoldoutError
    from trainer.releases import Registry

    try:
        own = settings.any_model(model)
        if own.kind != "llm":
            return None
        found = text_holdout.described(settings, model)
        adapters = Registry(settings.releases).list(own.adapter_name(model))
        wrong = text_holdout.check_releases(settings, model, adapters)
    except (ConfigError, HoldoutError, OSError) as error:
        fail(str(error))
    if wrong:
        fail(f"{', '.join(wrong)}: judged on a set that this ledger never was. It was replaced: restore it from a copy")
    return {name: {**row, **{each: _day(row[each]) for each in ("frozen_first", "frozen_last") if each in row}}
            for name, row in found.items()}  # fmt: skip


def _take(settings: TrainerConfig, model: str, name: str, source: Path | None, *, first: bool, as_json: bool) -> None:
    from trainer.config import ConfigError
    from trainer.datasets import DatasetError, read_folder
    from trainer.holdout import take
    from trainer.sketches import SketchError
    from trainer.trained import LedgerError

    if _is_text(settings, model):
        _take_texts(settings, model, name, source, first=first, as_json=as_json)
        return
    try:
        offered = read_folder(source) if source is not None else []
        taken = take(settings, model, name, offered, time.time(), first=first)
    except (ConfigError, DatasetError, LedgerError, SketchError, OSError) as error:
        fail(str(error))
    if not taken.entries:
        reasons = ", ".join(f"{len(items)} {reason}" for reason, items in taken.refused.items()) or "none was offered"
        fail(f"holdout {model}/{name}: no image was frozen: {reasons}")
    counts = {reason: len(items) for reason, items in taken.refused.items()}
    found = {"set": name, "added": taken.added, "images": taken.entries, "identity": taken.identity}
    show({**found, "refused": taken.refused if as_json else counts}, as_json)


def _is_text(settings: TrainerConfig, model: str) -> bool:
    from trainer.config import ConfigError

    try:
        return settings.any_model(model).kind == "llm"
    except ConfigError as error:
        fail(str(error))


def _take_texts(
    settings: TrainerConfig, model: str, name: str, source: Path | None, *, first: bool, as_json: bool
) -> None:
    from trainer.datasets import DatasetError
    from trainer.kinds.texts import read
    from trainer.text_holdout import take

    bad: list[str] = []
    try:
        offered = None
        if source is not None:
            offered, bad, _ = read(source, "lora" if name == "base" else settings.text(model).strategy)
        taken = take(settings, model, name, offered, time.time(), first=first)
    except (DatasetError, OSError) as error:
        fail(str(error))
    refused = taken.refused | ({"bad_line": bad} if bad else {})
    counts = {reason: len(rows) for reason, rows in refused.items()}
    if not taken.entries:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none was offered"
        fail(f"holdout {model}/{name}: no text was frozen: {reasons}")
    found = {"set": name, "added": taken.added, "texts": taken.entries, "identity": taken.identity}
    show({**found, "refused": refused if as_json else counts}, as_json)


def _described(settings: TrainerConfig, model: str) -> dict[str, dict[str, Any]]:
    """Each set in numbers; ends the program where one was changed."""
    from trainer import holdout
    from trainer.config import ConfigError
    from trainer.datasets import DatasetError, frozen_hash, read_folder

    found: dict[str, dict[str, Any]] = {}
    try:
        own = settings.model(model)
        for name in holdout.FOLDERS:
            folder, path = holdout.folder_of(own, name), holdout.ledger_path(settings, model, name)
            entries = holdout.read_ledger(path)
            if folder is None:
                continue
            if not entries:
                found[name] = {"images": 0, "folder": str(folder)}
                continue
            items = read_folder(folder)
            fresh = holdout.loose(path, f"{model}/{name}", entries, items)
            frozen = [item for item in items if item not in fresh]
            found[name] = {
                "images": len(entries),
                "not_frozen": len(fresh),
                "boxes": sum(len(item.boxes) for item in frozen),
                "classes": dict(sorted(Counter(box.label for item in frozen for box in item.boxes).items())),
                "labelled_by": dict(Counter(f"{entry.kind} {entry.release or entry.who}" for entry in entries)),
                "devices": dict(Counter(entry.device for entry in entries if entry.device)),
                "frozen_first": _day(entries[0].frozen),
                "frozen_last": _day(entries[-1].frozen),
                "identity": frozen_hash(frozen),
                "folder": str(folder),
            }
    except (ConfigError, DatasetError, OSError) as error:
        fail(str(error))
    return found


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
