"""The whole way to a teacher that is a server: device unsure -> MQTT -> responder -> HTTP -> verdict -> sample labelled."""

from __future__ import annotations

import hashlib
import json
import socket
import tarfile
import threading
from pathlib import Path
from typing import Any

from edged.wire import topics
from edged.wire.messages import Escalation, SampleEntry, Text, Verdict
from tests.support.bad_server import BadServer, chat, reply
from tests.support.device import SITE, Bus, Device, tables, until
from tests.support.openai_server import OpenAiServer
from tests.system.broker import Broker
from tests.system.test_text_tiers import NOT_DRAWN, PLAIN, PROMPT, UNSURE, ask, asker, put, speaker
from tests.system.test_tiers import alive

KEY = "sk-s3cret-0123456789"


def teacher(folder: Path, broker: Broker, url: str, **server: Any) -> dict[str, Any]:
    """A device of the tier `top` that has no model of its own."""
    (folder / "farm.key").write_text(KEY)
    (folder / "farm.key").chmod(0o600)
    plan = tables(folder, "teach1", broker, None)
    del plan["pipelines"]
    asks = {"url": url, "model": "large", "name": "farm", "api_key_file": folder / "farm.key", "prompts": "completion"}
    plan["slots"] = {"farm": {"server": {**asks, "timeout_s": 10.0, "tries_max": 1, **server}}}
    own = {"tier": "top", "task": "generate", "slot": "farm", "policy": NOT_DRAWN}
    return {**plan, "responders": {"r": own}, "delivery": {**plan["delivery"], "presence_s": 1.0}}


