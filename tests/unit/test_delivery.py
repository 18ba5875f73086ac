"""What is fetched of a release, from where, and why not: real HTTP servers, real files; carriers that fail are scripted."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.carriers import Came, Carrier, Https
from edged.clock import SystemClock
from edged.config_host import Host
from edged.core.bandwidth import Bucket, Metered
from edged.delivery import MQTT_BYTES_MAX, Admit, Delivery
from edged.fetch import Cancelled, Fetcher, FetchError, WrongContent
from edged.part import Part
from edged.releases import Releases, reference, verify
from edged.wire.manifest import FileEntry, ReleaseRef
from tests.support.blocks import ballasted
from tests.support.disk import small_disk
from tests.support.files import FileServer, file_server

MIB = 1 << 20
DOWN = "http://127.0.0.1:9"  # nobody listens there


def never() -> bool:
    return False


class Bench:
    """A device's delivery, with what it counts; its mirrors are `urls`."""

    def __init__(self, root: Path) -> None:
        self.releases, self.counted, self.urls = Releases(root), Counter[str](), list[str]()
        self.host = Host(carrier="https")
        self.free: Callable[[Path], int] = lambda _: 1 << 40
        self.reports = 0
        self.https = Https(Fetcher(), lambda: self.urls, self._count)
        self.carriers: dict[str, Carrier] = {"https": self.https}

    def _count(self, name: str, n: int) -> None:
        self.counted[name] += n

    def _report(self) -> None:
        self.reports += 1

    def delivery(self, admit: Admit | None = None) -> Delivery:
        made = Delivery(
            self.carriers, lambda: self.host, self.releases, SystemClock(), self._count, self._report,
            free=lambda folder: self.free(folder),
        )  # fmt: skip
        made.admit = admit
        return made

    def fetch(self, ref: ReleaseRef, admit: Admit | None = None) -> Path:
        folder = self.releases.folder(ref)
        self.delivery(admit).fetch(ref, folder, never)
        return folder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "releases")


@pytest.fixture
def mirrors(bench: Bench) -> Iterator[tuple[FileServer, FileServer]]:
    with file_server() as first, file_server() as second:
        bench.urls = [first.url, second.url]
        yield first, second


def test_only_what_is_not_here_is_fetched(
    bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path, toy2: Path
) -> None:
    old = bench.releases.install(toy)
    shutil.copytree(toy2, bench.releases.root / "damaged")
    (bench.releases.root / "damaged" / "release.json").write_bytes(b"{")  # a damaged neighbour costs nothing
    ref, server = reference(toy2), mirrors[0]
    server.publish(toy2, ref)
    folder = bench.fetch(ref)
    assert verify(folder, ref)
    assert server.blob(toy2, "golden_inputs") not in server.requested
    same = os.stat(bench.releases.folder(old) / "golden_inputs.npz")
    assert os.stat(folder / "golden_inputs.npz").st_ino == same.st_ino
    asked = len(server.requested)
    bench.fetch(ref)
    assert len(server.requested) == asked
    (folder / "model.onnx").unlink()
    bench.fetch(ref)
    assert server.requested[asked:] == [server.blob(toy2)]


def test_a_linked_file_is_not_written_through(bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path) -> None:
    """A damaged file of this release is replaced, not repaired in the place that it shares with another release."""
    ref = reference(toy)
    mirrors[0].publish(toy, ref)
    folder = bench.fetch(ref)
    os.link(folder / "model.onnx", bench.releases.root / "shared")
    before = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(b"damaged")
    bench.fetch(ref)
    assert (folder / "model.onnx").read_bytes() == before == (bench.releases.root / "shared").read_bytes()


def test_a_block_that_one_mirror_has_wrong_comes_from_the_next(
    bench: Bench, mirrors: tuple[FileServer, FileServer], tmp_path: Path, toy: Path
) -> None:
    ref = ballasted(toy, tmp_path / "next", 512)
    for server in mirrors:
        server.publish(tmp_path / "next", ref)
    liar, honest = mirrors
    blob = liar.blob(tmp_path / "next", "ballast")
    data = bytearray(liar.files[blob])
    data[200_000] ^= 1
    liar.files[blob] = bytes(data)
    assert verify(bench.fetch(ref), ref)
    assert bench.counted["blocks_wrong"] == 1
    assert honest.requested == [blob]


def test_a_mirror_that_breaks_costs_only_what_it_still_owed(
    bench: Bench, mirrors: tuple[FileServer, FileServer], tmp_path: Path, toy: Path
) -> None:
    ref = ballasted(toy, tmp_path / "next", 512)
    for server in mirrors:
        server.publish(tmp_path / "next", ref)
    broken, whole = mirrors
    blob = broken.blob(tmp_path / "next", "ballast")
    broken.cut[blob] = 300_000
    assert verify(bench.fetch(ref), ref)
    assert whole.requested == [blob]


