"""Agents in a real `edged run`: on its own language model, from the command line, over a swap, and on other devices."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.agent_client import ask
from edged.releases import reference
from edged.wire.messages import Event, Metrics, SampleEntry
from tests.support.babble import make_babbler
from tests.support.device import EDGED, Bus, Device, clean_env, tables, until
from tests.support.files import file_server
from tests.support.models import copy_release, put_pictures
from tests.support.plant import Plant
from tests.system.broker import Broker
from tests.system.test_agent_browser import MISSING

VERDICTS = ["accept", "reject"]
ANSWER = {"type": "object", "properties": {"verdict": {"enum": VERDICTS}}, "required": ["verdict"]}
QUESTION = {
    "type": "object",
    "properties": {"part": {"type": "integer"}},
    "required": ["part"],
    "additionalProperties": False,
}
MODULE = '''
"""An agent that answers by itself, and one that takes its time."""
import asyncio

from edged.agents import BaseAgent, Message


class Clerk(BaseAgent):
    def __init__(self, wait_s=0.0, **rest):
        super().__init__(**rest)
        self.wait_s = wait_s

    async def handle(self, request, request_context):
        await asyncio.sleep(self.wait_s)
        return Message("assistant", {"verdict": "reject" if request["part"] > 5 else "accept"})


class Relay(BaseAgent):
    """Asks its peer twice, and gives back what it said last."""

    async def handle(self, request, request_context):
        (peer,) = self.allowed_peers
        await self.invoke_agent(peer, request, request_context)
        return await self.invoke_agent(peer, request, request_context)


class Watcher(BaseAgent):
    """Says what the device sees."""

    async def handle(self, request, request_context):
        seen = await self.tools["last_detections"].call({"pipeline": "line", "limit": 1})
        return Message("assistant" if seen.ok else "error", seen.text)


def scratches(part: int) -> int:
    """How many scratches a part has."""
    return part - 4
'''
READER = '''
"""An agent whose browser starts whatever its model says, and one that then fails."""
from edged.agents import Message
from edged.agents.browser import BrowserAgent


class Reader(BrowserAgent):
    async def handle(self, request, request_context):
        await self.browser_tool.start()
        return Message("assistant", "it runs")


class Failing(Reader):
    async def handle(self, request, request_context):
        await super().handle(request, request_context)
        raise RuntimeError("no such page")
'''


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of random weights: what it says has a form only because it must."""
    folder = tmp_path_factory.mktemp("releases") / "babbler"
    make_babbler(folder, context=4096)
    return folder


def configured(folder: Path, name: str, broker: Broker, tongue: Path, **more: Any) -> dict[str, Any]:
    """A device whose one slot is for agents."""
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules" / "plant_agents.py").write_text(MODULE)
    plan = tables(folder, name, broker, None)
    return plan | {"slots": {"tongue": {"seed": tongue, "probation_s": 0.5}}, "pipelines": {}, **more}


INSPECTOR = {
    "slot": "tongue", "instruction": "You inspect parts.", "input_schema": QUESTION, "output_schema": ANSWER,
    "max_tokens": 400,
}  # fmt: skip


def run(device: Device, name: str, request: Any, *options: str) -> tuple[int, Any, str]:
    """`edged agent run`: exit status, response, what is on standard error."""
    done = device.cli("agent", "run", name, "--json", json.dumps(request), *options)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def asked(device: Device, name: str, request: Any) -> tuple[bool, Any]:
    """The same without the command's start: whether it went well, and the response, or why there is none."""
    answer = ask(device.state_dir, {"op": "run", "agent": name, "request": request}, 120)
    return answer["ok"], answer["response"] if answer["ok"] else answer["error"]


