"""A bad release and a good one through `trainer serve` and a real mosquitto: the canaries' audits decide (L11-L13).

The devices are Links that say what devices say; the release that is bad passed whatever gate there was, and is worse on
what the devices see.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edged.wire import topics
from edged.wire.messages import Box, Metrics, Provenance, SampleEntry
from tests.system.test_trainer_serve import Device, Trainer, rollout_of, running, until

ROLLOUT = (
    "steps = [0.3, 1.0]\nwatch_s = 8\naudits_planned = 100\nitems_min = 50\ninstall_s_max = 60\nfailed_grace_s = 1"
)
NAMES = ("d1", "d2", "d3", "d4", "d5", "d6")
BOX = Box(label="1", box=(0, 0, 5, 5))


def lived(device: Device, start: float, end: float, items: int, audits: int, right: float) -> None:
    """A window, and its audits with their verdicts, this share of them right."""
    window = Metrics(
        **device._envelope(), start=start, end=end, pipeline="line", release=device.active, items=items,
        accepted=items - audits, audited=audits, latency_ms_p95=40.0,
    )  # fmt: skip
    device.say(topics.METRICS, window)
    for number in range(audits):
        stamp = device._envelope()
        entry = SampleEntry(
            **stamp, sample=stamp["id"], pipeline="line", task="detect", model="digits", release=device.active,
            state="labelled", sha256="0" * 64, bytes=1, decision="audit", inclusion_probability=0.1,
            prediction=[BOX] if number < right * audits else [], label=[BOX], label_confidence=0.9, captured=end,
            provenance=Provenance(kind="model", who="big", release="teacher@1.0"),
        )  # fmt: skip
        device.say(topics.SAMPLE, entry)


def watched(trainer: Trainer, devices: list[Device], release: str, right: float) -> tuple[list[Device], list[Device]]:
    """Start the rollout and let its canaries run it: they are right so often, the others nine times of ten."""
    started = trainer.call("rollout", "start", release, "--unjudged", "made by hand")
    canaries = [device for device in devices if device.name in started["canary"]]
    others = [device for device in devices if device not in canaries]
    assert len(canaries) == 2
    for device in canaries:
        until("the canary is told", lambda device=device: device.desired == {"digits": release})
        device.install()
    until("it is watched", lambda: rollout_of(trainer)["status"] == "watching")
    until(
        "more is audited", lambda: all(device.policy.get("line", {}).get("audit_share", 0) > 0.1 for device in canaries)
    )
    now = time.time()
    for device in devices:
        lived(device, now, now + 1, 200, 60, right if device in canaries else 0.9)
    return canaries, others


@pytest.mark.long
@pytest.mark.timeout(300)
def test_l13_a_bad_release_is_caught_by_its_canaries_and_a_good_one_goes_to_all(tmp_path: Path) -> None:
    with running(tmp_path, *NAMES, rollout=ROLLOUT, model="threshold = 1000000") as (_, trainer, devices):
        trainer.register("digits@1.1", b"bad")
        trainer.register("digits@1.2", b"good")
        until("all devices are known", lambda: len(trainer.call("fleet", "status")) == len(NAMES))
        now = time.time()
        for device in devices:
            lived(device, now - 3600, now - 1, 1000, 60, 0.9)
        until("their past is known", lambda: sum(row["count"] for row in trainer.call("samples", "counts")) == 360)

        canaries, others = watched(trainer, devices, "digits@1.1", 0.4)
        for device in canaries:
            until("it is told to go back", lambda device=device: device.desired == {"digits": "digits@1.0"})
            device.install()
        ended = until("the rollout is aborted", lambda: (r := rollout_of(trainer))["status"] == "aborted" and r)
        assert "2/2 are back on the previous release" in ended["reason"]
        assert "audited agreement 0.4" in ended["reason"]
        assert ended["canary_result"] == "aborted"
        assert not any("digits@1.1" in device.ever for device in others)  # nobody but the canaries saw it
        until("audits are as before", lambda: all(device.policy == {} for device in devices))

        watched(trainer, devices, "digits@1.2", 0.92)
        for device in devices:
            until("everybody is told", lambda device=device: device.desired == {"digits": "digits@1.2"})
            device.install()
        done = until("the rollout is done", lambda: (r := rollout_of(trainer))["status"] == "done" and r)
        assert (done["progress"], done["canary_result"]) == ("6/6 nodes", "passed")
