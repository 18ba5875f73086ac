from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from trainer.releases import MANIFEST, Registry, ReleaseError, build_manifest, canonical_bytes, reference


def make(folder: Path, release: str = "digits@1.0", model: bytes = b"model", created: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    manifest = build_manifest(
        folder,
        release,
        kind="detect",
        engine="onnx_detect",
        roles={"model": "model.onnx"},
        labels=["a"],
        created=created,
    )
    (folder / MANIFEST).write_bytes(canonical_bytes(manifest))
    return folder


def test_what_is_registered_is_found_by_name_and_by_hash(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "releases")
    ref = registry.register(make(tmp_path / "in"))
    stored = registry.get("digits@1.0")
    assert (stored.folder / "model.onnx").read_bytes() == b"model"
    assert sha256((stored.folder / MANIFEST).read_bytes()).hexdigest() == ref.sha256 == stored.ref.sha256
    assert registry.blob(sha256(b"model").hexdigest()) == stored.folder / "model.onnx"
    assert registry.blob("0" * 64) is None


def test_a_release_keeps_the_bytes_that_it_was_written_with(tmp_path: Path) -> None:
    """An older trainer wrote fewer fields: its releases stay what the fleet's references pin."""
    path = make(tmp_path / "in") / MANIFEST
    older = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "thresholds"}
    path.write_text(json.dumps(older, indent=1))
    pinned = reference(tmp_path / "in")
    assert pinned.sha256 == sha256(path.read_bytes()).hexdigest()
    registry = Registry(tmp_path / "releases")
    assert registry.register(tmp_path / "in") == registry.get("digits@1.0").ref == pinned
    assert (registry.get("digits@1.0").folder / MANIFEST).read_bytes() == path.read_bytes()


def test_the_same_bytes_again_change_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "releases")
    first = registry.register(make(tmp_path / "in", created="2026-01-01T00:00:00Z"))
    again = Registry(tmp_path / "releases").register(make(tmp_path / "in", created="2027-01-01T00:00:00Z"))
    assert again == first
    assert [path.name for path in (tmp_path / "releases").iterdir()] == ["digits@1.0"]


def test_other_bytes_under_a_version_are_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "releases")
    registry.register(make(tmp_path / "in"))
    with pytest.raises(ReleaseError, match=r"digits@1\.0 exists with other content.*digits@1\.1 or higher"):
        registry.register(make(tmp_path / "in", model=b"other"))
    assert (registry.get("digits@1.0").folder / "model.onnx").read_bytes() == b"model"


def test_a_file_changed_after_the_manifest_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "releases")
    make(tmp_path / "in")
    (tmp_path / "in" / "model.onnx").write_bytes(b"tampered")
    with pytest.raises(ReleaseError, match="the file changed after the manifest was made"):
        registry.register(tmp_path / "in")
    assert list((tmp_path / "releases").iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"model\.onnx \(role model\) is missing"):
        build_manifest(tmp_path, "digits@1.0", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"})


def test_versions_are_numbers(tmp_path: Path) -> None:
    """L17: 1.10 is above 1.9."""
    registry = Registry(tmp_path / "releases")
    assert str(registry.next_version("digits")) == "digits@1.0"
    for version in ("1.10", "1.9", "1.2"):
        registry.register(make(tmp_path / version, f"digits@{version}"))
    registry.register(make(tmp_path / "other", "other@9.0"))
    assert [stored.ref.release for stored in registry.list("digits")] == ["digits@1.2", "digits@1.9", "digits@1.10"]
    assert str(registry.next_version("digits")) == "digits@1.11"


def test_a_release_of_another_process_is_seen(tmp_path: Path) -> None:
    reader, writer = Registry(tmp_path / "releases"), Registry(tmp_path / "releases")
    assert reader.list() == []
    writer.register(make(tmp_path / "in"))
    assert reader.blob(sha256(b"model").hexdigest()) is not None
    assert [stored.ref.release for stored in reader.list()] == ["digits@1.0"]


def test_a_wrong_manifest_in_a_folder_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / MANIFEST).write_text(json.dumps({"release": "digits"}))
    with pytest.raises(ReleaseError, match=r"release\.json: release = 'digits'.*digits@1\.4"):
        Registry(tmp_path / "releases").register(tmp_path / "in")


def test_an_unknown_release_names_those_that_exist(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "releases")
    registry.register(make(tmp_path / "in"))
    with pytest.raises(ReleaseError, match=r"registered: digits@1\.0"):
        registry.get("digits@2.0")
