"""`trainer tool ...` and `trainer mcp`: what agents use, for people and scripts too."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from trainer.terminal import ANSWER_S, CONFIG, Config, Wait, fail, load, open_database

tool_app = typer.Typer(
    help="The five tools of agents, as commands: JSON on standard output. What no agent may do is refused here too.",
    no_args_is_help=True,
)
OnDevices = Annotated[str, typer.Option(help="Devices, as site=plant1,profile!=pi4,line in (a,b). Default: all.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(tool_app, name="tool")
    app.command("mcp")(mcp)


def mcp(config: Config = CONFIG, wait: Wait = ANSWER_S) -> None:
    """Serve the tools to an agent by the Model Context Protocol, on standard input and output."""
    from trainer.mcp_tools import serve
    from trainer.tools import Tools

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    settings = load(config)
    serve(Tools(settings, open_database(settings), wait))


@tool_app.command("schemas")
def schemas() -> None:
    """Print the name, the purpose and the JSON Schema of the arguments of every tool."""
    from trainer.tools import TOOLS

    told = [{"name": each.name, "description": each.description, "schema": each.schema} for each in TOOLS.values()]
    typer.echo(json.dumps(told, indent=2))


@tool_app.command("collect_samples")
def collect_samples(
    model: Annotated[str, typer.Option(help="The model, as it is configured.")],
    selector: OnDevices = "",
    state: Annotated[str, typer.Option(help="Only samples of this state, as `labelled`.")] = "",
    pull: Annotated[bool, typer.Option("--pull", help="Fetch the pixels of the newest labelled ones.")] = False,
    limit: Annotated[int, typer.Option(help="At most this many are pulled.")] = 100,
    seconds: Annotated[float, typer.Option(help="How long devices may take.")] = 3600.0,
    config: Config = CONFIG,
    wait: Wait = ANSWER_S,
) -> None:
    """Count samples by model, device, state and class; with --pull fetch pixels."""
    asked = {"model": model, "selector": selector, "state": state, "pull": pull, "limit": limit, "seconds": seconds}
    _use("collect_samples", asked, config, wait)


@tool_app.command("request_training")
def request_training(
    model: Annotated[str, typer.Option(help="The model, as it is configured.")],
    config: Config = CONFIG,
    wait: Wait = ANSWER_S,
) -> None:
    """Train on the new samples, if rules allow it; `trainer train` is an operator's, who goes before them."""
    _use("request_training", {"model": model}, config, wait)


@tool_app.command("deploy_model")
def deploy_model(
    release: Annotated[str, typer.Argument(help="name@version, registered")],
    config: Config = CONFIG,
    wait: Wait = ANSWER_S,
) -> None:
    """Bring a release that passed the gate to the fleet."""
    _use("deploy_model", {"release": release}, config, wait)


@tool_app.command("query_metrics")
def query_metrics(
    model: Annotated[str, typer.Option(help="Only this model.")] = "",
    selector: OnDevices = "",
    hours: Annotated[float, typer.Option(help="How far to look back, at most 4320.")] = 24.0,
    group_by: Annotated[list[str] | None, typer.Option(help="A label: figures for each of its values too.")] = None,
    config: Config = CONFIG,
) -> None:
    """Answers, live accuracy and errors by release, trainings, rollouts and drift."""
    asked = {"model": model, "selector": selector, "hours": hours, "group_by": group_by or []}
    _use("query_metrics", asked, config, ANSWER_S)


@tool_app.command("notify")
def notify(
    text: Annotated[str, typer.Argument(help="What to say.")],
    title: Annotated[str, typer.Option()] = "",
    level: Annotated[str, typer.Option(help="info, warning or error")] = "info",
    config: Config = CONFIG,
    wait: Wait = ANSWER_S,
) -> None:
    """Tell the people who look after the fleet something."""
    _use("notify", {"text": text, "title": title, "level": level}, config, wait)


def _use(name: str, arguments: dict[str, Any], config: Any, wait: float) -> None:
    from trainer.tools import ToolRefused, Tools

    settings = load(config)
    try:
        answer = Tools(settings, open_database(settings), wait).call(name, arguments)
    except ToolRefused as error:
        fail(str(error))
    typer.echo(json.dumps(answer, indent=2, default=str))
