"""`trainer keys`: the keys that sign releases, and the ceremonies with the offline ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show

if TYPE_CHECKING:
    from trainer.repository import Repository

PASSPHRASE = "TRAINER_KEYS_PASSPHRASE"

keys_app = typer.Typer(
    help="The keys that sign releases: root and targets offline, the others here.", no_args_is_help=True
)

Offline = Annotated[
    list[Path] | None,
    typer.Option(
        "--offline", help="Folder with offline keys, best on a medium of its own; repeatable.", show_default=False
    ),
]
Secret = Annotated[
    Path | None,
    typer.Option(help=f"File with the passphrase of the offline keys. Default: ${PASSPHRASE}, else it is asked for."),
]


@keys_app.command("init")
def keys_init(
    offline: Offline = None,
    root: Annotated[str, typer.Option(help="How many of how many root keys must sign.")] = "2/3",
    targets: Annotated[str, typer.Option(help="How many of how many targets keys must sign.")] = "2/3",
    passphrase_file: Secret = None,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Make all keys and the first signed metadata. Offline keys go into the --offline folders in turn, encrypted.

    Nothing is overwritten. Devices are enrolled with the root that is made here.
    """
    from trainer.ceremony import Quorum, create
    from trainer.keys import TrustError
    from trainer.releases import Registry
    from trainer.repository import Lifetimes

    settings = load(config)
    try:
        repository, files = create(
            settings.trust.folder, offline or [], _asker(passphrase_file, new=True), root=Quorum.parse(root),
            targets=Quorum.parse(targets), lifetimes=Lifetimes(**settings.trust.lifetimes()),
        )  # fmt: skip
    except (TrustError, OSError) as error:
        fail(str(error))
    unsigned = [stored.ref.release for stored in Registry(settings.releases).list()]
    shown = {"root": repository.root(), "offline_keys": [str(path) for path in files], "unsigned_releases": unsigned}
    if as_json:
        show(shown, as_json)
        return
    typer.echo(f"root for devices: {repository.root()}")
    for path in files:
        typer.echo(f"offline key: {path}")
    typer.echo("put each folder's medium away, at places of their own, and its passphrase elsewhere")
    if unsigned:
        typer.echo(
            f"not signed yet: {', '.join(unsigned)}; sign what devices run with `trainer release sign NAME@VERSION`"
        )


@keys_app.command("list")
def keys_list(config: Config = CONFIG, as_json: Json = False) -> None:
    """Every key by its role, when the role's metadata expires, and what waits for signatures."""
    from trainer.keys import TrustError, short
    from trainer.repository import OFFLINE, ONLINE

    repository = _repository(config)
    try:
        current = repository.current()
    except TrustError as error:
        fail(str(error))
    rows = []
    for role in (*OFFLINE, *ONLINE):
        keyids = current.keyids(role)
        delegator = current.targets if role == ONLINE[0] else current.root
        rows.append({
            "role": role, "version": current.role(role).signed.version, "expires": current.role(role).signed.expires,
            "days_left": round(repository.left(current, role) * repository.lifetimes.seconds(role) / 86400, 1),
            "needed": delegator.signed.get_delegated_role(role).threshold,
            "keys": keyids if as_json else " ".join(map(short, keyids)),
            "kept": "offline" if role in OFFLINE else str(repository.keys),
            "staged": (repository.folder / "staged" / f"{role}.json").is_file(),
        })  # fmt: skip
    show(rows, as_json)


@keys_app.command("rotate")
def keys_rotate(
    roles: Annotated[list[str], typer.Argument(help="Of root, targets, models, snapshot, timestamp.")],
    key: Annotated[str | None, typer.Option(help="Only this key, as `trainer keys list` shows it.")] = None,
    offline: Offline = None,
    passphrase_file: Secret = None,
    config: Config = CONFIG,
) -> None:
    """Replace the keys of roles (or one key of one role) by new ones. New offline keys go into --offline folders in turn.

    After a break-in at the trainer: `trainer keys rotate models snapshot timestamp`, in one ceremony.
    """
    from trainer.ceremony import rotate

    if key is not None and len(roles) > 1:
        fail(f"--key {key}: name its role alone")
    _perform(config, lambda it: rotate(it, roles, key, offline or [], _asker(passphrase_file, new=True)))


@keys_app.command("add")
def keys_add(
    role: Annotated[str, typer.Argument(help="root or targets")],
    offline: Offline = None,
    passphrase_file: Secret = None,
    config: Config = CONFIG,
) -> None:
    """Give root or targets one more key, as after `revoke`. It goes into the first --offline folder."""
    from trainer.ceremony import add

    _perform(config, lambda it: add(it, role, offline or [], _asker(passphrase_file, new=True)))


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="The key, as `trainer keys list` shows it.")],
    offline: Offline = None,
    passphrase_file: Secret = None,
    config: Config = CONFIG,
) -> None:
    """Take a root or targets key away without a new one, where enough are left."""
    from trainer.ceremony import drop

    _perform(config, lambda it: drop(it, key, offline or [], _asker(passphrase_file)))


@keys_app.command("renew")
def keys_renew(
    role: Annotated[
        str | None, typer.Argument(help="root or targets; none: the online roles, where it is due.")
    ] = None,
    offline: Offline = None,
    passphrase_file: Secret = None,
    config: Config = CONFIG,
) -> None:
    """Sign again before it expires. The online roles are renewed by `trainer serve` too."""
    from trainer.ceremony import extend
    from trainer.keys import TrustError
    from trainer.repository import OFFLINE

    def act(repository: Repository) -> str:
        if role is None:
            return f"renewed: {', '.join(repository.renew()) or 'nothing was due'}"
        if role not in OFFLINE:
            raise TrustError(f"{role!r}: name {' or '.join(OFFLINE)}, or nothing for the online roles")
        return extend(repository, role, offline or [], _asker(passphrase_file))

    _perform(config, act)


@keys_app.command("sign")
def keys_sign(
    offline: Offline = None,
    discard: Annotated[bool, typer.Option("--discard", help="Give up what waits for signatures.")] = False,
    passphrase_file: Secret = None,
    config: Config = CONFIG,
) -> None:
    """Add signatures to a change that waits for them; it is published when there are enough."""
    from trainer import ceremony

    def act(repository: Repository) -> str:
        if discard:
            ceremony.discard(repository)
            return "given up"
        return ceremony.sign(repository, offline or [], _asker(passphrase_file))

    _perform(config, act)


def _repository(config: Path) -> Repository:
    from trainer.signing import repository_of

    settings = load(config)
    found = repository_of(settings)
    if found is None:
        fail(f"{settings.trust.folder}: no keys are here; make them with `trainer keys init --offline DIR`")
    return found


def _perform(config: Path, act: Callable[[Repository], str]) -> None:
    from trainer.keys import TrustError

    repository = _repository(config)
    try:
        typer.echo(act(repository))
    except (TrustError, OSError) as error:
        fail(str(error))


def _asker(file: Path | None, *, new: bool = False) -> Any:
    """Where the passphrase of a key's file comes from. `new`: one for a file that is not there yet is asked for twice."""

    def ask(path: Path) -> str:
        if file is not None:
            return file.read_text().rstrip("\n")
        given = os.environ.get(PASSPHRASE)
        if given:
            return given
        answer: str = typer.prompt(
            f"Passphrase of {path}", hide_input=True, confirmation_prompt=new and not path.exists(), err=True
        )
        return answer

    return ask
