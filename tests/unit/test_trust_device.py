"""What a device keeps of trust: its clock's floor, its memory over power cuts, and what it says of itself."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged import trust
from edged.fetch import FetchCancelled, FetchError
from edged.releases import MANIFEST_BYTES_MAX, reference
from edged.trust import CLOCK_SLACK_S, REFRESHED, Trust, Untrusted, describe, read_refreshed
from edged.wire.manifest import ReleaseRef
from edged.wire.trust import METADATA_BYTES_MAX, role_of
from tests.support.files import FileServer, file_server
from tests.support.trusted import DAY_S, Device, Owner, Wall

Config = trust.TrustConfig


class Source:
    """Metadata files from a dictionary."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __call__(self, name: str, _bytes_max: int) -> bytes:
        if name not in self.files:
            raise FetchError(f"no {name}", 404)
        return self.files[name]


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy2: Path) -> Owner:
    """Has released toy@1.0 and then toy@1.1. Not to be changed."""
    owner = Owner(tmp_path_factory.mktemp("owner"))
    owner.release(toy)
    owner.release(toy2)
    return owner


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as serving:
        yield serving


def files_of(owner: Owner) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in owner.repository.files().items()}


def enrolled(folder: Path, owner: Owner, source: Source, clock: Wall) -> Trust:
    return Trust(Config(root=owner.repository.metadata / "1.root.json"), folder, source, clock)


def admit(trusting: Trust, ref: ReleaseRef) -> int:
    return trusting.admit(ref, lambda: False)


def test_a_clock_that_goes_back_refuses_installs_over_restarts_and_until_it_is_right(
    tmp_path: Path, owner: Owner, toy: Path
) -> None:
    now = time.time()
    clock, ref, source = Wall(now + 1000), reference(toy), Source(files_of(owner))
    assert admit(enrolled(tmp_path, owner, source, clock), ref) == (toy / "release.json").stat().st_size
    clock.time = now
    for _ in range(2):  # a restart each
        with pytest.raises(
            Untrusted, match=r"the clock says .*, but signatures were checked at .* already.*set the clock"
        ):
            admit(enrolled(tmp_path, owner, source, clock), ref)
    clock.time = now + 1000 - CLOCK_SLACK_S  # a time server's correction is no attack
    admit(enrolled(tmp_path, owner, source, clock), ref)
    clock.time -= 1
    with pytest.raises(Untrusted, match="the clock says"):  # small steps back do not add up
        admit(enrolled(tmp_path, owner, source, clock), ref)


def test_a_clock_that_was_once_far_ahead_bricks_nothing(tmp_path: Path, owner: Owner, toy: Path) -> None:
    """The floor cannot go beyond what is signed: with a clock ahead of that, a refresh fails and leaves no floor."""
    now = time.time()
    clock, source = Wall(now + 20 * 365 * DAY_S), Source(files_of(owner))
    with pytest.raises(Untrusted, match=r"expired.*is the clock right"):
        admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    clock.time = now
    admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    clock.time = now + 0.9 * DAY_S  # the most that it can be wrong: what is left of the timestamp's day
    admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    clock.time = now
    with pytest.raises(Untrusted, match="the clock says"):
        admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    clock.time = now + 1.1 * DAY_S  # a day later all is well
    renewed = Source({**source.files, **_renewed(owner, clock.time, tmp_path / "later")})
    admit(enrolled(tmp_path, owner, renewed, clock), reference(toy))


def _renewed(owner: Owner, now: float, folder: Path) -> dict[str, bytes]:
    shutil.copytree(owner.repository.folder, folder)
    later = Owner.__new__(Owner)
    later.repository = type(owner.repository)(folder, now=lambda: now)
    later.repository.renew()
    return files_of(later)


def test_a_device_without_a_battery_for_its_clock_waits_for_the_time(tmp_path: Path, owner: Owner, toy: Path) -> None:
    clock, source = Wall(86400.0), Source(files_of(owner))  # the second of January 1970: nothing seems expired
    with pytest.raises(Untrusted, match=r"the clock says 1970-01-02 .*, but root 1 was signed at 20.*: set it"):
        admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    clock.time = time.time()
    admit(enrolled(tmp_path, owner, source, clock), reference(toy))


