"""What people order for a slot, and crashes after a commit, on an updater with its clock in hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edged import acts as module
from edged.core.probation import Criteria
from edged.core.update import RESTARTS_MAX, SETTLED_S
from edged.holds import Answer, Order
from edged.prove import Proof
from edged.releases import Releases, reference
from edged.store import Store
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import ForgetCommand, PinCommand, RollbackCommand, UnpinCommand
from tests.support.models import make_release
from tests.unit.test_updater import PROBATION_S, AtOnce, Box


@pytest.fixture(autouse=True)
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(module, "prove", lambda *_: Proof(0.1, 0.1, 2))


ENVELOPE = {"id": "o", "ts": 0.0, "boot": "b", "seq": 1}
ROLLBACK = RollbackCommand(**ENVELOPE, slot="eye")
PIN, UNPIN = PinCommand(**ENVELOPE, slot="eye"), UnpinCommand(**ENVELOPE, slot="eye")


class Person:
    """Someone beside the box; hears how orders end."""

    def __init__(self, box: Box) -> None:
        self.box, self.heard, self._number = box, [], 0
        self.sit_down()

    def sit_down(self) -> None:
        """Beside the new process of the box."""
        self.box.updater.answered = lambda order, answer: self.heard.append((order, answer.state))
        self.heard: list[tuple[str, str]] = []

    def order(self, order: Order, order_id: str = "") -> Answer:
        self._number += 1
        answer = self.box.updater.order(order_id or f"o{self._number}", order)
        self.box.settle()
        return answer


def committed(box: Box, *refs: ReleaseRef) -> None:
    for ref in refs:
        box.desire(ref)
        box.wait(PROBATION_S)
        assert (box.eye.active, box.eye.update) == (ref.release, "committed")


@pytest.fixture
def box(tmp_path: Path, toy: Path, toy2: Path) -> Box:
    make_release(tmp_path / "toy3", "toy@1.2", 2)
    return Box(tmp_path / "state", toy, toy, toy2, tmp_path / "toy3")


@pytest.fixture
def refs(tmp_path: Path, toy: Path, toy2: Path, box: Box) -> tuple[ReleaseRef, ReleaseRef, ReleaseRef]:
    return reference(toy), reference(toy2), reference(tmp_path / "toy3")


Refs = tuple[ReleaseRef, ReleaseRef, ReleaseRef]


def test_a_rollback_needs_no_network_and_the_same_desire_does_not_undo_it(box: Box, refs: Refs) -> None:
    _, second, third = refs
    committed(box, second)
    known, box.server = box.server, {}
    person = Person(box)
    assert person.order(ROLLBACK) == Answer("accepted")
    assert person.heard == [("o1", "done")]
    assert (box.eye.active, box.eye.update, box.eye.reason) == ("toy@1.0", "reverted", "rolled back by a person")
    assert (box.eye.held, box.eye.previous) == ("toy@1.1", "toy@1.1")
    assert box.store.bad(second.sha256) is None, "nothing is known against it"
    for _ in range(2):
        box.desire(second)
        assert box.eye.active == "toy@1.0"
        box.switch_on()
    box.server = known
    committed(box, third)
    assert box.eye.held is None
    committed(box, second)  # another release was desired in between: the person's word is spent


def test_a_rollback_in_probation_goes_back_to_what_served_before(box: Box, refs: Refs) -> None:
    second = refs[1]
    box.desire(second)
    assert box.eye.update == "switched"
    person = Person(box)
    assert person.order(ROLLBACK).state == "accepted"
    assert (box.eye.active, box.eye.update, box.eye.held) == ("toy@1.0", "reverted", "toy@1.1")
    assert person.order(ROLLBACK).state == "failed", "there was nothing before"
    assert person.order(UNPIN).state == "done"
    assert (box.eye.active, box.eye.update, box.eye.held) == ("toy@1.1", "switched", None)


def test_a_rollback_ends_what_is_under_way(box: Box, refs: Refs) -> None:
    _, second, third = refs
    committed(box, second)
    box.server.clear()
    box.desire(third)
    assert box.eye.update == "failed", "nobody answers: it is tried again"
    person = Person(box)
    assert person.order(ROLLBACK).state == "accepted"
    box.server[third] = box.state.parent / "toy3"
    box.wait(1000.0)
    assert (box.eye.active, box.eye.update, box.eye.held) == ("toy@1.0", "reverted", "toy@1.2")


def test_two_rollbacks_in_a_row_do_not_go_forward(box: Box, refs: Refs) -> None:
    committed(box, refs[1])
    person = Person(box)
    assert person.order(ROLLBACK).state == "accepted"
    again = person.order(ROLLBACK)
    assert again.state == "failed"
    assert "has just come back from toy@1.1" in again.reason
    assert box.eye.active == "toy@1.0"


def test_an_order_that_comes_again_is_carried_out_once(box: Box, refs: Refs) -> None:
    _, second, third = refs
    committed(box, second, third)
    person = Person(box)
    assert person.order(ROLLBACK, "r1").state == "accepted"
    assert box.eye.active == "toy@1.1"
    box.switch_on()
    person.sit_down()
    assert person.order(ROLLBACK, "r1") == Answer("done")
    assert box.eye.active == "toy@1.1"


@pytest.mark.parametrize("events", range(3))
def test_a_crash_in_a_rollback_comes_to_the_same_end(box: Box, refs: Refs, events: int) -> None:
    committed(box, refs[1])
    person = Person(box)
    box.updater.order("r1", ROLLBACK)
    box.settle(events)
    box.switch_on()
    person.sit_down()
    box.settle()
    assert (box.eye.active, box.eye.update, box.eye.held) == ("toy@1.0", "reverted", "toy@1.1")
    assert person.order(ROLLBACK, "r1") == Answer("done")
    box.desire(refs[1])
    assert box.eye.active == "toy@1.0"


def test_what_cannot_serve_is_not_rolled_back_to(box: Box, refs: Refs) -> None:
    person = Person(box)
    assert person.order(ROLLBACK) == Answer("failed", "eye has no release before toy@1.0 to go back to")
    committed(box, refs[1])
    shutil.rmtree(Releases(box.state / "releases").folder(refs[0]))
    assert person.order(ROLLBACK).reason == "eye cannot go back to toy@1.0: its files are not here any more"
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")
    adapter = RollbackCommand(**ENVELOPE, slot="eye", adapter=True)
    assert person.order(adapter) == Answer("failed", "eye/adapter has no release that it could go back from")
    nobody = RollbackCommand(**ENVELOPE, slot="ear")
    assert person.order(nobody) == Answer("failed", "no slot 'ear' here; known: eye")


def test_a_damaged_predecessor_leaves_what_serves(box: Box, refs: Refs) -> None:
    committed(box, refs[1])
    folder = Releases(box.state / "releases").folder(refs[0])
    (folder / "model.onnx").write_bytes(b"junk")
    person = Person(box)
    person.order(ROLLBACK)
    assert box.eye.active == "toy@1.1"
    assert any(said.startswith("no_way_back") for said in box.said)
    box.switch_on()
    box.settle()
    assert box.eye.active == "toy@1.1", "a model serves after a restart too"


def test_a_pinned_slot_ignores_what_is_desired_until_it_is_unpinned(box: Box, refs: Refs) -> None:
    _, second, third = refs
    person = Person(box)
    assert person.order(PIN) == Answer("done")
    box.desire(second)
    box.switch_on()
    person.sit_down()
    box.desire(second)
    assert (box.eye.active, box.eye.pinned, box.eye.update) == ("toy@1.0", "toy@1.0", "idle")
    assert person.order(PinCommand(**ENVELOPE, slot="eye", release=third)).state == "done"
    assert (box.eye.active, box.eye.pinned, box.eye.update) == ("toy@1.2", "toy@1.2", "switched")
    box.wait(PROBATION_S)
    assert (box.eye.active, box.eye.update) == ("toy@1.2", "committed")
    assert person.order(UNPIN) == Answer("done")
    assert (box.eye.active, box.eye.pinned, box.eye.update) == ("toy@1.1", None, "switched")


def test_a_pin_withdraws_what_is_under_way(box: Box, refs: Refs) -> None:
    box.server.clear()
    box.desire(refs[1])
    assert box.eye.update == "failed"
    person = Person(box)
    person.order(PIN)
    assert (box.eye.update, box.eye.pinned) == ("idle", "toy@1.0")
    box.server[refs[1]] = box.state
    box.wait(1000.0)
    assert box.eye.update == "idle"


def test_a_pinned_release_that_fails_its_probation_is_put_back_all_the_same(box: Box, refs: Refs) -> None:
    person = Person(box)
    person.order(PinCommand(**ENVELOPE, slot="eye", release=refs[1]))
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    box.wait(1.0)
    assert (box.eye.active, box.eye.update, box.eye.pinned) == ("toy@1.0", "reverted", "toy@1.1")


def test_a_bad_release_is_reported_and_can_be_forgotten(box: Box, refs: Refs) -> None:
    box.desire(refs[1])
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    box.wait(1.0)
    (bad,) = box.updater.known_bad()
    assert (bad.release, bad.sha256, bad.reason) == ("toy@1.1", refs[1].sha256, "3 engine errors during probation")
    person = Person(box)
    assert person.order(PinCommand(**ENVELOPE, slot="eye", release=refs[1])).state == "done"
    assert box.eye.reason == "known to be bad: 3 engine errors during probation"
    assert person.order(ForgetCommand(**ENVELOPE, release="toy@7.0")).state == "failed"
    assert person.order(ForgetCommand(**ENVELOPE, release="toy@1.1")).state == "done"
    assert box.updater.known_bad() == []
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "switched")


# Crashes after the commit.


def crash(box: Box, times: int) -> None:
    for _ in range(times):
        box.switch_on()
        box.settle()


def test_a_release_that_crashes_soon_after_its_commit_is_put_back(box: Box, refs: Refs) -> None:
    committed(box, refs[1])
    crash(box, RESTARTS_MAX)
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")
    crash(box, 1)
    assert (box.eye.active, box.eye.update) == ("toy@1.0", "reverted")
    assert box.eye.reason == "the daemon crashed again and again soon after this update"
    assert box.store.bad(refs[1].sha256)
    box.desire(refs[1])
    assert box.eye.active == "toy@1.0"


def test_a_release_that_has_served_for_a_while_is_not_blamed(box: Box, refs: Refs) -> None:
    committed(box, refs[1])
    crash(box, RESTARTS_MAX)
    for _ in range(2):
        box.wait(SETTLED_S)
    crash(box, 2 * RESTARTS_MAX)
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")


def test_stops_that_were_asked_for_blame_nobody(box: Box, refs: Refs) -> None:
    box.desire(refs[1])
    for _ in range(2 * RESTARTS_MAX):
        box.updater.stop(0)
        box.switch_on()
        box.settle()
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "switched")
    box.wait(PROBATION_S)
    for _ in range(2 * RESTARTS_MAX):
        box.updater.stop(0)
        box.switch_on()
        box.settle()
    assert (box.eye.active, box.eye.update) == ("toy@1.1", "committed")


def test_without_a_predecessor_there_is_nothing_to_put_back(tmp_path: Path, toy: Path) -> None:
    box = Box(tmp_path, toy)
    crash(box, 3 * RESTARTS_MAX)
    assert box.eye.active == "toy@1.0"


def test_a_bad_release_is_remembered_in_the_same_breath_as_the_state(
    box: Box, refs: Refs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash at any saving: either the update goes on from where it was, or its release is known to be bad."""
    box.desire(refs[1])
    for _ in range(Criteria().errors_max):
        box.updater.engine_error("eye")
    real: Callable[..., None] = Store.save_update

    def then_the_power_goes(store: Store, target: str, record: dict[str, object], *more: object) -> None:
        real(store, target, record, *more)
        raise SystemExit

    monkeypatch.setattr(Store, "save_update", then_the_power_goes)
    with pytest.raises(SystemExit):
        box.wait(1.0)
    monkeypatch.undo()
    assert box.store.updates()["eye"]["state"] == "reverting"
    assert box.store.bad(refs[1].sha256) == "3 engine errors during probation"
