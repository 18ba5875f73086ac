"""Agents in a daemon: taken on, cancelled, ended; asked over the socket, and by other devices whoever brings the letters."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.agent_client import Nobody, ask
from edged.agents import Agent, BaseAgent, LearnableAgent, Message, RequestContext
from edged.agents.feedback import BadFeedback, Feedback
from edged.agents.hosted import RUNS_MAX, Busy, Hosted, NoAgent
from edged.agents.learnable import offer_training
from edged.agents.local import LINE_BYTES_MAX, AgentSocket
from edged.agents.peers import CLOCKS_APART_S_MAX, IN_HAND_MAX, Mail
from edged.agents.recorded import StoreRecorder
from edged.clock import SystemClock
from edged.config_agents import Agent as AgentConfig
from edged.config_agents import Peer
from edged.link import Inbound, Link, LinkOptions
from edged.outgoing import Outgoing
from edged.pace import Pace
from edged.slot import Slot
from edged.stamp import Stamp
from edged.store import Store
from edged.wire import messages, topics
from edged.wire.invoked import INVOKED_BYTES_MAX, Invocation, Invoked
from tests.support.device import until
from tests.support.scripted import Scripted, final
from tests.support.scripted import ask as asking

PART = {"type": "object", "properties": {"part": {"type": "integer"}}, "required": ["part"]}
VERDICT = {"type": "object", "properties": {"verdict": {"type": "string"}}, "required": ["verdict"]}
OPEN = threading.Event()  # lets those go on that wait for it


class Waiter(BaseAgent):
    """Answers when it may."""

    begun: list[Any] = []

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        self.begun.append(request)
        while not OPEN.is_set():
            await asyncio.sleep(0.005)
        return Message(
            "assistant", {"verdict": f"of {request_context.caller_agent_name}", "path": [*request_context.path]}
        )


class Busybody(BaseAgent):
    """Asks a neighbour as often as it is told to, and says how often it was let."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        (neighbour,) = self.allowed_peers
        answers = [await self.invoke_agent(neighbour, "you?", request_context) for _ in range(request["times"])]
        return Message("assistant", sum(answer.role != "error" for answer in answers))


class Brief(BaseAgent):
    """Answers at once."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return Message("assistant", "yes")


class Failing(BaseAgent):
    """Has a bug."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        raise RuntimeError("no such sensor")


