"""What `make powercut` makes of a disk: every kind of damage is named, and a whole disk is not."""

from __future__ import annotations

import copy
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bench.powercut_findings import Known, as_text, blamed, missing, phase_of, phases, unfinished
from bench.powercut_guest import found
from edged.core.update import State
from edged.releases import Releases
from edged.store import Store
from edged.update_record import Record
from tests.support.models import put_pictures
from tests.unit.store_cases import image_of, new_sample

PLAIN, ASKED = "b01-0000-007-plain.png", "b01-0001-008-strange.png"
WHOLE: dict[str, Any] = {
    "samples": [["s1", ASKED, "labelled", "aa"]], "bad_blobs": [], "damaged": [], "set_aside": [],
    "updates": {"eye": ["committed", "toy@1.0"]}, "waiting": [], "done": [PLAIN, ASKED], "rejected": [],
}  # fmt: skip


@pytest.fixture
def known() -> Known:
    """Two pictures are on the disk; the device has said of the second that it keeps it and that it is labelled."""
    known = Known(put={PLAIN, ASKED}, sha256={"008-strange.png": "aa"})
    known.result(PLAIN, "r1", None)
    known.result(ASKED, "r2", "s1")
    known.sample("s1", "labelled")
    return known


def changed(**more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(WHOLE), **more}


def test_a_whole_disk_has_nothing_wrong(known: Known) -> None:
    assert missing(known, WHOLE) == {}
    assert unfinished(known, WHOLE) == {}


@pytest.mark.parametrize(
    ("what", "disk"),
    [
        ("pictures that are gone", changed(done=[ASKED])),
        ("pictures in two places", changed(waiting=[PLAIN])),
        ("pictures that were rejected", changed(done=[ASKED], rejected=[PLAIN])),
        ("acknowledged samples that are gone", changed(samples=[])),
        ("samples that moved back", changed(samples=[["s1", ASKED, "escalated", "aa"]])),
        ("done pictures without their sample", changed(samples=[["s1", "another", "labelled", "aa"]])),
        ("samples twice", changed(samples=[["s1", ASKED, "labelled", "aa"], ["s2", ASKED, "escalated", "aa"]])),
        ("samples with other bytes than their picture", changed(samples=[["s1", ASKED, "labelled", "bb"]])),
        ("blobs that are not what their hash says", changed(bad_blobs=["aa"])),
        ("damaged releases", changed(damaged=["model.onnx: expected 7 bytes, found no file"])),
        ("databases set aside", changed(set_aside=["edged.db.broken-1"])),
        ("databases that cannot be read", {"broken": "database disk image is malformed"}),
    ],
)
def test_each_kind_of_damage_is_named(known: Known, what: str, disk: dict[str, Any]) -> None:
    assert what in missing(known, disk)


def test_what_was_only_heard_of_may_still_be_anywhere_on_its_way(known: Known) -> None:
    known.result("b01-0002-009-strange.png", "r3", "s9")
    assert missing(known, WHOLE) == {"acknowledged samples that are gone": ["s9"]}
    on_its_way = [*WHOLE["samples"], ["s9", "b01-0002-009-strange.png", "escalated", "cc"]]
    assert missing(known, changed(samples=on_its_way)) == {}


def test_a_sample_is_known_by_the_farthest_that_was_heard_of_it() -> None:
    known = Known()
    for state in ("escalated", "labelled", "escalated"):
        known.sample("s1", state)
    known.result("item", "r1", "s1")
    assert known.samples == {"s1": "labelled"}


@pytest.mark.parametrize(
    ("what", "disk"),
    [
        ("pictures that still wait", changed(waiting=["b01-0003-001-plain.png"])),
        ("questions without a label", changed(samples=[["s1", ASKED, "unresolved", "aa"]])),
    ],
)
def test_what_is_left_in_the_end_is_named(known: Known, what: str, disk: dict[str, Any]) -> None:
    assert what in unfinished(known, disk)


def test_a_picture_has_one_result(known: Known) -> None:
    known.result(PLAIN, "r1", None)  # heard again under its id: the same
    assert unfinished(known, WHOLE) == {}
    known.result(PLAIN, "another", None)
    assert unfinished(known, WHOLE) == {"pictures with two results": [PLAIN]}
    known.items.clear()
    assert unfinished(known, WHOLE) == {"pictures without a result": [PLAIN, ASKED]}


def test_a_line_for_people_counts_and_names_some() -> None:
    text = as_text({"pictures that are gone": [f"p{number}" for number in range(7)]})
    assert text == ["pictures that are gone: 7 (p0, p1, p2, p3, p4, ...)"]


