"""`trainer serve` as a process of its own against a real mosquitto; the devices are Links that act as devices do."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from edged.link import Inbound, Link, LinkOptions
from edged.wire import messages, topics
from edged.wire.messages import Box, CommandState, Metrics, ModelReport, Provenance, Reported, SampleEntry, State
from tests.support.models import write_manifest
from tests.system.broker import Broker
from trainer.core.access import Identity
from trainer.host import new_id
from trainer.releases import Registry, build_manifest

SITE = "plant"
WAIT_S = 40.0
T = TypeVar("T")


def until(what: str, found: Callable[[], T | None], seconds: float = WAIT_S) -> T:
    """The first true value of `found`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Device:
    """What a device says and hears; what it does about it is the test's to say."""

    def __init__(self, broker: Broker, name: str, active: str = "digits@1.0") -> None:
        self.name, self.active, self.update, self.reason = name, active, "idle", ""
        self.boot, self.seq, self.rev = new_id(), 0, 0
        self.desired: dict[str, Any] = {}
        self.adapters: dict[str, str] = {}
        self.policy: dict[str, dict[str, Any]] = {}
        self.ever: set[str] = set()  # releases that it was ever told to run
        self.commands: dict[str, messages.SamplesCommand] = {}
        self.pixels: dict[str, bytes] = {}  # sha256 -> bytes
        self.entries: dict[str, SampleEntry] = {}
        ca, (certificate, key) = (broker.ca, broker.certificate(name)) if broker.ca else (None, (None, None))
        options = LinkOptions(broker.host, broker.port, name, ca, certificate, key, session_expiry_s=3600)
        down = [topics.DESIRED.filter(site=SITE, dev=name), topics.COMMAND.filter(site=SITE, dev=name)]
        self.link = Link(options, down)
        self.link.start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        until("connected", lambda: self.link.connected)
        self.say(topics.STATE, State(**self._envelope(), state="online", device=name, tier="device"))
        self.report()

    def _envelope(self) -> dict[str, Any]:
        self.seq += 1
        return {"id": new_id(), "ts": time.time(), "boot": self.boot, "seq": self.seq}

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                event = self.link.inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(event, Inbound):
                _, fields, message = messages.decode(event.topic, event.payload)
                if isinstance(message, messages.Desired):
                    self.rev = max(self.rev, message.rev)
                    self.desired = {slot: ref.release for slot, ref in message.models.items()}
                    self.adapters = {slot: ref.release for slot, ref in message.adapters.items()}
                    self.policy, self.ever = message.policy, self.ever | set(self.desired.values())
                elif isinstance(message, messages.SamplesCommand):
                    self.commands[fields["id"]] = message
                    if message.action == "list":
                        for entry in list(self.entries.values()):
                            self.say(topics.SAMPLE, entry.model_copy(update=self._envelope()))
                        self.done(fields["id"])
                self.link.acknowledge(event)

    def say(self, route: topics.Route, message: messages.Message, **fields: str) -> None:
        address = route(site=SITE, dev=self.name, **fields)
        until("room", lambda: self.link.publish(address, messages.encode(message)))

    def report(self) -> None:
        model = ModelReport(active=self.active, update=self.update, reason=self.reason)
        self.say(topics.REPORTED, Reported(**self._envelope(), desired_rev=self.rev, models={"digits": model}))

    def catalogue(self, number: int, confidence: float = 0.9, state: str = "labelled") -> str:
        data = f"pixels of {self.name} {number}".encode()
        digest = sha256(data).hexdigest()
        self.pixels[digest] = data
        sample = f"{self.name}-{number}"
        entry = SampleEntry(
            **self._envelope(), sample=sample, pipeline="line", task="detect", model="digits", release="digits@1.0",
            state=state, sha256=digest, bytes=len(data), label=[Box(label="1", box=(0, 0, 5, 5))],
            label_confidence=confidence, provenance=Provenance(kind="model", who="big", release="teacher@1.0"),
            captured=time.time(),
        )  # fmt: skip
        self.entries[sample] = entry
        self.say(topics.SAMPLE, entry)
        return sample

    def window(self, items: int, escalated: int) -> None:
        now = time.time()
        metrics = Metrics(
            **self._envelope(), start=now, end=now + 0.01, pipeline="line", release=self.active, items=items,
            accepted=items - escalated, escalated=escalated,
        )  # fmt: skip
        self.say(topics.METRICS, metrics)

    def claims(self) -> list[tuple[str, messages.SamplesCommand]]:
        return [(key, command) for key, command in list(self.commands.items()) if command.action == "claim"]

    def done(self, command: str) -> None:
        state = CommandState(**self._envelope(), command=command, state="done")
        self.say(topics.COMMAND_STATE, state, type="samples", id=command)

    def install(self) -> None:
        """Do as desired."""
        self.active, self.update = self.desired["digits"], "committed"
        self.report()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.link.stop()