class Odd(BaseAgent):
    """Answers with what is no message, or no JSON."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        odd: dict[str, Any] = {"none": None, "set": Message("assistant", {1, 2}), "bytes": Message("error", b"b")}
        return odd.get(request) or (Message("assistant", [float("nan")]) if request == "nan" else None)  # type: ignore[return-value]


class Large(BaseAgent):
    """Says more than can be sent."""

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        return Message("assistant", "x" * INVOKED_BYTES_MAX)


class Holder(BaseAgent):
    """Holds something until it is closed; `how` it closes."""

    closed: list[str] = []

    def __init__(self, how: str = "", **given: Any) -> None:
        super().__init__(**given)
        self.how = how
        if how == "in a thread":
            self.close = self._close  # type: ignore[method-assign]

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        raise RuntimeError("no such sensor")

    async def close(self) -> None:
        self.closed.append(f"{self.how} {threading.current_thread().name}")
        if self.how == "fails":
            raise OSError("gone already")
        if self.how == "hangs":
            await asyncio.sleep(3600)

    def _close(self) -> None:
        self.closed.append(f"{self.how} {threading.current_thread().name}")


MODELS: list[Scripted] = []  # of the agents that were made last


def scripted(model: Any, **given: Any) -> Agent:
    MODELS.append(Scripted(final({"verdict": "reject"}), final({"verdict": "again"})))
    return Agent(MODELS[-1], **given)


def learner(model: Any, **given: Any) -> LearnableAgent:
    return LearnableAgent(
        Scripted(final({"verdict": "reject"})), learning_head="peft", output_schema=["verdict"], **given
    )


class Site:
    """One device: its store, its agents, its letters. What it sends is in its outbox; `bring` carries that to another."""

    def __init__(self, folder: Path, device: str, peers: dict[str, Peer] | None = None, **agents: Any) -> None:
        clock = SystemClock()
        self.store, self.events = Store(folder / device), list[str]()
        self.outgoing = Outgoing("plant", device, Stamp(clock))
        recorder = StoreRecorder(self.store, clock, self.outgoing)
        here = f"{__name__}:"
        configs = {
            f"{device}-{name}": AgentConfig(slot="tongue", **{**each, "factory": here + each["factory"]})
            for name, each in agents.items()
        }
        self.hosted = Hosted(
            configs, {"tongue": Slot("tongue")}, self.store, recorder, clock, Pace(clock),
            lambda *_, **__: None, lambda kind, text, **_: self.events.append(text),
        )  # fmt: skip
        self.link = Acknowledged()
        self.mail = Mail(self.hosted, self.store, self.link, self.outgoing, clock, lambda: None)
        self.hosted.with_peers(peers or {}, self.mail)
        self.hosted.start()

    def sent(self) -> list[tuple[str, bytes]]:
        """What waits in the outbox, taken out of it."""
        rows = [row.message for row in self.store.due(SystemClock().now() + 0.5, 100)]
        self.store.acked_many([row.id for row in rows], 0.0, 0.0)
        return [(row.topic, row.payload) for row in rows]

    def hear(self, topic: str, payload: bytes, number: int = 1) -> None:
        """As the control loop would."""
        route, fields, message = messages.decode(topic, payload)
        handler: Any = self.mail.on_invoke if route is topics.INVOKE else self.mail.on_invoked
        handler(Inbound(topic, payload, False, (number, 1, 0)), fields, message)

    def counted(self, name: str) -> int:
        return self.store.counters().get(name, 0)

    def close(self) -> None:
        assert self.hosted.stop()
        self.store.close()


class Acknowledged(Link):
    """A connection that was never made, and what was acknowledged on it."""

    def __init__(self) -> None:
        super().__init__(LinkOptions("127.0.0.1", 1, "nobody"), [])
        self.done: list[int] = []

    def acknowledge(self, message: Inbound) -> None:
        self.done.append(message.token[0])


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    OPEN.clear()
    yield made
    OPEN.set()
    for site in made:
        site.close()


WAITER: dict[str, Any] = {"factory": "Waiter", "callers": ["one"]}


@pytest.fixture
def site(tmp_path: Path, sites: list[Site]) -> Site:
    made = Site(
        tmp_path, "dev1", waiter=WAITER, failing={"factory": "Failing"}, talker={"factory": "scripted"},
        missing={"factory": "nowhere_to_be_found"},
        picky=WAITER | {"input_schema": PART},
    )  # fmt: skip
    sites.append(made)
    return made


def test_a_run_ends_with_one_answer_and_the_id_of_its_record(site: Site) -> None:
    message, run = site.hosted.submit("dev1-talker", "go").future.result(20)
    assert message.content == {"verdict": "reject"}
    kept = site.store.runs.get(run)
    assert kept is not None and kept.agent == "dev1-talker"
    second, other = site.hosted.submit("dev1-talker", "go on").future.result(20)
    assert second.content == {"verdict": "again"} and other != run
    message, run = site.hosted.submit("dev1-failing", "go").future.result(20)
    assert message.role == "error" and "failed: RuntimeError: no such sensor" in message.text
    kept = site.store.runs.get(run)
    assert kept is not None and kept.record["error"] == message.text


def test_runs_of_agents_that_answer_by_themselves_are_recorded_and_teach_nothing(site: Site) -> None:
    Waiter.begun.clear()
    running = site.hosted.submit("dev1-waiter", "go on")
    cancelled = site.hosted.submit("dev1-waiter", "stop")
    until("both run", lambda: {"go on", "stop"} <= {*Waiter.begun})
    cancelled.cancel()
    until("the cancelled one is recorded", lambda: site.store.runs.newest(10))
    OPEN.set()
    message, run = running.future.result(20)
    assert message.role == "assistant"
    answered, stopped = site.store.runs.newest(10)
    assert (answered.id, answered.record["goal"], json.loads(answered.record["summary"])["verdict"]) == (
        run, "go on", "of None",
    )  # fmt: skip
    assert answered.record["error"] == "" and answered.record["seconds"] > 0
    assert (stopped.record["goal"], stopped.record["error"]) == ("stop", "agent dev1-waiter stopped: it was cancelled")
    for feedback in (Feedback(score=1.0, who="ann"), Feedback(correction="x", who="ann")):
        with pytest.raises(BadFeedback, match=r"there is nothing to learn from: .* agent dev1-waiter answers by code"):
            site.hosted.feedback(run, feedback)
    assert site.store.samples(limit=10) == [] and site.store.runs.get(run).feedback == []  # type: ignore[union-attr]
    site.hosted.submit("dev1-picky", {"wrong": 1}).future.result(20)
    assert len(site.store.runs.newest(10)) == 2, "what was refused is no run"


@pytest.mark.parametrize("remember", [True, False])
def test_a_conversation_survives_a_restart_where_it_is_to(tmp_path: Path, sites: list[Site], remember: bool) -> None:
    talker = {"factory": "scripted", "remember": remember}
    for said in ("Bin 4 holds bolts.", "What does bin 4 hold?"):
        site = Site(tmp_path, "dev1", talker=talker)
        assert site.hosted.submit("dev1-talker", said).future.result(20)[0].content == {"verdict": "reject"}
        site.close()
    turns = [turn.content for turn in MODELS[-1].asked[0].messages if turn.role != "system"]
    assert turns[-1] == "What does bin 4 hold?"
    assert turns[:-1] == (["Bin 4 holds bolts.", json.dumps(final({"verdict": "reject"}))] if remember else [])


def test_what_cannot_run_is_said_and_the_others_run(site: Site) -> None:
    assert "has no callable 'nowhere_to_be_found'" in site.events[0]
    assert [problem.what for problem in site.hosted.problems()] == ["agent dev1-missing"]
    with pytest.raises(NoAgent, match=r"dev1-missing was not made: .*nowhere_to_be_found"):
        site.hosted.submit("dev1-missing", "go")
    with pytest.raises(
        NoAgent, match="no agent 'x' runs here; there are: dev1-waiter, dev1-failing, dev1-talker, dev1-picky"
    ):
        site.hosted.submit("x", "go")
    with pytest.raises(ValueError, match="max_steps 51: use 1 to 50"):
        site.hosted.submit("dev1-talker", "go", max_steps=51)
    assert site.hosted.status()["dev1-talker"]["running"] == 0


def test_so_many_runs_wait_and_no_more(site: Site) -> None:
    running = [site.hosted.submit("dev1-waiter", "go") for _ in range(RUNS_MAX)]
    with pytest.raises(Busy, match=f"{RUNS_MAX} runs of agents"):
        site.hosted.submit("dev1-talker", "go")
    running[0].cancel()
    until("its place is free", lambda: site.hosted.status()["dev1-waiter"]["running"] == RUNS_MAX - 1)
    assert site.hosted.submit("dev1-talker", "go").future.result(20)[0].role == "assistant"


def test_whoever_asks_over_the_socket_is_answered_and_who_goes_cancels(tmp_path: Path, site: Site) -> None:
    served = AgentSocket(tmp_path / "dev1", site.hosted)
    with pytest.raises(Nobody):
        ask(tmp_path / "dev1", {"op": "list"})
    served.start()
    answer = ask(tmp_path / "dev1", {"op": "run", "agent": "dev1-talker", "request": "go"}, 20)
    assert answer["ok"] and answer["response"] == {"verdict": "reject"}
    said = {"op": "feedback", "run": answer["run"], "feedback": {"score": 0.0, "who": "ann"}}
    assert ask(tmp_path / "dev1", said, 20) == {"ok": True}
    kept = site.store.runs.get(answer["run"])
    assert kept is not None and kept.feedback == [{"score": 0.0, "who": "ann"}]
    for line, kind in (
        ({"op": "feedback", "run": "nobody", "feedback": {"score": 1, "who": "ann"}}, "unknown"),
        ({"op": "feedback", "run": answer["run"], "feedback": {"mood": 1}}, "usage"),
        ({"op": "run", "agent": "x", "request": 1}, "unknown"), ({"op": "run"}, "usage"), ({"op": "dance"}, "usage"),
        ({}, "usage"), ({"op": "x" * LINE_BYTES_MAX}, "usage"),
    ):  # fmt: skip
        assert ask(tmp_path / "dev1", line, 20)["kind"] == kind, line
    with pytest.raises(TimeoutError):
        ask(tmp_path / "dev1", {"op": "run", "agent": "dev1-waiter", "request": "go"}, 0.2)
    until("it was cancelled", lambda: site.hosted.status()["dev1-waiter"]["running"] == 0)
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(tmp_path / "dev1" / "agents.sock"))  # says nothing, and keeps nobody from an answer
    assert ask(tmp_path / "dev1", {"op": "list"}, 20)["agents"]["dev1-talker"]["slot"] == "tongue"
    silent.close()
    served.stop()


def test_an_agent_that_learns_hears_of_feedback_and_asks_for_a_training(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(tmp_path, "dev1", learner={"factory": "learner"}, talker={"factory": "scripted"})
    sites.append(site)
    wishes: list[Any] = []

    def train(wish: Any) -> Any:
        wishes.append(wish)
        return {"action": "announced"}

    offer_training(train)
    try:
        _, run = site.hosted.submit("dev1-learner", "go").future.result(20)
        assert "0 runs with new feedback; nobody was asked to train" in site.hosted.adapt("dev1-learner")
        site.hosted.feedback(run, Feedback(correction={"verdict": "accept"}, who="ann"))
        assert "1 runs with new feedback; action: announced" in site.hosted.adapt("dev1-learner")
        assert [wish["samples"] for wish in wishes] == [[run]]
        with pytest.raises(ValueError, match=r"does not learn: set agents\.dev1-talker\.factory"):
            site.hosted.adapt("dev1-talker")
    finally:
        offer_training(None)


def test_whatever_comes_over_the_socket_or_out_of_an_agent_is_answered(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(tmp_path, "dev1", talker={"factory": "scripted"}, odd={"factory": "Odd"})
    sites.append(site)
    served = AgentSocket(tmp_path / "dev1", site.hosted)
    served.start()

    def asked(**line: Any) -> tuple[str, str]:
        answer = ask(tmp_path / "dev1", line, 20)
        return answer["kind"], answer["error"]

    run = ask(tmp_path / "dev1", {"op": "run", "agent": "dev1-talker", "request": "go"}, 20)["run"]
    for feedback, said in (
        ({"who": 5, "score": 1}, "who 5: give a text"), ({"who": "ann", "score": "1"}, "score '1': give a number"),
        ({"who": "ann", "score": True}, "score True"), ({"who": "ann", "score": 1, "note": []}, "note []: give a text"),
        ({"who": "ann", "preference": "x"}, ""), (5, ""), ("x", ""), ([], "feedback gives nothing"),
    ):  # fmt: skip
        kind, error = asked(op="feedback", run=run, feedback=feedback)
        assert kind == "usage" and said in error, feedback
    for request, said in (
        ("none", "answered with NoneType; a Message is expected"), ("set", "is no JSON: Object of type set"),
        ("bytes", "is no JSON: Object of type bytes"), ("nan", "is no JSON: Out of range float"),
    ):  # fmt: skip
        kind, error = asked(op="run", agent="dev1-odd", request=request)
        assert kind == "agent" and said in error
    asker = Agent(Scripted(asking("dev1-odd", "set"), final("done")), "x", allowed_peers=["dev1-odd"])
    assert asyncio.run(asker.auto_run("?")).content == "done", "nor does it end the run of an agent that asks it"
    site.hosted.adapt = lambda name: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    assert asked(op="adapt", agent="dev1-talker") == ("agent", "ZeroDivisionError: division by zero")
    served.stop()


def test_who_waits_when_the_daemon_ends_is_told(tmp_path: Path) -> None:
    OPEN.clear()
    site = Site(tmp_path, "dev1", waiter=WAITER)
    served = AgentSocket(tmp_path / "dev1", site.hosted)
    served.start()
    answers: list[Any] = []
    line = {"op": "run", "agent": "dev1-waiter", "request": "go"}
    asking = threading.Thread(target=lambda: answers.append(ask(tmp_path / "dev1", line, 20)))
    asking.start()
    until("it runs", lambda: site.hosted.status()["dev1-waiter"]["running"])
    served.stop()
    site.close()
    asking.join(20)
    assert answers[0]["kind"] == "cancelled" and "the daemon is ending" in answers[0]["error"]


def test_agents_give_back_what_they_hold_when_the_daemon_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever became of their runs, and whatever one of them does."""
    Holder.closed.clear()
    hows = ["fails", "hangs", "in a thread", "answers"]
    site = Site(
        tmp_path, "dev1", **{f"h{n}": {"factory": "Holder", "options": {"how": how}} for n, how in enumerate(hows)}
    )
    message, _ = site.hosted.submit("dev1-h3", "go").future.result(20)
    assert message.role == "error"
    site.close()
    assert sorted(Holder.closed) == ["answers agents", "fails agents", "hangs agents", "in a thread close dev1-h2"]
    assert "agent dev1-h0 was not closed" in caplog.text and "1 agents did not close within 3 s" in caplog.text