def test_an_agent_answers_is_corrected_and_its_sample_waits_for_a_training(
    tmp_path: Path, broker: Broker, bus: Bus, babbler: Path
) -> None:
    plan = configured(tmp_path, "dev1", broker, babbler, agents={"inspector": INSPECTOR})
    with Device(tmp_path, plan) as device:
        status, response, said = run(device, "inspector", {"part": 7})
        assert status == 0, said + device.log()
        assert response["verdict"] in VERDICTS
        run_id = said.split()[1]
        assert run(device, "inspector", {"wrong_field": 1})[0] == 1
        assert "Request validation failed" in run(device, "inspector", {"wrong_field": 1})[2]
        right = next(each for each in VERDICTS if each != response["verdict"])
        done = device.cli("agent", "feedback", run_id, "--correction", json.dumps({"verdict": right}), "--who", "ann")
        assert done.returncode == 0, done.stderr
        wrong = device.cli("agent", "feedback", run_id, "--correction", '{"verdict": "maybe"}', "--who", "ann")
        assert wrong.returncode == 2 and "'maybe' is not one of" in wrong.stderr
        (entry,) = until("the catalogue", lambda: bus.of(SampleEntry, "dev1"))
        assert (entry.pipeline, entry.model, entry.state) == ("agent:inspector", "tongue", "labelled")
        assert entry.provenance and entry.provenance.who == "ann"
        assert json.loads(entry.label[0].text)["action_input"]["response"] == {"verdict": right}  # type: ignore[union-attr]
        windows = until("a window", lambda: [w for w in bus.of(Metrics, "dev1") if w.pipeline == "agent:inspector"])
        assert (windows[0].items, windows[0].accepted, windows[0].release) == (1, 1, "babbler@1.0")
        listed = json.loads(device.cli("agent", "list", "--json").stdout)["inspector"]
        assert (listed["slot"], listed["error"], listed["running"]) == ("tongue", None, 0)
        assert (listed["release"], listed["adapter"]) == ("babbler@1.0", ""), "what answers now"
        assert device.cli("agent", "run", "nobody", "--text", "x").returncode == 2
        assert device.cli("agent", "runs").stdout.count("inspector") == 1, "what was refused is no run"
    assert device.cli("agent", "run", "inspector", "--text", "x").returncode == 3


def test_an_agent_that_learns_asks_for_a_training_with_its_configuration(
    tmp_path: Path, broker: Broker, bus: Bus, babbler: Path
) -> None:
    head = {"r": 8, "lora_alpha": 16, "target_modules": ["qkv_proj", "o_proj"]}
    learner = INSPECTOR | {
        "factory": "learnable", "options": {"learning_head": "peft", "learning_head_config": head},
    }  # fmt: skip
    plan = configured(tmp_path, "dev1", broker, babbler, agents={"learner": learner, "inspector": INSPECTOR})
    with Device(tmp_path, plan) as device:
        bus.online("dev1")
        nothing = device.cli("agent", "adapt", "learner")
        assert nothing.returncode == 0 and "0 runs with new feedback; nobody was asked" in nothing.stdout
        status, response, said = run(device, "learner", {"part": 7})
        assert status == 0, said + device.log()
        run_id = said.split()[1]
        right = next(each for each in VERDICTS if each != response["verdict"])
        done = device.cli("agent", "feedback", run_id, "--correction", json.dumps({"verdict": right}), "--who", "ann")
        assert done.returncode == 0, done.stderr
        adapted = device.cli("agent", "adapt", "learner")
        assert adapted.returncode == 0, adapted.stderr
        assert adapted.stdout.startswith(
            "1 runs with new feedback; action: announced, reason: its samples are announced"
        )
        assert adapted.stdout.endswith("babbler@1.0 still answers\n")
        (event,) = until("the event", lambda: [e for e in bus.of(Event, "dev1") if e.kind == "training_wanted"])
        assert event.text == "agent learner asks for a training of tongue with 1 judged runs"
        assert event.detail["samples"] == [run_id] and event.detail["learning_head"] == "peft"
        assert (event.detail["agent"], event.detail["model"]) == ("learner", "tongue")
        assert event.detail["learning_head_config"].items() >= head.items()
        (entry,) = until("the catalogue", lambda: bus.of(SampleEntry, "dev1"))
        assert (entry.pipeline, entry.state) == ("agent:learner", "labelled"), "its sample is announced"
        assert "0 runs with new feedback" in device.cli("agent", "adapt", "learner").stdout, "it has asked already"
        refused = device.cli("agent", "adapt", "inspector")
        assert refused.returncode == 2 and "inspector does not learn: set agents.inspector.factory" in refused.stderr


def test_an_agent_sees_what_the_cameras_of_its_device_see(
    tmp_path: Path, broker: Broker, babbler: Path, toy: Path
) -> None:
    watcher = {
        "slot": "tongue", "factory": "plant_agents:Watcher", "tools": ["edged.agents.sight:last_detections"],
    }  # fmt: skip
    plan = configured(tmp_path, "dev1", broker, babbler, agents={"watcher": watcher})
    line = tables(tmp_path, "dev1", broker, toy)
    plan["slots"] |= line["slots"]
    plan["pipelines"] = {"line": line["pipelines"]["line"]}
    with Device(tmp_path, plan) as device:
        assert "has detected nothing" in asked(device, "watcher", "What is there?")[1]
        put_pictures(device.inbox, ["a.png"])
        device.wait("it is answered", lambda s: s["pipelines"]["line"]["totals"]["items"])
        ok, seen = asked(device, "watcher", "What is there?")
        (shot,) = json.loads(seen)
        assert ok and (shot["item"], shot["release"]) == ("a.png", "toy@1.0")
        assert [each["label"] for each in shot["objects"]] == ["cat"]


