"""From `trainer enroll` over `edged enroll` and `edged check` to a real `edged run` that answers others' questions."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edged.clock import SystemClock
from edged.stamp import Stamp
from edged.wire import messages, topics
from tests.support.device import EDGED, SITE, Device, clean_env, tables, until
from tests.support.plant import Client, Plant

ASK = topics.ESCALATION(site=SITE, dev="cam1", tier="big", task="detect").topic


def enrolled(plant: Plant, folder: Path, name: str, seed: Path, **more: Any) -> Device:
    """A device whose configuration has no word of who it is, until its bundle is installed."""
    folder.mkdir(exist_ok=True)
    base = tables(folder, name, plant, seed, **more)
    device = Device(folder, {**base, "device": {**base["device"], "id": "unnamed"}, "broker": {"reconnect_s_max": 1}})
    bundle = folder / f"{name}.edged"
    bundle.write_bytes((plant.folder / f"{name}.edged").read_bytes())
    device.name, device.inbox = name, folder / f"{name}-in"
    device.inbox.mkdir()
    for _ in range(2):  # again: nothing changes
        before = device.config.read_text()
        done = device.cli("enroll", str(bundle), "--unsigned")
        assert done.returncode == 0, done.stderr
    assert device.config.read_text() == before
    return device


def ask(plant: Plant, question: bytes, response_topic: str) -> list[str]:
    """What `edged` never says: a question that names somebody else's topic for the answer. What its asker then hears."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="cam1", protocol=mqtt.MQTTv5)
    certificate, key = plant.certificate("cam1")
    client.tls_set(str(plant.ca), str(certificate), str(key))
    listening = threading.Event()
    heard: list[str] = []
    client.on_connect = lambda *_: client.subscribe(f"edged/v1/{SITE}/cam1/down/verdict", 1)
    client.on_subscribe = lambda *_: listening.set()
    client.on_message = lambda _client, _data, message: heard.append(message.topic)
    client.connect(plant.host, plant.port)
    client.loop_start()
    try:
        assert listening.wait(30)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = response_topic
        properties.CorrelationData = b"mine"
        client.publish(ASK, question, qos=1, properties=properties).wait_for_publish(30)
        until("an answer", lambda: heard)
    finally:
        client.disconnect()
        client.loop_stop()
    return heard


@pytest.mark.timeout(180)
def test_an_enrolled_responder_connects_and_answers_who_asked_and_nobody_else(tmp_path: Path, toy: Path) -> None:
    with Plant(tmp_path / "plant", ["cam1", "cam2"], ["big1"]) as plant:
        device = enrolled(plant, tmp_path, "big1", toy, responders={"big": {"tier": "big", "slot": "eye"}})
        findings = json.loads(device.cli("check", "--json").stdout)
        assert [row for row in findings if row["level"] == "error"] == []
        assert next(row for row in findings if row["name"] == "broker rights")["level"] == "ok"

        aimed = f"edged/v1/{SITE}/cam2/down/verdict"
        with (
            device,
            Client(plant, "cam2", f"edged/v1/{SITE}/cam2/down/#") as victim,
            Client(plant, "host", f"edged/v1/{SITE}/+/up/state") as host,
        ):
            device.wait("it is connected", lambda s: s["broker"] == "connected")
            until("its birth", lambda: topics.STATE(site=SITE, dev="big1").topic in host.topics())
            question = messages.Escalation(
                **Stamp(SystemClock())(), sample="s1", pipeline="line", task="detect", release="toy@1.0",
                reason="unsure", confidence=0.2, image="AAAA", sha256="0" * 64, label_by=2e9, origin="cam2",
            )  # fmt: skip
            # The image is none: it is refused, and that is an answer.
            assert ask(plant, messages.encode(question), aimed) == [topics.VERDICT(site=SITE, dev="cam1").topic]
            assert victim.topics() == []


def test_a_bundle_of_another_plant_does_not_get_in(tmp_path: Path, toy: Path) -> None:
    with Plant(tmp_path / "plant", ["cam1"]) as plant:
        stranger = Plant(tmp_path / "stranger", ["cam1"])
        stranger.port = plant.port
        stranger.trainer("ca", "show")
        text = stranger.settings.read_text()
        stranger.settings.write_text(text.replace("\nport = ", f"\nport = {plant.port} # "))
        stranger.enroll("cam1")
        device = enrolled(stranger, tmp_path, "cam1", toy)
        done = device.cli("check", "--json", "--no-prove")
        assert done.returncode == 1
        broker = next(row for row in json.loads(done.stdout) if row["name"] == "broker")
        assert broker["level"] == "error" and "TLS" in broker["text"]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "no.edged").write_text("{}")
    done = subprocess.run(
        [EDGED, "enroll", tmp_path / "no.edged", "-c", tmp_path / "edged.toml"],
        capture_output=True, text=True, check=False, env=clean_env(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "no.edged: device: Field required; make it again with `trainer enroll`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "edged.toml").exists()