def peer(agent: str = "two-waiter", **more: Any) -> dict[str, Peer]:
    given = {"device": "two", "agent": agent, "input_schema": PART, "output_schema": VERDICT, "deadline_s": 20.0}
    return {"there": Peer(**{**given, **more})}


@pytest.fixture
def pair(tmp_path: Path, sites: list[Site]) -> tuple[Site, Site]:
    """`one` asks agents of `two` by the name `there`."""
    two = {"waiter": WAITER, "large": {"factory": "Large", "callers": ["one"]}, "shut": {"factory": "Large"}}
    sites += [Site(tmp_path, "one", peer()), Site(tmp_path, "two", **two)]
    return sites[0], sites[1]


def posted(site: Site) -> tuple[str, bytes]:
    """The one letter that a device sends."""
    return until("a letter", site.sent)[0]


def test_a_request_travels_is_answered_once_and_its_answer_comes_back(pair: tuple[Site, Site]) -> None:
    one, two = pair
    context = RequestContext().called_by("foreman")
    running = one.hosted.submit("there", {"part": 7}, context)
    topic, payload = posted(one)
    assert topic == "edged/v1/plant/two/down/invoke/two-waiter/one"
    two.hear(topic, payload, 1)
    two.hear(topic, payload, 2)  # again, while it is being answered
    OPEN.set()
    back = posted(two)
    assert back[0].startswith("edged/v1/plant/one/down/invoked/two/")
    until("it is acknowledged", lambda: two.link.done)
    assert two.link.done == [2], "the newest copy"
    two.hear(topic, payload, 3)  # and again, after it was
    assert (two.counted("invocations"), two.counted("invocations_repeated"), two.sent()) == (1, 1, [])
    one.hear(*back)
    message, _ = running.future.result(20)
    assert message.content["verdict"] == "of one/foreman", "who asks is said with its device"
    one.hear(*back)
    assert one.counted("invocations_late") == 1


