"""What is kept of an answer: within the budget, once, with everything that the decision was made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edged import images
from edged.answers import Answers
from edged.capture import Capture, Kept
from edged.cases import Answer, Case, of_image
from edged.config import WHOLE, Pipeline
from edged.config_sources import MqttSource
from edged.core.breaker import LATE_MAX, State
from edged.core.policy import Policy, judge
from edged.core.tracks import Lost, Track
from edged.engines.base import Detections, ImageStats, Prepared
from edged.outgoing import Outgoing
from edged.slot import Loaded
from edged.sources import Item
from edged.stamp import Stamp
from edged.store import Sample, StorageFull, Store, StoreError, StoreLimits
from edged.why import document, screen
from edged.wire import messages
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef
from tests.support.clocks import SetClock

SEEN = ImageStats(0.4, 0.2, 0.5)
FITTED = Calibration(
    method="logistic", features=["min_logit", "missed_count"], mean=[0.0, 0.0], scale=[2.0, 1.0], weights=[2.0, -1.0],
    bias=0.5, items=412,
)  # fmt: skip


class Bench:
    """The capturing part of one pipeline with a real store."""

    def __init__(self, folder: Path, limits: StoreLimits | None = None, **config: Any) -> None:
        self.clock, self.store = SetClock(), Store(folder, limits)
        self.config = Pipeline(slot="eye", source=MqttSource(), escalate_to="big", **config)
        self.outgoing = Outgoing("plant", "dev1", Stamp(self.clock))
        self.restart()

    def restart(self) -> None:
        self.answers = Answers(self.config.answer_by_s)
        self.capture = Capture(
            "line", self.config, "eye", self.store, self.outgoing, self.clock, self.answers
        )  # fmt: skip

    def case(self, answer: Answer) -> Case:
        return of_image(answer, whole=self.config.roi == WHOLE)

    def handle(self, answer: Answer) -> Kept:
        case = self.case(answer)
        return self.capture.keep(case, self.capture.admit(case))

    def sample(self, sample_id: str) -> Sample:
        found = self.store.sample(sample_id)
        assert found is not None
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def answer(
    number: int, *, scores: tuple[float, ...] = (0.6,), draw: float = 0.9, calibration: Calibration = FITTED,
    policy: Policy | None = None, lost: tuple[Lost, ...] = (), corner: tuple[int, int] = (0, 0), scene: int | None = None,
    stats: ImageStats = SEEN,
) -> Answer:  # fmt: skip
    """What a pipeline has made of picture `number`; every picture is another scene unless `scene` says which."""
    policy = policy or Policy(dedupe_s=0.0)
    chance = np.random.default_rng(number if scene is None else scene)
    pixels = np.kron(chance.integers(0, 256, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    boxes = np.array([[30.0 * n, 8, 30 * n + 30, 40] for n in range(len(scores))], np.float32).reshape(-1, 4)
    found = Detections(boxes, np.array(scores, np.float32), np.arange(len(scores)) % 2)
    manifest = ReleaseManifest(
        release="toy@1.0", kind="detect", engine="onnx_detect", files={}, labels=["cat", "dog"], calibration=calibration,
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    loaded = Loaded(ReleaseRef(release="toy@1.0", sha256="0" * 64), manifest, None)  # type: ignore[arg-type]
    judged = judge(found, stats, manifest, policy, draw, bool(lost))
    assert judged.decision.action != "accept"
    item = Item(f"item-{number}", f"{number}.png", 1.7e9, images.encode(pixels) + b" " * number)
    prepared = Prepared(pixels, pixels, (64, 64, "uint8"), 1.0, (0.0, 0.0), stats)
    return Answer(item, loaded, prepared, corner, found, policy, draw, lost, judged, 3.0)


def test_an_escalation_is_kept_with_its_question_and_what_it_was_made_of(bench: Bench) -> None:
    assert bench.handle(answer(1)) == Kept("item-1", "")
    sample, (row,) = bench.sample("item-1"), bench.store.due(bench.clock.now(), 10)
    assert (sample.state, sample.reason, sample.inclusion_probability) == ("escalated", "unsure", 1.0)
    question = messages.decode(row.message.topic, row.message.payload)[2]
    assert isinstance(question, messages.Escalation)
    assert (question.sample, question.sha256) == ("item-1", sample.sha256)
    evidence = sample.evidence
    # The logit of p is the bias and the contributions: nothing else speaks.
    total = evidence["bias"] + sum(row["contribution"] for row in evidence["features"].values())
    assert 1 / (1 + math.exp(-total)) == pytest.approx(sample.confidence)
    assert evidence["features"]["min_logit"]["value"] == pytest.approx(math.log(0.6 / 0.4), rel=1e-5)
    assert (evidence["threshold"], evidence["policy"]["target_risk"]) == (0.9, 0.1)
    assert (evidence["spent"]["messages"], evidence["breaker"], evidence["decided"]) == (1, "closed", bench.clock.now())


@pytest.mark.parametrize(("scores", "reason", "share"), [((0.99,), "audit", 0.5), ((), "audit_empty", 0.25)])
def test_an_audit_is_kept_with_its_inclusion(
    bench: Bench, scores: tuple[float, ...], reason: str, share: float
) -> None:
    calibration = FITTED.model_copy(update={"bias": 9.0})
    policy = Policy(audit_share=0.5, empty_share=0.25)
    bench.handle(answer(1, scores=scores, draw=0.2, calibration=calibration, policy=policy))
    sample = bench.sample("item-1")
    assert (sample.state, sample.decision, sample.reason) == ("escalated", "audit", reason)
    assert sample.inclusion_probability == share
    assert sample.evidence["draw"] == 0.2


def test_over_budget_the_sample_is_kept_and_nobody_is_asked(bench: Bench) -> None:
    policy = Policy(dedupe_s=0.0, messages_per_minute=3)
    kept = [bench.handle(answer(n, policy=policy)) for n in range(5)]
    assert [one.suppressed for one in kept] == ["", "", "", "messages", "messages"]
    assert bench.store.counts() == {"escalated": 3, "captured": 2}
    assert bench.store.depth()[0] == 3
    late = bench.sample("item-4")
    assert (late.label_by, late.decision, late.evidence["suppressed"]) == (None, "escalate", "messages")
    bench.clock.passes(61)
    assert bench.handle(answer(9, policy=policy)).suppressed == ""


def test_the_day_of_bytes_survives_a_restart(bench: Bench) -> None:
    policy = Policy(dedupe_s=0.0, bytes_per_day=10_000)
    while bench.handle(answer(int(bench.clock.mono), policy=policy)).suppressed != "bytes":
        bench.clock.passes(1)
    spent = bench.capture._budget.spent(bench.clock.mono)
    assert 7000 < spent.bytes <= 10_000
    bench.clock.passes(3600)
    bench.restart()
    assert bench.handle(answer(200, policy=policy)).suppressed == "bytes"
    bench.clock.passes(25 * 3600)
    bench.restart()
    assert bench.handle(answer(201, policy=policy)).suppressed == ""


def test_what_looks_the_same_is_asked_about_once_and_audits_always(bench: Bench) -> None:
    policy = Policy(dedupe_s=60.0, audit_share=1.0)
    kept = [bench.handle(answer(n, scene=5, policy=policy)) for n in range(3)]
    assert kept == [Kept("item-0", ""), Kept(None, "duplicate"), Kept(None, "duplicate")]
    assert bench.handle(answer(3, scene=6, policy=policy)).suppressed == ""
    sure = FITTED.model_copy(update={"bias": 9.0})
    audits = [bench.handle(answer(n, scene=5, policy=policy, calibration=sure)) for n in (4, 5)]
    assert audits == [Kept("item-4", ""), Kept("item-5", "")]
    bench.clock.passes(61)
    assert bench.handle(answer(8, scene=5, policy=policy)).suppressed == ""


def test_what_nobody_was_asked_about_does_not_make_the_next_one_a_duplicate(bench: Bench) -> None:
    tight, wide = Policy(messages_per_minute=0), Policy()
    assert bench.handle(answer(1, scene=5, policy=tight)).suppressed == "messages"
    assert bench.handle(answer(2, scene=5, policy=wide)).suppressed == ""


def test_a_commit_that_failed_is_repeated_without_spending_again(bench: Bench) -> None:
    made = answer(1, policy=Policy(dedupe_s=60.0))
    case = bench.case(made)
    admission = bench.capture.admit(case)
    failing = bench.store.capture

    def fails(*_: Any) -> None:
        raise StoreError("the disk is gone for a moment")

    bench.store.capture = fails  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        bench.capture.keep(case, admission)
    bench.store.capture = failing  # type: ignore[method-assign]
    assert [bench.capture.keep(case, admission) for _ in range(2)] == [Kept("item-1", "")] * 2
    assert bench.capture._budget.spent(bench.clock.mono).messages == 1
    # The whole item again, as after a crash: the same sample, and no duplicate of itself.
    assert bench.handle(made) == Kept("item-1", "")
    assert (bench.store.counts(), bench.store.depth()[0]) == ({"escalated": 1}, 1)


def test_a_full_store_is_said_and_is_no_question_without_an_answer(tmp_path: Path) -> None:
    bench = Bench(tmp_path, StoreLimits(outbox_rows_max=1))
    assert [bench.handle(answer(n)).suppressed for n in range(LATE_MAX + 2)] == ["", *["full"] * (LATE_MAX + 1)]
    assert bench.store.counters()["samples_not_kept"] == LATE_MAX + 1
    bench.clock.passes(100)
    assert bench.answers.tick(bench.clock.mono) is None  # one is late, not those that were never asked
    bench.store.close()


def test_on_a_full_disk_answering_goes_on(bench: Bench) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageFull("the disk is full")

    bench.store.set_value = full  # type: ignore[method-assign]
    assert bench.handle(answer(1)) == Kept(None, "full")


def test_a_region_is_kept_as_exactly_the_pixels_that_the_model_saw(tmp_path: Path) -> None:
    bench = Bench(tmp_path, roi=[0.25, 0.5, 0.75, 1.0])
    made = answer(1, corner=(32, 64))
    made = replace(made, item=replace(made.item, image=images.encode(np.zeros((128, 128, 3), np.uint8))))  # the frame
    bench.handle(made)
    sample = bench.sample("item-1")
    path = bench.store.blob(sample.sha256)
    assert path is not None
    assert (images.decode(path.read_bytes()) == made.prepared.image).all()
    assert sample.prediction[0]["box"] == [0, 8, 30, 40]  # in pixels of what is kept
    assert sample.evidence["seen"] == [32, 64, 96, 128]
    assert "in its region, pixels 32,64 to 96,128 of the frame" in "\n".join(screen(sample))
    bench.store.close()


def test_an_image_that_is_too_large_to_send_is_kept(bench: Bench) -> None:
    made = answer(1)
    made = replace(made, item=replace(made.item, image=made.item.image + b" " * messages.INLINE_BYTES_MAX))
    assert bench.handle(made) == Kept("item-1", "too_large")
    assert bench.sample("item-1").state == "captured"
    assert bench.capture._budget.spent(bench.clock.mono).messages == 0


# `edged why`: every kind of decision, on one screen.


def shown(bench: Bench, made: Answer, sample_id: str = "item-1") -> str:
    bench.handle(made)
    sample = bench.sample(sample_id)
    json.dumps(document(sample), allow_nan=False)
    lines = screen(sample)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    return "\n".join(lines)


def test_why_an_unsure_answer_was_asked_about(bench: Bench) -> None:
    text = shown(bench, answer(1, scores=(0.6, 0.5)))
    assert "item-1   escalated" in text
    assert "cat" in text
    assert "score 0.60" in text
    assert "(fitted on 412 items)" in text
    assert "What the rule said: escalate (unsure)\n  not sure enough to be accepted\n" in text
    assert "accepted from 0.900 on: at most 10.0% of what is accepted may be wrong" in text
    assert "asked big at 2027-01-15 08:00:00 UTC; a label is wanted until 2027-01-22 08:00:00 UTC" in text


def test_why_shows_the_largest_contribution_first(bench: Bench) -> None:
    text = shown(bench, answer(1, scores=(0.55, 0.2, 0.15, 0.1, 0.1, 0.1)))
    assert text.index("how many weak candidates lie beside it") < text.index("its weakest box")
    assert "speaks against it" in text


def test_why_an_audit_was_drawn(bench: Bench) -> None:
    sure = FITTED.model_copy(update={"bias": 9.0})
    text = shown(bench, answer(1, draw=0.0123, calibration=sure, policy=Policy(audit_share=0.02)))
    assert "audit (audit)\n  sure enough, and drawn by lot" in text
    assert "its lot 0.0123 is below the share 0.02 that is checked" in text


def test_why_a_strange_or_broken_picture_was_asked_about(bench: Bench) -> None:
    text = shown(bench, answer(1, stats=ImageStats(math.nan, 0, 0)))
    assert "escalate (novel)\n  the picture is unlike those that the release was calibrated on" in text
    assert bench.sample("item-1").confidence == 0.0
    text = shown(bench, answer(2, calibration=Calibration()), "item-2")
    assert "escalate (uncalibrated)" in text
    assert "nothing can be accepted" in text
    assert "a guess: the release has too little data" in text


def test_why_a_weak_candidate_was_asked_about(bench: Bench) -> None:
    sure = FITTED.model_copy(update={"bias": 9.0})
    text = shown(bench, answer(1, scores=(0.9, 0.21), calibration=sure))
    assert "escalate (weak)\n  sure enough, but something is nearly a box where nothing was answered" in text
    assert "a candidate of score 0.210; from 0.200 on they are asked about" in text


def test_why_a_lost_object_was_asked_about(bench: Bench) -> None:
    sure = FITTED.model_copy(update={"bias": 9.0})
    lost = Lost("lost_weak", Track(1, (1.0, 2.0, 3.0, 4.0), 7, 0.8))
    text = shown(bench, answer(1, calibration=sure, lost=(lost,)))
    assert "dog was there for 7 frames; only a weak candidate is left in its place" in text


def test_why_nobody_was_asked(bench: Bench) -> None:
    for number in range(LATE_MAX):
        bench.answers.asked(f"s{number}", bench.clock.mono)
    bench.clock.passes(10)
    assert bench.answers.tick(bench.clock.mono) is State.OPEN
    text = shown(bench, answer(1, policy=Policy(messages_per_minute=0)))
    assert "item-1   captured" in text
    assert "nobody was asked (messages): the budget of messages a minute was spent" in text
    assert "spent then: 0 of 0 messages a minute" in text
    assert "nobody had answered for a while" in text


def test_why_tells_what_became_of_it(bench: Bench) -> None:
    bench.handle(answer(1))
    label = [{"label": "owl", "box": [0, 0, 1, 1], "score": 1.0}]
    by = {"kind": "model", "who": "big1", "release": "teacher@3.0"}
    bench.clock.passes(60)
    said = [{"who": who, "confidence": 0.5, "label": label} for who in ("near1", "big1")]
    bench.store.label("item-1", "labelled", label, 0.93, by, "", bench.clock.now(), None, said)
    bench.store.claim(["item-1"], "job-7")
    bench.store.used(["item-1"], "toy@1.1")
    text = "\n".join(screen(bench.sample("item-1")))
    assert "item-1   used" in text
    assert "2027-01-15 08:01:00 UTC: model big1 with teacher@3.0 says, with 0.93: owl" in text
    assert "near1 said, with 0.50: owl" in text
    assert "claimed by the training job-7" in text
    assert "it trained toy@1.1" in text


def test_the_fullest_screen_is_still_one(bench: Bench) -> None:
    lost = tuple(Lost("lost", Track(0, (0.0, 0.0, 9.0, 9.0), 5, 0.9)) for _ in range(9))
    wide = Calibration(
        method="logistic", features=["min_logit", "mean_logit", "kept", "empty", "overlap", "missed_count", "rival_logit"],
        mean=[0.0] * 7, scale=[1.0] * 7, weights=[0.1] * 4 + [-0.1] * 3, items=9,
    )  # fmt: skip
    made = answer(1, scores=(0.5,) * 30, calibration=wide, lost=lost)
    shown(bench, replace(made, item=replace(made.item, name="a very long name " * 20)))
    by = {"kind": "model", "who": "big1" * 40, "release": "teacher@3.0"}
    said = [{"who": f"r{n}", "confidence": 0.5, "label": []} for n in range(4)]
    bench.store.label("item-1", "unresolved", [], 0.2, by, "because " * 40, bench.clock.now(), None, said)
    lines = screen(bench.sample("item-1"))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_a_sample_of_before_there_was_evidence_is_explained_as_far_as_it_goes(bench: Bench) -> None:
    bench.handle(answer(1))
    text = "\n".join(screen(replace(bench.sample("item-1"), evidence={})))
    assert "What that was made of was not recorded" in text
    assert "escalate (unsure)" in text
