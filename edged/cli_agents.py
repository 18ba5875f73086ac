"""`edged agent`: the agents of this device, for people and scripts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edged.cli_options import DEFAULT_CONFIG, Config, Json, fail, settings_of, store_of

AGENT_FAILED, USAGE, NO_DAEMON, CANCELLED = 1, 2, 3, 130
ANSWER_S_MAX = 30.0  # for what is not a run
# What of the daemon's refusals is this command's exit status; any other is AGENT_FAILED.
STATUSES = {"usage": USAGE, "unknown": USAGE}

app = typer.Typer(
    help="The agents of this device: each a table agents.NAME in edged.toml. They run in the daemon, on its own models.",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="The agent, as `edged agent list` names it.")]


@app.command("list")
def agent_list(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """List the agents that run here, and those of other devices that they may ask: slot (and what answers in it) or device,
    tools, peers, what is wrong. Exit status: 0, 3 no daemon with agents runs."""
    agents = _ask(config, {"op": "list"}, ANSWER_S_MAX)["agents"]
    if as_json:
        typer.echo(json.dumps(agents, indent=2))
        return
    for name, agent in agents.items():
        where = f"slot {agent['slot']}" if "slot" in agent else f"{agent['agent']} of device {agent['device']}"
        answering = [agent[key] for key in ("release", "adapter") if agent.get(key)]
        where += f" ({' with '.join(answering)})" if answering else ""
        more = "".join(
            f", {what} {', '.join(agent[key])}"
            for key, what in (("tools", "tools"), ("allowed_peers", "may ask"), ("callers", "answers"))
            if agent.get(key)
        )
        wrong = f"  DOES NOT RUN: {agent['error']}" if agent.get("error") else ""
        typer.echo(f"{name}  {where}{more}, {agent['running']} running{wrong}")
    typer.echo(f"{len(agents)} agents", err=True)


@app.command("run")
def agent_run(
    name: Name,
    given: Annotated[
        str | None, typer.Option("--json", help="The request as JSON; - reads it from standard input.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The request as plain text, instead.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps at most, instead of agents.NAME.max_steps.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Give up, and cancel, after this many seconds.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Let an agent answer a request, and print its response: a text as it is, everything else as JSON.

    The id of the run is on standard error, for `edged agent feedback`. Ctrl-C cancels the run at its next token.

    Exit status: 0 a response, 1 the agent gave an error (on standard error), 2 no such agent or no such request, 3 no
    daemon with agents runs, 130 cancelled.

    Examples:

      edged agent run inspector --json '{"part": 7}'

      edged agent run clerk --text "Which parts were rejected today?"
    """
    request = _request(given, text)
    line: dict[str, Any] = {"op": "run", "agent": name, "request": request}
    if max_steps is not None:
        line["max_steps"] = max_steps
    answer = _ask(config, line, timeout, check=False)
    if answer.get("run"):
        typer.echo(f"run {answer['run']}", err=True)
    if not answer["ok"]:
        raise _refused(answer)
    response = answer["response"]
    typer.echo(response if isinstance(response, str) else json.dumps(response, ensure_ascii=False))


