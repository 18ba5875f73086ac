"""`trainer samples report`: how good the labels are that a model would train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, open_database, show

if TYPE_CHECKING:
    from trainer.quality import Report


def register(samples_app: typer.Typer) -> None:
    """Add the command to `trainer samples`."""
    samples_app.command("report")(samples_report)


def samples_report(
    model: Annotated[str, typer.Argument(help="The model, as configured under models.NAME.", metavar="MODEL")],
    source: Annotated[
        Path | None, typer.Option("--from", help="A labelled folder, instead of what the devices keep.")
    ] = None,
    pool: Annotated[bool, typer.Option("--pool", help="What was imported and pulled, instead.")] = False,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Who labelled how many and how surely, what is disputed, what repeats, which classes are rare."""
    from trainer import quality
    from trainer.config import ConfigError
    from trainer.datasets import DatasetError, read_folder
    from trainer.pool import Pool, Wanted

    if pool and source is not None:
        fail(f"--pool and --from {source}: choose one")
    settings = load(config)
    try:
        own = settings.model(model)
        items = read_folder(source) if source is not None else []
    except (ConfigError, DatasetError) as error:
        fail(str(error))
    if source is not None:
        samples = quality.from_folder(items)
    elif pool:
        samples = quality.from_statements(Pool(open_database(settings), settings.pool).records(Wanted(model)))
    else:
        with open_database(settings).read() as connection:
            samples = quality.from_database(connection, model)
    held = {item.sha256: item.data for item in items}
    folders = [settings.samples, settings.data_dir / "pool" / "objects"]

    def pixels(digest: str) -> bytes | None:
        if digest in held:
            return held[digest]
        path = next((folder / digest for folder in folders if (folder / digest).is_file()), None)
        return path.read_bytes() if path is not None else None

    found = quality.report(
        model, samples, pixels, labels=own.labels, confidence_min=own.label_confidence_min,
        class_boxes_min=own.gate_rules().class_boxes_min,
    )  # fmt: skip
    if as_json:
        show(found.to_dict(), as_json)
    else:
        _print(found)


def _print(found: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for key in rows[0]:
            made.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], int | float) else "left")
        for row in rows:
            made.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(made)
        console.print()

    console.print(f"{found.model}: {found.samples} labelled samples\n", markup=False)
    table("Who labelled them", found.provenance)
    rare = {name: "absent" if name in found.absent else "few" for name in found.few}
    table("Classes", [{"class": name, **counts, "": rare.get(name, "")} for name, counts in found.classes.items()])
    table("Devices", found.devices)
    table("Disagreements", [_row(each) for each in found.disagreement_list])
    near = found.near_duplicates
    table("Near-duplicates", [{"samples": len(group), "group": " ".join(group)} for group in near["largest"]])
    for line in _lines(found):
        console.print(line, markup=False)


def _row(each: Any) -> dict[str, Any]:
    return {
        "sample": each.sample,
        "label by": each.label_by,
        "sure": each.label_confidence,
        "other": each.other_by,
        "other sure": each.other_confidence,
        "": "disputed" if each.disputed else "",
    }


def _lines(found: Report) -> list[str]:
    """What a person has to know, a line each."""
    near = found.near_duplicates
    lines = [
        f"{found.below_floor} labels are below the floor of {found.confidence_min:g} and do not train",
        f"{found.own_predictions} labels are the model's own predictions and do not train",
        f"{found.disagreements} opinions disagree with a label; {found.disputed} are disputed: until a person decides, "
        "those samples do not train",
        f"{near['repeats']} of {near['compared']} images repeat another one ({near['groups']} groups); "
        f"{near['not_compared']} could not be compared: their pixels are on the devices or do not decode",
    ]
    if found.imbalance is not None:
        lines.append(f"the most frequent class has {found.imbalance:g} times the examples of the rarest that there is")
    if found.few:
        lines.append(f"{len(found.few)} classes have fewer than {found.examples_min} examples: {', '.join(found.few)}")
    if found.too_few_to_judge:
        lines.append(
            f"{len(found.too_few_to_judge)} have fewer than {found.class_boxes_min}, too few for the gate to judge if the "
            f"holdout has no more: {', '.join(found.too_few_to_judge)}"
        )
    return lines
