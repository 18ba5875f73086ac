"""Texts that a device is unsure of: a larger model answers them, through tiers of real processes, one of which dies."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from edged.wire import messages, topics
from edged.wire.manifest import Calibration, Scaling
from edged.wire.messages import Escalation, InferReply, SampleEntry, Text, Verdict
from tests.support.babble import make_babbler
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.models import write_manifest
from tests.system.broker import Broker
from tests.system.test_tiers import alive
from trainer.core.access import Identity
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest

PROMPT = "line 1 read a 7 with score 0.9. What to do?\n"
PLAIN = "accept the seven"
UNSURE, SURE = -9.0, 9.0  # logits that a release's calibration adds: right with nearly 0, with nearly 1
NOT_DRAWN = {"audit_share": 0.0}


def speaker(folder: Path, phi: dict[str, Path], release: str, bias: float) -> Path:
    """A release that answers PROMPT with PLAIN, always as sure as `bias` says."""
    target = folder / release.replace("@", "-")
    target.mkdir()
    shutil.copy(phi["model_gguf"], target / "model.gguf")
    fitted = Calibration(method="scaled", answers=Scaling(temperature=1.0, bias=bias), items=500)
    roles = {"model": "model.gguf", **write_prompt_golden(target, [(PROMPT, PLAIN)])}
    write_manifest(target, build_manifest(target, release, kind="llm", engine="llama", roles=roles, calibration=fitted))
    return target


def asker(folder: Path, broker: Broker, seed: Path, *tiers: str, **chat: Any) -> dict[str, Any]:
    plan = tables(folder, "dev1", broker, None)
    plan["slots"] = {"tongue": {"seed": seed}}
    asks = {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}, "policy": NOT_DRAWN, "answer_by_s": 20.0}
    plan["pipelines"] = {"chat": {**asks, "escalate_to": list(tiers), **chat}}
    return plan


def responder(folder: Path, name: str, broker: Broker, seed: Path, tier: str, *asks: str) -> dict[str, Any]:
    plan = tables(folder, name, broker, None)
    del plan["pipelines"]
    plan["slots"] = {"tongue": {"seed": seed}}
    own = {"tier": tier, "task": "generate", "slot": "tongue", "escalate_to": list(asks), "policy": NOT_DRAWN}
    return {**plan, "responders": {"r": own}, "delivery": {**plan["delivery"], "presence_s": 1.0}}


def ask(bus: Bus, **fields: Any) -> InferReply:
    return bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT, **fields), seconds=60)


def test_a_text_goes_up_the_tiers_and_comes_back_with_who_said_what(tmp_path: Path, phi: dict[str, Path]) -> None:
    clients = [
        Identity("dev1", SITE),
        *(Identity(name, SITE, roles=("device", "responder")) for name in ("mid1", "top1")),
        Identity("observer", SITE, roles=("observer",)),
    ]
    with Broker(tmp_path / "broker", tls=True, clients=clients) as broker:
        bus = Bus(broker)
        small, middle, large = (
            speaker(tmp_path, phi, release, bias)
            for release, bias in (("small@1.0", UNSURE), ("mid@1.0", UNSURE), ("large@1.0", SURE))
        )
        top = Device(tmp_path, responder(tmp_path, "top1", broker, large, "top"))
        between = Device(tmp_path, responder(tmp_path, "mid1", broker, middle, "middle", "top"))
        device = Device(tmp_path, asker(tmp_path, broker, small, "middle", "top"))
        with top, between, device:
            alive(bus, "top")
            alive(bus, "middle")
            reply = ask(bus, tokens_max=40)
            assert (reply.decided_by, reply.release, reply.generated_response) == ("top1", "large@1.0", PLAIN)
            assert (reply.error, reply.doubt, reply.generation_prompt) == (None, None, PROMPT)
            device.wait("a labelled sample", lambda s: s["samples"].get("labelled") == 1)
            (row,) = json.loads(device.cli("samples", "list", "--json").stdout)
            assert (row["task"], row["reason"], row["prediction"]) == ("generate", "unsure", [{"text": PLAIN}])
            assert [(o["who"], o["tier"], o["label"]) for o in row["opinions"]] == [
                ("mid1", "middle", [{"text": PLAIN}]), ("top1", "top", [{"text": PLAIN}]),
            ]  # fmt: skip
            (entry,) = until("its catalogue entry", lambda: bus.of(SampleEntry))
            assert (entry.label, entry.prediction, entry.decision) == (
                [Text(text=PLAIN)],
                [Text(text=PLAIN)],
                "escalate",
            )
            explained = device.cli("why", row["id"]).stdout
            assert "What small@1.0 was asked" in explained
            assert f'model top1 with large@1.0 says, with {row["label_confidence"]:.2f}: "{PLAIN}"' in explained

            # What the larger model said is what there is to learn.
            exported = device.cli("requests", "export", str(tmp_path / "dataset.jsonl"), "--json")
            assert json.loads(exported.stdout)["written"] == 1
            (example,) = map(json.loads, (tmp_path / "dataset.jsonl").read_text().splitlines())
            assert example["summary"] == PLAIN
            assert [step["tool"] for step in example["execution"]] == ["generate", "escalate"]
            assert [step["status"] for step in example["execution"]] == ["success", "success"]
            assert (example["execution"][1]["who"], example["execution"][1]["release"]) == ("top1", "large@1.0")

            # The middle tier dies with the question in its hands: the one above is asked.
            between.kill9()
            reply = ask(bus, tokens_max=41)
            assert (reply.decided_by, reply.generated_response) == ("top1", PLAIN)
        bus.close()


def test_nothing_leaves_a_device_whose_policy_does_not_say_so(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    top = responder(tmp_path, "top1", broker, speaker(tmp_path, phi, "large@1.0", SURE), "top")
    with Device(tmp_path, top):
        alive(bus, "top")
        with Device(tmp_path, asker(tmp_path, broker, speaker(tmp_path, phi, "small@1.0", UNSURE))) as device:
            reply = ask(bus)
            assert (reply.decided_by, reply.doubt) == ("dev1", "unsure")
            assert (device.status() or {})["samples"] == {}
    assert bus.of(Escalation) == []


def test_who_does_not_want_to_wait_any_longer_gets_the_local_text(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    """Nobody lives in the tier that is asked."""
    plan = asker(tmp_path, broker, speaker(tmp_path, phi, "small@1.0", UNSURE), "top", answer_by_s=25.0)
    with Device(tmp_path, plan) as device:
        late = ask(bus, deadline_s=3.0)
        assert (late.decided_by, late.generated_response, late.error, late.doubt) == ("dev1", PLAIN, None, "unsure")
        request = bus.ask("dev1", "chat", generation_prompt=PROMPT, tokens_max=41)
        until("it is asked about", lambda: len({asked.sample for asked in bus.of(Escalation)}) == 2)
        command = messages.CancelCommand(**bus.stamp(), request=request)
        bus.say(topics.COMMAND(site=SITE, dev="dev1", type="cancel", id=command.id), command)
        assert bus.reply(request).generated_response == PLAIN
        # The question stays: its label is wanted for days.
        assert (device.status() or {})["samples"] == {"escalated": 2}
        assert device.signal(signal.SIGTERM) == 0


def put(bus: Bus, prompt: str) -> Verdict:
    """The verdict on a question of another device to the tier `top`, which carries `prompt`."""
    alive(bus, "top")
    stamp = bus.stamp()
    question = Escalation(
        **stamp, sample="s1", pipeline="chat", task="generate", release="x@1.0", reason="unsure", confidence=0.1,
        prompt=prompt, sha256=hashlib.sha256(prompt.encode()).hexdigest(), label_by=stamp["ts"] + 60, origin="dev9",
    )  # fmt: skip
    bus.say(topics.ESCALATION(site=SITE, dev="dev9", tier="top", task="generate"), question)
    (verdict,) = until("a verdict", lambda: bus.of(Verdict))
    return verdict


@pytest.mark.parametrize("spoilt", ["not JSON", '{"stop": 7}'])
def test_a_question_that_is_no_prompt_is_rejected(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path], spoilt: str
) -> None:
    top = responder(tmp_path, "top1", broker, speaker(tmp_path, phi, "large@1.0", SURE), "top")
    with Device(tmp_path, top) as device:
        verdict = put(bus, spoilt)
        assert verdict.status == "rejected"
        assert "prompt" in verdict.reason
        device.counted("escalations_corrupt")


def test_a_prompt_over_the_responders_context_is_left_to_somebody_else(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    make_babbler(tmp_path / "babbler")
    with Device(tmp_path, responder(tmp_path, "top1", broker, tmp_path / "babbler", "top")) as device:
        verdict = put(bus, json.dumps({"generation_prompt": "word " * 20_000}))
        assert verdict.status == "unresolved"
        assert "context" in verdict.reason
        device.counted("escalations_unsuitable")