def test_an_agents_step_asks_a_peer_of_another_device_like_one_of_its_own(pair: tuple[Site, Site]) -> None:
    one, two = pair
    OPEN.set()
    model = Scripted(asking("there", {"part": 7}), final("done"))
    foreman = Agent(model, "x", agent_name="hosted-foreman", allowed_peers=["there"])
    running = one.hosted.spawn(foreman.auto_run("Ask about part 7."))  # type: ignore[arg-type]
    two.hear(*posted(one))
    one.hear(*posted(two))
    assert running.result(20).content == "done"  # type: ignore[attr-defined]
    assert "there: " in model.asked[0].messages[0].content, "it is among those that it can ask"
    assert '"verdict": "of one/hosted-foreman"' in model.asked[1].messages[-1].content
    stranger = Agent(Scripted(asking("there", {"part": 7}), final("done")), "x", agent_name="hosted-stranger")
    one.hosted.spawn(stranger.auto_run("Ask about part 7.")).result(20)  # type: ignore[arg-type]
    assert one.sent() == [], "who may not ask it here does not"


def test_both_ends_hold_requests_and_answers_against_their_schemas(pair: tuple[Site, Site]) -> None:
    one, _ = pair
    message, _ = one.hosted.submit("there", {"wrong_field": "value"}).future.result(20)
    assert message.text.startswith("Request validation failed") and one.sent() == [], "it never travels"
    running = one.hosted.submit("there", {"part": 7})
    _, payload = posted(one)
    asked = Invocation.model_validate_json(payload)
    foreign = Invoked(**one.outgoing.stamp(), invocation=asked.id, response={"wrong": 1})
    one.hear(f"edged/v1/plant/one/down/invoked/three/{asked.id}", messages.encode(foreign))
    assert one.counted("invocations_foreign") == 1, "who was not asked is not believed"
    one.hear(f"edged/v1/plant/one/down/invoked/two/{asked.id}", messages.encode(foreign))
    message, _ = running.future.result(20)
    assert message.text.startswith("Response validation failed: the answer of agent two-waiter of device two is wrong")


