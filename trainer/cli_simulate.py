"""`trainer simulate`: a fleet of simulated devices, to see what a broker and a trainer carry and how a rollout goes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.simulate.plan import Plan
    from trainer.simulate.run import Seen

SHOWN_S = 10.0  # between two lines where the output is no terminal


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(simulate)


def simulate(
    devices: Annotated[int, typer.Option(min=1, max=99_999, help="How many.")] = 100,
    processes: Annotated[int, typer.Option(min=1, max=64, help="That they are spread over.")] = 2,
    rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Windows of metrics a second, of all together. Default: each device one a minute."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Answers in a window.")] = 20,
    duration: Annotated[float | None, typer.Option(min=0, help="Seconds. Default: until Ctrl-C.")] = None,
    broker: Annotated[str, typer.Option(help="HOST:PORT. Default: the configuration's.")] = "",
    site: Annotated[str, typer.Option(help="Default: the configuration's.")] = "",
    model: Annotated[str, typer.Option(help="Slot and model. Default: the only one that is configured.")] = "",
    classes: Annotated[str, typer.Option(help="With commas between. Default: the model's labels.")] = "",
    release: Annotated[str, typer.Option(help="That they run. Default: the oldest one of the model here.")] = "",
    escalate_share: Annotated[float, typer.Option(min=0, max=1, help="Of the answers: unsure, so asked about.")] = 0.05,
    audit_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the others: checked, where desired state says nothing else.")
    ] = 0.02,
    accuracy: Annotated[float, typer.Option(min=0, max=1, help="Of the answers of the first release.")] = 0.9,
    bad_share: Annotated[float, typer.Option(min=0, max=1, help="Of the devices: a new release is worse there.")] = 0.0,
    bad_loss: Annotated[float, typer.Option(min=0, max=1, help="How much accuracy it loses there.")] = 0.3,
    revert_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the devices: go back from a new release.")
    ] = 0.0,
    lost_per_hour: Annotated[float, typer.Option(min=0, help="Connections that each device loses.")] = 0.0,
    lost_s: Annotated[float, typer.Option(min=0, help="How long it is away then, about.")] = 60.0,
    connects: Annotated[float, typer.Option(min=0.1, help="Devices that connect in a second.")] = 100.0,
    responders: Annotated[int, typer.Option(min=0, max=16, help="Simulated ones, that answer them.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    end: Annotated[
        str,
        typer.Option(
            help="How they leave: offline (say so), clear (and take what the broker retains along), will (cut)."
        ),
    ] = "offline",
    certificates: Annotated[
        Path | None, typer.Option(help="A folder with NAME.crt and NAME.key of each client, for a broker with TLS.")
    ] = None,
    among_real_devices: Annotated[bool, typer.Option(help="Also where the site has real devices.")] = False,
    trail: Annotated[
        Path | None, typer.Option(help="A folder for the ids of all reports that the broker took.")
    ] = None,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Simulate devices: births, metrics, questions, samples, updates over real blocks, reverts, lost connections.

    They speak the real protocol with the broker of the configuration, and are called sim-00001 and so on. Ctrl-C ends them
    in order. A whole rollout without a broker, hours of it in minutes: `trainer simulate-virtual`. See docs/scale.md.
    """
    settings = load(config)
    host, port = _address(broker, settings)
    name, labels = _model(settings, model, classes)
    if end not in ("offline", "clear", "will"):
        fail(f"--end {end}: use offline, clear or will")
    from trainer.simulate.plan import Plan
    from trainer.simulate.run import SimulationError

    plan = Plan(
        host=host, port=port, site=site or settings.site, devices=devices, processes=processes,
        certificates=certificates, ca=settings.broker.ca, model=name, classes=labels,
        release=release or _oldest(settings, name), window_s=devices / rate if rate else 60.0, items=items,
        escalate_share=escalate_share, audit_share=audit_share, accuracy=accuracy, bad_share=bad_share,
        bad_loss=bad_loss, revert_share=revert_share, lost_per_hour=lost_per_hour, lost_s=lost_s,
        responders=responders, connects_s=connects, seed=seed, end=end, trail=trail,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        _run(plan, settings, duration, as_json, among_real_devices)
    except SimulationError as error:
        fail(str(error))


def _run(plan: Plan, settings: TrainerConfig, duration: float | None, as_json: bool, among_real: bool) -> None:
    from trainer.simulate.run import Simulation
    from trainer.simulate.safety import check_certificates, refuse_real_devices

    check_certificates(plan)
    if not among_real:
        refuse_real_devices(plan, settings)
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        fleet = Simulation(plan)
        with fleet, _shown(plan) as look:
            fleet.until(duration, look, lambda: bool(stopped))
            look(fleet.seen())
            typer.echo("taking leave", err=True)
        seen = fleet.seen()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    result: dict[str, Any] = {"devices": plan.devices, **seen.to_dict()}
    if not as_json:
        result |= {key: ", ".join(f"{n} {what}" for what, n in result[key].items()) for key in ("counts", "updates")}
    show(result, as_json)


@contextmanager
def _shown(plan: Plan) -> Iterator[Callable[[Seen], None]]:
    """Live on standard error: a line that is rewritten on a terminal, one now and then elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as line:
            yield lambda seen: line.update(_line(plan, seen))
        return
    said = [-SHOWN_S]

    def say(seen: Seen) -> None:
        if seen.seconds - said[0] >= SHOWN_S:
            said[0] = seen.seconds
            print(_line(plan, seen), file=sys.stderr, flush=True)

    yield say


def _line(plan: Plan, seen: Seen) -> str:
    counts = seen.counts
    updates = ", ".join(f"{n} {state}" for state, n in sorted(seen.updates.items()) if state != "idle")
    return (
        f"{seen.seconds:.0f} s: {seen.online}/{plan.devices} online, {counts['reports']} reports "
        f"({counts['windows']} windows, {counts['samples']} samples), {counts['questions']} questions, "
        f"{counts['verdicts']} verdicts, {counts['block_bytes'] / 1e6:.1f} MB of blocks"
        + (f"; updates: {updates}" if updates else "")
    )


def _address(broker: str, settings: TrainerConfig) -> tuple[str, int]:
    if not broker:
        return settings.broker.host, settings.broker.port
    host, _, port = broker.rpartition(":")
    if not host or not port.isdigit():
        fail(f"--broker {broker}: use HOST:PORT")
    if settings.broker.ca is None and host not in ("127.0.0.1", "localhost", "::1"):
        fail(f"--broker {broker}: off this machine traffic is encrypted; set broker.ca in the configuration")
    return host, int(port)


def _model(settings: TrainerConfig, model: str, classes: str) -> tuple[str, list[str]]:
    known = sorted(settings.models)
    if not model:
        if len(known) != 1:
            fail(f"--model: which? Configured are {', '.join(known) or 'none'}")
        model = known[0]
    labels = [name.strip() for name in classes.split(",") if name.strip()]
    labels = labels or list(getattr(settings.models.get(model), "labels", []))
    if not labels:
        fail(f"--classes: models.{model} names no labels; say them, with commas between")
    return model, labels


def _oldest(settings: TrainerConfig, model: str) -> str:
    from edged.wire.manifest import ReleaseId
    from trainer.releases import Registry

    names = sorted((each.ref.release for each in Registry(settings.releases).list(model)), key=ReleaseId)
    return names[0] if names else f"{model}@1.0"
