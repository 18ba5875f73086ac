"""Orders of the command line: files that anybody may have written badly, taken once, answered, kept for the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import acts as module
from edged.orders import ANSWERS_MAX, FOLDER, Orders, place, read
from edged.prove import Proof
from edged.releases import reference
from edged.store import StorageFull, Store
from tests.unit.test_updater import PROBATION_S, AtOnce, Box


@pytest.fixture(autouse=True)
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(module, "prove", lambda *_: Proof(0.1, 0.1, 2))


class Desk:
    """A box with orders on its disk; `told` is what went out on `up/cmd`."""

    def __init__(self, state: Path, seed: Path, *server: Path) -> None:
        self.box = Box(state, seed, *server)
        self.told: list[tuple[str, str, str, str]] = []
        self.sit_down()

    def sit_down(self) -> None:
        """At the updater of the box's process."""
        self.orders = Orders(self.box.state, self.box.store, self.box.updater, lambda *told: self.told.append(told))

    def tick(self) -> None:
        self.orders.tick()
        self.box.settle()

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.box.state / FOLDER).iterdir())


@pytest.fixture
def desk(tmp_path: Path, toy: Path, toy2: Path) -> Desk:
    desk = Desk(tmp_path / "state", toy, toy2)
    desk.box.desire(reference(toy2))
    desk.box.wait(PROBATION_S)
    return desk


ROLLBACK: dict[str, Any] = {"slot": "eye", "adapter": False}


def test_an_order_is_carried_out_and_answered(desk: Desk) -> None:
    place(desk.box.state, "local-1", "rollback", ROLLBACK)
    desk.tick()
    assert desk.box.eye.active == "toy@1.0"
    assert desk.orders.status() == {"local-1": {"state": "done", "reason": ""}}
    assert (desk.files, desk.told) == ([], [])


def test_an_order_waits_for_the_next_start(desk: Desk) -> None:
    place(desk.box.state, "local-1", "rollback", ROLLBACK)
    desk.box.switch_on()
    desk.sit_down()
    desk.tick()
    assert desk.box.eye.active == "toy@1.0"


def test_a_crash_before_the_file_is_gone_does_nothing_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    place(desk.box.state, "local-1", "rollback", ROLLBACK)

    def crash(_path: Path, **_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(SystemExit):
            desk.tick()
    desk.box.switch_on()
    desk.sit_down()
    desk.box.settle()
    desk.tick()
    assert (desk.box.eye.active, desk.box.eye.update) == ("toy@1.0", "reverted")
    assert desk.orders.status()["local-1"]["state"] == "done"
    assert desk.files == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"kind": "dance"}, "order 'dance' is unknown; known: forget, pin, rollback, unpin"),
        ({"kind": "rollback"}, "slot: Field required"),
        ({"kind": "rollback", "slot": "a/b"}, "slot: String should match"),
        ({"kind": "pin", "slot": "eye", "release": "digits"}, "release: Input should be"),
        ({}, "no order: KeyError"),
        ([], "no order: "),
    ],
)
def test_what_is_no_order_is_counted_and_answered(desk: Desk, body: Any, reason: str) -> None:
    (desk.box.state / FOLDER / "local-x.json").write_text(json.dumps(body))
    desk.tick()
    assert desk.orders.status()["local-x"]["state"] == "failed"
    assert desk.orders.status()["local-x"]["reason"].startswith(reason)
    assert desk.box.store.counters()["orders_invalid"] == 1
    assert desk.files == []
    assert desk.box.eye.active == "toy@1.1"


KEYS = st.sampled_from(["kind", "slot", "adapter", "release"])
VALUES = st.none() | st.integers() | st.text(max_size=9) | st.sampled_from(["pin", "unpin", "eye"])
DOCUMENTS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@given(data=st.binary(max_size=200) | DOCUMENTS.map(lambda value: json.dumps(value).encode()))
def test_whatever_lies_there_is_an_order_or_says_why_not(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "local-h.json"
    path.write_bytes(data)
    try:
        kind, _ = read(path)
    except ValueError:
        return
    assert kind in ("forget", "pin", "rollback", "unpin")


def test_answers_do_not_grow_for_ever(desk: Desk) -> None:
    for number in range(ANSWERS_MAX + 5):
        place(desk.box.state, f"local-{number:03}", "unpin", ROLLBACK)
        desk.tick()
    assert len(desk.orders.status()) == ANSWERS_MAX
    assert f"local-{ANSWERS_MAX + 4:03}" in desk.orders.status()


def test_an_order_that_cannot_be_kept_has_not_happened_and_stays(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    place(desk.box.state, "local-1", "rollback", ROLLBACK)

    def full(*_: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_update", full)
        with pytest.raises(StorageFull):
            desk.tick()
    assert desk.files == ["local-1.json"]
    assert (desk.box.eye.active, desk.box.eye.update, desk.box.eye.held) == ("toy@1.1", "committed", None)
    desk.tick()
    assert (desk.box.eye.active, desk.box.eye.update, desk.box.eye.held) == ("toy@1.0", "reverted", "toy@1.1")
    assert desk.files == []
