"""Who is blamed for a crash of the process, row by row, and what is remembered of it across one."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged import acts
from edged.core import quarantine
from edged.core.quarantine import BLAME, Blame, Crash, Trial, blame, counts_against, standing, trial
from edged.core.update import RESTARTS_MAX, UNDER_WAY, State
from edged.engines.base import GenerateRequest
from edged.in_hand import ITEMS_MAX, PREPARER, WORKER, Hands, InHand
from edged.prove import Proof
from edged.releases import reference
from edged.slot import Slot, SlotStopped
from edged.sources import Item
from edged.store import Store
from edged.updater import Updater
from edged.wire.manifest import ReleaseRef
from tests.support.device import until
from tests.unit import test_updater
from tests.unit.test_updater import AtOnce

REF = ReleaseRef(release="toy@1.0", sha256="a" * 64)
NEXT = ReleaseRef(release="toy@1.1", sha256="b" * 64)
S = State


# The tables.


@pytest.mark.parametrize(
    ("how", "earlier", "alone", "found"),
    [
        (Trial.NONE, 0, True, Blame.SUSPECT),
        (Trial.NONE, 0, False, Blame.SUSPECT),
        (Trial.NONE, 1, True, Blame.QUARANTINED),
        (Trial.NONE, 1, False, Blame.SUSPECT),
        (Trial.NONE, 5, True, Blame.QUARANTINED),
        (Trial.ANSWERING, 0, True, Blame.SUSPECT),
        (Trial.ANSWERING, 1, False, Blame.SUSPECT),
        (Trial.ANSWERING, 1, True, Blame.QUARANTINED),
        (Trial.UNPROVEN, 0, True, Blame.SUSPECT),
        (Trial.UNPROVEN, 1, True, Blame.SUSPECT),
        (Trial.UNPROVEN, 9, True, Blame.SUSPECT),
    ],
)
def test_an_item(how: Trial, earlier: int, alone: bool, found: Blame) -> None:
    assert blame(how, earlier, alone) is found


def test_every_row_is_there() -> None:
    assert set(BLAME) == {(how, again, alone) for how in Trial for again in (False, True) for alone in (False, True)}


@pytest.mark.parametrize(
    ("own", "others", "answered", "how"),
    [
        ({S.IDLE}, (), False, Trial.NONE),
        ({S.COMMITTED, S.IDLE}, {S.DOWNLOADING}, False, Trial.NONE),
        ({S.COMMITTED}, {S.SWITCHED}, False, Trial.NONE),  # that one had nothing in hand
        ({S.SWITCHED, S.IDLE}, (), False, Trial.UNPROVEN),
        ({S.SWITCHED, S.IDLE}, (), True, Trial.ANSWERING),
        ({S.STAGED}, (), True, Trial.UNPROVEN),  # a model was being loaded
        ({S.COMMITTED}, {S.STAGED}, True, Trial.UNPROVEN),
        ({S.REVERTING}, (), True, Trial.UNPROVEN),
    ],
)
def test_how_a_release_stands(own: set[State], others: set[State], answered: bool, how: Trial) -> None:
    assert trial(own, others, answered) is how


@pytest.mark.parametrize(
    ("update", "items", "quarantined", "counts"),
    [
        (S.SWITCHED, 0, False, True),
        (S.SWITCHED, 2, False, True),
        (S.SWITCHED, 1, True, False),
        (S.STAGED, 0, False, True),
        (S.STAGED, 1, False, True),
        (S.STAGED, 1, True, True),
        (S.DOWNLOADING, 0, False, True),  # a restart for another reason, as ever
        (S.DOWNLOADING, 1, False, False),
        (S.PROVING, 1, False, False),
        (S.PROVING, 1, True, False),
        (S.COMMITTED, 0, False, True),  # while it has not served for long
        (S.COMMITTED, 2, False, True),
        (S.COMMITTED, 1, True, False),
        (S.IDLE, 0, False, False),
    ],
)
def test_an_update(update: State, items: int, quarantined: bool, counts: bool) -> None:
    assert counts_against(update, items, quarantined) is counts


def test_without_an_item_in_hand_every_update_under_way_is_counted_as_ever() -> None:
    assert {state for state in State if counts_against(state, 0, False)} == UNDER_WAY | {State.COMMITTED}


def test_what_happened_under_a_bad_release_is_forgiven() -> None:
    crashes = [Crash("toy@1.0", ("a",)), Crash("toy@1.1", ("b",)), Crash("toy@1.0 + fix@1", ("a", "c"))]
    assert standing(crashes, {"b"}.__contains__) == (crashes[0], crashes[2])
    assert standing(crashes, {"c"}.__contains__) == (crashes[0], crashes[1])
    assert not standing(crashes, {"a", "b"}.__contains__)


# What is remembered.


class Box:
    """A daemon's hands that can crash, be stopped and come back on the same disk and boot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.boot = "boot 1"
        self.serving, self.on_trial = REF, ""
        self.stopping = False
        self.start()

    def start(self) -> None:
        """A new process; the one before has crashed unless it was stopped."""
        self.store = Store(self.folder / "state")
        if self.on_trial:
            self.store.save_update("eye", {"state": self.on_trial, "candidate": NEXT.model_dump()})
        self.in_hand = InHand(
            self.folder / "in_hand", self.store, lambda kind, _text, **more: self.said.append((kind, more)), self.boot
        )
        self.line, self.other = self.hands("line", "eye"), self.hands("other", "ear")

    def hands(self, pipeline: str, slot: str) -> Hands:
        live = SimpleNamespace(ref=self.serving, adapter=None, engine=object())
        place = cast(Slot, SimpleNamespace(name=slot, live=live, wait=lambda _: True))

        def must_stop() -> bool:
            return self.stopping

        return self.in_hand.of(pipeline, place, must_stop)

    def crash(self, *names: str, other: str = "") -> None:
        """The process dies with these items in hand (the worker's, then the preparer's), and another pipeline's."""
        holds = [self.line.held(item(name), record) for name, record in zip(names, (WORKER, PREPARER), strict=False)]
        if other:
            holds.append(self.other.held(item(other), WORKER))
        for hold in holds:
            hold.__enter__()
        self.store.close()
        self.start()

    def answer(self, name: str) -> None:
        for record in (PREPARER, WORKER):
            with self.line.held(item(name), record):
                pass

    def reason(self, name: str) -> str:
        return self.line.turned_away(item(name))