def test_a_swap_underneath_an_agent_at_work_is_not_noticed(
    tmp_path: Path, broker: Broker, bus: Bus, babbler: Path
) -> None:
    later = tmp_path / "later"
    next_one = copy_release(babbler, later, {"release": "babbler@1.1"})
    with file_server() as files:
        files.publish(later, next_one)
        plan = configured(tmp_path, "dev1", broker, babbler, agents={"inspector": INSPECTOR}, host={"url": files.url})
        with Device(tmp_path, plan) as device:
            bus.online("dev1")
            bus.desire("dev1", 1, {"tongue": next_one})
            answers: list[tuple[bool, Any]] = []

            def swapped() -> bool:
                answers.append(asked(device, "inspector", {"part": len(answers)}))
                status = device.status()
                return bool(status and status["models"]["tongue"]["active"] == next_one.release)

            until("the swap", swapped, 120)
            answers.append(asked(device, "inspector", {"part": 99}))
            assert all(ok and response["verdict"] in VERDICTS for ok, response in answers), answers
            runs = json.loads(device.cli("agent", "runs", "--json").stdout)
            releases = [run["record"]["release"] for run in runs]
            assert releases[0] == next_one.release and releases[-1] == reference(babbler).release


def test_ctrl_c_cancels_a_run_and_the_next_one_has_its_turn(tmp_path: Path, broker: Broker, babbler: Path) -> None:
    slow = {"slot": "tongue", "factory": "plant_agents:Clerk", "options": {"wait_s": 3600}}
    plan = configured(tmp_path, "dev1", broker, babbler, agents={"slow": slow, "inspector": INSPECTOR})
    with Device(tmp_path, plan) as device:
        command: list[str | Path] = [EDGED, "agent", "run", "slow", "--json", '{"part": 1}', "-c", device.config]
        waiting = subprocess.Popen(command, env=clean_env(), stderr=subprocess.PIPE)
        device.wait("it runs", lambda s: s["agents"]["slow"]["running"] == 1)
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        device.wait("it was cancelled", lambda s: s["agents"]["slow"]["running"] == 0)
        assert asked(device, "inspector", {"part": 1})[0]
        assert run(device, "slow", {"part": 1}, "--timeout", "0.5")[0] == 130
        listed = until("it is listed, too", lambda: device.cli("agent", "runs", "slow").stdout)
        run_id = listed.split()[0]
        assert listed.split()[1:5] == ["error", "slow", "-", "0"], (
            "an agent of its own kind has no steps that are known"
        )
        refused = device.cli("agent", "feedback", run_id, "--score", "0", "--who", "ann")
        assert refused.returncode == 2 and "there is nothing to learn from" in refused.stderr


