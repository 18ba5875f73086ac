"""`edged profile`: which profiles there are, what one says, and which fits this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edged.cli_options import Json, fail

if TYPE_CHECKING:
    from edged.core.detect import Choice, Facts
    from edged.profiles import Profile

app = typer.Typer(help="What edged knows about kinds of devices.", no_args_is_help=True)


@app.command("list")
def profile_list(as_json: Json = False) -> None:
    """List the profiles: name, what it is for, where its file lies."""
    from edged import profiles

    rows: list[dict[str, Any]] = []
    broken = False
    for name, path in profiles.paths().items():
        try:
            rows.append({"name": name, "description": profiles.read(path).description, "path": str(path), "error": ""})
        except profiles.ProfileError as error:
            broken = True
            rows.append({"name": name, "description": "", "path": str(path), "error": str(error)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            typer.echo(f"{row['name']:<18} {row['error'] or row['description']}")
        looked = ", ".join(map(str, profiles.folders()))
        typer.echo(f"{len(rows)} profiles; looked for in {looked}", err=True)
    if broken or not rows:
        raise typer.Exit(1)


@app.command("show")
def profile_show(
    name: Annotated[str, typer.Argument(help="Name of a profile, or path of a profile's file.")], as_json: Json = False
) -> None:
    """Print a profile: with --json every key with its default, else its file."""
    from edged import profiles

    try:
        profile = profiles.find(name)
        path = profiles.path_of(name)
    except profiles.ProfileError as error:
        raise fail(str(error), 2) from None
    if as_json:
        typer.echo(json.dumps({"path": str(path), **profile.model_dump(mode="json")}, indent=2))
    else:
        typer.echo(f"# {path}\n{path.read_text(encoding='utf-8').rstrip()}")


@app.command("detect")
def profile_detect(
    root: Annotated[
        Path,
        typer.Option("--root", help="File tree of the machine: a mounted system, or a copy of its /proc and /sys."),
    ] = Path("/"),
    as_json: Json = False,
) -> None:
    """Which profile fits this machine, why, and why not the others. Nothing is changed. Exit status 1 when none fits."""
    from edged import profile_facts, profiles

    facts = profile_facts.facts(root)
    choice = profiles.detect(facts)
    if as_json:
        typer.echo(json.dumps(profiles.as_json(choice, facts), indent=2))
    elif choice.name is not None:
        _screen(choice, profiles.find(choice.name), facts)
    if choice.name is None:
        raise fail(profiles.no_fit(choice, facts))


def _screen(choice: Choice, profile: Profile, facts: Facts) -> None:
    from edged.profiles import described

    typer.echo(f"{profile.name}: {profile.description}")
    typer.echo(f"machine: {described(facts)}")
    for text in facts.narrowed:
        typer.echo(f"  {text}")
    typer.echo("because:")
    for text in choice.reasons:
        typer.echo(f"  {text}")
    typer.echo("not:")
    for other in choice.others:
        typer.echo(f"  {other.name}: {'; '.join(other.why)}")
    typer.echo(f'to use it, write under [device]: profile = "{profile.name}"')
