"""The trainer's signed metadata: ceremonies, revocations, renewal, and crashes between any two files."""

from __future__ import annotations

import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edged.releases import reference
from edged.wire.manifest import ReleaseRef
from edged.wire.trust import METADATA_BYTES_MAX
from tests.support.files import file_server
from tests.support.trusted import DAY_S, Device, Owner, passphrase
from trainer import ceremony, keys, repository
from trainer.ceremony import Quorum
from trainer.keys import Key, TrustError
from trainer.repository import OLD_VERSIONS_MAX, Repository


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an owner who has released nothing. Not to be changed."""
    folder = tmp_path_factory.mktemp("fresh")
    Owner(folder)
    return folder


@pytest.fixture
def owner(tmp_path: Path, fresh: Path) -> Owner:
    return Owner(shutil.copytree(fresh, tmp_path / "owner"))


def some(number: int = 0) -> ReleaseRef:
    return ReleaseRef(release=f"some@1.{number}", sha256=f"{number:064x}")


def versions(owner: Owner) -> dict[str, int]:
    current = owner.repository.current()
    roles = ("root", "targets", "models", "snapshot", "timestamp")
    return {role: current.role(role).signed.version for role in roles}


def consistent(owner: Owner) -> None:
    """Every role is signed by enough of its keys, and names what follows."""
    current = owner.repository.current()
    assert all(current.verified(role) for role in ("root", "targets", "models", "snapshot", "timestamp"))


def test_offline_keys_lie_apart_encrypted_and_the_online_ones_are_private(owner: Owner) -> None:
    for medium in owner.media:
        assert sorted(path.name.partition("-")[0] for path in medium.iterdir()) == ["root", "targets"]
        for path in medium.iterdir():
            assert b"ENCRYPTED" in path.read_bytes()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with pytest.raises(TrustError, match="is it the right passphrase"):
                keys.load(path, lambda _: "wrong")
    online = sorted(owner.repository.keys.iterdir())
    assert [path.name.partition("-")[0] for path in online] == ["models", "snapshot", "timestamp"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in online} == {0o600}
    consistent(owner)


def test_nothing_is_overwritten(owner: Owner, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="is not empty: keys are made once"):
        ceremony.create(owner.repository.folder, owner.media, passphrase)
    key = Key.new("root")
    key.save(tmp_path, passphrase)
    with pytest.raises(TrustError, match="is there already: a key is never overwritten"):
        key.save(tmp_path, passphrase)
    with pytest.raises(TrustError, match="no folder for the offline keys"):
        ceremony.create(tmp_path / "new", [], passphrase)
    with pytest.raises(TrustError, match="a passphrase of 5 characters; use at least 12"):
        ceremony.create(tmp_path / "new", [tmp_path / "medium"], lambda _: "short")
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "medium").glob("*"))


@pytest.mark.parametrize("text", ["2", "3/2", "0/1", "a/b", "2/", "2/17", "-1/2"])
def test_a_quorum_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TrustError, match="for example 2/3"):
        Quorum.parse(text)


def test_other_quorums(tmp_path: Path) -> None:
    made, files = ceremony.create(
        tmp_path / "trust", [tmp_path / "m"], passphrase, root=Quorum.parse("3/5"), targets=Quorum.parse("1/2")
    )
    roles = made.current().root.signed.roles
    assert (roles["root"].threshold, len(roles["root"].keyids)) == (3, 5)
    assert (roles["targets"].threshold, len(roles["targets"].keyids), len(files)) == (1, 2, 7)


def test_signing_is_idempotent_and_what_was_revoked_stays_so(owner: Owner) -> None:
    owner.repository.sign(some(), 10)
    before = versions(owner)
    owner.repository.sign(some(), 10)
    assert versions(owner) == before
    assert owner.repository.signed() == {"some@1.0": some().sha256}
    with pytest.raises(TrustError, match="signed with other bytes: release these under a new version"):
        owner.repository.sign(ReleaseRef(release="some@1.0", sha256="f" * 64), 10)
    assert owner.repository.revoke("some@1.0", "it burns")
    assert not owner.repository.revoke("some@1.0", "it burns still")
    assert owner.repository.signed() == {}
    assert Repository(owner.repository.folder).revoked() == {"some@1.0": "it burns still"}
    with pytest.raises(
        TrustError, match=r"was revoked \(it burns still\) and stays so: release it under a new version"
    ):
        owner.repository.sign(some(), 10)


def test_metadata_is_renewed_at_half_of_its_life_and_not_before(owner: Owner) -> None:
    now, before = time.time(), versions(owner)
    assert owner.at(now + 0.4 * DAY_S).renew() == []
    assert owner.at(now + 0.6 * DAY_S).renew() == ["timestamp"]
    assert versions(owner) == {**before, "timestamp": before["timestamp"] + 1}
    assert owner.at(now + 3.6 * DAY_S).renew() == ["models", "snapshot", "timestamp"]
    assert owner.at(now + 3.7 * DAY_S).renew() == []
    # A trainer that was off for a year comes back by itself; the offline roles need people.
    late = owner.at(now + 364 * DAY_S)
    assert late.renew() == ["models", "snapshot", "timestamp"]
    assert late.left(late.current(), "root") < 0.01
    assert "root 2 is published" in ceremony.extend(late, "root", owner.media[:2], passphrase)
    assert "targets 2 is published" in ceremony.extend(late, "targets", owner.media[1:], passphrase)
    assert min(late.left(late.current(), role) for role in ("root", "targets")) > 0.99
    consistent(owner)


@pytest.mark.parametrize("role", ["root", "targets", "models", "snapshot", "timestamp"])
def test_every_roles_keys_can_be_replaced(owner: Owner, role: str) -> None:
    old = owner.repository.current().keyids(role)
    owner.repository.sign(some(), 10)
    ceremony.rotate(owner.repository, [role], None, owner.media, passphrase)
    assert not set(old) & set(owner.repository.current().keyids(role))
    assert len(owner.repository.current().keyids(role)) == len(old)
    consistent(owner)
    if role not in ("root", "targets"):  # the old key's file is gone: nothing asks for it any more
        assert not list(owner.repository.keys.glob(f"*{old[0][:8]}*"))
    owner.repository.sign(some(1), 10)
    assert len(owner.repository.signed()) == 2


def test_one_key_of_several_is_replaced_or_taken_away(owner: Owner) -> None:
    keyids = owner.repository.current().keyids("root")
    ceremony.rotate(owner.repository, ["root"], keyids[0][:8], owner.media[1:], passphrase)
    after = owner.repository.current().keyids("root")
    assert (len(after), set(after) & set(keyids)) == (3, set(keyids[1:]))
    ceremony.drop(owner.repository, keyids[1][:8], owner.media[1:], passphrase)
    left = owner.repository.current().keyids("root")
    assert len(left) == 2
    with pytest.raises(TrustError, match=r"root has 2 keys left and needs 2: `trainer keys rotate root --key"):
        ceremony.drop(owner.repository, left[0], owner.media, passphrase)
    ceremony.add(owner.repository, "root", [owner.media[0].with_name("new"), *owner.media], passphrase)
    assert len(owner.repository.current().keyids("root")) == 3
    assert owner.repository.current().root.signed.roles["root"].threshold == 2
    with pytest.raises(TrustError, match="'models': name root or targets"):
        ceremony.add(owner.repository, "models", owner.media, passphrase)
    consistent(owner)


def test_wrong_names_are_answered_with_the_right_ones(owner: Owner) -> None:
    with pytest.raises(TrustError, match=r"'ffff' is no key of root; its keys: [0-9a-f]{8}, "):
        ceremony.rotate(owner.repository, ["root"], "ffff", owner.media, passphrase)
    with pytest.raises(TrustError, match=r"'king' is no role; roles: root, targets, models, snapshot, timestamp"):
        ceremony.rotate(owner.repository, ["king"], None, owner.media, passphrase)
    with pytest.raises(TrustError, match=r"is no key of root or targets; .* `trainer keys rotate`"):
        ceremony.drop(owner.repository, owner.repository.current().keyids("models")[0], owner.media, passphrase)
    with pytest.raises(TrustError, match="a new root key needs a folder"):
        ceremony.rotate(owner.repository, ["root"], None, [], passphrase)
    with pytest.raises(TrustError, match="no such folder; is its medium mounted"):
        ceremony.extend(owner.repository, "root", [owner.media[0] / "x"], passphrase)


def test_custodians_sign_one_after_the_other_at_places_of_their_own(owner: Owner) -> None:
    before = versions(owner)
    said = ceremony.rotate(owner.repository, ["models"], None, owner.media[:1], passphrase)
    assert said.startswith("targets has 1 of 2 signatures: continue with `trainer keys sign --offline DIR`")
    assert versions(owner) == before
    with pytest.raises(TrustError, match="a change of targets waits for signatures: finish it"):
        ceremony.rotate(owner.repository, ["root"], None, owner.media, passphrase)
    # Twice the same custodian is one custodian.
    assert "1 of 2" in ceremony.sign(owner.repository, owner.media[:1], passphrase)
    assert ceremony.finish(owner.repository) == ""
    assert ceremony.sign(owner.repository, owner.media[2:], passphrase) == "targets 2 is published"
    consistent(owner)
    with pytest.raises(TrustError, match="nothing waits"):
        ceremony.sign(owner.repository, owner.media, passphrase)


def test_a_change_can_be_given_up(owner: Owner) -> None:
    ceremony.rotate(owner.repository, ["timestamp"], None, owner.media[:1], passphrase)
    ceremony.discard(owner.repository)
    assert "root 2 is published" in ceremony.rotate(owner.repository, ["timestamp"], None, owner.media, passphrase)
    consistent(owner)


def test_new_targets_keys_come_with_targets_signed_by_them(owner: Owner) -> None:
    """Else devices would meet a root whose targets nobody has signed yet."""
    said = ceremony.rotate(owner.repository, ["targets"], None, owner.media[:1], passphrase)
    assert "root has 1 of 2 signatures of its present keys" in said
    assert versions(owner)["root"] == 1
    assert ceremony.sign(owner.repository, owner.media[1:], passphrase) == "root 2 is published, targets 2 is published"
    consistent(owner)


class Crash(BaseException):
    """The machine stopped here."""


CHANGES: dict[str, Callable[[Owner], object]] = {
    "sign": lambda owner: owner.repository.sign(some(2), 10),
    "revoke": lambda owner: owner.repository.revoke("toy@1.1", "it burns"),
    "renew": lambda owner: owner.at(time.time() + 4 * DAY_S).renew(),
    "root": lambda owner: ceremony.rotate(owner.repository, ["root"], None, owner.media, passphrase),
    "timestamp": lambda owner: ceremony.rotate(owner.repository, ["timestamp"], None, owner.media, passphrase),
    "models": lambda owner: ceremony.rotate(owner.repository, ["models"], None, owner.media, passphrase),
    "targets": lambda owner: ceremony.rotate(owner.repository, ["targets"], None, owner.media, passphrase),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_between_any_two_files_leaves_what_devices_accept_or_the_next_look_mends(
    tmp_path: Path, fresh: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    begin = Owner(shutil.copytree(fresh, tmp_path / "begin"))
    begin.release(toy)
    begin.release(toy2)
    real, ended, number = repository.write, False, 0
    while not ended:
        owner = Owner(shutil.copytree(tmp_path / "begin", tmp_path / f"owner{number}"))
        left = [number]

        def write(folder: Path, role: str, metadata: object, left: list[int] = left) -> bytes:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return real(folder, role, metadata)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(repository, "write", write)
            patched.setattr(ceremony, "write", write)
            try:
                CHANGES[change](owner)
                ended = True
            except Crash:
                pass
        with file_server() as server:
            device = Device(tmp_path / f"device{number}", begin.repository.root(), server.url)
            if change in ("sign", "revoke", "renew", "models"):  # no root has changed: devices notice nothing
                owner.publish(server)
                device.install(reference(toy))
            ceremony.finish(owner.repository)
            owner.repository.renew()
            assert owner.repository.renew() == []
            consistent(owner)
            owner.publish(server)
            device.install(reference(toy))
        assert ("toy@1.1" in owner.repository.signed()) == (change != "revoke")  # remembered before it was signed
        number += 1
    assert number > 1


def test_a_look_at_what_is_due_mends_what_a_new_root_made_invalid(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = repository.write

    def write(folder: Path, role: str, metadata: object) -> bytes:
        if role == "timestamp":
            raise Crash
        return real(folder, role, metadata)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(repository, "write", write)
        with pytest.raises(Crash):
            ceremony.rotate(owner.repository, ["timestamp"], None, owner.media, passphrase)
    assert not owner.repository.current().verified("timestamp")
    assert owner.repository.renew() == ["timestamp"]
    consistent(owner)


def test_only_a_few_old_versions_are_kept_and_every_root(owner: Owner) -> None:
    for number in range(OLD_VERSIONS_MAX + 5):
        owner.repository.sign(some(number), 10)
    newest = versions(owner)["snapshot"]
    kept = sorted(int(path.name.partition(".")[0]) for path in owner.repository.metadata.glob("*.snapshot.json"))
    assert kept == list(range(newest - OLD_VERSIONS_MAX, newest + 1))
    ceremony.extend(owner.repository, "root", owner.media, passphrase)
    assert {"1.root.json", "2.root.json", "timestamp.json"} < owner.repository.files().keys()
    assert all(path.is_file() for path in owner.repository.files().values())


def test_only_metadata_is_handed_out(owner: Owner) -> None:
    assert owner.repository.read("timestamp.json") == owner.repository.files()["timestamp.json"].read_bytes()
    key = next(owner.repository.keys.iterdir()).name
    for name in ("9.root.json", f"../keys/{key}", "../revoked.json", "", "."):
        assert owner.repository.read(name) is None


def test_two_who_sign_at_once_both_succeed(owner: Owner) -> None:
    threads = [
        threading.Thread(target=lambda n=n: Repository(owner.repository.folder).sign(some(n), 10)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owner.repository.signed()) == 6
    consistent(owner)


def test_more_than_devices_take_is_not_signed(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METADATA_BYTES_MAX, "models", 1200)
    signing = (owner.repository.sign(some(number), 10) for number in range(20))
    with pytest.raises(TrustError, match="devices take at most 1200: revoke releases that nobody needs"):
        list(signing)
    consistent(owner)


def test_a_lost_online_key_is_named_with_the_fix(owner: Owner) -> None:
    shutil.rmtree(owner.repository.keys)
    with pytest.raises(TrustError, match=r"role models: none of its keys .* `trainer keys rotate models`"):
        owner.repository.sign(some(), 10)
    owner.repository.keys.mkdir()
    ceremony.rotate(owner.repository, ["models", "snapshot", "timestamp"], None, owner.media, passphrase)
    consistent(owner)