def test_a_large_file_comes_from_a_liar_and_a_mirror_that_breaks_together(
    bench: Bench, mirrors: tuple[FileServer, FileServer], tmp_path: Path, toy: Path
) -> None:
    ref = ballasted(toy, tmp_path / "next", 65 << 10)
    for server in mirrors:
        server.publish(tmp_path / "next", ref)
    liar, broken = mirrors
    blob = liar.blob(tmp_path / "next", "ballast")
    data = bytearray(liar.files[blob])
    data[40 * MIB] ^= 1
    liar.files[blob] = bytes(data)
    broken.cut[blob] = 50 * MIB  # of the whole file: this server knows no ranges
    assert verify(bench.fetch(ref), ref)
    assert bench.counted["blocks_wrong"] == 1


def test_when_every_mirror_has_other_bytes_they_are_blamed(
    bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path
) -> None:
    ref = reference(toy)
    for server in mirrors:
        server.publish(toy, ref)
        server.files[server.blob(toy)] = server.files[server.blob(toy)][:-1] + b"?"
    with pytest.raises(WrongContent, match=rf"{mirrors[0].url}.*block 0.*{mirrors[1].url}.*block 0"):
        bench.fetch(ref)
    mirrors[1].files.clear()  # one that does not answer may have the right ones
    with pytest.raises(FetchError, match="block 0"):
        bench.fetch(ref)


def test_a_forged_manifest_is_not_kept(bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path) -> None:
    ref = ReleaseRef(release="toy@1.0", sha256="0" * 64)
    for server in mirrors:
        server.publish(toy, ref)
    with pytest.raises(WrongContent, match="desired state pins 000000000000"):
        bench.fetch(ref)
    assert not list(bench.releases.folder(ref).iterdir())


def test_what_is_not_admitted_is_not_asked_for(bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path) -> None:
    ref = reference(toy)
    mirrors[0].publish(toy, ref)

    def refuse(_ref: ReleaseRef, _cancelled: Cancelled) -> int:
        raise FetchError("not signed")

    with pytest.raises(FetchError, match="not signed"):
        bench.fetch(ref, admit=refuse)
    assert mirrors[0].requested == []
    signed = (toy / "release.json").stat().st_size
    bench.urls = [mirrors[0].url]
    with pytest.raises(WrongContent, match=f"at most {signed - 1} bytes"):
        bench.fetch(ref, admit=lambda _ref, _cancelled: signed - 1)
    assert verify(bench.fetch(ref, admit=lambda _ref, _cancelled: signed), ref)


def test_without_an_address_the_transfer_waits(bench: Bench, toy: Path) -> None:
    with pytest.raises(FetchError, match=r"the trainer's address is not known yet.*set host\.url"):
        bench.fetch(reference(toy))


def test_room_on_the_disk_is_looked_at_before_anything_but_the_manifest_is_fetched(
    bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path
) -> None:
    ref = reference(toy)
    mirrors[0].publish(toy, ref)
    size = sum(p.stat().st_size for p in toy.iterdir() if p.name != "release.json")
    bench.free = lambda _: size - 1
    with pytest.raises(FetchError, match=f"{size} bytes are missing, but only {size - 1} are free at .*: free space"):
        bench.fetch(ref)
    assert mirrors[0].requested == [f"/releases/{ref.release}/release.json"]
    bench.free = lambda _: size
    assert verify(bench.fetch(ref), ref)


def test_a_disk_that_is_full_all_the_same_is_a_passing_failure(
    bench: Bench, mirrors: tuple[FileServer, FileServer], tmp_path: Path, toy: Path
) -> None:
    ref = ballasted(toy, tmp_path / "next", 4096)
    mirrors[0].publish(tmp_path / "next", ref)
    with small_disk(tmp_path / "disk", "2m") as disk:
        bench.releases = Releases(disk / "releases")
        with pytest.raises(FetchError, match="No space left on device"):
            bench.fetch(ref)


class Scripted:
    """A carrier that fails as it is told."""

    def __init__(self, unusable: str = "", fails: Exception | None = None) -> None:
        self.reason, self.fails, self.asked = unusable, fails, 0

    def unusable(self, entries: Sequence[FileEntry]) -> str:
        return self.reason

    def manifest(self, ref: ReleaseRef, bytes_max: int, cancelled: Cancelled) -> bytes:
        return self._fail()

    def metadata(self, name: str, bytes_max: int, cancelled: Cancelled) -> bytes:
        return self._fail()

    def bring(self, part: Part, came: Came, cancelled: Cancelled) -> None:
        self._fail()

    def _fail(self) -> bytes:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        return b"bytes"


def test_auto_takes_the_other_carrier_when_one_cannot_or_does_not(
    bench: Bench, mirrors: tuple[FileServer, FileServer], toy: Path
) -> None:
    ref = reference(toy)
    mirrors[0].publish(toy, ref)
    bench.host = Host()
    for mqtt in (Scripted("no trainer"), Scripted(fails=FetchError("silence")), Scripted(fails=WrongContent("lies"))):
        bench.carriers["mqtt"] = mqtt
        shutil.rmtree(bench.releases.folder(ref), ignore_errors=True)
        assert verify(bench.fetch(ref), ref)
        assert bool(mqtt.asked) == (not mqtt.reason)


