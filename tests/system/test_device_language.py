"""Language requests to a real device: streamed, cancelled, late, constrained, refused, and what is kept of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.link import PACKET_OVERHEAD
from edged.wire import messages, topics
from edged.wire.messages import CommandState, InferReply, Partial
from tests.support.babble import PROMPT, make_babbler
from tests.support.device import SITE, Bus, Device, tables, until
from tests.system.broker import Broker
from trainer.broker import BrokerLimits

PACKET_BYTES_MAX = BrokerLimits().packet_bytes_max
VERDICT = {
    "type": "object", "properties": {"verdict": {"enum": ["keep", "drop"]}}, "required": ["verdict"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        listening = Bus(broker)
        listening.broker = broker  # type: ignore[attr-defined]
        yield listening
        listening.close()


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that never comes to an end by itself."""
    folder = tmp_path_factory.mktemp("releases") / "babbler"
    make_babbler(folder)
    return folder


def configured(folder: Path, name: str, broker: Broker, tongue: Path, eye: Path) -> dict[str, Any]:
    plan = tables(folder, name, broker, eye)
    plan["slots"]["tongue"] = {"seed": tongue, "probation_s": 0.5}
    plan["pipelines"] = {
        "look": {"slot": "eye", "source": {"type": "mqtt"}},
        "chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}},
    }
    return plan


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, bus: Bus, babbler: Path, toy: Path) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("device")
    with Device(folder, configured(folder, "dev1", bus.broker, babbler, toy)) as running:  # type: ignore[attr-defined]
        yield running


def chat(bus: Bus, **fields: Any) -> str:
    if "messages" not in fields:
        fields.setdefault("generation_prompt", PROMPT)
    return bus.ask("dev1", "chat", **fields)


def pieces(bus: Bus, request: str) -> list[Partial]:
    return [partial for partial in bus.of(Partial) if partial.request == request]


def running(bus: Bus, **fields: Any) -> str:
    """A request that the model is at work on."""
    request = chat(bus, stream=True, **fields)
    until("its first piece", lambda: pieces(bus, request))
    return request


def cancel(bus: Bus, request: str) -> CommandState:
    command = messages.CancelCommand(**bus.stamp(), request=request)
    bus.say(topics.COMMAND(site=SITE, dev="dev1", type="cancel", id=command.id), command)
    return until(
        "the command is done", lambda: next((s for s in bus.of(CommandState) if s.command == command.id), None)
    )


def test_the_text_comes_in_pieces_before_the_whole(bus: Bus, device: Device) -> None:
    request = running(bus, tokens_max=150)
    reply = bus.reply(request)
    assert (reply.error, reply.finish_reason, reply.answer_tokens) == (None, "length", 150)
    parts = pieces(bus, request)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == reply.generated_response
    heard = [message for _, _, message in bus.heard if getattr(message, "request", "") == request]
    assert heard[-1] == reply, "the reply comes last"
    quiet = bus.reply(chat(bus, tokens_max=150))
    assert quiet.generated_response == reply.generated_response
    assert not pieces(bus, quiet.request), "only who wants the pieces gets them"


def test_a_cancelled_request_ends_at_once_and_keeps_what_was_written(bus: Bus, device: Device) -> None:
    request = running(bus)
    done = cancel(bus, request)
    assert (done.state, done.detail["open"]) == ("done", True)
    reply = bus.reply(request)
    assert (reply.error, reply.finish_reason, reply.confidence) == ("cancelled", "cancelled", None)
    assert reply.generated_response
    assert reply.generated_response == "".join(part.text for part in pieces(bus, request))
    again = cancel(bus, request)
    assert (again.state, again.detail["open"]) == ("done", False)
    assert "no such request" in again.detail["text"]


def test_a_request_cancelled_while_it_waits_never_runs(bus: Bus, device: Device) -> None:
    first = running(bus)
    second, third = chat(bus, tokens_max=5), chat(bus, tokens_max=5)
    assert cancel(bus, second).detail["open"]
    cancel(bus, first)
    waited = bus.reply(second)
    assert (waited.error, waited.answer_tokens, waited.generated_response) == ("cancelled", 0, None)
    assert bus.reply(third).answer_tokens == 5, "who waits behind it is answered"


def test_a_deadline_ends_what_runs_and_what_waits(bus: Bus, device: Device) -> None:
    runs, waits = chat(bus, deadline_s=1.0), chat(bus, deadline_s=0.1)
    late = bus.reply(runs)
    assert (late.error, late.finish_reason) == ("deadline", "deadline")
    assert late.generated_response
    never = bus.reply(waits)
    assert (never.error, never.answer_tokens, never.generated_response) == ("deadline", 0, None)
    assert bus.reply(chat(bus, tokens_max=5, deadline_s=60.0)).error is None