def item(name: str) -> Item:
    return Item(id=f"id-{name}", name=name, captured=0.0)


def prompt(text: str, request: str) -> Item:
    return Item(id=request, name=request, captured=0.0, prompt=GenerateRequest(text))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_an_item_in_hand_at_two_crashes_is_turned_away(box: Box) -> None:
    box.crash("bad.png")
    assert box.reason("bad.png") == ""
    assert box.said == []
    box.crash("bad.png")
    assert box.reason("bad.png") == "quarantined: in hand at 2 crashes"
    assert box.said == [("item_quarantined", {"item": "bad.png", "pipeline": "line", "release": "toy@1.0"})]
    assert box.reason("good.png") == ""
    box.store.close()
    box.start()
    assert box.reason("bad.png"), "for good"
    assert len(box.said) == 1, "and said once"


def test_who_was_in_hand_beside_it_is_not_blamed(box: Box) -> None:
    box.crash("bad.png", "next.png", other="word")
    assert not any(map(box.reason, ("bad.png", "next.png", "word")))
    # Each is in hand alone now, so the second crash has one culprit.
    box.crash("bad.png")
    assert box.reason("bad.png")
    assert not box.reason("next.png")
    box.answer("next.png")
    box.crash("next.png")
    assert not box.reason("next.png"), "it was answered meanwhile: that was its first crash again"


def test_two_that_are_in_hand_together_are_both_suspects_however_often(box: Box) -> None:
    for _ in range(3):
        first, second = box.line.held(item("one.png"), WORKER), box.line.held(item("two.png"), PREPARER)
        box.in_hand._entries.clear()  # a process that did not know of them
        first.__enter__()
        second.__enter__()
        box.store.close()
        box.start()
    assert not box.reason("one.png")
    assert not box.reason("two.png")


def test_a_crash_at_nothing_or_after_a_stop_blames_nobody(box: Box) -> None:
    box.answer("good.png")
    box.crash()
    assert not box.in_hand.known(lambda: "id-good.png")[1]
    assert not box.in_hand.excuses(State.SWITCHED)
    for _ in range(3):
        box.in_hand.close()  # then systemd loses patience
        box.crash("slow.png")
    assert not box.in_hand.known(lambda: "id-slow.png")[1]


def test_a_pipeline_that_ends_leaves_no_file(box: Box) -> None:
    assert len(list((box.folder / "in_hand").iterdir())) == 2
    box.line.close()
    assert [path.name for path in (box.folder / "in_hand").iterdir()] == ["1-other"]


def test_a_power_cut_blames_nobody(box: Box) -> None:
    for boot in ("boot 2", "boot 3", "boot 4"):
        box.boot = boot
        box.crash("good.png")
    assert not box.in_hand.known(lambda: "id-good.png")[1]


def test_a_damaged_mark_is_left_out(box: Box) -> None:
    for content in (b"", b"1half", b"\xff" * 5000):
        (box.folder / "in_hand" / "9-odd").write_bytes(content)
        box.crash("bad.png")
    assert box.reason("bad.png")


