"""`trainer simulate-virtual`: a whole rollout on a virtual clock, without a broker and without a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.terminal import Json, fail, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate-virtual")(simulate_virtual)


def simulate_virtual(
    devices: Annotated[int, typer.Option(min=2, max=1_000_000, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result, byte for byte.")] = 0,
    disruption: Annotated[
        float, typer.Option(min=0, max=1, help="Share of them that may be on its way at once; 0: all.")
    ] = 0.1,
    bad: Annotated[bool, typer.Option(help="Also roll out a bad release after the good one.")] = True,
    folder: Annotated[
        Path | None, typer.Option(help="Where the database stays; by default it is made and removed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Roll a good release out to a simulated fleet, then a bad one, on a virtual clock and without a broker.

    The coordinator, its database and the messages are the real ones. Hours pass in minutes; with a real broker and in real
    time: `trainer simulate`. See docs/scale.md.
    """
    from trainer.simulate.virtual import Scenario, Stuck, run_virtual

    try:
        found = run_virtual(Scenario(devices, seed, disruption, bad), folder, lambda text: typer.echo(text, err=True))
    except (Stuck, OSError) as error:
        fail(str(error))
    if as_json:
        show(found, as_json)
        return
    result, cost = found["result"], found["cost"]
    for each in result["rollouts"]:
        show([_row(each["release"], step) for step in each["steps"]], as_json=False)
        typer.echo(
            f"{each['release']}: {each['phase']} after {each['seconds'] / 3600:.2f} h; {each['ran_it']} ran it, "
            f"{each['ran_it_beside_the_canaries']} of them no canaries; {each['reverts']} reverted; at most "
            f"{each['busy_max']} on their way at once; {each['away_at_the_end']} still away\n"
        )
    typer.echo(
        f"{result['virtual_s'] / 3600:.1f} h of the virtual clock, {result['devices']['messages']} messages from devices "
        f"and {result['devices']['messages_to_devices']} to them, database {result['database_bytes'] / 1e6:.1f} MB\n"
        f"{cost['wall_s']:.0f} s, {cost['cpu_s']:.0f} s of a processor ({cost['cpu_ms_per_device']:.2f} ms a device), "
        f"at most {cost['memory_mib_max']} MiB"
    )


def _row(release: str, step: dict[str, Any]) -> dict[str, Any]:
    return {
        "release": release, "at": f"{step['at_s'] / 3600:.2f} h", "phase": step["phase"], "told": step["told"],
        "running": step["running"], "audited": step["audited"],
    }  # fmt: skip