def refused(two: Site, agent: str, caller: str = "one", **changes: Any) -> str | None:
    """The error that a letter to `two` is answered with; None for no answer."""
    given = {"request": {"part": 1}, "within_s": 20.0, "task": "t1", "path": [f"{caller}/foreman"]}
    asked = Invocation(**{**two.outgoing.stamp(), **given, **changes})
    two.hear(f"edged/v1/plant/two/down/invoke/{agent}/{caller}", messages.encode(asked))
    sent = two.sent() if "ts" in changes else until("an answer", two.sent)
    return Invoked.model_validate_json(sent[0][1]).error if sent else None


def test_what_is_not_answered_says_why(pair: tuple[Site, Site]) -> None:
    _, two = pair
    assert refused(two, "two-shut") == "agent two-shut does not answer one: agents.two-shut.callers does not name it"
    assert "does not answer three" in (refused(two, "two-waiter", "three") or "")
    assert refused(two, "nobody") == "no agent 'nobody' runs here"
    assert "9 agents wait for one another, at most 8" in (refused(two, "two-waiter", depth=9) or "")
    assert "33 calls between agents" in (refused(two, "two-waiter", interactions=33) or "")
    assert "the response cannot be sent: " in (refused(two, "two-large") or "")
    assert refused(two, "two-waiter", ts=SystemClock().now() - 21 - CLOCKS_APART_S_MAX) is None
    assert two.counted("invocations_expired") == 1


