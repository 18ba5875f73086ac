"""The command line of the device. Thin: it parses, calls, prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edged import cli_agents, cli_enroll, cli_orders, cli_profile, cli_requests, cli_samples
from edged.cli_options import DEFAULT_CONFIG, Config, Json, fail, settings_of, settings_to_start, store_of

app = typer.Typer(
    name="edged",
    help="Runs quantised models on this device, knows when it is unsure, asks a larger model, gets a better one back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
samples_app = typer.Typer(help="The samples that this device keeps.", no_args_is_help=True)
models_app = typer.Typer(help="The releases on this device.", no_args_is_help=True)
app.add_typer(samples_app, name="samples")
cli_samples.register(samples_app)
cli_enroll.register(app)
app.add_typer(models_app, name="models")
cli_orders.register(app, models_app)
app.add_typer(cli_requests.app, name="requests")
app.add_typer(cli_agents.app, name="agent")
app.add_typer(cli_profile.app, name="profile")

Prove = Annotated[bool, typer.Option(help="Let each seed answer its golden inputs, which may take minutes.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"edged {version('edged')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main() -> None:
    """Entry point of `edged`."""
    app()


@app.command()
def run(
    config: Config = DEFAULT_CONFIG,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    log_format: Annotated[
        str | None, typer.Option("--log-format", help="auto, journald, text or json, instead of log.format.")
    ] = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C; the item in hand is finished first, a second one ends at
    once. SIGHUP loads the configuration again, as a change of the file does."""
    from edged import journal
    from edged.daemon import AlreadyRunning
    from edged.fetch import FetchError
    from edged.link import BadCredentials
    from edged.serve import build, serve
    from edged.store import StoreError

    if log_format not in (None, *journal.FORMATS):
        raise fail(f"--log-format {log_format}: write one of {', '.join(journal.FORMATS)}", 2)
    settings, without = settings_to_start(config)
    journal.set_up("debug" if verbose else settings.log.level, log_format or settings.log.format)
    try:
        daemon = build(settings, config)
    except (AlreadyRunning, BadCredentials, StoreError, FetchError, OSError) as error:
        raise fail(str(error)) from None
    if without:
        daemon.reloader.begun_without(without)
    serve(daemon)


@app.command()
def status(
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every 2 s, until Ctrl-C.")] = False,
) -> None:
    """What the running daemon does, what is wrong first. Exit status: 0 healthy, 1 there are problems, 3 none runs."""
    from edged import status as screen
    from edged.status_socket import ask_status

    state_dir, wrong = screen.whereabouts(config)
    problems: list[screen.Problem] = []
    for _ in screen.rounds(again=watch):
        answer = ask_status(state_dir)
        if answer is None:
            raise fail(wrong, 2) if wrong else fail(screen.silence(state_dir, config), 3)
        if as_json:
            typer.echo(json.dumps(answer, indent=2))
        else:
            typer.echo("\n".join(screen.render(answer, colour=sys.stdout.isatty())))
        problems = screen.problems(answer)
    raise typer.Exit(1 if problems else 0)


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in values.items() if n) or "none"


@app.command()
def check(config: Config = DEFAULT_CONFIG, as_json: Json = False, prove: Prove = True) -> None:
    """Find what is wrong with this device before it is deployed, and the fix. Exit status 1 when there is an error."""
    from edged import check as look
    from edged.config import ConfigError, load

    logging.getLogger("edged").addHandler(logging.NullHandler())  # what matters becomes a finding
    try:
        findings = look.inspect(load(config), config, proving=prove)
    except ConfigError as error:
        findings = look.unusable(error)
    rows = [finding.document() for finding in findings]
    typer.echo(json.dumps(rows, indent=2) if as_json else "\n".join(look.screen(findings)))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def diag(
    config: Config = DEFAULT_CONFIG,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, replaced as a whole.")] = None,
    prove: Prove = False,
) -> None:
    """Write one archive for support: state, findings, log, configuration; no secrets, images, prompts or answers."""
    from edged import diag as archive

    logging.getLogger("edged").addHandler(logging.NullHandler())
    about = archive.subject(config, proving=prove)
    path, parts = output or archive.default_name(about), archive.collect(about)
    try:
        archive.write(path, parts, about)
    except OSError as error:
        raise fail(f"{path}: {error.strerror}; name another file with --output") from None
    for name, data in parts.items():
        typer.echo(f"{len(data):>9} bytes  {name}")
    typer.echo(f"{path}: {path.stat().st_size} bytes; look through it before you send it")