@pytest.mark.parametrize(
    ("mqtt", "https", "raised", "said"),
    [
        (Scripted("none"), Scripted(fails=WrongContent("other bytes")), WrongContent, "other bytes"),
        (
            Scripted(fails=FetchError("silence")),
            Scripted(fails=WrongContent("other bytes")),
            FetchError,
            "mqtt: silence",
        ),
        (Scripted("none"), Scripted("no address"), FetchError, "mqtt: none; https: no address"),
    ],
)
def test_it_is_blamed_only_when_nobody_else_could_have_it_right(
    bench: Bench, mqtt: Scripted, https: Scripted, raised: type[Exception], said: str
) -> None:
    bench.host, bench.carriers = Host(), {"mqtt": mqtt, "https": https}
    with pytest.raises(raised, match=said) as failed:
        bench.delivery().metadata("timestamp.json", 100)
    if isinstance(failed.value, FetchError):
        assert failed.value.status is None


@pytest.mark.parametrize(("other", "failures"), [(FetchError("b", 404), 0), (FetchError("refused"), 1)])
def test_a_file_is_absent_when_one_says_so_and_nobody_else_has_it(
    bench: Bench, other: FetchError, failures: int
) -> None:
    """Else a device that reaches nothing but the broker would never know that there is no newer root."""
    bench.host = Host()
    bench.carriers = {"mqtt": Scripted(fails=FetchError("a", 404)), "https": Scripted(fails=other)}
    with pytest.raises(FetchError, match=f"mqtt: a; https: {other}") as failed:
        bench.delivery().metadata("2.root.json", 100)
    assert failed.value.status == 404
    assert bench.counted["carrier_failures"] == failures


def test_who_hides_a_file_does_not_hide_it_from_who_has_it(bench: Bench) -> None:
    bench.host, bench.carriers = Host(), {"mqtt": Scripted(fails=FetchError("a", 404)), "https": Scripted()}
    assert bench.delivery().metadata("2.root.json", 100) == b"bytes"


def test_a_mirror_that_is_down_does_not_make_what_is_absent_unknown(
    bench: Bench, mirrors: tuple[FileServer, FileServer]
) -> None:
    for bench.urls in ([mirrors[0].url, DOWN], [DOWN, mirrors[0].url]):
        with pytest.raises(FetchError) as failed:
            bench.delivery().metadata("2.root.json", 100)
        assert failed.value.status == 404


def test_large_releases_go_by_https_first(bench: Bench) -> None:
    bench.host, bench.carriers = Host(), {"mqtt": Scripted(), "https": Scripted()}
    delivery = bench.delivery()
    assert delivery._order(MQTT_BYTES_MAX) == ("mqtt", "https")
    assert delivery._order(MQTT_BYTES_MAX + 1) == ("https", "mqtt")
    bench.host = Host(carrier="mqtt")
    assert delivery._order(MQTT_BYTES_MAX + 1) == ("mqtt",)


def test_progress_is_known_while_it_comes_and_not_afterwards(
    bench: Bench, mirrors: tuple[FileServer, FileServer], tmp_path: Path, toy: Path
) -> None:
    ref = ballasted(toy, tmp_path / "next", 512)
    mirrors[0].publish(tmp_path / "next", ref)
    delivery, seen = bench.delivery(), list[int]()

    def look() -> bool:
        now = delivery.progress(ref)
        if now is not None:
            assert now.total > 512 << 10
            seen.append(now.bytes)
        return False

    delivery.fetch(ref, bench.releases.folder(ref), look)
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert delivery.progress(ref) is None
    assert bench.reports >= 1


@pytest.mark.parametrize(
    ("missing", "hour", "refused"),
    [(8 * MIB, 12, False), (8 * MIB + 1, 12, True), (1 << 40, 1, False), (1 << 40, 4, False), (1 << 40, 5, True)],
)
def test_a_metered_link_takes_little_at_any_time_and_everything_at_night(
    missing: int, hour: int, refused: bool
) -> None:
    said = Metered(8 * MIB, (1, 5)).refusal(missing, hour)
    assert bool(said) == refused
    if refused:
        assert re.search(
            r"at most 8 MiB of a release at any time \(host\.metered_mib_max\), more from 1:00 to 5:00", said
        )


def test_hours_may_go_over_midnight_and_none_means_never() -> None:
    night = Metered(0, (22, 4))
    assert [hour for hour in range(24) if not night.refusal(1, hour)] == [0, 1, 2, 3, 22, 23]
    assert "more at no hour" in Metered(0).refusal(1, 3)


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 5)), max_size=40), st.integers(1 << 10, 1 << 24))
def test_bandwidth_is_never_exceeded_by_more_than_a_second_of_it(flow: list[tuple[int, float]], rate: int) -> None:
    bucket, now, sent = Bucket(), 0.0, 0
    for count, pause in flow:
        now += pause
        wait = bucket.take(count, rate, now)
        sent += count
        now += wait
        assert sent <= rate * (now + 1) + 1
    assert Bucket().take(1 << 30, 0, 0.0) == 0


def test_bandwidth_is_used_up() -> None:
    bucket, now = Bucket(), 0.0
    for _ in range(100):
        now += bucket.take(1000, 1000, now)
    assert 98 <= now <= 100