def test_of_other_devices_so_many_requests_wait_and_no_more(pair: tuple[Site, Site]) -> None:
    _, two = pair
    for number in range(IN_HAND_MAX):
        asked = Invocation(**two.outgoing.stamp(), request={"part": number}, within_s=20.0, task="t")
        two.hear("edged/v1/plant/two/down/invoke/two-waiter/one", messages.encode(asked))
    assert "busy: 8 requests of other devices wait" in (refused(two, "two-waiter") or "")
    OPEN.set()
    until("all are answered", lambda: len(two.link.done) == IN_HAND_MAX + 1)


def test_an_answer_that_comes_too_late_is_not_sent(pair: tuple[Site, Site]) -> None:
    _, two = pair
    asked = Invocation(**two.outgoing.stamp(), request={"part": 1}, within_s=0.2, task="t")
    two.hear("edged/v1/plant/two/down/invoke/two-waiter/one", messages.encode(asked))
    time.sleep(0.3)
    OPEN.set()
    until("it is over", lambda: two.link.done == [1])
    assert two.sent() == [] and two.counted("invocations_expired") == 1


def test_those_whose_time_is_over_leave_their_places_to_others(tmp_path: Path, sites: list[Site]) -> None:
    """Also where their agent would never end, and those who asked say nothing more."""
    sites.append(Site(tmp_path, "two", waiter=WAITER, brief={"factory": "Brief", "callers": ["one"]}))
    (two,) = sites
    for number in range(IN_HAND_MAX):
        asked = Invocation(**two.outgoing.stamp(), request={"part": number}, within_s=0.2, task="t")
        two.hear("edged/v1/plant/two/down/invoke/two-waiter/one", messages.encode(asked))
    until("all have ended", lambda: two.counted("invocations_expired") == IN_HAND_MAX)
    assert two.hosted.status()["two-waiter"]["running"] == 0
    assert refused(two, "two-brief") is None


def test_the_calls_of_a_task_are_counted_together_however_often_its_devices_are_asked(
    tmp_path: Path, sites: list[Site]
) -> None:
    busybody = {"factory": "Busybody", "callers": ["one", "three"], "allowed_peers": ["two-brief"]}
    sites.append(Site(tmp_path, "two", busybody=busybody, brief={"factory": "Brief"}))
    (two,) = sites

    def made(caller: str, task: str, so_far: int) -> Any:
        given = {"request": {"times": 20}, "within_s": 20.0, "task": task, "interactions": so_far}
        asked = Invocation(**two.outgoing.stamp(), **given)
        two.hear(f"edged/v1/plant/two/down/invoke/two-busybody/{caller}", messages.encode(asked))
        return Invoked.model_validate_json(posted(two)[1]).response

    assert made("one", "t1", 1) == 20, "calls 2 to 21"
    assert made("three", "t1", 1) == 11, "calls 22 to 32, whoever asks"
    assert made("one", "t2", 30) == 2, "another task, of which others have made 30"