@app.command()
def infer(
    slot: Annotated[str, typer.Argument(help="Slot whose model answers.")],
    image: Annotated[Path | None, typer.Option("--image", help="Picture to look at.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    messages: Annotated[
        Path | None, typer.Option("--messages", help="Conversation: a JSON list of {role, content}.")
    ] = None,
    schema: Annotated[Path | None, typer.Option("--schema", help="JSON Schema that the answer must follow.")] = None,
    tokens_max: Annotated[int, typer.Option(min=0, help="End the answer here; 0: where the context ends.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the chance at a temperature above 0.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print each piece as it is made: a JSON line each.")] = False,
    release: Annotated[
        Path | None, typer.Option("--release", help="Release folder, instead of the active one.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Answer one image, prompt or conversation with a slot's model, without the daemon; prints JSON. Exit status 1 when
    there is no whole answer."""
    if sum(given is not None for given in (image, prompt, messages)) != 1:
        raise fail("give exactly one of --image FILE, --prompt TEXT and --messages FILE", 2)
    if image is not None and (schema or tokens_max or temperature or seed or stop or stream):
        raise fail("--image takes none of the options of language: leave them out", 2)
    from edged import once

    def hear(piece: str) -> None:
        typer.echo(json.dumps({"text": piece}))

    try:
        request = None
        if image is None:
            request = once.language(
                prompt, messages, schema, tokens_max=tokens_max, temperature=temperature, seed=seed,
                stop=tuple(stop or ()),
            )  # fmt: skip
        answer = once.answer(settings_of(config), slot, image, request, release, hear if stream else None)
    except once.CannotAnswer as error:
        raise fail(str(error)) from None
    typer.echo(json.dumps(answer, indent=None if stream else 2))
    if "error" in answer:
        raise typer.Exit(1)


@samples_app.command("list")
def samples_list(
    config: Config = DEFAULT_CONFIG,
    state: Annotated[str | None, typer.Option(help="Only samples in this state, for example labelled.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, oldest first.")] = 100,
    as_json: Json = False,
) -> None:
    """List samples: id, state, pipeline, release, confidence, reason, label."""
    from dataclasses import asdict

    with store_of(config) as store:
        rows = store.samples(state, limit)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        label = " ".join(str(part.get("label", part.get("text"))) for part in row.label or [])[:60] or "-"
        typer.echo(
            f"{row.id}  {row.state:<10} {row.pipeline} {row.release} p={row.confidence:.2f} {row.reason}  {label}"
        )
    typer.echo(f"{len(rows)} samples", err=True)


@app.command()
def why(
    sample: Annotated[str, typer.Argument(help="Id of the sample, as `edged samples list` shows it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Why a sample was kept: what was seen, how sure that was, what the rule said, and what has become of it."""
    from edged.why import document, screen

    with store_of(config) as store:
        found = store.sample(sample)
        listed = store.samples(limit=1)
    if found is None:
        example = f", for example {listed[0].id}" if listed else "; none is kept here yet"
        raise fail(f"no sample {sample!r} on this device: `edged samples list` shows the ids{example}")
    typer.echo(json.dumps(document(found), indent=2) if as_json else "\n".join(screen(found)))


@samples_app.command("counts")
def samples_counts(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """How many samples are in which state."""
    with store_of(config) as store:
        counts = store.counts()
    typer.echo(json.dumps(counts) if as_json else _counts(counts))


@models_app.command("list")
def models_list(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """List the releases on this device's disk, verified against their hashes."""
    from edged.releases import BadRelease, Releases, reference, verify

    releases = Releases(settings_of(config).device.state_dir / "releases")
    rows: list[dict[str, Any]] = []
    for folder in releases.candidates():
        try:
            ref = reference(folder)
            manifest = verify(folder, ref)
            size = sum(entry.bytes for entry in manifest.files.values())
            rows.append(
                {"release": ref.release, "sha256": ref.sha256, "kind": manifest.kind, "bytes": size, "error": ""}
            )
        except BadRelease as error:
            rows.append({"release": folder.name, "sha256": "", "kind": "", "bytes": 0, "error": str(error)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(
            row["error"] or f"{row['release']:<24} {row['kind']:<7} {row['bytes']:>12} bytes  {row['sha256'][:12]}"
        )


@models_app.command("verify")
def models_verify(folder: Annotated[Path, typer.Argument(help="Release folder.")]) -> None:
    """Verify a release folder and let it answer its golden set in a process of its own."""
    from edged.engines.base import EngineOptions
    from edged.prove import ProveFailed, prove
    from edged.releases import BadRelease, reference, verify

    try:
        ref = reference(folder)
        verify(folder, ref)
        proof = prove(folder, EngineOptions(), 120)
    except (BadRelease, ProveFailed) as error:
        raise fail(str(error)) from None
    typer.echo(f"{ref.release}: every file matches its hash; {proof.golden} golden inputs answered as promised")


@app.command()
def schema(
    topic: Annotated[str | None, typer.Argument(help="Only this topic, for example up/reported.")] = None,
) -> None:
    """Print the JSON Schema of every payload by topic, so that a client in any language can join."""
    from edged.wire.messages import json_schema

    schemas = json_schema()
    if topic is not None:
        schemas = {name: body for name, body in schemas.items() if topic in name}
        if not schemas:
            raise fail(f"no topic contains {topic!r}; known: {', '.join(json_schema())}", 2)
    typer.echo(json.dumps(schemas, indent=2))