def test_a_release_that_has_answered_nothing_is_blamed_instead_of_its_items(box: Box) -> None:
    box.serving, box.on_trial = NEXT, "switched"
    box.crash()
    for _ in range(3):
        box.crash("good.png")
        assert not box.in_hand.excuses(State.SWITCHED)
    assert not box.reason("good.png")
    # It is put back. What happened under it is forgiven.
    box.store.remember_bad(NEXT.release, NEXT.sha256, "crashes", 0.0)
    box.serving, box.on_trial = REF, "reverted"
    box.crash()
    box.crash("good.png")
    assert not box.reason("good.png")
    assert box.said == []
    box.crash("good.png")
    assert box.reason("good.png"), "two crashes under the committed release are its own"


def test_a_release_on_probation_that_answers_others_is_not_blamed_for_the_second_crash(box: Box) -> None:
    box.serving, box.on_trial = NEXT, "switched"
    box.crash()
    box.crash("bad.png")
    assert not box.in_hand.excuses(State.SWITCHED), "who it was is not known yet"
    assert box.line.last(item("bad.png")), "others are answered first"
    assert not box.line.last(item("bad.png")), "once"
    box.answer("good.png")
    box.crash("bad.png")
    assert box.in_hand.excuses(State.SWITCHED)
    assert box.reason("bad.png")
    assert box.said[0][1]["release"] == "toy@1.1"
    # If it is put back all the same, the item is free again: under the release before it may be a good one.
    box.store.remember_bad(NEXT.release, NEXT.sha256, "engine errors", 0.0)
    assert not box.reason("bad.png")


def test_the_release_before_one_on_probation_is_not_on_trial(box: Box) -> None:
    box.on_trial = "switched"  # after a start it serves until the candidate is loaded again
    box.crash("bad.png")
    box.crash("bad.png")
    assert box.reason("bad.png")


def test_a_prompt_is_known_by_its_content(box: Box) -> None:
    assert not box.line.ended(prompt("kill", "r1"))
    assert not box.line.turned_away(prompt("kill", "r2"))
    assert box.line.ended(prompt("kill", "r2"))
    assert box.line.turned_away(prompt("kill", "r3")) == "quarantined: in hand at 2 crashes"
    assert not box.line.turned_away(prompt("kind", "r4"))


def test_a_suspect_is_in_hand_alone(box: Box) -> None:
    box.crash("bad.png")
    order: list[str] = []
    first = box.other.held(item("word"), WORKER)
    first.__enter__()

    def work(hands: Hands, name: str) -> None:
        with hands.held(item(name), WORKER):
            order.append(name)
            assert box.in_hand._held == 1

    suspect = threading.Thread(target=work, args=(box.line, "bad.png"))
    suspect.start()
    until("the suspect waits", lambda: box.in_hand._alone)
    later = threading.Thread(target=work, args=(box.hands("third", "eye"), "frame"))
    later.start()
    assert order == []
    first.__exit__(None, None, None)
    suspect.join()
    later.join()
    assert order == ["bad.png", "frame"]
    assert not box.in_hand.known(lambda: "id-bad.png")[1], "it was answered: nothing is suspected any more"


def test_a_stop_ends_the_wait_of_a_suspect(box: Box) -> None:
    box.crash("bad.png")
    with box.other.held(item("word"), WORKER):
        box.stopping = True
        with pytest.raises(SlotStopped), box.line.held(item("bad.png"), WORKER):
            raise AssertionError("it must not begin")
    with box.other.held(item("word"), WORKER):
        pass


def test_no_more_items_are_remembered_than_the_limit(box: Box) -> None:
    for number in range(ITEMS_MAX + 5):
        box.line.ended(prompt(f"prompt {number}", "r"))
    assert len(box.store.value("in_hand")["items"]) == ITEMS_MAX
    assert box.line.ended(prompt(f"prompt {ITEMS_MAX + 4}", "r")), "the newest are kept"
    assert not box.line.ended(prompt("prompt 0", "r")), "the oldest is forgotten"


def test_without_a_folder_nothing_is_remembered_and_nothing_fails() -> None:
    place = cast(Slot, SimpleNamespace(name="eye", live=None, wait=lambda _: True))
    hands = InHand().of("line", place, lambda: False)
    with hands.held(item("good.png"), WORKER):
        pass
    assert hands.turned_away(item("good.png")) == ""
    hands.close()


@pytest.mark.parametrize("excused", [True, False])
def test_an_end_that_an_item_is_to_blame_for_does_not_count_against_the_update(
    tmp_path: Path, toy: Path, toy2: Path, monkeypatch: pytest.MonkeyPatch, excused: bool
) -> None:
    monkeypatch.setattr(acts, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(acts, "prove", lambda *_: Proof(0.1, 0.1, 2))
    updater = test_updater.Box(tmp_path, toy, toy2)
    updater.desire(reference(toy2))
    start = Updater.start
    monkeypatch.setattr(Updater, "start", lambda self: start(self, lambda state: excused and state is State.SWITCHED))
    for _ in range(RESTARTS_MAX + 1):
        updater.switch_on()
        updater.settle()
    assert updater.eye.update == ("switched" if excused else "reverted")


def test_the_limit_is_two() -> None:
    assert quarantine.CRASHES_MAX == 2
