"""An object store has what the trainer serves, under the same names: copied once, mended, led to when it is there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from tests.support.models import make_release
from trainer.cli import app
from trainer.config import ConfigError, load_config
from trainer.database import Database
from trainer.files import sha256_of, write_whole
from trainer.host import Host
from trainer.mirror import LOOK_S, RETRY_S, Mirror, MirrorError, Mirroring
from trainer.releases import Registry


@pytest.fixture
def registry(tmp_path: Path, toy: Path) -> Registry:
    made = Registry(tmp_path / "registry")
    made.register(toy)
    return made


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store/deep"
        return
    root = f"/{uuid.uuid4().hex}"
    yield f"memory:/{root}"
    fsspec.filesystem("memory").rm(root, recursive=True)


def held(url: str) -> dict[str, bytes]:
    """Name -> bytes of everything in a store."""
    store, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{root}/"): store.cat_file(name) for name in store.find(root)}


def served(registry: Registry) -> dict[str, bytes]:
    """The same of what `trainer serve` answers with."""
    found = {}
    for stored in registry.list():
        found[f"releases/{stored.ref.release}/release.json"] = (stored.folder / "release.json").read_bytes()
        for entry in stored.manifest.files.values():
            found[f"blobs/{entry.sha256}"] = (stored.folder / entry.path).read_bytes()
    return found


def test_a_store_has_what_the_trainer_serves(url: str, registry: Registry, toy2: Path, tmp_path: Path) -> None:
    metadata = {name: tmp_path / name for name in ("1.root.json", "timestamp.json")}
    for path in metadata.values():
        write_whole(path, b"1")
    mirror = Mirror(url, {}, registry, lambda: metadata)
    first = mirror.sync()
    extra = {"metadata/1.root.json": b"1", "metadata/timestamp.json": b"1"}
    assert held(url) == served(registry) | extra
    assert (first.files, first.bytes, first.there) == (len(held(url)), sum(map(len, held(url).values())), 0)

    registry.register(toy2)
    write_whole(metadata["timestamp.json"], b"2")
    again = Mirror(url, {}, registry, lambda: metadata).sync()  # another process: it knows of nothing
    assert held(url) == served(registry) | extra | {"metadata/timestamp.json": b"2"}
    assert again.files + again.there == len(held(url)) and again.there > first.files - 2
    assert mirror.sync().files == 0


def test_what_is_half_there_or_gone_is_copied_again(url: str, registry: Registry) -> None:
    Mirror(url, {}, registry).sync()
    store, root = fsspec.core.url_to_fs(url)
    half, gone = sorted(name for name in served(registry) if name.startswith("blobs/"))[:2]
    store.pipe_file(f"{root}/{half}", served(registry)[half][:-1])
    store.rm_file(f"{root}/{gone}")
    assert Mirror(url, {}, registry).sync().files == 2
    assert held(url) == served(registry)


def test_a_copy_that_breaks_off_leads_nowhere(
    url: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs, then what names them, then what names that: a manifest is there when all its files are."""
    write_whole(tmp_path / "timestamp.json", b"1")
    mirror = Mirror(url, {}, registry, lambda: {"timestamp.json": tmp_path / "timestamp.json"})
    kind, kept, left = type(mirror._store), type(mirror._store).put_file, [0]

    def breaks(self: Any, *arguments: Any, **options: Any) -> None:
        if left[0] == 0:
            raise TimeoutError("planted")
        left[0] -= 1
        kept(self, *arguments, **options)

    monkeypatch.setattr(kind, "put_file", breaks)
    names = list(served(registry))
    for number in range(len(names)):
        left[0] = number and 1  # each time one file more
        with pytest.raises(MirrorError, match=r"planted; are the keys"):
            mirror.sync()
        there = held(url)
        assert len(there) == number
        assert not [name for name in there if name.startswith(("releases/", "metadata/"))]
    left[0] = 9
    mirror.sync()
    assert held(url) == served(registry) | {"metadata/timestamp.json": b"1"}


@pytest.mark.parametrize(("where", "said"), [("nowhere://x", "nowhere"), ("file://", "keys, the bucket")])
def test_what_is_no_store_is_named_with_the_fix(where: str, said: str, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((ConfigError, MirrorError), match=said) as error:
        Mirror(f"{where}{tmp_path}/file/store", {}, registry).sync()
    assert f"{where}{tmp_path}" in str(error.value)


def test_serving_goes_on_while_the_store_is_away_and_catches_up(
    tmp_path: Path, toy: Path, toy2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trainer.toml").write_text(f'data_dir = "data"\n[storage]\nmirror = "file://{tmp_path}/mount/store"\n')
    (tmp_path / "mount").write_text("nothing is mounted here")
    config = load_config(tmp_path / "trainer.toml")
    registry = Registry(config.releases)
    registry.register(toy)
    host = TurnedHost(config, tmp_path / "trainer.toml", Database(config.database_at), registry)
    mirroring = Mirroring(host)

    def turn(seconds: float) -> None:
        host.at += seconds
        mirroring.tick()
        mirroring.stop()

    for _ in range(3):
        turn(RETRY_S + 1)
    assert mirroring.counters == {"mirror_failures": 3}
    assert caplog.text.count("devices ask the next address meanwhile") == 1, "the same is said once"
    (tmp_path / "mount").unlink()
    turn(RETRY_S / 2)
    assert not (tmp_path / "mount").exists()
    turn(RETRY_S)
    assert held(config.storage.mirror) == served(registry)
    registry.register(toy2)
    turn(LOOK_S + 1)
    assert held(config.storage.mirror) == served(registry)
    assert mirroring.counters["mirror_files"] == len(served(registry))
    host.database.close()


class TurnedHost(Host):
    """A host whose clock is turned by hand."""

    at = 1.8e9

    def now(self) -> float:
        return self.at


def test_the_command_copies_once_and_says_what_it_did(tmp_path: Path, registry: Registry, toy: Path) -> None:
    (tmp_path / "trainer.toml").write_text('data_dir = "data"\n')
    config = ["--config", str(tmp_path / "trainer.toml")]
    none = CliRunner().invoke(app, ["release", "mirror", *config])
    assert none.exit_code == 1 and "set storage.mirror" in none.output
    make_release(tmp_path / "mine", "mine@1.0")
    assert CliRunner().invoke(app, ["release", "add", str(tmp_path / "mine"), *config]).exit_code == 0
    to = f"file://{tmp_path}/store"
    done = CliRunner().invoke(app, ["release", "mirror", "--to", to, "--json", *config])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["files"] == len(held(to)) > 2
    assert (
        json.loads(CliRunner().invoke(app, ["release", "mirror", "--to", to, "--json", *config]).output)["files"] == 0
    )
    blobs = [path for path in (tmp_path / "store" / "blobs").iterdir() if path.is_file()]
    assert all(sha256_of(path) == path.name for path in blobs)