def test_the_answer_ends_before_a_stop_sequence(bus: Bus, device: Device) -> None:
    whole = bus.reply(chat(bus, tokens_max=60)).generated_response or ""
    stop = next(word for word in ("reads", "teacher", "seve", "the", "ea", "12") if word in whole[5:])
    cut = bus.reply(chat(bus, tokens_max=60, stop=["never in there", stop]))
    assert (cut.generated_response, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_seed_decides_what_chance_says(bus: Bus, device: Device) -> None:
    def answer(seed: int) -> str | None:
        reply = bus.reply(chat(bus, temperature=1.0, seed=seed, tokens_max=20))
        assert reply.confidence is not None
        assert 0 < reply.confidence < 1
        return reply.generated_response

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_an_answer_with_a_schema_is_valid_or_says_truncated(bus: Bus, device: Device) -> None:
    whole = bus.reply(chat(bus, answer_schema=VERDICT))
    assert (whole.error, whole.finish_reason) == (None, "stop")
    assert json.loads(whole.generated_response or "")["verdict"] in {"keep", "drop"}
    cut = bus.reply(chat(bus, answer_schema=VERDICT, tokens_max=2))
    assert (cut.error, cut.finish_reason, cut.confidence) == ("truncated", "truncated", None)
    assert cut.generated_response
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.generated_response)


def test_a_conversation_goes_through_the_models_own_template(bus: Bus, device: Device) -> None:
    turns = [{"role": "system", "content": "Be brief."}, TURN]
    talked = bus.reply(chat(bus, messages=turns, tokens_max=30))
    spelled = bus.reply(chat(bus, generation_prompt="<system>Be brief.\n<user>A seven?\n<assistant>", tokens_max=30))
    assert (talked.error, talked.generation_prompt) == (None, None)
    assert talked.generated_response == spelled.generated_response
    assert talked.prompt_tokens == spelled.prompt_tokens
    assert talked.generated_response != bus.reply(chat(bus, tokens_max=30)).generated_response