@pytest.mark.parametrize(
    ("at", "wanted", "phase"),
    [
        ({}, "start", "start"),
        ({}, "proving", "start"),
        ({"update": "proving", "asking": True}, "escalation", "escalation"),
        ({"update": "proving", "asking": True}, "proving", "proving"),
        ({"update": "switched", "asking": False}, "downloading", "switched"),
        ({"update": "committed", "asking": False}, "downloading", "rest"),
        ({"update": "committed", "asking": False}, "any", "rest"),
    ],
)
def test_a_cut_counts_for_what_the_device_was_doing(at: dict[str, Any], wanted: str, phase: str) -> None:
    assert phase_of(at, wanted) == phase


def test_any_phase_but_the_start_is_any() -> None:
    assert "any" in phases({"update": "idle", "asking": False})
    assert "any" not in phases({})


@pytest.mark.parametrize(
    ("kind", "text", "bad"),
    [
        ("update_reverted", "eye: toy@2.1: release.json: Invalid JSON", True),
        ("update_failed", "eye: toy@2.1: the trainer cannot be reached: it is tried again", False),
        ("update_reverted", "eye: toy@2.1: the daemon was restarted too often during this update", False),
        ("update_committed", "eye: toy@2.1: ", False),
    ],
)
def test_a_release_is_blamed_only_for_cuts_that_came_too_often(kind: str, text: str, bad: bool) -> None:
    assert blamed(kind, text) == bad


@pytest.fixture
def state(tmp_path: Path, toy: Path) -> Path:
    """A device's folder as a cut leaves it: a sample, its release, and a log that is not yet in the database."""
    state, cut = tmp_path / "state", tmp_path / "cut"
    ref = Releases(state / "releases").install(toy)
    store = Store(state)
    store.capture(new_sample("s1", item=ASKED), image_of("s1"))
    store.save_update("eye", Record(target="eye", active=ref).model_dump(mode="json"))
    shutil.copytree(state, cut)
    store.close()
    for name in ("", "done", "rejected"):
        (tmp_path / "in" / name).mkdir(exist_ok=True)
    return cut


def looked(state: Path) -> dict[str, Any]:
    return found(state, state.parent / "in", state.parent)


def test_what_lies_on_the_disk_is_told_and_left_as_it_is(state: Path) -> None:
    put_pictures(state.parent / "in" / "done", [ASKED])
    put_pictures(state.parent / "in", [PLAIN])
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    folders = {path for path in state.rglob("*") if path.is_dir()}
    disk = looked(state)
    assert disk["samples"] == [["s1", ASKED, "escalated", sha256(image_of("s1")).hexdigest()]]
    assert disk["updates"] == {"eye": ["idle", "toy@1.0"]}
    assert (disk["waiting"], disk["done"], disk["rejected"]) == ([PLAIN], [ASKED], [])
    assert (disk["bad_blobs"], disk["damaged"], disk["set_aside"]) == ([], [], [])
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    assert {path for path in state.rglob("*") if path.is_dir()} == folders


def test_a_disk_that_has_seen_no_daemon_is_whole(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert looked(tmp_path / "state")["samples"] == []
    assert list((tmp_path / "state").iterdir()) == []


def test_a_blob_and_a_release_with_other_bytes_are_found(state: Path) -> None:
    digest = sha256(image_of("s1")).hexdigest()
    blob, model = next(state.rglob(digest)), next(state.rglob("model.onnx"))
    for path in (blob, model):
        path.write_bytes(bytes(path.stat().st_size))
    disk = looked(state)
    assert disk["bad_blobs"] == [digest]
    assert "model.onnx" in disk["damaged"][0]


@pytest.mark.parametrize(("update", "damaged"), [("downloading", 0), ("proving", 1), ("switched", 1)])
def test_a_candidate_is_whole_once_it_was_verified(state: Path, toy2: Path, update: State, damaged: int) -> None:
    ref = Releases(state / "releases").install(toy2)
    (Releases(state / "releases").folder(ref) / "release.json").write_bytes(b"")
    store = Store(state)
    store.save_update("eye", Record(target="eye", state=update, candidate=ref).model_dump(mode="json"))
    store.close()
    assert len(looked(state)["damaged"]) == damaged


def test_a_database_that_cannot_be_read_says_so(state: Path) -> None:
    for path in state.glob("edged.db*"):
        path.write_bytes(b"\xff" * 8192)
    assert "database" in looked(state)["broken"]
