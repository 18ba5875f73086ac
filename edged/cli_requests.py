"""`edged requests`: the language requests that this device answered, for people and for fine-tuning."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edged.cli_options import DEFAULT_CONFIG, Config, Json, fail, settings_of, store_of

app = typer.Typer(help="The language requests that this device answered.", no_args_is_help=True)
Pipeline = Annotated[str | None, typer.Option("--pipeline", help="Only those of this pipeline.")]
Since = Annotated[str | None, typer.Option("--since", help="Only those from this time on (ISO 8601, UTC if no zone).")]


@app.command("list")
def requests_list(
    config: Config = DEFAULT_CONFIG,
    pipeline: Pipeline = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 100,
    as_json: Json = False,
) -> None:
    """List language requests: id, outcome, pipeline, release, confidence, tokens, prompt."""
    from dataclasses import asdict

    start = _seconds(since)
    with store_of(config) as store:
        rows = store.requests(limit, since=start, pipeline=pipeline)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        sure = "-" if row.confidence is None else f"{row.confidence:.2f}"
        asked = json.dumps(row.prompt or [turn["content"] for turn in row.messages], ensure_ascii=False)
        typer.echo(
            f"{row.id}  {row.outcome:<9} {row.pipeline} {row.adapter or row.release or '-'} p={sure} "
            f"{row.prompt_tokens}+{row.answer_tokens} tokens  {asked[:60]}"
        )
    typer.echo(f"{len(rows)} requests", err=True)


@app.command("export")
def requests_export(
    file: Annotated[Path, typer.Argument(help="dataset.jsonl to write, replaced as a whole; - for standard output.")],
    config: Config = DEFAULT_CONFIG,
    pipeline: Pipeline = None,
    since: Since = None,
    as_json: Json = False,
) -> None:
    """Write the whole answers as examples for fine-tuning, oldest first: one JSON object a line with goal,
    context_summary, plan, execution and summary."""
    from edged import dataset
    from edged.store import StoreLimits

    start = _seconds(since)
    with store_of(config) as store:
        rows = store.requests(StoreLimits().requests_max, since=start, pipeline=pipeline)
        lines = dataset.lines(reversed(rows), store.sample, settings_of(config).device.id)
    if str(file) == "-":
        sys.stdout.writelines(lines)
    else:
        try:
            dataset.write(file, lines)
        except OSError as error:
            raise fail(f"{file}: {error.strerror}; nothing was written") from None
    summary = {"file": str(file), "written": len(lines), "left_out": len(rows) - len(lines)}
    text = f"{file}: {len(lines)} examples; {len(rows) - len(lines)} requests have no whole answer"
    typer.echo(json.dumps(summary) if as_json else text, err=str(file) == "-")


def _seconds(since: str | None) -> float:
    """Seconds since the epoch of an ISO 8601 time, in UTC unless it says otherwise."""
    from datetime import UTC, datetime

    if since is None:
        return 0.0
    try:
        when = datetime.fromisoformat(since)
    except ValueError:
        raise fail(f"--since {since!r}: no ISO 8601 time; write 2026-01-31 or 2026-01-31T12:00:00Z", 2) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
