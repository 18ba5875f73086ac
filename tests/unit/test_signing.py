"""A trainer that works unattended: it signs what it releases, renews metadata in time, and says what people must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from tests.support.trusted import DAY_S, Owner, passphrase
from trainer import ceremony, signing
from trainer.config import load_config
from trainer.database import Database, events
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.keys import TrustError
from trainer.orders import Orders, await_answer, place
from trainer.releases import MANIFEST, Registry
from trainer.repository import Repository
from trainer.rollouts import Rollouts
from trainer.server import Server, ServerOptions
from trainer.signing import Signing, installable, listing, register, repository_of

Look = Callable[[float], list[tuple[str, str]]]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A trainer without keys."""
    path = tmp_path / "trainer.toml"
    path.write_text('data_dir = "data"\n[trust]\nfolder = "owner/trust"\n')
    config = load_config(path)
    config.data_dir.mkdir()
    return Host(config, path, Database(config.database_at), Registry(config.releases))


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    """Makes the trainer's keys."""
    return Owner(tmp_path / "owner")


def said(host: Host) -> list[tuple[str, str]]:
    with host.database.read() as connection:
        return [(row.kind, row.text) for row in connection.execute(select(events).order_by(events.c.ts))]


@pytest.fixture
def look(host: Host, monkeypatch: pytest.MonkeyPatch) -> Look:
    """`look(days)`: what the running trainer says so many days after now, when it looks again."""
    made: list[Signing] = []
    monkeypatch.setattr(signing, "LOOK_S", 0.0)

    def at(days: float) -> list[tuple[str, str]]:
        if not made:
            made.append(Signing(host))
        now = host.now() + days * DAY_S
        real = Repository.__init__
        with monkeypatch.context() as patched:
            patched.setattr(Repository, "__init__", lambda it, folder, lives: real(it, folder, lives, lambda: now))
            before = len(said(host))
            made[0].tick()
        return said(host)[before:]

    return at


def test_without_keys_it_is_said_once_that_nothing_is_signed(host: Host, look: Look, toy: Path) -> None:
    ((kind, text),) = look(0)
    assert kind == "releases_unsigned"
    assert "only devices with `unsigned = true` install releases; see `trainer keys init`" in text
    assert look(400) == []
    assert register(host.config, host.registry, toy).release == "toy@1.0"
    installable(host.config, host.registry.get("toy@1.0"))


def test_metadata_is_renewed_before_it_expires_and_people_are_told_long_before(
    host: Host, owner: Owner, look: Look
) -> None:
    assert look(0.4) == []
    assert look(0.6) == [("metadata_renewed", "timestamp 2")]
    assert look(4) == [("metadata_renewed", "models 2, snapshot 2, timestamp 3")]
    kinds = [kind for kind, _ in look(280)]
    assert kinds == ["metadata_renewed", "root_expires", "targets_expires"]
    assert "`trainer keys renew root`" in dict(said(host))["root_expires"]
    assert look(280.1) == []  # not again within the day
    late = owner.at(host.now() + 281 * DAY_S)
    for role in ("root", "targets"):
        ceremony.extend(late, role, owner.media, passphrase)
    assert [kind for kind, _ in look(283)] == ["metadata_renewed"]


def test_a_renewal_that_fails_is_said(host: Host, owner: Owner, look: Look) -> None:
    for path in owner.repository.keys.glob("timestamp-*"):
        path.unlink()
    ((kind, text),) = look(0.6)
    assert kind == "metadata_not_renewed"
    assert "`trainer keys rotate timestamp`" in text
    assert look(0.6) == []
    ceremony.rotate(owner.repository, ["timestamp"], None, owner.media, passphrase)
    assert [kind for kind, _ in look(0.7)] == ["metadata_renewed"]


def test_what_is_registered_is_signed_and_what_is_revoked_is_not_rolled_out(
    host: Host, owner: Owner, toy: Path, toy2: Path
) -> None:
    ref = register(host.config, host.registry, toy)
    assert register(host.config, host.registry, toy) == ref
    repository = repository_of(host.config)
    assert repository is not None
    assert repository.signed() == {"toy@1.0": ref.sha256}
    installable(host.config, host.registry.get("toy@1.0"))
    host.registry.register(toy2)  # as before there were keys
    with pytest.raises(TrustError, match=r"toy@1\.1 is not signed, and devices would refuse it: `trainer release sign"):
        installable(host.config, host.registry.get("toy@1.1"))
    repository.revoke("toy@1.0", "it burns")
    with pytest.raises(TrustError, match=r"toy@1\.0 was revoked: it burns"):
        installable(host.config, host.registry.get("toy@1.0"))
    rows = {row["release"]: (row["signed"], row["revoked"]) for row in listing(host.registry, repository)}
    assert rows == {"toy@1.0": (False, "it burns"), "toy@1.1": (False, None)}


@pytest.mark.parametrize(
    ("kind", "body"),
    [("rollout_start", {"release": "toy@1.0"}),
     ("desire", {"device": "d", "models": {"eye": "toy@1.0"}, "adapters": {}}),
     ("desire", {"device": "d", "models": {}, "adapters": {"eye": "toy@1.0"}})],
)  # fmt: skip
def test_no_order_names_a_release_that_devices_would_refuse(
    host: Host, owner: Owner, toy: Path, kind: str, body: dict[str, Any]
) -> None:
    orders = Orders(host, Jobs(host), Rollouts(host))

    def answer() -> str:
        order = place(host.database, kind, body)
        orders.tick()
        said = await_answer(host.database, order, 0)
        assert said is not None
        return str(said["error"])

    host.registry.register(toy)
    assert answer().startswith("toy@1.0 is not signed, and devices would refuse it")
    register(host.config, host.registry, toy)
    assert "signed" not in answer()  # what else is wrong: there is no such device, or no fleet
    owner.repository.revoke("toy@1.0", "it burns")
    assert answer() == "toy@1.0 was revoked: it burns"


def test_what_a_thief_signed_is_listed(host: Host, owner: Owner, toy: Path, toy2: Path) -> None:
    register(host.config, host.registry, toy)
    thief = Owner(owner.repository.folder.parent)  # has the online keys, and a registry elsewhere
    thief.release(toy2)
    (strange,) = [row for row in listing(host.registry, owner.repository) if row["kind"] is None]
    assert (strange["release"], strange["created"]) == ("toy@1.1", "NOT REGISTERED HERE")
    assert not listing(host.registry, owner.repository, "other")


def test_metadata_is_served_and_nothing_else(tmp_path: Path, owner: Owner, toy: Path) -> None:
    ref = owner.release(toy)
    server = Server(
        ServerOptions("127.0.0.1", 0, 1000), owner.registry, tmp_path / "samples",
        claimed=lambda _digest: False, status=dict, arrived=lambda _digest: None, metadata=owner.repository.read,
    )  # fmt: skip
    server.start()
    try:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            for name, path in owner.repository.files().items():
                assert http.get(f"/metadata/{name}").content == path.read_bytes()
            key = next(owner.repository.keys.iterdir())
            for name in ("2.root.json", f"..%2fkeys%2f{key.name}", "revoked.json", f"..%2fkeys%2f{key.name}%00.json"):
                assert http.get(f"/metadata/{name}").status_code == 404
            assert "`trainer keys init`" in http.get("/metadata/2.root.json").json()["error"]
            assert len(http.get(f"/releases/{ref.release}/{MANIFEST}").content) > 0
    finally:
        server.stop()
