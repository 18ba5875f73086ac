"""Release folders on the device: exactly what was promised, or a reason that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edged.releases import BadRelease, Releases, read_manifest, reference, verify
from edged.wire.manifest import ReleaseRef


def test_a_whole_release_verifies(toy: Path) -> None:
    ref = reference(toy)
    assert ref.release == "toy@1.0"
    assert verify(toy, ref).labels == ["cat", "dog", "owl"]


def rewrite(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    fields = json.loads(path.read_bytes())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.onnx").unlink(), r"model\.onnx: expected \d+ bytes, found no file"),
        (lambda f: (f / "model.onnx").write_bytes(b"x"), r"model\.onnx: expected \d+ bytes, found 1"),
        (
            lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:-1] + b"!"),
            r"model\.onnx: expected sha256 [0-9a-f]{12}, found [0-9a-f]{12}: the file was changed",
        ),
        (lambda f: (f / "release.json").unlink(), r"release\.json: No such file.*a release folder holds release\.json"),
        (lambda f: (f / "release.json").write_bytes(b"{"), r"release\.json: .*Invalid JSON"),
        (
            lambda f: rewrite(f / "release.json", lambda m: m.update(labels=["cow"])),
            r"release\.json: expected toy@1\.0 [0-9a-f]{12}, found toy@1\.0",
        ),
        (
            lambda f: rewrite(f / "release.json", lambda m: m["files"]["model"].update(path="../../etc/passwd")),  # type: ignore[index]
            r"release\.json: files\.model\.path",
        ),
    ],
)
def test_what_was_changed_is_named(tmp_path: Path, toy: Path, damage: Callable[[Path], object], said: str) -> None:
    ref = reference(toy)
    shutil.copytree(toy, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(BadRelease, match=said):
        verify(tmp_path / "copy", ref)


def test_a_seed_is_installed_once_and_whole(tmp_path: Path, toy: Path) -> None:
    releases = Releases(tmp_path / "releases")
    ref = releases.install(toy)
    half = releases.folder(ref).with_name(releases.folder(ref).name + ".new")
    half.mkdir()  # of a start that was cut off
    assert releases.install(toy) == ref
    assert verify(releases.folder(ref), ref)
    assert releases.candidates() == [releases.folder(ref)]
    shutil.copytree(toy, tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"")
    with pytest.raises(BadRelease, match=r"model\.onnx"):
        Releases(tmp_path / "others").install(tmp_path / "broken")
    assert not list((tmp_path / "others").iterdir())


def test_only_what_is_wanted_stays(tmp_path: Path, toy: Path, toy2: Path) -> None:
    releases = Releases(tmp_path / "releases")
    first, second = releases.install(toy), releases.install(toy2)
    assert releases.keep_only([second]) == [releases.folder(first).name]
    assert releases.candidates() == [releases.folder(second)]
    releases.discard(second)
    releases.discard(second)
    assert not releases.candidates()


def test_two_manifests_of_the_same_name_never_share_a_folder(tmp_path: Path) -> None:
    releases = Releases(tmp_path)
    one, other = (ReleaseRef(release="toy@1.0", sha256=digit * 64) for digit in "ab")
    assert releases.folder(one) != releases.folder(other)


def test_a_manifest_read_twice_is_the_same(toy: Path) -> None:
    assert read_manifest(toy) == read_manifest(toy)
