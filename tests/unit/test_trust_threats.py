"""Each threat that signed metadata is there for, through the real way of fetching: a device, HTTP, and a hostile server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import MetaFile, Root, TargetFile

from edged.fetch import WrongContent
from edged.releases import reference
from edged.trust import Untrusted
from edged.wire.manifest import ReleaseRef
from edged.wire.trust import METADATA_BYTES_MAX, MODELS, target_path
from tests.support.files import FileServer, file_server
from tests.support.trusted import DAY_S, Device, Owner, Wall, bump, forged, leading_to, passphrase
from trainer import ceremony
from trainer.keys import Key


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as serving:
        yield serving


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """The folder of an owner who has released toy@1.0. Not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "owner"
    folder.mkdir()
    Owner(folder).release(toy)
    return folder


@pytest.fixture
def owner(tmp_path: Path, made: Path) -> Owner:
    return Owner(shutil.copytree(made, tmp_path / "owner"))


@pytest.fixture
def device(tmp_path: Path, owner: Owner, server: FileServer) -> Device:
    """Enrolled, and it has installed toy@1.0."""
    owner.publish(server)
    root = tmp_path / "root.json"
    shutil.copyfile(owner.repository.root(), root)
    device = Device(tmp_path / "device", root, server.url)
    device.install(owner.registry.get("toy@1.0").ref)
    return device


