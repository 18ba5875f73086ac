"""A segmenter and a classifier learn from their fleet: `edged run`, a larger model that answers, `trainer serve`, mosquitto.

The device sees fog, which its model has never seen. What it is unsure of goes to the teacher, the labels to the trainer,
which trains, judges and rolls out; then the device runs what came of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.wire.manifest import Thresholds
from edged.wire.messages import Result, Verdict
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.shaped import CLASSES, SIZE, pictured, shaped_trainer, teacher
from tests.system.broker import Broker
from tests.system.test_canary_devices import Host
from tests.system.test_tiers import alive
from trainer.package import package_vision

FED, MORE_THAN = 60, 49
PROBATION = 25  # answers: enough to be compared with those of the release before
PACE_S, SEEN_MAX = 0.2, 1500  # between two pictures of a camera that goes on, and how many it has
WAIT_S = 500.0  # of a busy machine
UNSURE = {"target_risk": 0.0, "audit_share": 0.0, "empty_share": 1.0, "dedupe_s": 0.0, "messages_per_minute": 6000}
# As in tests/trainer/test_train_shapes.py: the segmenter's head alone, the classifier as usual.
KEYS: dict[str, dict[str, Any]] = {
    "segment": {"method": "head", "epochs": 4, "batch": 8, "lr": 0.01, "patience": 0},
    "classify": {"epochs": 12, "batch": 8, "lr": 0.003, "patience": 0},
}
SERVING = """
[broker]
port = {port}
[http]
port = 0
[rollout]
watch_s = 4
items_min = 10
error_margin = 0.5  # few items: what is looked for is the way, not the statistics
escalation_margin = 0.9
audits_planned = 0
extend_max = 20
latency_factor = 50.0
memory_factor = 50.0
temperature_margin = 90.0
failed_grace_s = 2.0
"""


class ShapesHost(Host):
    """`trainer serve` for the slot `shapes`."""

    def __init__(self, folder: Path, broker: Broker, kind: str) -> None:
        folder.mkdir()
        self.config = shaped_trainer(folder, kind, threshold=MORE_THAN, minimum_interval_s=3600, **KEYS[kind])
        self.log = folder / "serve.log"
        own = f'name = "host"\nsite = "{SITE}"\ncommand_resend_s = 1.0\n'
        self.config.write_text(own + self.config.read_text() + SERVING.format(port=broker.port))

    def job(self) -> dict[str, Any]:
        jobs: list[dict[str, Any]] = self.call("rollout", "status")["jobs"]
        return jobs[0] if jobs else {}


def knowing(folder: Path, kind: str) -> Path:
    """The teacher as a release."""
    seen = [*pictured(54, 43, fog=True), *pictured(24, 44, fog=False)]
    known = [item.decode(CLASSES, kind) for item in seen]  # type: ignore[arg-type]
    out = folder / "teacher-1.0"
    package_vision(
        teacher(kind), out, "teacher@1.0", labels=CLASSES, imgsz=SIZE, calibration=known, thresholds=Thresholds(),
        precision="fp32",
    )  # fmt: skip
    return out


def machines(folder: Path, broker: Broker, seed: Path, kind: str) -> tuple[Device, Device]:
    """A device that is unsure of everything, and the larger one that it asks."""
    own = tables(folder, "cam1", broker, None)
    own["slots"] = {"shapes": {"probation_s": 0.5, "probation_items": PROBATION, "seed": seed}}
    own["pipelines"] = {"line": own["pipelines"]["line"] | {"slot": "shapes", "policy": UNSURE}}
    big = tables(folder, "big1", broker, None, responders={"big": {"tier": "big", "slot": "teacher"}})
    big["slots"] = {"teacher": {"seed": knowing(folder, kind)}}
    return Device(folder, own), Device(folder, {key: value for key, value in big.items() if key != "pipelines"})


def feed(device: Device, seed: int, count: int) -> Iterator[None]:
    """Hand over a picture with every step."""
    for number, item in enumerate(pictured(count, seed, fog=True)):
        beside = device.inbox / f".{seed}-{number}.png"
        beside.write_bytes(item.data)
        beside.rename(device.inbox / f"{seed}-{number}.png")
        yield


@contextmanager
def seeing(device: Device, seed: int) -> Iterator[None]:
    """A camera that goes on, whatever the release: what was answered before a watch began is no evidence in it."""
    stopping = threading.Event()

    def see() -> None:
        for _ in feed(device, seed, SEEN_MAX):
            if stopping.wait(PACE_S):
                return

    thread = threading.Thread(target=see, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["segment", "classify"])
def test_what_a_device_is_unsure_of_comes_back_to_it_as_a_better_model(tmp_path: Path, kind: str) -> None:
    with Broker(tmp_path / "broker") as broker:
        bus, host = Bus(broker), ShapesHost(tmp_path / "host", broker, kind)
        device, responder = machines(tmp_path, broker, tmp_path / "host" / "shapes-1.0", kind)
        with host.serving(), responder, device:
            alive(bus, "big")
            list(feed(device, 25, FED))
            device.wait("answers", lambda s: s["samples"].get("labelled", 0) > MORE_THAN, WAIT_S)
            verdicts = [one for one in bus.of(Verdict) if one.label]
            assert verdicts and all(box.polygons for one in verdicts for box in one.label if kind == "segment")

            job = until("the training has ended", lambda: (j := host.job()).get("status") in ENDED and j, WAIT_S)
            assert job["status"] in ("deploying", "completed"), job["detail"] + host.log.read_text()[-4000:]
            assert (job["target_model"], job["metrics"]["samples_used"] > MORE_THAN) == ("shapes@1.1", True)
            device.wait("it runs what was learned", lambda s: s["models"]["shapes"]["active"] == "shapes@1.1", WAIT_S)

            with seeing(device, 91):
                ended = host.ended("shapes@1.1")
            assert (ended["status"], ended["canary_result"]) == ("done", "passed"), ended
            better = until("its answers", lambda: answers(bus, "shapes@1.1", 20), WAIT_S)
            right, before = rightly(better), rightly(answers(bus, "shapes@1.0", 20))
            assert right > max(0.6, before), (before, right)
            if kind == "segment":
                assert any(box.polygons for each in better for box in each.prediction)
        bus.close()


ENDED = ("deploying", "completed", "failed", "refused")


def answers(bus: Bus, release: str, count: int) -> list[Result]:
    found = [each for each in bus.of(Result, "cam1") if each.release == release]
    return found if len(found) >= count else []


def rightly(results: list[Result]) -> float:
    """The share whose best row names the shape that is there; the pictures have them by turns."""
    right = 0
    for each in results:
        number = int(each.item.rpartition("-")[2].removesuffix(".png"))
        best = max(each.prediction, key=lambda box: box.score or 0.0, default=None)
        right += best is not None and best.label == CLASSES[number % len(CLASSES)]
    return right / len(results)