@app.command("feedback")
def agent_feedback(
    run: Annotated[str, typer.Argument(help="The id of a run, as `edged agent run` and `edged agent runs` print it.")],
    who: Annotated[
        str, typer.Option("--who", help="Whose word it is; it becomes the label's provenance.", envvar="USER")
    ],
    score: Annotated[float | None, typer.Option(help="0 (wrong) to 1 (right).")] = None,
    correction: Annotated[
        str | None, typer.Option(help="The response as it should have been, as JSON or a text.")
    ] = None,
    chosen: Annotated[str | None, typer.Option(help="Of two responses the better one; with --rejected.")] = None,
    rejected: Annotated[str | None, typer.Option(help="The worse one.")] = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Say what you think of a run's response: a score, what it should have been, or which of two is better.

    It becomes a labelled sample of this device, which the next training of its model learns from, like every other one.

    Examples:

      edged agent feedback 0198c1f2-... --score 0

      edged agent feedback 0198c1f2-... --correction '{"verdict": "reject"}' --note "three scratches"
    """
    if (chosen is None) != (rejected is None):
        raise fail("--chosen and --rejected belong together", USAGE)
    said: dict[str, Any] = {"who": who, "note": note}
    if score is not None:
        said["score"] = score
    if correction is not None:
        said["correction"] = _value(correction)
    if chosen is not None and rejected is not None:
        said["preference"] = {"chosen": _value(chosen), "rejected": _value(rejected)}
    _ask(config, {"op": "feedback", "run": run, "feedback": said}, ANSWER_S_MAX)
    typer.echo(f"{run}: kept as feedback of {who}")


@app.command("adapt")
def agent_adapt(name: Name, config: Config = DEFAULT_CONFIG) -> None:
    """Let an agent that learns ask for a training with what it was told, and say what runs now.

    The device trains nothing: the wish is an event for people, the samples are announced to the trainer, and its triggers,
    gate and rollout decide."""
    typer.echo(_ask(config, {"op": "adapt", "agent": name}, ANSWER_S_MAX)["text"])


@app.command("runs")
def agent_runs(
    name: Annotated[str | None, typer.Argument(help="Only this agent's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """List runs that this device keeps, newest first: id, agent, how it ended, whose words they are (the adapter where there
    was one), how many steps, how long it took, what people said, goal."""
    from dataclasses import asdict

    with store_of(config) as store:
        runs = store.runs.newest(limit, agent=name)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
        return
    for run in runs:
        record = run.record
        outcome = "error" if record["error"] else "ok"
        words = len(run.feedback)
        said = f"{words} feedback" if words else "no feedback"
        goal = json.dumps(record["goal"][:60], ensure_ascii=False)
        by = record["adapter"] or record["release"] or "-"
        took = f", {record['seconds']:.1f} s" if record.get("seconds") is not None else ""
        typer.echo(f"{run.id}  {outcome:<5} {run.agent} {by} {len(record['execution'])} steps{took}, {said}  {goal}")
    typer.echo(f"{len(runs)} runs", err=True)


@app.command("export")
def agent_export(
    file: Annotated[Path, typer.Argument(help="dataset.jsonl to write, replaced as a whole; - for standard output.")],
    name: Annotated[str | None, typer.Option("--agent", help="Only this agent's runs.")] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Write whole runs, oldest first: one JSON object a line with goal, context_summary, plan, execution and summary.

    What trains an agent step by step is `edged requests export --pipeline agent:NAME`; these lines show its runs from
    request to response, with what people said of them."""
    from edged import dataset
    from edged.store import StoreLimits

    with store_of(config) as store:
        runs = store.runs.newest(StoreLimits().executions_max, agent=name)
    lines = dataset.run_lines(reversed(runs), settings_of(config).device.id)
    if str(file) == "-":
        sys.stdout.writelines(lines)
    else:
        try:
            dataset.write(file, lines)
        except OSError as error:
            raise fail(f"{file}: {error.strerror}; nothing was written") from None
    typer.echo(f"{file}: {len(lines)} runs; {len(runs) - len(lines)} have no response", err=str(file) == "-")


def _request(given: str | None, text: str | None) -> Any:
    if (given is None) == (text is None):
        raise fail("give the request: --json '{...}', or --text '...'", USAGE)
    if text is not None:
        return text
    try:
        return json.loads(sys.stdin.read() if given == "-" else given or "")
    except ValueError as error:
        raise fail(f"--json: {error}; write JSON, or use --text", USAGE) from None


def _value(text: str) -> Any:
    """JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _ask(config: Path, line: dict[str, Any], seconds: float | None, *, check: bool = True) -> dict[str, Any]:
    from edged.agent_client import Nobody, ask

    state = settings_of(config).device.state_dir
    try:
        answer = ask(state, line, seconds)
    except Nobody:
        why = "no edged runs here, or its configuration has no table agents.NAME"
        raise fail(f"{why}: start it with `edged run --config {config}`", NO_DAEMON) from None
    except KeyboardInterrupt:
        raise fail("cancelled", CANCELLED) from None
    except TimeoutError:
        raise fail(f"no answer within {seconds:g} s; cancelled", CANCELLED) from None
    except PermissionError as error:
        raise fail(f"{state}: {error.strerror}; run this as root, or as the user that runs edged") from None
    except (OSError, ValueError) as error:
        raise fail(f"{state}: {error}", NO_DAEMON) from None
    if check and not answer["ok"]:
        raise _refused(answer)
    return answer


def _refused(answer: dict[str, Any]) -> typer.Exit:
    kind = answer.get("kind", "")
    return fail(answer.get("error", "refused"), CANCELLED if kind == "cancelled" else STATUSES.get(kind, AGENT_FAILED))