def test_a_server_labels_what_a_device_was_unsure_of_and_may_be_away_meanwhile(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    with OpenAiServer(tmp_path, phi["model_gguf"], key=KEY) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        top = Device(tmp_path, teacher(tmp_path, broker, server.url))
        small = speaker(tmp_path, phi, "small@1.0", UNSURE)
        with top, Device(tmp_path, asker(tmp_path, broker, small, "top", answer_by_s=10.0)) as device:
            alive(bus, "top")
            reply = ask(bus, tokens_max=40)
            assert (reply.decided_by, reply.release) == ("farm", "large")
            assert (reply.generated_response or "").strip() == PLAIN
            assert (reply.error, reply.doubt) == (None, None)
            device.wait("a labelled sample", lambda s: s["samples"].get("labelled") == 1)
            (row,) = json.loads(device.cli("samples", "list", "--json").stdout)
            said = row["provenance"]
            assert (said["kind"], said["who"], said["release"]) == ("model", "farm", "large")
            assert row["label"][0]["text"].strip() == PLAIN
            assert 0.5 < row["label_confidence"] <= 1  # of its tokens
            entry = until("its catalogue entry", lambda: next((e for e in bus.of(SampleEntry) if e.label), None))
            assert isinstance(entry.label[0], Text)
            assert entry.provenance is not None
            assert (entry.provenance.who, entry.opinions[0].who) == ("farm", "farm")
            assert "model farm with large says" in device.cli("why", row["id"]).stdout

            # The server goes: nobody hangs, nothing is labelled, nothing is lost.
            server.stop()
            reply = ask(bus, tokens_max=41, deadline_s=3.0)
            assert (reply.decided_by, reply.doubt) == ("dev1", "unsure")
            top.counted("escalations_unanswered")
            assert (device.status() or {})["samples"] == {"labelled": 1, "escalated": 1}
            assert len([v for v in bus.of(Verdict) if v.status != "labelled"]) == 0
            # It comes back: the question is asked again, and labelled.
            server.start(port)
            device.wait("a late label", lambda s: s["samples"].get("labelled") == 2)
            # The fault was not the release's.
            status = top.status() or {}
            assert status["models"]["farm"]["active"] == "server@1.0"
            assert status["bad"] == []

            once = json.loads(top.cli("infer", "farm", "--prompt", PROMPT, "--tokens-max", "40").stdout)
            assert (once["generated_response"].strip(), once["finish_reason"]) == (PLAIN, "stop")

            # The key is nowhere but in its file.
            assert KEY not in top.log() + json.dumps(status)
            archive = tmp_path / "diag.tar.gz"
            done = top.cli("diag", "--output", str(archive))
            assert done.returncode == 0, done.stderr
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    file = tar.extractfile(member)
                    assert file is None or KEY.encode() not in file.read(), member.name
            checked = {row["name"]: row for row in json.loads(top.cli("check", "--json").stdout)}
            assert checked["slots.farm"]["level"] == "ok"
        assert all(KEY not in question.model_dump_json() for question in bus.of(Escalation))


def test_an_answer_under_a_schema_labels_only_when_it_keeps_to_it(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    schema = {"type": "object", "properties": {"verdict": {"enum": ["accept", "reject"]}}, "required": ["verdict"]}
    asked = json.dumps({"generation_prompt": "which?", "answer_schema": schema})
    with (
        BadServer(reply(200, chat("accept")), reply(200, chat('{"verdict": "accept"}'))) as server,
        Device(tmp_path, teacher(tmp_path, broker, server.url, prompts="chat")),
    ):
        alive(bus, "top")
        for number in range(2):
            escalate(bus, f"s{number}", asked)
            until("a verdict", lambda wanted=number + 1: len(bus.of(Verdict)) == wanted)
    first, second = bus.of(Verdict)
    assert (first.sample, first.status, first.reason) == ("s0", "unresolved", "its answer ended as invalid")
    assert (second.sample, second.status) == ("s1", "labelled")
    assert isinstance(second.label[0], Text)
    assert json.loads(second.label[0].text) == {"verdict": "accept"}
    said = json.loads(server.requests[0][1].partition(b"\r\n\r\n")[2])
    assert said["response_format"]["json_schema"]["schema"] == schema


def test_several_questions_are_asked_at_once_where_the_responder_says_so(
    tmp_path: Path, broker: Broker, bus: Bus
) -> None:
    together = threading.Barrier(3)

    def when_all_are_here(connection: socket.socket, ended: threading.Event) -> None:
        together.wait(20)
        reply(200, chat("yes"))(connection, ended)

    with BadServer(when_all_are_here) as server:
        plan = teacher(tmp_path, broker, server.url, prompts="chat", timeout_s=30.0)
        plan["responders"]["r"]["concurrency"] = 3
        with Device(tmp_path, plan):
            alive(bus, "top")
            for number in range(3):
                escalate(bus, f"s{number}", json.dumps({"generation_prompt": f"question {number}"}))
            verdicts = until("three verdicts", lambda: v if len(v := bus.of(Verdict)) == 3 else None)
    assert {(v.sample, v.status, v.provenance.who) for v in verdicts} == {
        (f"s{number}", "labelled", "farm") for number in range(3)
    }
    # What left: the prompt and how to answer it, the key, and nothing about whose question it is.
    for _, request in server.requests:
        head, _, body = request.partition(b"\r\n\r\n")
        assert set(json.loads(body)) == {"model", "messages", "temperature", "max_tokens", "stream", "logprobs"}
        assert json.loads(body)["messages"][0]["content"].startswith("question ")
        assert not [word for word in (b"dev9", b"teach1", b"plant", b"chatter") if word in request]
        assert f"Bearer {KEY}".encode() in head


def escalate(bus: Bus, sample: str, prompt: str) -> None:
    """A question of the device dev9."""
    stamp = bus.stamp()
    question = Escalation(
        **stamp, sample=sample, pipeline="chatter", task="generate", release="x@1.0", reason="unsure", confidence=0.1,
        prompt=prompt, sha256=hashlib.sha256(prompt.encode()).hexdigest(), label_by=stamp["ts"] + 60, origin="dev9",
    )  # fmt: skip
    bus.say(topics.ESCALATION(site=SITE, dev="dev9", tier="top", task="generate"), question)


def test_what_the_server_cannot_answer_comes_back_unresolved_with_the_reason(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    with OpenAiServer(tmp_path, phi["model_gguf"], key=KEY) as server, Device(
        tmp_path, teacher(tmp_path, broker, server.url)
    ) as top:  # fmt: skip
        verdict = put(bus, json.dumps({"generation_prompt": "word " * 2000}))
        assert verdict.status == "unresolved"
        assert "it answered 400" in verdict.reason
        assert "context" in verdict.reason
        top.counted("escalations_unsuitable")