@pytest.mark.skipif(bool(MISSING), reason=f"this machine has no {' and no '.join(MISSING)}")
def test_when_the_daemon_ends_no_browser_of_its_agents_is_left(tmp_path: Path, broker: Broker, babbler: Path) -> None:
    agents = {name: {"slot": "tongue", "factory": f"reader:{name.title()}"} for name in ("reader", "failing")}
    plan = configured(tmp_path, "dev1", broker, babbler, agents=agents)
    (tmp_path / "modules" / "reader.py").write_text(READER)
    with Device(
        tmp_path, plan, program=(Path(sys.executable).with_name("edged"),)
    ) as device:  # with the extra `browser`
        assert asked(device, "reader", "go") == (True, "it runs")
        ok, said = asked(device, "failing", "go")
        assert not ok and "RuntimeError: no such page" in said
        assert device.process is not None
        below = psutil.Process(device.process.pid).children(recursive=True)
        browsers = [each for each in below if "--headless" in " ".join(each.cmdline())]
        assert len([each for each in browsers if each.parent() not in browsers]) == 2, "one an agent"
        assert device.stop() == 0
        assert "still at work" not in device.log() and "not close" not in device.log()
        assert [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture
def two(tmp_path: Path, babbler: Path) -> Iterator[tuple[Device, Device]]:
    """`asker`, which knows agents of `helper`, both with certificates at a broker that lets peers invoke and nobody else."""
    broker = Plant(tmp_path / "plant", [])
    for name in ("asker", "helper"):
        broker.enroll(name, "--peer")
    broker.trainer("broker", "config", "--listen", "127.0.0.1", "--user", "root")
    clerk = {"slot": "tongue", "factory": "plant_agents:Clerk", "input_schema": QUESTION, "output_schema": ANSWER}
    remote = {"device": "helper", "agent": "clerk", "deadline_s": 20.0, "output_schema": ANSWER}
    peers = {
        "clerk_there": remote | {"input_schema": QUESTION}, "unchecked": remote, "shut": remote | {"agent": "shut"},
        "slow_there": remote | {"agent": "slow", "deadline_s": 1.0},
        "relay_there": {"device": "helper", "agent": "relay"},
    }  # fmt: skip
    relay = {"slot": "tongue", "factory": "plant_agents:Relay"}
    others = {
        "clerk": clerk | {"callers": ["asker"]}, "shut": clerk,
        "slow": clerk | {"callers": ["asker"], "options": {"wait_s": 3.0}},
        "relay": relay | {"callers": ["asker"], "allowed_peers": ["relay_back"]},
    }  # fmt: skip
    foreman = INSPECTOR | {"allowed_peers": ["clerk_there"], "tools": ["plant_agents:scratches"]}
    chief = INSPECTOR | {"allowed_peers": ["clerk_there"], "temperature": 1.0}
    ours = {
        "foreman": foreman, "chief": chief, "relay": relay | {"callers": ["helper"], "allowed_peers": ["relay_there"]},
    }  # fmt: skip
    back = {"relay_back": {"device": "asker", "agent": "relay"}}
    asker = configured(tmp_path, "asker", broker, babbler, peers=peers, agents=ours)
    helper = configured(tmp_path, "helper", broker, babbler, peers=back, agents=others)
    with broker, Device(tmp_path, asker) as one, Device(tmp_path, helper) as other:
        for each in (one, other):
            each.wait("it is connected", lambda s: s["broker"] == "connected")
        yield one, other


def nobody_waits(counters: dict[str, int]) -> int:
    """How many requests of others came to nothing because nobody waits for them any more."""
    return counters.get("invocations_expired", 0) + counters.get("invocations_cancelled", 0)


def test_agents_ask_those_of_other_devices(two: tuple[Device, Device]) -> None:
    asker, helper = two
    assert asked(asker, "clerk_there", {"part": 7}) == (True, {"verdict": "reject"})
    assert asked(asker, "clerk_there", {"part": 3}) == (True, {"verdict": "accept"})
    ok, said = asked(asker, "clerk_there", {"wrong_field": 7})
    assert not ok and "Request validation failed: agent clerk_there was not run" in said
    helper.counted("invocations", 2)
    ok, said = asked(asker, "unchecked", {"wrong_field": 7})
    assert not ok and "agent clerk of device helper: Request validation failed" in said, "refused over there, too"
    ok, said = asked(asker, "shut", {"part": 1})
    assert not ok and "does not answer asker: agents.shut.callers" in said
    helper.counted("invocations_refused")
    ok, said = asked(asker, "slow_there", {"part": 1})
    assert not ok and "did not answer within 1.0 s" in said
    helper.wait("it ends there too, by its own clock or as it is told", lambda s: nobody_waits(s["counters"]))
    helper.kill9()
    ok, said = asked(asker, "slow_there", {"part": 1})
    assert not ok and "did not answer within 1.0 s; is it online" in said
    asker.counted("invocations_unanswered", 2)
    foreman = json.loads(asker.cli("agent", "list", "--json").stdout)["foreman"]
    assert (
        foreman["error"] is None and foreman["tools"] == ["scratches"] and foreman["allowed_peers"] == ["clerk_there"]
    )


def test_a_model_of_one_device_asks_the_agent_of_another(two: tuple[Device, Device]) -> None:
    """Whom it asks and what is the model's own step. It writes at random, so it does so in some of its runs."""
    asker, helper = two

    def through() -> dict[str, Any] | None:
        asked(asker, "chief", {"part": 7})
        (run, *_) = json.loads(asker.cli("agent", "runs", "--json").stdout)
        plan, done = run["record"]["plan"], run["record"]["execution"]
        steps = [(step, came) for step, came in zip(plan, done, strict=True) if step["tool"] == "invoke_agent"]
        return next(({**step, **came} for step, came in steps if came["status"] == "success"), None)

    step = until("a run in which it asks", through, 120)
    assert step["arguments"]["agent_name"] == "clerk_there"
    part = step["arguments"]["request"]["part"]
    assert json.loads(step["output"]) == {"verdict": "reject" if part > 5 else "accept"}
    helper.counted("invocations")


def test_agents_of_two_devices_that_ask_each_other_in_a_circle_end(two: tuple[Device, Device]) -> None:
    """Each asks twice: without one count for the whole task these were hundreds of requests, with it 32 a device."""
    ok, said = asked(two[0], "relay", "round and round")
    assert not ok
    assert "calls between agents, at most 32 are made for a task" in said or "agents wait for one another" in said
    status = [device.status() for device in two]
    made = [each["counters"].get("invocations", 0) for each in status if each]
    assert len(made) == 2 and 8 <= sum(made) <= 64, made
    assert not any(each["agents"]["relay"]["running"] for each in status if each)