def test_a_signed_release_is_installed_and_its_metadata_fetched_once(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    ref = owner.release(toy2)
    owner.publish(server)
    before = len(server.requested)
    device.install(ref)
    asked = server.requested[before:]
    assert [name for name in asked if name.startswith("/metadata/")] == [
        "/metadata/2.root.json", "/metadata/timestamp.json", "/metadata/3.snapshot.json", "/metadata/3.models.json",
    ]  # fmt: skip  # not targets: it is what it was


def test_arbitrary_software_that_nobody_signed(device: Device, server: FileServer, toy2: Path) -> None:
    ref = reference(toy2)
    server.publish(toy2, ref)  # a hijacked broker desires it, and its bytes are to be had
    with pytest.raises(Untrusted, match=r"toy@1\.1 is not signed: nobody released it, or it was revoked"):
        device.install(ref)
    assert not device.releases.folder(ref).exists()


def test_arbitrary_software_under_a_signed_name(device: Device, server: FileServer, tmp_path: Path, toy: Path) -> None:
    evil = shutil.copytree(toy, tmp_path / "evil")
    (evil / "release.json").write_bytes((toy / "release.json").read_bytes() + b" ")
    ref = reference(evil)
    server.publish(evil, ref)
    with pytest.raises(Untrusted, match=r"toy@1\.0: desired state pins [0-9a-f]{12}, signed is [0-9a-f]{12}"):
        device.install(ref)


def test_arbitrary_software_of_another_owner(device: Device, server: FileServer, tmp_path: Path, toy2: Path) -> None:
    stranger = Owner(tmp_path / "stranger")
    ref = stranger.release(toy2)
    stranger.publish(server)
    with pytest.raises(Untrusted, match="not what the owner signed"):
        device.install(ref)


@pytest.mark.parametrize("what", ["manifest", "model"])
def test_tampered_bytes(device: Device, owner: Owner, server: FileServer, toy2: Path, what: str) -> None:
    ref = owner.release(toy2)
    owner.publish(server)
    path = server.blob(toy2) if what == "model" else f"/releases/{ref.release}/release.json"
    data = server.files[path]
    server.files[path] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(WrongContent):
        device.install(ref)


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.models.json", "1.targets.json"])
def test_tampered_metadata(tmp_path: Path, owner: Owner, server: FileServer, name: str) -> None:
    served = owner.publish(server)
    server.files[f"/metadata/{name}"] = served[name].replace(b"2", b"3", 1)
    device = Device(tmp_path / "fresh", owner.repository.root(), server.url)
    with pytest.raises(Untrusted, match="not what the owner signed"):
        device.install(owner.registry.get("toy@1.0").ref)


def test_rollback_to_metadata_from_before_a_revocation(device: Device, owner: Owner, server: FileServer) -> None:
    old = owner.publish(server)
    ref = owner.registry.get("toy@1.0").ref
    owner.repository.revoke("toy@1.0", "it burns")
    owner.publish(server)
    with pytest.raises(Untrusted, match="revoked"):
        device.install(ref)
    server.files.update({f"/metadata/{name}": data for name, data in old.items()})
    for each in (device, device.again()):
        with pytest.raises(Untrusted, match=r"New timestamp version 2 must be >= 3"):
            each.install(ref)


def test_a_revoked_release_is_refused_although_its_files_are_here(
    device: Device, owner: Owner, server: FileServer
) -> None:
    owner.repository.revoke("toy@1.0", "it burns")
    owner.publish(server)
    ref = owner.registry.get("toy@1.0").ref
    assert device.releases.folder(ref).is_dir()
    with pytest.raises(Untrusted, match="revoked"):
        device.install(ref)


def test_freeze_ends_with_the_timestamp(device: Device, owner: Owner, server: FileServer) -> None:
    """The server goes on with old metadata: it is taken as long as it is young, and not a day longer."""
    ref = owner.registry.get("toy@1.0").ref
    clock = Wall(time.time() + 0.9 * DAY_S)
    frozen = Device(device.folder, device.root, server.url, clock)
    frozen.install(ref)
    clock.time += 0.2 * DAY_S
    with pytest.raises(
        Untrusted, match=r"timestamp\.json is expired: nothing is installed until the trainer renews it"
    ):
        frozen.install(ref)
    owner.at(clock.time).renew()
    owner.publish(server)
    frozen.install(ref)


@pytest.mark.parametrize("days", [8, 366])
def test_freeze_with_a_stolen_timestamp_key_ends_with_the_other_roles(
    device: Device, owner: Owner, server: FileServer, days: float
) -> None:
    clock = Wall(time.time() + days * DAY_S)
    at_then = owner.at(clock.time)
    served = owner.publish(server)

    def refresh(timestamp: Any) -> None:
        bump(timestamp)
        timestamp.expires = at_then.expiry("timestamp")

    server.files["/metadata/timestamp.json"] = forged(served["timestamp.json"], refresh, [owner.online("timestamp")])
    with pytest.raises(Untrusted, match="expired"):
        Device(device.folder, device.root, server.url, clock).install(owner.registry.get("toy@1.0").ref)


def test_mix_and_match_of_two_states(tmp_path: Path, owner: Owner, server: FileServer, toy2: Path) -> None:
    """The timestamp of one state with the snapshot of another: nobody ever signed that these belong together."""
    old = owner.publish(server)
    ref = owner.release(toy2)
    owner.publish(server)
    server.files["/metadata/3.snapshot.json"] = old["2.snapshot.json"]
    with pytest.raises(Untrusted, match="not what the owner signed"):
        Device(tmp_path / "fresh", owner.repository.root(), server.url).install(ref)


def test_mix_and_match_of_models_of_the_same_version(
    tmp_path: Path, owner: Owner, server: FileServer, toy2: Path
) -> None:
    """With the key of models alone, stolen: another models file of the right version is not what snapshot says."""
    served = owner.publish(server)
    ref = reference(toy2)
    server.publish(toy2, ref)
    own = forged(served["2.models.json"], adding(ref, toy2), [owner.online(MODELS)])
    server.files["/metadata/2.models.json"] = own
    with pytest.raises(Untrusted, match="not what the owner signed"):
        Device(tmp_path / "fresh", owner.repository.root(), server.url).install(ref)


def adding(ref: ReleaseRef, folder: Path) -> Callable[[Any], None]:
    def change(targets: Any) -> None:
        path = target_path(ref.release)
        targets.targets[path] = TargetFile((folder / "release.json").stat().st_size, {"sha256": ref.sha256}, path)

    return change


@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json", "3.snapshot.json", "3.models.json"])
def test_endless_metadata_is_given_up(device: Device, owner: Owner, server: FileServer, toy2: Path, name: str) -> None:
    ref = owner.release(toy2)
    owner.publish(server)
    server.endless.add(f"/metadata/{name}")
    with pytest.raises(Untrusted, match="expected at most"):  # the test ends: the device hung up
        device.install(ref)


def test_endless_metadata_whose_length_was_signed_with_stolen_keys(
    device: Device, owner: Owner, server: FileServer
) -> None:
    served = owner.publish(server)

    def boundless(timestamp: Any) -> None:
        bump(timestamp)
        timestamp.snapshot_meta = MetaFile(3, length=1 << 50)

    server.files["/metadata/timestamp.json"] = forged(served["timestamp.json"], boundless, [owner.online("timestamp")])
    server.endless.add("/metadata/3.snapshot.json")
    with pytest.raises(Untrusted, match=f"at most {METADATA_BYTES_MAX['snapshot']} bytes"):
        device.install(owner.registry.get("toy@1.0").ref)


def test_an_endless_manifest_is_given_up_at_its_signed_length(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    ref = owner.release(toy2)
    owner.publish(server)
    server.endless.add(f"/releases/{ref.release}/release.json")
    size = (toy2 / "release.json").stat().st_size
    with pytest.raises(WrongContent, match=f"at most {size} bytes"):
        device.install(ref)


def taking_over(thief: Key) -> Callable[[Any], None]:
    """A next root, in which the thief's key alone is every role's."""

    def change(root: Any) -> None:
        bump(root)
        for role in root.roles.values():
            role.keyids, role.threshold = [thief.keyid], 1
        root.keys = {thief.keyid: thief.signer.public_key}

    return change


def test_one_stolen_root_key_of_three_names_no_new_root(device: Device, owner: Owner, server: FileServer) -> None:
    served, thief = owner.publish(server), Key.new("root")
    stolen = owner.offline("root")[0]
    server.files["/metadata/2.root.json"] = forged(served["1.root.json"], taking_over(thief), [stolen, thief])
    with pytest.raises(Untrusted, match="root was signed by 1/2 keys"):
        device.install(owner.registry.get("toy@1.0").ref)


def test_two_stolen_root_keys_of_three_do(device: Device, owner: Owner, server: FileServer) -> None:
    """What the quorum means: the test above fails for lack of a signature, and for nothing else."""
    served, thief = owner.publish(server), Key.new("root")
    stolen = owner.offline("root")[:2]
    server.files["/metadata/2.root.json"] = forged(served["1.root.json"], taking_over(thief), [*stolen, thief])
    with pytest.raises(Untrusted, match="timestamp was signed by 0/1 keys"):  # under the thief's root
        device.install(owner.registry.get("toy@1.0").ref)


def test_one_stolen_targets_key_of_three_names_no_other_models_key(
    tmp_path: Path, owner: Owner, server: FileServer
) -> None:
    served, thief = owner.publish(server), Key.new(MODELS)

    def delegate(targets: Any) -> None:
        targets.delegations.roles[MODELS].keyids = [thief.keyid]
        targets.delegations.keys = {thief.keyid: thief.signer.public_key}

    server.files["/metadata/1.targets.json"] = weak = forged(
        served["1.targets.json"], delegate, owner.offline("targets")[:1]
    )

    def point(snapshot: Any) -> None:  # the thief has the trainer's online keys too
        snapshot.meta["targets.json"] = MetaFile.from_data(1, weak, ["sha256"])

    server.files["/metadata/2.snapshot.json"] = snapshot = forged(
        served["2.snapshot.json"], point, [owner.online("snapshot")]
    )

    def follow(timestamp: Any) -> None:
        timestamp.snapshot_meta = MetaFile.from_data(2, snapshot, ["sha256"])

    server.files["/metadata/timestamp.json"] = forged(served["timestamp.json"], follow, [owner.online("timestamp")])
    with pytest.raises(Untrusted, match="targets was signed by 1/2 keys"):
        Device(tmp_path / "fresh", owner.repository.root(), server.url).install(owner.registry.get("toy@1.0").ref)


@pytest.mark.parametrize("lacking", ["old", "new", "version"])
def test_a_root_rotation_signed_too_weakly(device: Device, owner: Owner, server: FileServer, lacking: str) -> None:
    served, own = owner.publish(server), owner.offline("root")
    fresh = [Key.new("root") for _ in range(3)]

    def replace(root: Root) -> None:
        bump(root)
        if lacking == "version":
            bump(root)
        for key in own:
            root.revoke_key(key.keyid, "root")
        for key in fresh:
            root.add_key(key.signer.public_key, "root")

    signers = {"old": [*own[:1], *fresh], "new": [*own, *fresh[:1]], "version": [*own, *fresh]}[lacking]
    server.files["/metadata/2.root.json"] = forged(served["1.root.json"], replace, signers)
    with pytest.raises(Untrusted, match=r"root was signed by 1/2 keys|Expected root version 2"):
        device.install(owner.registry.get("toy@1.0").ref)


def test_a_root_rotation_signed_well_is_followed_over_several_versions(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    for _ in range(3):
        ceremony.rotate(owner.repository, ["root"], None, owner.media, passphrase)
    ceremony.rotate(owner.repository, ["timestamp"], None, owner.media, passphrase)
    ceremony.rotate(owner.repository, ["targets"], None, owner.media, passphrase)
    ref = owner.release(toy2)
    owner.publish(server)
    device.install(ref)
    assert device.trust.status()["root_version"] == 6
    device.again().install(ref)


def test_the_key_of_models_says_nothing_outside_its_path(
    tmp_path: Path, owner: Owner, server: FileServer, toy2: Path
) -> None:
    """The thief has all three online keys, and the owner's targets delegates other paths to them."""
    current = owner.repository.current()
    current.targets.signed.delegations.roles[MODELS].paths = [f"{MODELS}/eye@*"]  # type: ignore[union-attr, index]
    current.targets.signed.version = 2
    current.targets.signatures.clear()
    for key in owner.offline("targets"):
        current.targets.sign(key.signer, append=True)
    (owner.repository.metadata / "2.targets.json").write_bytes(current.targets.to_bytes())
    owner.repository.publish(current, {"targets"})
    ref = owner.release(toy2)  # the repository signs what it is told to, as a thief would
    owner.publish(server)
    with pytest.raises(Untrusted, match=r"toy@1\.1 is not signed"):
        Device(tmp_path / "fresh", owner.repository.root(), server.url).install(ref)


def test_all_online_keys_stolen_are_stopped_by_two_custodians(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    served, ref = owner.publish(server), reference(toy2)
    server.publish(toy2, ref)
    stolen = {role: owner.online(role) for role in (MODELS, "snapshot", "timestamp")}
    own = forged(served["2.models.json"], lambda t: (bump(t), adding(ref, toy2)(t)), [stolen[MODELS]])
    thiefs = leading_to(served, own, stolen["snapshot"], stolen["timestamp"])
    ceremony.rotate(owner.repository, list(stolen), None, owner.media[:2], passphrase)
    owner.publish(server)
    assert "/metadata/2.root.json" in server.files  # which the thief cannot make
    server.files.update({f"/metadata/{name}": data for name, data in thiefs.items()})
    with pytest.raises(Untrusted, match="timestamp was signed by 0/1 keys"):
        device.install(ref)
    owner.publish(server)
    device.install(owner.registry.get("toy@1.0").ref)


def test_all_online_keys_stolen_and_not_revoked_install_a_model(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    """What docs/security.md admits; and the test above fails for the rotation, and for nothing else."""
    served, ref = owner.publish(server), reference(toy2)
    server.publish(toy2, ref)
    own = forged(served["2.models.json"], lambda t: (bump(t), adding(ref, toy2)(t)), [owner.online(MODELS)])
    thiefs = leading_to(served, own, owner.online("snapshot"), owner.online("timestamp"))
    server.files.update({f"/metadata/{name}": data for name, data in thiefs.items()})
    device.install(ref)


def test_a_trainer_from_an_old_backup_is_refused_until_its_online_keys_are_new(
    tmp_path: Path, device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    backup = shutil.copytree(owner.repository.folder, tmp_path / "backup")
    ref = owner.release(toy2)
    owner.publish(server)
    device.install(ref)
    shutil.rmtree(owner.repository.folder)
    shutil.copytree(backup, owner.repository.folder)
    served = {name for name in server.files if name.startswith("/metadata/")}
    for name in served:
        del server.files[name]
    owner.publish(server)
    with pytest.raises(Untrusted, match=r"New timestamp version 2 must be >= 3"):
        device.install(ref)
    owner.release(toy2)
    ceremony.rotate(owner.repository, [MODELS, "snapshot", "timestamp"], None, owner.media[:2], passphrase)
    owner.publish(server)
    device.install(ref)


def test_devices_come_back_when_the_offline_roles_were_renewed_too_late(
    device: Device, owner: Owner, server: FileServer, toy2: Path
) -> None:
    clock = Wall(time.time() + 400 * DAY_S)
    late, slow = owner.at(clock.time), Device(device.folder, device.root, server.url, clock)
    ref = owner.release(toy2)
    late.renew()
    owner.publish(server)
    with pytest.raises(Untrusted, match=r"root\.json is expired"):
        slow.install(ref)
    ceremony.extend(late, "root", owner.media[:2], passphrase)
    owner.publish(server)
    with pytest.raises(Untrusted, match="targets is expired"):
        slow.install(ref)
    ceremony.extend(late, "targets", owner.media[:2], passphrase)
    owner.publish(server)
    slow.install(ref)