class Trainer:
    """The process, its configuration and its command line."""

    def __init__(self, folder: Path, broker: Broker, rollout: str = "", model: str = "") -> None:
        self.folder, self.config = folder, folder / "trainer.toml"
        folder.mkdir(parents=True, exist_ok=True)
        tls = ""
        if broker.ca:
            certificate, key = broker.certificate("host")
            tls = f'ca = "{broker.ca}"\ncertificate = "{certificate}"\nkey = "{key}"\n'
        self.tls = tls
        self.config.write_text(
            f'name = "host"\nsite = "{SITE}"\ndata_dir = "data"\ncommand_resend_s = 1.0\n'
            f"[broker]\nport = {broker.port}\n{tls}[http]\nport = 0\n{tls}[rollout]\n{rollout}\n"
            '[models.digits]\ncheckpoint = "missing.pt"\nlabels = ["1"]\nimgsz = 32\nholdout = "holdout"\n'
            'holdout_clean = "clean"\ncalibration = "calibration"\nminimum_interval_s = 0\n'
            f"{model}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            command = [sys.executable, "-m", "trainer", "serve", "--config", str(self.config)]
            self._process = subprocess.Popen(command, stderr=log, stdout=log, cwd=Path.cwd())

    def end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(timeout=30)
        self._process = None
        return code

    def stop(self) -> None:
        if self._process is not None:
            self.end(signal.SIGTERM)

    def call(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "trainer", *arguments, "--config", str(self.config), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def register(self, release: str, model: bytes) -> None:
        source = self.folder / release
        source.mkdir()
        (source / "model.onnx").write_bytes(model)
        roles = {"model": "model.onnx"}
        write_manifest(source, build_manifest(source, release, kind="detect", engine="onnx_detect", roles=roles))
        Registry(self.folder / "data" / "releases").register(source)

    def log(self) -> str:
        return (self.folder / "serve.log").read_text()


@contextmanager
def running(
    folder: Path, *names: str, tls: bool = False, rollout: str = "", model: str = ""
) -> Iterator[tuple[Broker, Trainer, list[Device]]]:
    known = [Identity("host", SITE, roles=("trainer",)), *(Identity(name, SITE) for name in names)]
    with Broker(folder / "broker", tls=tls, clients=known if tls else None) as broker:
        trainer = Trainer(folder / "trainer", broker, rollout, model)
        trainer.register("digits@1.0", b"first")
        trainer.start()
        devices = [Device(broker, name) for name in names]
        try:
            yield broker, trainer, devices
        except BaseException:
            print(trainer.log()[-8000:])
            raise
        finally:
            for device in devices:
                device.stop()
            trainer.stop()


def job_of(trainer: Trainer) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = trainer.call("rollout", "status")["jobs"]
    return jobs[0] if jobs else {}


def rollout_of(trainer: Trainer) -> dict[str, Any]:
    found: list[dict[str, Any]] = trainer.call("rollout", "status")["rollouts"]
    return found[0]


@pytest.mark.timeout(180)
def test_samples_are_claimed_uploaded_and_given_back_when_training_fails(tmp_path: Path) -> None:
    """L6, L9, L14: devices hand over exactly the samples of the manifest, and get them back when the training fails."""
    with running(tmp_path, "d1", "d2", tls=True) as (broker, trainer, (first, second)):
        names = {first.catalogue(number) for number in range(60)} | {second.catalogue(number) for number in range(40)}
        for number in range(5):
            first.catalogue(1000 + number, confidence=0.1)  # below the floor: never trains, never counts
        until("all are known", lambda: sum(row["count"] for row in trainer.call("samples", "counts")) == 105)
        time.sleep(1)
        assert job_of(trainer) == {}  # 100 are not more than 100
        until("room", lambda: first.link.publish(topics.SAMPLE(site=SITE, dev="d1"), b'{"sample": 1'))  # stops nothing

        names.add(second.catalogue(40))
        until("both devices are asked", lambda: bool(first.claims() and second.claims()))
        claims = [*first.claims(), *second.claims()]
        assert {sample for _, command in claims for sample in command.samples} == names
        url = claims[0][1].upload_url
        assert url.startswith("https://")

        with client(broker, "d1") as http:
            assert http.get(url.replace("/samples", "/healthz")).status_code == 200
            digest = next(iter(first.pixels))
            wrong = http.put(f"{url}/{digest}", content=b"other bytes")
            assert wrong.status_code == 422
            assert all(each in wrong.json()["error"] for each in (digest, sha256(b"other bytes").hexdigest()))
            foreign = b"nobody asked for this"
            assert http.put(f"{url}/{sha256(foreign).hexdigest()}", content=foreign).status_code == 403
            upload(http, url, first)
            status = http.get(url.replace("/samples", "/status")).json()
            assert status["counters"]["payloads_invalid"] == 1
        with pytest.raises(httpx.HTTPError), httpx.Client(verify=context(broker, None), trust_env=False) as http:
            http.get(url)  # no certificate, no entry

        # A power cut in the middle of the hand-over: the claim is made again, and only what is missing is needed.
        trainer.end(signal.SIGKILL)
        second.commands.clear()
        trainer.start()
        (command_id, claim), *_ = until("the claim is repeated", second.claims)
        with client(broker, "d2") as http:
            upload(http, claim.upload_url, second)
        second.done(command_id)

        job = until("the job has failed", lambda: (j := job_of(trainer)).get("status") == "failed" and j)
        assert "missing.pt" in job["detail"]
        assert "models.digits.checkpoint" in job["detail"]
        assert job["target_model"] == "digits@1.1"
        assert job["metrics"]["samples_used"] == 101
        assert set(job["metrics"]) == {"accuracy", "improvement", "samples_used", "training_time_minutes"}
        assert set(job["deployment"]) == {"status", "progress", "canary_result"}
        released = until("samples are given back", lambda: given_back(first, second))
        assert released == names
        time.sleep(2)
        assert len(trainer.call("rollout", "status")["jobs"]) == 1  # what failed once does not call for training again
        counts = {(row["device"], row["state"]): row["count"] for row in trainer.call("samples", "counts")}
        assert counts == {("d1", "labelled"): 65, ("d2", "labelled"): 41}
        assert list((trainer.folder / "data" / "samples").iterdir()) == []


def given_back(*devices: Device) -> set[str]:
    released = {s for d in devices for c in list(d.commands.values()) if c.action == "release" for s in c.samples}
    return released if len(released) == 101 else set()


def context(broker: Broker, name: str | None) -> Any:
    import ssl

    made = ssl.create_default_context(cafile=str(broker.ca))
    if name is not None:
        made.load_cert_chain(*map(str, broker.certificate(name)))
    return made


def client(broker: Broker, name: str) -> httpx.Client:
    return httpx.Client(verify=context(broker, name), trust_env=False)


def upload(http: httpx.Client, url: str, device: Device) -> None:
    wanted = {s for _, command in device.claims() for s in command.samples}
    for number, (digest, data) in enumerate(list(device.pixels.items())):
        if number < len(wanted):  # the unsure ones come last, and were not asked for
            assert http.put(f"{url}/{digest}", content=data).status_code == 201
            assert http.put(f"{url}/{digest}", content=data).status_code == 200  # again: nothing changes


ROLLOUT = "watch_s = 4\nitems_min = 20\naudits_planned = 0\ninstall_s_max = 60\nfailed_grace_s = 1"


@pytest.mark.timeout(180)
def test_a_release_goes_to_the_canary_and_then_to_all_through_a_power_cut(tmp_path: Path) -> None:
    with running(tmp_path, "d1", "d2", "d3", rollout=ROLLOUT) as (_, trainer, devices):
        trainer.register("digits@1.1", b"second")
        until("three devices are known", lambda: len(trainer.call("fleet", "status")) == 3)
        started = trainer.call("rollout", "start", "digits@1.1", "--unjudged", "made by hand")
        assert len(started["canary"]) == 1
        canary = next(device for device in devices if device.name == started["canary"][0])
        others = [device for device in devices if device is not canary]
        until("the canary is told", lambda: canary.desired == {"digits": "digits@1.1"})
        canary.install()
        until("it is watched", lambda: rollout_of(trainer)["status"] == "watching")
        assert all(device.desired == {} for device in others)

        trainer.end(signal.SIGKILL)
        for _ in range(3):  # what is said while nobody listens waits in the broker
            canary.window(20, 1)
            others[0].window(20, 12)
        trainer.start()
        until("everybody is told", lambda: all(d.desired == {"digits": "digits@1.1"} for d in others))
        for device in others:
            device.install()
        done = until("the rollout is done", lambda: (r := rollout_of(trainer))["status"] == "done" and r)
        assert done["progress"] == "3/3 nodes"
        assert done["canary_result"] == "passed"
        kinds = [row["active"] for d in trainer.call("fleet", "status") for row in d["models"].values()]
        assert kinds == ["digits@1.1"] * 3


@contextmanager
def listening(broker: Broker) -> Iterator[list[str]]:
    """The kinds of the events that whoever subscribes to them at the broker hears."""
    name, kinds, done = "wall", list[str](), threading.Event()
    ca, (certificate, key) = (broker.ca, broker.certificate(name)) if broker.ca else (None, (None, None))
    link = Link(
        LinkOptions(broker.host, broker.port, name, ca, certificate, key), [topics.EVENT.filter(site=SITE, dev="+")]
    )

    def listen() -> None:
        while not done.is_set():
            try:
                found = link.inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(found, Inbound):
                message = messages.decode(found.topic, found.payload)[2]
                assert isinstance(message, messages.Event)
                kinds.append(message.kind)
                link.acknowledge(found)

    thread = threading.Thread(target=listen, daemon=True)
    link.start()
    thread.start()
    try:
        until("the listener is connected", lambda: link.connected)
        yield kinds
    finally:
        done.set()
        thread.join()
        link.stop()


@pytest.mark.timeout(180)
def test_a_canary_that_fails_brings_the_previous_release_back(tmp_path: Path) -> None:
    """And whoever subscribes hears of each phase (L18)."""
    with running(tmp_path, "d1", "d2", rollout=ROLLOUT) as (broker, trainer, devices), listening(broker) as kinds:
        trainer.register("digits@1.1", b"second")
        until("two devices are known", lambda: len(trainer.call("fleet", "status")) == 2)
        started = trainer.call("rollout", "start", "digits@1.1", "--unjudged", "made by hand")
        canary = next(device for device in devices if device.name == started["canary"][0])
        until("the canary is told", lambda: canary.desired == {"digits": "digits@1.1"})
        canary.update, canary.reason = "failed", "golden input 3: expected class 7"
        canary.report()
        until("it is told to go back", lambda: canary.desired == {"digits": "digits@1.0"})
        canary.update = "idle"
        canary.report()
        ended = until("the rollout is aborted", lambda: (r := rollout_of(trainer))["status"] == "aborted" and r)
        assert "golden input 3" in ended["reason"]
        other = next(device for device in devices if device is not canary)
        assert other.desired == {}
        phases = ["rollout_canary", "rollout_aborting", "rollout_aborted"]
        until("events of every phase", lambda: [kind for kind in kinds if kind in phases] == phases)

        # A broker that loses everything is told again what devices shall run.
        canary.desired = {}
        broker.kill9()
        for left in (broker.folder).glob("*.db"):
            os.unlink(left)
        broker.start()
        until("desired state is there again", lambda: canary.desired == {"digits": "digits@1.0"})