def test_who_waits_no_longer_ends_the_run_on_the_other_device(tmp_path: Path, sites: list[Site]) -> None:
    sites += [Site(tmp_path, "one", peer(deadline_s=0.3)), Site(tmp_path, "two", waiter=WAITER)]
    one, two = sites
    for seconds in (None, 0.2):  # the peer's deadline, and the task's
        context = RequestContext(deadline=seconds and time.monotonic() + seconds)
        running = one.hosted.submit("there", {"part": 7}, context)
        letters = until("a letter", one.sent)
        topic, payload = letters[0]
        patient = Invocation.model_validate_json(payload).model_copy(update={"within_s": 3600.0})
        two.hear(topic, messages.encode(patient), 1)
        until("it runs", lambda: two.hosted.status()["two-waiter"]["running"])
        assert running.future.result(20)[0].role == "error"
        two.hear(*(letters[1:] or until("another letter", one.sent))[0], 2)
        until("it ends", lambda: two.hosted.status()["two-waiter"]["running"] == 0)
    assert (one.counted("invocations_unanswered"), two.counted("invocations_cancelled")) == (2, 2)


def test_who_cancels_ends_the_run_on_the_other_device_and_nobody_else_can(pair: tuple[Site, Site]) -> None:
    one, two = pair
    running = one.hosted.submit("there", {"part": 7})
    topic, payload = posted(one)
    two.hear(topic, payload, 1)
    until("it runs", lambda: two.hosted.status()["two-waiter"]["running"])
    asked = Invocation.model_validate_json(payload)
    forged = Invocation(**two.outgoing.stamp(), within_s=9.0, task="t", cancels=asked.id)
    two.hear("edged/v1/plant/two/down/invoke/two-waiter/three", messages.encode(forged), 2)
    assert two.hosted.status()["two-waiter"]["running"] == 1
    running.cancel()
    two.hear(*posted(one), 3)
    until("it ends", lambda: two.link.done == [2, 3, 1])
    assert (two.counted("invocations_cancelled"), two.sent()) == (1, [])
    two.hear(topic, payload, 4)
    assert two.counted("invocations_repeated") == 1, "it does not come back to life"


def test_who_does_not_answer_in_time_is_an_error(tmp_path: Path, sites: list[Site]) -> None:
    sites.append(Site(tmp_path, "one", peer(deadline_s=0.1)))
    message, _ = sites[0].hosted.submit("there", {"part": 7}).future.result(20)
    assert "agent two-waiter of device two did not answer within 0.1 s" in message.text
    assert sites[0].counted("invocations_unanswered") == 1
    large = {"part": 7, "note": "x" * INVOKED_BYTES_MAX}
    message, _ = sites[0].hosted.submit("there", large).future.result(20)
    assert "was not asked: " in message.text and "send at most 65536" in message.text


def test_only_what_went_out_of_here_may_come_back_to_who_waits_for_it(tmp_path: Path, sites: list[Site]) -> None:
    """An agent that waits for a peer may be asked by it; another device cannot claim that one waits."""
    sites.append(Site(tmp_path, "one", peer(), back=WAITER | {"callers": ["two"]}))
    one = sites[0]
    OPEN.set()
    context = RequestContext().called_by("foreman")
    one.hosted.submit("there", {"part": 7}, context)
    gone_out = Invocation.model_validate_json(posted(one)[1])
    assert gone_out.path == ["one/foreman"]
    paths = []
    for task in (gone_out.task, "made-up"):
        asked = Invocation(
            **one.outgoing.stamp(),
            request={"part": 1},
            within_s=20.0,
            task=task,
            path=["one/foreman", "two/two-waiter"],
        )
        one.hear("edged/v1/plant/one/down/invoke/one-back/two", messages.encode(asked))
        paths.append(Invoked.model_validate_json(posted(one)[1]).response["path"])
    assert paths == [["foreman", "two/two-waiter"], ["one/foreman", "two/two-waiter"]]