def test_a_damaged_floor_is_said_and_does_not_stop_installs(
    tmp_path: Path, owner: Owner, toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / REFRESHED).write_text("{")
    admit(enrolled(tmp_path, owner, Source(files_of(owner)), Wall(time.time())), reference(toy))
    assert REFRESHED in caplog.text
    assert read_refreshed(tmp_path)["root_version"] == 1


class PowerCut(BaseException):
    """Nothing after this instant happened."""


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("cut", range(7))
def test_a_power_cut_between_any_two_files_is_recovered_from(
    tmp_path: Path, owner: Owner, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch, cut: int, torn: bool
) -> None:
    """The cut comes at file number `cut`: it is not there, or (where a disk lies about fsync) its first half is."""
    clock, source = Wall(time.time()), Source(files_of(owner))
    writes = []

    def write(path: Path, data: bytes) -> None:
        writes.append(path)
        if len(writes) > cut:
            if torn:
                path.write_bytes(data[: len(data) // 2])
            raise PowerCut
        real(path, data)

    real = trust.write_durably
    monkeypatch.setattr(trust, "write_durably", write)
    if cut < 6:  # root, timestamp, snapshot, targets, models, refreshed
        with pytest.raises(PowerCut):
            admit(enrolled(tmp_path, owner, source, clock), reference(toy))
    else:
        admit(enrolled(tmp_path, owner, source, clock), reference(toy))
        assert [path.name for path in writes] == [
            "1.root.json", "timestamp.json", "snapshot.json", "targets.json", "models.json", REFRESHED,
        ]  # fmt: skip
    monkeypatch.setattr(trust, "write_durably", real)
    for ref in (reference(toy), reference(toy2)):
        admit(enrolled(tmp_path, owner, source, clock), ref)


def test_every_file_is_on_the_disk_before_its_name_is(
    tmp_path: Path, owner: Owner, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own writing has no fsync: a power cut would leave a device without memory of what it has seen."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "trust"
    admit(enrolled(folder, owner, Source(files_of(owner)), Wall(time.time())), reference(toy))
    for name in ("1.root.json", "timestamp.json", "snapshot.json", "targets.json", "models.json", REFRESHED):
        place = synced.index(f".{name}.new")
        assert synced[place + 1] == ("root_history" if "root" in name else "trust")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_metadata_is_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, owner: Owner, toy: Path, data: st.DataObject
) -> None:
    files = files_of(owner)
    name = data.draw(st.sampled_from(sorted(files)))
    whole = bytearray(files[name])
    at = data.draw(st.integers(0, len(whole) - 1))
    damage: Callable[[], object] = data.draw(st.sampled_from([
        lambda: whole.__setitem__(at, whole[at] ^ 1 << data.draw(st.integers(0, 7))),
        lambda: whole.__delitem__(slice(at, None)),
        lambda: whole.__setitem__(slice(at, at), data.draw(st.binary(min_size=1, max_size=30))),
    ]))  # fmt: skip
    damage()
    files[name] = bytes(whole)
    trusting = enrolled(tmp_path_factory.mktemp("device"), owner, Source(files), Wall(time.time()))
    with suppress(Untrusted):  # damage to a signature that is not needed, or to nothing that is signed, is none
        assert admit(trusting, reference(toy)) == (toy / "release.json").stat().st_size


@given(name=st.text(max_size=40))
def test_only_names_of_metadata_are_names_of_metadata(name: str) -> None:
    role = role_of(name)
    assert role is None or name.removesuffix(f"{role}.json").rstrip(".").isdigit() or name == f"{role}.json"
    assert role is None or role in METADATA_BYTES_MAX


@pytest.mark.parametrize(
    ("name", "role"),
    [("7.snapshot.json", "snapshot"), ("timestamp.json", "timestamp"), ("12.models.json", "models"),
     ("../timestamp.json", None), ("1.2.root.json", None), ("root.json\n", None), ("keys.json", None)],
)  # fmt: skip
def test_names_of_metadata(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_a_device_that_knows_no_root_refuses_everything_and_names_the_fix(tmp_path: Path, toy: Path) -> None:
    trusting = Trust(Config(), tmp_path, Source({}), Wall(time.time()))
    with pytest.raises(
        Untrusted, match=r"knows no root and accepts no release: enrol it, so that \[trust\] root names"
    ):
        admit(trusting, reference(toy))
    assert trusting.status()["mode"] == "closed"
    assert "knows no root" in trusting.status()["refused"]


def test_a_device_that_wants_no_signatures_asks_for_none(tmp_path: Path, toy: Path) -> None:
    trusting = Trust(Config(unsigned=True), tmp_path, Source({}), Wall(time.time()))
    assert admit(trusting, reference(toy)) == MANIFEST_BYTES_MAX
    assert trusting.status()["mode"] == "unsigned"


def test_a_root_that_is_gone_or_none_is_named(tmp_path: Path, owner: Owner, toy: Path) -> None:
    source = Source(files_of(owner))
    gone = Trust(Config(root=tmp_path / "root.json"), tmp_path / "trust", source, Wall(time.time()))
    with pytest.raises(Untrusted, match=r"\[trust\] root .*root\.json: No such file.*enrol this device again"):
        admit(gone, reference(toy))
    (tmp_path / "root.json").write_bytes(source.files["timestamp.json"])
    with pytest.raises(Untrusted, match="Expected 'root', got 'timestamp'"):
        admit(gone, reference(toy))


def test_another_root_replaces_what_is_kept_of_the_old_one(
    tmp_path: Path, owner: Owner, toy: Path, server: FileServer
) -> None:
    """After all root keys were lost devices are enrolled again, by hand: with the new owner's metadata."""
    owner.publish(server)
    root = tmp_path / "root.json"
    shutil.copyfile(owner.repository.root(), root)
    device = Device(tmp_path / "device", root, server.url)
    device.install(reference(toy))
    other = Owner(tmp_path / "other")
    ref = other.release(toy)
    other.publish(server)
    shutil.copyfile(other.repository.root(), root)
    device.install(ref)
    assert len(list((tmp_path / "device" / "trust").glob("*.json"))) == 6


def test_a_trainer_that_cannot_be_reached_or_signs_nothing_is_no_refusal(
    tmp_path: Path, owner: Owner, toy: Path
) -> None:
    for source in (Source({}), lambda *_: (_ for _ in ()).throw(FetchError("refused"))):
        with pytest.raises(FetchError, match=r"no timestamp\.json|refused"):
            admit(enrolled(tmp_path, owner, source, Wall(time.time())), reference(toy))  # type: ignore[arg-type]


def test_a_refresh_that_nobody_wants_any_more_ends(tmp_path: Path, owner: Owner, toy: Path) -> None:
    with pytest.raises(FetchCancelled):
        enrolled(tmp_path, owner, Source(files_of(owner)), Wall(time.time())).admit(reference(toy), lambda: True)


def test_what_is_known_after_a_refresh_is_shown(tmp_path: Path, owner: Owner, toy: Path) -> None:
    config = Config(root=owner.repository.metadata / "1.root.json")
    assert describe(config, tmp_path)["floor"] is None
    clock = Wall(time.time())
    trusting = Trust(config, tmp_path, Source(files_of(owner)), clock)
    admit(trusting, reference(toy))
    status = json.loads(json.dumps(trusting.status()))
    assert (status["mode"], status["root_version"], status["at"]) == ("signed", 1, clock.time)
    assert status["floor"] == clock.time - CLOCK_SLACK_S
    days = {role: round((at - clock.time) / DAY_S) for role, at in status["expires"].items()}
    assert days == {"root": 365, "targets": 365, "models": 7, "snapshot": 7, "timestamp": 1}