TURN = {"role": "user", "content": "A seven?"}
REFUSED = [
    ("chat", {}, "neither `image` (base64) nor `generation_prompt` nor `messages`"),
    ("chat", {"generation_prompt": "a", "messages": [TURN]}, "has `generation_prompt` and `messages`"),
    ("chat", {"generation_prompt": "a", "image": "YQ=="}, "has `image` and `generation_prompt`"),
    ("chat", {"generation_prompt": ""}, "prompt is empty"),
    ("chat", {"generation_prompt": "word " * 40_000}, "32768"),
    ("chat", {"generation_prompt": "a", "answer_schema": {"type": "oddity"}}, "schema"),
    ("chat", {"generation_prompt": "a", "answer_schema": {"const": "x" * (1 << 16)}}, "send at most 65536"),
    ("chat", {"generation_prompt": "a", "messages": []}, "messages: List should have at least 1 item"),
    ("chat", {"messages": [TURN | {"role": "tool"}]}, "messages.0.role: Input should be 'system', 'user' or"),
    ("chat", {"generation_prompt": "a", "stop": ["x"] * 9}, "stop: List should have at most 8 items"),
    ("chat", {"generation_prompt": "a", "stop": [""]}, "stop.0: String should have at least 1 character"),
    ("chat", {"generation_prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    ("chat", {"generation_prompt": "a", "seed": -1}, "seed: Input should be greater than or equal to 0"),
    ("chat", {"generation_prompt": "a", "deadline_s": 0}, "deadline_s: Input should be greater than 0"),
    ("look", {"image": "YQ==", "stream": True}, "`stream` is for language"),
    ("look", {"image": ""}, "image: empty"),
    ("look", {"generation_prompt": "a"}, "is no generator"),
]  # fmt: skip


def test_a_reply_that_the_broker_would_not_take_is_an_error_with_both_sizes(bus: Bus, device: Device) -> None:
    """The request just fits; the reply repeats the prompt and says more."""
    bus.online("dev1")
    body = {"v": 1, **bus.stamp(), "id": "huge"}
    room = PACKET_BYTES_MAX - PACKET_OVERHEAD - len(json.dumps(body | {"generation_prompt": ""}))
    bus.say(
        topics.INFER(site=SITE, dev="dev1", pipeline="chat"),
        json.dumps(body | {"generation_prompt": "x" * room}).encode(),
    )
    reply = bus.reply("huge")
    assert reply.generation_prompt is None
    said = re.search(r"the reply has (\d+) bytes, and the broker takes packets of at most (\d+)", reply.error or "")
    assert said, reply.error
    assert int(said[2]) == PACKET_BYTES_MAX
    assert int(said[1]) > room
    # And the next one is answered as ever.
    assert bus.reply(chat(bus, tokens_max=2)).error is None


def test_what_cannot_be_answered_is_refused_with_the_reason(bus: Bus, device: Device) -> None:
    bus.online("dev1")
    asked = []
    for number, (pipeline, fields, reason) in enumerate(REFUSED):
        body = {"v": 1, **bus.stamp(), **fields, "id": f"refused-{number}"}
        bus.say(topics.INFER(site=SITE, dev="dev1", pipeline=pipeline), json.dumps(body).encode())
        asked.append((f"refused-{number}", reason))
    for request, reason in asked:
        reply = bus.reply(request)
        assert reason in (reply.error or ""), request
        assert reply.generated_response is None
    counters = device.wait("counted", lambda s: s["counters"].get("items_unsuitable", 0) >= 4)["counters"]
    assert "items_engine_error" not in counters, "the release is not to blame"
    assert bus.reply(chat(bus, tokens_max=3)).error is None


def test_what_became_of_requests_is_kept_and_exported(bus: Bus, device: Device, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, TURN]
    valid = chat(bus, messages=turns, answer_schema=VERDICT, seed=3)
    bus.reply(valid)
    short = chat(bus, tokens_max=4)
    bus.reply(short)
    gone = running(bus)
    cancel(bus, gone)
    bus.reply(gone)
    bad = chat(bus, generation_prompt="word " * 40_000)
    bus.reply(bad)

    listed = device.cli("requests", "list", "--json", "--pipeline", "chat", "--limit", "4")
    rows = {row["id"]: row for row in json.loads(listed.stdout)}
    assert {request: rows[request]["outcome"] for request in (valid, short, gone, bad)} == {
        valid: "ok", short: "ok", gone: "cancelled", bad: "error",
    }  # fmt: skip
    assert "32768" in rows[bad]["reason"]
    assert rows[valid]["messages"] == turns
    assert rows[valid]["options"] == {"schema": VERDICT, "seed": 3}
    assert (rows[short]["prompt"], rows[short]["answer_tokens"], rows[short]["release"]) == (PROMPT, 4, "babbler@1.0")
    assert rows[gone]["answer"]

    file = tmp_path / "dataset.jsonl"
    summary = json.loads(device.cli("requests", "export", str(file), "--json").stdout)
    lines = file.read_text().splitlines()
    assert summary["written"] == len(lines)
    assert summary["left_out"] >= 3
    found = [row for row in map(json.loads, lines) if row["execution"][0]["request"] in rows]
    assert [row["execution"][0]["request"] for row in found] == [valid], "only what the model ended itself"
    assert found[0].keys() == {"goal", "context_summary", "plan", "execution", "summary"}
    assert (found[0]["goal"], found[0]["context_summary"]) == ("A seven?", "system: Be brief.")
    assert json.loads(found[0]["summary"])["verdict"] in {"keep", "drop"}


def test_a_stop_in_the_middle_of_an_answer_brings_the_request_again(
    tmp_path: Path, bus: Bus, babbler: Path, toy: Path
) -> None:
    plan = configured(tmp_path, "dev2", bus.broker, babbler, toy)  # type: ignore[attr-defined]
    plan["slots"]["none"] = {"threads": 1}
    plan["pipelines"]["later"] = {"slot": "none", "source": {"type": "mqtt"}}
    with Device(tmp_path, plan, ready=False) as device:
        never = bus.reply(bus.ask("dev2", "later", generation_prompt=PROMPT))
        assert "no model is loaded yet in slot none" in (never.error or ""), "and none is on its way"
        # The one that is on its way is waited for.
        request = bus.ask("dev2", "chat", generation_prompt=PROMPT, tokens_max=1000, stream=True)
        until("its first piece", lambda: pieces(bus, request))
        assert device.stop() == 0
        assert not [reply for reply in bus.of(InferReply) if reply.request == request]
        device.start()
        reply = bus.reply(request)
        assert (reply.error, reply.answer_tokens) == (None, 1000)
        (kept,) = json.loads(device.cli("requests", "list", "--json").stdout)
        assert (kept["id"], kept["outcome"], kept["answer"]) == (request, "ok", reply.generated_response)
