"""A fleet whose language model learns by itself: `edged run` twice and a teacher, `trainer serve`, mosquitto (L10-L13).

The devices ask the teacher, an adapter is trained on what it said, goes to a canary, is watched and goes to all. The next
one is sound, proves itself on devices, and says what the teacher does not: it is taken back; only its canary ever had it.
"""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest

from bench.demo.phi import GRAMMAR, PhiExample
from edged.releases import reference
from edged.wire.manifest import Calibration, ReleaseRef, Scaling
from edged.wire.messages import Desired, SampleEntry, Text
from tests.support.device import POLICY, SITE, Bus, Device, tables, toml, until
from tests.support.hosted import ADAPTED, PLAIN, PROMPT, clerk
from tests.support.models import write_manifest
from tests.support.trained import EXAMPLES, SETTINGS, line
from tests.system.broker import Broker
from tests.system.test_canary_devices import Host
from tests.system.test_tiers import alive
from trainer.golden import write_prompt_golden
from trainer.releases import Registry, build_manifest

NAMES = ("d1", "d2")
OTHERS = [each for each in GRAMMAR if each not in EXAMPLES]
GOOD, WORSE = "clerk-lora@1.0", "clerk-lora@1.1"
ROLLOUT = {
    "steps": [0.5, 1.0], "watch_s": 15.0, "items_min": 12, "audits_planned": 12, "extend_max": 20, "failed_grace_s": 2.0,
    "latency_factor": 50.0, "memory_factor": 20.0, "temperature_margin": 90.0,
}  # fmt: skip


def adapter(folder: Path, release: str, file: Path, base: ReleaseRef, answer: str, **more: Any) -> Path:
    """A release of an adapter that answers PROMPT so."""
    folder.mkdir()
    shutil.copy(file, folder / "adapter.gguf")
    roles = {"adapter": "adapter.gguf", **write_prompt_golden(folder, [(PROMPT, answer)])}
    write_manifest(folder, build_manifest(folder, release, kind="lora", engine="llama", roles=roles, base=base, **more))
    return folder


def without_effect(file: Path, out: Path) -> Path:
    """The same adapter, so weak that the model answers as without it."""
    shutil.copy(file, out)
    reader = gguf.GGUFReader(out, "r+")
    field = reader.fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] = 1e-6
    reader.data.flush()
    return out


def teacher(folder: Path, broker: Broker, phi: dict[str, Path]) -> Device:
    """A larger model: here the same one with the plant's new rule on it, and sure of it."""
    base = clerk(folder / "large", phi["model_gguf"], "large@1.0")
    sure = Calibration(method="scaled", answers=Scaling(temperature=1.0, bias=9.0), items=500)
    rule = adapter(folder / "rule", "rule@1.0", phi["adapter_gguf"], reference(base), ADAPTED, calibration=sure)
    plan = tables(folder, "big1", broker, None)
    plan["device"]["tier"] = "big"
    del plan["pipelines"]
    plan["slots"] = {"tongue": {"seed": base, "adapter": rule, "probation_s": 0.5}}
    plan["responders"] = {"r": {"tier": "big", "task": "generate", "slot": "tongue", "policy": POLICY}}
    return Device(folder, plan)


def asker(folder: Path, name: str, broker: Broker, seed: Path) -> Device:
    plan = tables(folder, name, broker, None)
    plan["slots"] = {"clerk": {"seed": seed, "probation_s": 0.5}}
    asks = {"slot": "clerk", "task": "generate", "source": {"type": "mqtt"}, "escalate_to": "big", "answer_by_s": 20.0}
    plan["pipelines"] = {"chat": {**asks, "policy": POLICY}}
    return Device(folder, plan)


def ask_all(bus: Bus, items: Sequence[PhiExample]) -> None:
    """Every question to one of the devices in turn, each answered before the next."""
    for number, item in enumerate(items):
        name = NAMES[number % len(NAMES)]
        reply = bus.reply(bus.ask(name, "chat", generation_prompt=item.prompt), 60)
        assert (reply.decided_by, reply.generated_response) == ("big1", item.adapter), reply


