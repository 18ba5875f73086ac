"""`trainer ca`, `trainer enroll`, `trainer revoke`, `trainer broker`: who may connect, and the broker that must know it."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import fail, load, open_database, show

if TYPE_CHECKING:
    from edged.link import LinkOptions
    from trainer.config import TrainerConfig
    from trainer.core.access import Identity, Role
    from trainer.enrolment import Enrolment

RELOAD_S_MAX = 60.0
ANSWER_S = 15.0
BUNDLE_SUFFIX = ".edged"
BROKER = "broker"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}

app = typer.Typer(no_args_is_help=True)
ca_app = typer.Typer(help="The authority that issues everybody's certificates.", no_args_is_help=True)
broker_app = typer.Typer(help="The MQTT broker: its configuration, and whom it knows.", no_args_is_help=True)
app.add_typer(ca_app, name="ca")
app.add_typer(broker_app, name="broker")

CONFIG = Path("trainer.toml")
Config = Annotated[
    Path, typer.Option("--config", "-c", envvar="TRAINER_CONFIG", help="The trainer's TOML file.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", envvar="TRAINER_CA_PASSPHRASE_FILE", help="What opens the authority's key."),
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the broker's answer.")]
Renew = Annotated[bool, typer.Option("--renew", help="New certificates, also for a revoked name.")]


@ca_app.command("init")
def ca_init(
    name: Annotated[str, typer.Option(help="What the authority is called.")] = "edged CA",
    config: Config = CONFIG,
    passphrase: Passphrase = None,
) -> None:
    """Make the authority: its key, which never leaves this machine, and its certificate, which everybody gets."""
    with _enrolment(config, passphrase) as (_, enrolment):
        enrolment.create(name)
        typer.echo(
            f"{enrolment.folder / 'ca.crt'}: the authority; back up {enrolment.folder}, and show nobody its ca.key"
        )


@ca_app.command("issue")
def ca_issue(
    name: Annotated[str, typer.Argument(help="Common name, for example `broker`, or the trainer's name.")],
    role: Annotated[str, typer.Option(help="trainer, broker or observer; devices and responders: `trainer enroll`.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address at which it is a server; repeatable.")] = None,
    site: Annotated[str | None, typer.Option(help="By default the configuration's.")] = None,
    config: Config = CONFIG,
    passphrase: Passphrase = None,
    renew: Renew = False,
) -> None:
    """A certificate and its key for somebody who is no device. The same again, until --renew."""
    from trainer.core.access import Identity

    if role not in ("trainer", "broker", "observer"):
        fail(
            f"--role {role}: trainer, broker or observer; a device or a responder gets a bundle: `trainer enroll {name}`"
        )
    if role == "broker" and not host:
        fail(f"{name} is a server: give the name that devices reach it at, --host broker.plant.example")
    with _enrolment(config, passphrase) as (settings, enrolment):
        identity = Identity(name, site or settings.site, roles=(role,))  # type: ignore[arg-type]
        for issued in enrolment.certify(identity, hosts=host or (), renew=renew):
            typer.echo(f"{issued.certificate}\n{issued.key}")


@ca_app.command("show")
def ca_show(config: Config = CONFIG, as_json: Json = False) -> None:
    """Everybody who has certificates: who he is, until when, and whether they are revoked."""
    with _enrolment(config, None) as (_, enrolment):
        rows = [
            {
                "name": each.identity.name,
                "roles": "+".join(each.identity.roles),
                "site": each.identity.site,
                "group": each.identity.group,
                "expires": _date(each.expires),
                "days": int((each.expires - time.time()) // 86400),
                "revoked": _date(each.revoked) if each.revoked is not None else "",
                "reason": each.reason,
            }
            for each in enrolment.all()
        ]
    show(rows, as_json)


@app.command()
def enroll(
    device: Annotated[str | None, typer.Argument(help="The device's name: its id, client id and common name.")] = None,
    names: Annotated[Path | None, typer.Option("--from", help="File with many names, one a line.")] = None,
    site: Annotated[str | None, typer.Option(help="By default the configuration's.")] = None,
    group: Annotated[str | None, typer.Option(help="Group whose desired state it follows.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundles.")] = Path(),
    responder: Annotated[bool, typer.Option("--responder", help="It answers other devices' questions.")] = False,
    peer: Annotated[
        bool, typer.Option("--peer", help="Its agents may ask those of other devices, and answer.")
    ] = False,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Without a TUF root: it takes unsigned releases.")
    ] = False,
    config: Config = CONFIG,
    passphrase: Passphrase = None,
    renew: Renew = False,
) -> None:
    """Make the bundle with which `edged enroll` makes a machine this device. It holds the device's private keys.

    Enrolled already: the same certificates again, with the site and group given now.
    """
    from edged.wire.bundle import encode
    from trainer.core.access import Identity
    from trainer.enrolment import newest_root
    from trainer.files import write_whole

    if (device is None) == (names is None):
        fail("give one DEVICE, or --from FILE with one name a line")
    more: list[Role] = [role for role, wanted in (("responder", responder), ("peer", peer)) if wanted]  # type: ignore[misc]
    roles: tuple[Role, ...] = ("device", *more)
    with _enrolment(config, passphrase) as (settings, enrolment):
        root = None if unsigned else newest_root(settings.trust.folder)
        broker = _broker_address(settings)
        wanted = [device] if device is not None else _names(names)
        identities = [Identity(name or "", site or settings.site, group or "", roles) for name in wanted]
        for identity in identities:
            bundle = enrolment.bundle(identity, broker, root, renew=renew)
            path = out / f"{identity.name}{BUNDLE_SUFFIX}"
            write_whole(path, encode(bundle))  # mode 0600
            typer.echo(path)
    if broker[0] in LOOPBACK:
        typer.echo(
            f"the broker is {broker[0]}:{broker[1]}, which this machine alone reaches: for others set enrolment.broker",
            err=True,
        )
    typer.echo(
        f"on the device: `edged enroll FILE`, then delete it. A broker that runs must know {'it' if device else 'them'}: "
        "`trainer broker admit NAME`, or `trainer broker config` and a restart",
        err=True,
    )


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Whose certificates are taken back.")],
    reason: Annotated[str, typer.Option(help="Kept in the record.")] = "",
    config: Config = CONFIG,
    passphrase: Passphrase = None,
    wait: Wait = ANSWER_S,
) -> None:
    """Let somebody in no more: recorded, on the list that servers refuse by, and thrown out of the broker.

    Status 1 when a part is still to be done; the same command again does it.
    """
    from trainer.core.dynsec import dismissals
    from trainer.crl import CRL

    with _enrolment(config, passphrase) as (settings, enrolment):
        identity = enrolment.revoke(name, reason)
        place, crl = settings.enrolment.broker_folder, enrolment.folder / CRL
        typer.echo(f"{identity.name}: revoked in the record and in {crl}")
        undone = [
            *_try("the broker's list", lambda: _place_crl(place, crl)),
            *_try("the broker's reload", lambda: _reload(settings.enrolment.broker_reload)),
            *_try("the broker's client", lambda: _tell(settings, dismissals(identity), wait)),
        ]
        if undone:
            fail(
                "\n".join([*undone, f"mend that, and give `trainer revoke {name}` again: until then a part lets it in"])
            )
        _forget(settings, identity, wait)
    typer.echo(f"{identity.name}: the broker has ended its connections and refuses new ones")


@broker_app.command("config")
def broker_config(
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default enrolment.broker_folder.")] = None,
    at: Annotated[Path | None, typer.Option(help="Where the folder will lie on the broker's machine.")] = None,
    listen: Annotated[str, typer.Option(help="Address that it listens on.")] = "0.0.0.0",
    port: Annotated[int | None, typer.Option(help="By default the one that devices are told.")] = None,
    name: Annotated[str, typer.Option(help="The common name of its certificate.")] = BROKER,
    plugin: Annotated[Path | None, typer.Option(help="Mosquitto's dynamic security plugin (.so).")] = None,
    user: Annotated[str | None, typer.Option(help="Whom it runs as. Default: mosquitto, where root asks.")] = None,
    config: Config = CONFIG,
) -> None:
    """Write a whole configuration of Mosquitto 2: certificates, rights of everybody enrolled, limits, a drop-in for systemd.

    It is made of the record alone: writing it again loses nothing. A running broker reads it at its next start.
    """
    from trainer.broker import CRL as PLACE
    from trainer.broker import SERVICE_USER, BrokerTls, write_broker_config, write_drop_in
    from trainer.crl import CRL

    with _enrolment(config, None) as (settings, enrolment):
        found = enrolment.find(name)
        if found is None or "broker" not in found.identity.roles:
            fail(f"no certificate for the broker {name!r}: `trainer ca issue {name} --role broker --host NAME`")
        issued = enrolment.folder / "issued"
        folder = out or settings.enrolment.broker_folder
        known = [each.identity for each in enrolment.all() if each.revoked is None]
        path = write_broker_config(
            folder,
            port or _broker_address(settings)[1],
            host=listen,
            tls=BrokerTls(
                enrolment.folder / "ca.crt", issued / f"{name}.crt", issued / f"{name}.key", enrolment.folder / CRL
            ),
            clients=known,
            plugin=plugin,
            user=user or (SERVICE_USER if os.geteuid() == 0 else None),
            at=at,
        )
        drop_in = write_drop_in(folder, at=at)
    typer.echo(f"{path}: {len(known)} identities, revoked certificates in {folder / PLACE}")
    typer.echo(
        f"install it: cp -r {drop_in.parent} /etc/systemd/system/; systemctl daemon-reload; systemctl restart mosquitto"
    )


@broker_app.command("admit")
def broker_admit(
    names: Annotated[
        list[str], typer.Argument(help="Names that are enrolled; new or changed since the broker's start.")
    ],
    config: Config = CONFIG,
    wait: Wait = ANSWER_S,
) -> None:
    """Make a running broker know somebody, without a restart: his rights as the record has them now."""
    from trainer.core.dynsec import admissions

    with _enrolment(config, None) as (settings, enrolment):
        commands: list[dict[str, Any]] = []
        for name in names:
            found = enrolment.find(name)
            if found is None or found.revoked is not None:
                fail(
                    f"{name} is {'revoked' if found else 'not enrolled'}: `trainer enroll {name}`, with --renew if revoked"
                )
            commands += admissions(found.identity)
        wrong = _try("the broker", lambda: _tell(settings, commands, wait))
        if wrong:
            fail(wrong[0])
    typer.echo(f"the broker knows {', '.join(names)}")


@contextmanager
def _enrolment(config: Path, passphrase: Path | None) -> Iterator[tuple[TrainerConfig, Enrolment]]:
    """The configuration, and the record with its authority; what goes wrong ends the program with a message."""
    from trainer.broker import BrokerError
    from trainer.ca import CaError
    from trainer.core.access import BadName
    from trainer.enrolment import Enrolment, EnrolmentError

    settings = load(config)
    database = open_database(settings)
    try:
        secret = None if passphrase is None else passphrase.read_bytes().strip()
        yield settings, Enrolment(settings.enrolment.folder, database, secret or None)
    except (BadName, BrokerError, CaError, EnrolmentError, OSError) as error:
        fail(str(error))
    finally:
        database.close()


def _names(path: Path | None) -> list[str]:
    lines = path.read_text().splitlines() if path is not None else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _broker_address(settings: TrainerConfig) -> tuple[str, int]:
    """Where devices find the broker."""
    text = settings.enrolment.broker
    if not text:
        return settings.broker.host, settings.broker.port
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        fail(f"enrolment.broker {text!r}: write HOST:PORT, for example broker.plant.example:8883")
    return host, int(port)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _try(what: str, act: Callable[[], None]) -> list[str]:
    """What went wrong with one part, so that the others are still done."""
    from trainer.broker import BrokerError
    from trainer.broker_control import ControlError

    try:
        act()
    except (BrokerError, ControlError, OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"{what}: {error}"]
    return []


def _place_crl(folder: Path, crl: Path) -> None:
    from trainer.broker import put_crl

    if not put_crl(folder, crl):
        raise OSError(
            f"enrolment.broker_folder {folder} holds no configuration: `trainer broker config`, or correct the key"
        )


def _reload(command: str) -> None:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=RELOAD_S_MAX, check=False)
    if done.returncode:
        raise OSError(f"enrolment.broker_reload {command!r} ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def _admin(settings: TrainerConfig) -> LinkOptions:
    from edged.link import LinkOptions
    from trainer.enrolment import ADMIN

    issued, broker = settings.enrolment.folder / "issued", settings.broker
    return LinkOptions(
        broker.host, broker.port, ADMIN, settings.enrolment.folder / "ca.crt",
        issued / f"{ADMIN}.crt", issued / f"{ADMIN}.key", reconnect_s_max=1,
    )  # fmt: skip


def _forget(settings: TrainerConfig, identity: Identity, wait: float) -> None:
    """What the broker retains of a device would still be shown to whoever looks; it lets nobody in, so that it is said and
    no failure when it cannot be emptied."""
    from edged.link import BadCredentials
    from edged.wire import topics
    from trainer.broker_control import ControlError, empty

    if "device" not in identity.roles:
        return
    kept = [route(site=identity.site, dev=identity.name) for route in (topics.STATE, topics.REPORTED)]
    try:
        wrong = empty(_admin(settings), kept, wait)
    except (BadCredentials, ControlError, OSError) as error:
        wrong = [str(error)]
    if wrong:
        fix = "`trainer broker config` and a restart of the broker give edged-admin the right to"
        typer.echo(f"the broker still shows what {identity.name} last said: {'; '.join(wrong)}; {fix}", err=True)


def _tell(settings: TrainerConfig, commands: list[dict[str, Any]], wait: float) -> None:
    from edged.link import BadCredentials
    from trainer.broker_control import ControlError, command
    from trainer.core.dynsec import tolerated
    from trainer.enrolment import ADMIN

    try:
        answers = command(_admin(settings), commands, wait)
    except BadCredentials as error:
        raise ControlError(f"{error}; `trainer ca init` makes {ADMIN}'s") from None
    refused = [f"{answer['command']}: {answer['error']}" for answer in answers if not tolerated(answer)]
    if refused:
        raise ControlError("; ".join(refused))
