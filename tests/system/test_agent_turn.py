"""An agent that gets a task wrong learns from what people say of its runs, in one turn of the loop, on real processes:
mosquitto, `edged run` twice, `trainer serve` with its training (A10, P7).

The inspector calls a tool and rejects parts from six scratches on; the plant wants that from three on. A person corrects
some runs. The trainer takes them, trains an adapter, judges it on runs that were held out and on what must not be forgotten,
and rolls it out to a canary and then to both devices, under agents that are asked all the time. Then parts that nobody ever
spoke of are judged right, and the clerk, whose task has nothing to do with it, answers as before.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.agent_client import ask
from tests.support.device import SITE, Device, tables, toml, until
from tests.support.inspecting import (
    AGENTS,
    ORDERS,
    PARTS,
    SLOT,
    TAUGHT_FROM,
    WANTED_FROM,
    bin_of,
    order_of,
    part_of,
    verdict,
    write_tools,
)
from tests.system.broker import Broker
from tests.system.test_canary_devices import Host
from tests.system.test_canary_text import ended
from trainer.releases import Registry

ROOT = Path(__file__).parents[2]
NAMES = ("d1", "d2")
BASE, ADAPTER = f"{SLOT}@1.0", f"{SLOT}-lora@1.0"
WHO = "ann"
Request = dict[str, Any]
Answers = dict[int, Any]  # by the number of the part or the order

# Of the parts with each number of scratches two judge, two train, and of two nobody ever says anything; so of the orders.
BY_SCRATCHES = [[part for part in PARTS if part_of(part)["scratches"] == count] for count in range(10)]
JUDGED, TAUGHT, UNTOLD = ([part for parts in BY_SCRATCHES for part in parts[n::3]] for n in range(3))
KEPT_ORDERS, REHEARSED_ORDERS, OTHER_ORDERS = (list(ORDERS)[n::3] for n in range(3))

ROLLOUT = {
    "steps": [0.5, 1.0], "watch_s": 12.0, "items_min": 10, "extend_max": 20, "failed_grace_s": 2.0, "latency_factor": 50.0,
    "memory_factor": 20.0, "temperature_margin": 90.0, "audits_planned": 0,
}  # fmt: skip
TRAINED = """
[models.{slot}]
kind = "llm"
checkpoint = "{checkpoint}"
epochs = 14
batch = 8
lr = 0.005
threads = 1
threshold = {threshold}
minimum_interval_s = 0
validation_share = 0.0
holdout_share = 0.0
calibration_share = 0.0
split_guard_s = 0.0
# A busy machine makes answers of a few milliseconds slow.
gate = {{ latency_slack_ms = 60000 }}
lora = {{ r = 8, lora_alpha = 16, target_modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] }}
"""


@pytest.fixture(scope="module")
def model() -> dict[str, Path]:
    """The agents' small Phi: paths `base` (its checkpoint) and `model_gguf`; kept below build/, so that only the first run
    trains."""
    command = [sys.executable, "-m", "tests.support.inspecting", str(ROOT / "build" / "test-inspector")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Path(path) for name, path in json.loads(done.stdout.splitlines()[-1]).items()}


def taught(request: Request) -> Any:
    """What the model says of a part."""
    return verdict(request["scratches"], TAUGHT_FROM)


def wanted(request: Request) -> Any:
    """What the plant wants of it."""
    return verdict(request["scratches"], WANTED_FROM)


HELD_OUT = [part_of(part) for part in JUDGED]
# Each part as it is, and looked at again with other scratches.
TRAINING = [part_of(part, more) for part in TAUGHT for more in ((0, part) if part % 10 else (0,))]
BY_HAND = (0, next(n for n, request in enumerate(TRAINING) if taught(request) != wanted(request)))
VARIANTS = {part: part_of(part) for part in UNTOLD}
WRONG = [part for part, request in VARIANTS.items() if taught(request) != wanted(request)]


def examples(requests: Sequence[Request]) -> int:
    """How many examples the feedback on these makes: of a run that was right also the call of the tool."""
    return sum(2 if taught(request) == wanted(request) else 1 for request in requests)


def trainer_with(folder: Path, broker: Broker, checkpoint: Path, *, threshold: int) -> tuple[Host, Path]:
    """A trainer that knows the agents' model, not running yet, and that model as a release for devices."""
    host, seed = Host(folder / "host", broker), folder / BASE
    plan = {"name": "host", "site": SITE, "data_dir": "data", "broker": {"port": broker.port}, "http": {"port": 0}}
    table = TRAINED.format(slot=SLOT, checkpoint=checkpoint.resolve(), threshold=threshold)
    host.config.write_text(toml(plan | {"rollout": ROLLOUT}) + table)
    command = [sys.executable, "-m", "trainer", "release", "make-phi", seed, "--model-id", checkpoint, "--name", SLOT,
               "--quantization", "F16"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    host.call("release", "add", str(seed))
    return host, seed


def device(folder: Path, name: str, broker: Broker, seed: Path) -> Device:
    write_tools(folder)
    plan = tables(folder, name, broker, None)
    slots = {SLOT: {"seed": seed, "probation_s": 0.5}}
    return Device(folder, plan | {"slots": slots, "pipelines": {}, "agents": AGENTS})


def run(at: Device, agent: str, request: Request) -> tuple[str, Any]:
    """The id of a run of an agent, and its response."""
    answer = ask(at.state_dir, {"op": "run", "agent": agent, "request": request}, 120)
    assert answer["ok"], (agent, request, answer)
    return answer["run"], answer["response"]


def asked(at: Device, agent: str, requests: dict[int, Request]) -> Answers:
    return {number: run(at, agent, request)[1] for number, request in requests.items()}


def judge(at: Device, agent: str, request: Request, right: Any, *, by_hand: bool = False) -> bool:
    """Let an agent run, and let a person say what it should have answered: a score where it was right, else a correction;
    `by_hand`: with the command. Whether it was right."""
    run_id, response = run(at, agent, request)
    good = bool(response == right)
    if by_hand:
        said = ["--score", "1"] if good else ["--correction", json.dumps(right)]
        done = at.cli("agent", "feedback", run_id, "--who", WHO, *said)
        assert done.returncode == 0, done.stderr
    else:
        feedback = {"who": WHO, **({"score": 1.0} if good else {"correction": right})}
        answer = ask(at.state_dir, {"op": "feedback", "run": run_id, "feedback": feedback}, 30)
        assert answer["ok"], answer
    return good


def freeze(host: Host, at: Device, agent: str, name: str) -> int:
    """What people have said of an agent's runs becomes a set that judges, by the commands that an operator would give."""
    file = host.config.parent / f"{name}.jsonl"
    done = at.cli("requests", "export", str(file), "--pipeline", f"agent:{agent}")
    assert done.returncode == 0, done.stderr
    return int(host.call("holdout", "freeze", SLOT, "--set", name, "--from", str(file))["added"])


def expected(agent: str, request: Request, said: Any) -> bool:
    """Whether an answer is one that the model gives before or after, and no other."""
    if not said["ok"]:
        return False
    if agent == "clerk":
        return bool(said["response"] == bin_of(request["order"]))
    return said["response"] in (taught(request), wanted(request))


def used(devices: Sequence[Device]) -> int:
    """How many samples the devices know to be used up."""
    return sum((each.status() or {})["samples"].get("used", 0) for each in devices)


@contextmanager
def asking(devices: Sequence[Device]) -> Iterator[list[tuple[str, Request, Any]]]:
    """Both agents of each device are asked on and on; yields what they answered: (agent, request, the socket's answer)."""
    stopping, answers = threading.Event(), list[tuple[str, Request, Any]]()

    def go_on(at: Device) -> None:
        for number in itertools.count():
            part, order = PARTS[number % len(PARTS)], ORDERS[number % len(ORDERS)]
            for agent, request in (("inspector", part_of(part)), ("clerk", order_of(order))):
                try:
                    said: Any = ask(at.state_dir, {"op": "run", "agent": agent, "request": request}, 120)
                except Exception as error:  # nobody answered: that is what is looked for
                    said = {"ok": False, "error": repr(error)}
                answers.append((agent, request, said))
            if stopping.wait(1.0):
                return

    threads = [threading.Thread(target=go_on, args=(each,), daemon=True) for each in devices]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a10_p7_feedback_becomes_an_adapter_under_a_running_agent(
    tmp_path: Path, broker: Broker, model: dict[str, Path]
) -> None:
    judging, training = examples(HELD_OUT), examples(TRAINING) + len(REHEARSED_ORDERS)
    told = judging + len(KEPT_ORDERS) + training
    host, seed = trainer_with(tmp_path, broker, model["base"], threshold=told - 1)
    registry = Registry(host.config.parent / "data" / "releases")
    others = {order: order_of(order) for order in OTHER_ORDERS}
    with ExitStack() as stack:
        stack.enter_context(host.serving())
        devices = [stack.enter_context(device(tmp_path, name, broker, seed)) for name in NAMES]
        processes = [each.process for each in devices]

        # Before: by the rule that it was taught, and nothing else is wrong.
        assert asked(devices[0], "inspector", VARIANTS) == {part: taught(each) for part, each in VARIANTS.items()}
        assert len(WRONG) == 6
        clerk_before = asked(devices[0], "clerk", others)
        assert clerk_before == {order: bin_of(order) for order in OTHER_ORDERS}

        # What judges: runs that a person has looked at, taken from the device by its commands.
        for request in HELD_OUT:
            judge(devices[1], "inspector", request, wanted(request))
        for order in KEPT_ORDERS:
            assert judge(devices[1], "clerk", order_of(order), bin_of(order))
        assert freeze(host, devices[1], "inspector", "target") == judging
        assert freeze(host, devices[1], "clerk", "base") == len(KEPT_ORDERS)

        # What trains. The last piece of feedback is one more than the threshold.
        for number, request in enumerate(TRAINING):
            right = judge(devices[number % 2], "inspector", request, wanted(request), by_hand=number in BY_HAND)
            assert right == (taught(request) == wanted(request))
        adapt = devices[0].cli("agent", "adapt", "inspector").stdout
        assert adapt.startswith(f"{len(TRAINING[::2])} runs with new feedback; action: announced"), adapt
        assert f"{BASE} still answers" in adapt
        with asking(devices) as answers:
            for number, order in enumerate(REHEARSED_ORDERS):
                judge(devices[number % 2], "clerk", order_of(order), bin_of(order))
            until("the adapter is trained and judged", (registry.folder / ADAPTER).is_dir, 900)
            rollout = ended(host, ADAPTER)
            assert (rollout["status"], rollout["progress"]) == ("done", "2/2 nodes"), rollout
            for each in devices:
                each.wait("it runs the adapter", lambda s: s["models"][SLOT]["adapter"] == ADAPTER)
            count = len(answers)
            until("it is asked some more", lambda: len(answers) > count + 20, 120)
        unlike = [said for agent, request, said in answers if not expected(agent, request, said)]
        assert not unlike, f"of {len(answers)} answers: {unlike[:3]}"
        assert [each.process for each in devices] == processes and all(
            each and each.poll() is None for each in processes
        )

        # After: what nobody spoke of is right, and the unrelated task is as it was.
        for each in devices:
            after = asked(each, "inspector", VARIANTS)
            right_now = [part for part in WRONG if after[part] == wanted(VARIANTS[part])]
            assert right_now == WRONG, f"{len(right_now)} of {len(WRONG)} where it was 0: {after}"
            assert after == {part: wanted(request) for part, request in VARIANTS.items()}
            assert asked(each, "clerk", others) == clerk_before
            told_now = json.loads(each.cli("agent", "list", "--json").stdout)["inspector"]
            assert (told_now["release"], told_now["adapter"]) == (BASE, ADAPTER)
            newest = json.loads(each.cli("agent", "runs", "inspector", "--limit", "1", "--json").stdout)[0]["record"]
            assert (newest["release"], newest["adapter"]) == (BASE, ADAPTER)
            assert [step["tool"] for step in newest["execution"]] == ["drawing", "final_response"]
        adapt = devices[0].cli("agent", "adapt", "inspector").stdout
        assert f"{BASE} was replaced by {BASE} with {ADAPTER}" in adapt, adapt
        until("the devices are told what was used", lambda: used(devices) == told)

    released = registry.get(ADAPTER).manifest
    checks = {each["name"]: each for each in released.evaluation["gate"]["checks"]}
    assert released.evaluation["gate"]["passed"]
    assert (checks["holdout_examples"]["value"], checks["base_examples"]["value"]) == (judging, len(KEPT_ORDERS))
    samples = released.lineage["samples"]
    assert samples["training"] + samples["validation"] == training
    assert samples["provenance"] == {f"person {WHO}": training}
    assert samples["left_out"] == {"in_holdout": len(KEPT_ORDERS)}, (
        "what judges the gate is no part of what was left out"
    )