@contextmanager
def asking(bus: Bus) -> Iterator[None]:
    """The devices are asked on and on."""
    stopping = threading.Event()

    def ask() -> None:
        for item in itertools.cycle(OTHERS):
            requests = [bus.ask(name, "chat", generation_prompt=item.prompt) for name in NAMES]
            for request in requests:
                bus.reply(request, 120)
            if stopping.wait(0.7):
                return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def configured(host: Host, broker: Broker, phi: dict[str, Path]) -> None:
    plan = {"name": "host", "site": SITE, "data_dir": "data", "broker": {"port": broker.port}, "http": {"port": 0}}
    model = SETTINGS.format(checkpoint=phi["base"].resolve())
    usual = "".join(f"{each}\n" for each in model.splitlines() if not each.startswith("gate"))
    more = f"threshold = {len(EXAMPLES) - 1}\nholdout_share = 0.0\ncalibration_share = 0.0\n"
    host.config.write_text(toml({**plan, "rollout": ROLLOUT}) + usual + more)
    for name, items in (("target", OTHERS[:16]), ("base", OTHERS[24:40])):
        given = host.config.parent / f"{name}.jsonl"
        given.write_text("".join(f"{line(each)}\n" for each in items))
        assert host.call("holdout", "freeze", "clerk", "--set", name, "--from", str(given))["added"] == 16


def ended(host: Host, release: str) -> dict[str, Any]:
    """The rollout, once it is over or waits for a person."""

    def look() -> dict[str, Any] | None:
        time.sleep(3)  # a command takes a second of this machine
        rows = [row for row in host.call("rollout", "status")["rollouts"] if row["release"] == release]
        return rows[0] if rows and rows[0]["status"] in ("done", "aborted", "held") else None

    return until(f"the rollout of {release} has ended", look, 600)


def ever_told(bus: Bus, release: str) -> set[str]:
    """The devices whose desired state ever named the adapter."""
    heard = [(fields, message) for _, fields, message in list(bus.heard) if isinstance(message, Desired)]
    return {fields["dev"] for fields, told in heard if any(ref.release == release for ref in told.adapters.values())}


def local(bus: Bus, name: str, release: str) -> list[str]:
    """What the device itself answered with a release, before the teacher did."""
    entries = [each for each in bus.of(SampleEntry, name) if each.release == release]
    return [part.text for each in entries for part in each.prediction if isinstance(part, Text)]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_l13_a_fleet_learns_an_adapter_and_takes_a_worse_one_back(
    tmp_path: Path, broker: Broker, bus: Bus, phi: dict[str, Path]
) -> None:
    base = clerk(tmp_path / "clerk-1.0", phi["model_gguf"])
    host = Host(tmp_path / "host", broker)
    configured(host, broker, phi)
    registry = Registry(host.config.parent / "data" / "releases")
    host.call("release", "add", str(base))
    with ExitStack() as stack:
        stack.enter_context(host.serving())
        big = stack.enter_context(teacher(tmp_path, broker, phi))
        big.wait("the plant's rule is on it", lambda s: s["models"]["tongue"]["adapter"] == "rule@1.0")
        alive(bus, "big")
        devices = [stack.enter_context(asker(tmp_path, name, broker, base)) for name in NAMES]
        ask_all(bus, EXAMPLES)
        stack.enter_context(asking(bus))

        def job() -> dict[str, Any]:
            found: list[dict[str, Any]] = host.call("jobs", "--long")
            return found[0] if found else {"status": "none"}

        trained = host.config.parent / "data" / "releases" / GOOD
        until("the adapter is trained and judged", trained.is_dir, 800)
        done = ended(host, GOOD)
        assert (done["status"], done["progress"], done["canary_result"]) == ("done", "2/2 nodes", "passed"), done
        for device in devices:
            device.wait("it runs the adapter", lambda s: s["models"]["clerk"]["adapter"] == GOOD)
        until("the job is over", lambda: job()["status"] == "completed")
        for name in NAMES:
            until("it says what the teacher says", lambda name=name: any(
                said.startswith(("PASS", "HOLD")) for said in local(bus, name, GOOD)))  # fmt: skip

        weak = without_effect(registry.get(GOOD).folder / "adapter.gguf", tmp_path / "weak.gguf")
        worse = adapter(tmp_path / "worse", WORSE, weak, reference(base), PLAIN)
        host.call("release", "add", str(worse))
        (canary,) = host.call("rollout", "start", WORSE, "--unjudged", "made by hand")["canary"]
        back = ended(host, WORSE)
        assert back["status"] == "aborted", back
        assert re.search(r"audited agreement -?0\.0", back["reason"]), back["reason"]
        assert "1/1 are back on the previous release" in back["reason"]
        assert ever_told(bus, WORSE) == {canary}
        assert {name for name in NAMES if local(bus, name, WORSE)} == {canary}
        for device in devices:
            device.wait("the adapter before is on it", lambda s: s["models"]["clerk"]["adapter"] == GOOD)
        shown = {row["device"]: row["models"]["clerk"]["adapter"] for row in host.call("fleet", "status")
                 if "clerk" in row["models"]}  # fmt: skip
        assert shown == dict.fromkeys(NAMES, GOOD)
