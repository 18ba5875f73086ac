"""`edged run` as a real process from the device's own environment, and someone who listens to what it says."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from edged.clock import SystemClock
from edged.link import Inbound, Link, LinkOptions
from edged.stamp import Stamp
from edged.status_socket import ask_status
from edged.wire import messages, topics
from edged.wire.manifest import ReleaseRef
from tests.system.broker import Broker

EDGED = Path(__file__).parents[2] / "build" / "venv-device" / "bin" / "edged"
SITE = "plant"
# Every item is decided by its own evidence: no lot, and no limit that a burst of alike pictures would meet.
POLICY = {"audit_share": 0.0, "empty_share": 0.0, "dedupe_s": 0.0, "messages_per_minute": 6000}
WAIT_S = 30.0
T = TypeVar("T")
Message = TypeVar("Message", bound=messages.Message)


def until(what: str, found: Callable[[], T | None], seconds: float = WAIT_S) -> T:
    """The first true value of `found`; fails when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)


def toml(tables: dict[str, Any]) -> str:
    """A TOML document; every table in dotted keys."""
    lines = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            text = json.dumps(str(value) if isinstance(value, Path) else value)
            lines.append(f"{prefix} = {text}")

    walk("", tables)
    return "\n".join(lines) + "\n"


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`base` with `more` laid over it, table by table."""
    out = dict(base)
    for key, value in more.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def tables(folder: Path, name: str, at: Broker, seed: Path | None, **more: Any) -> dict[str, Any]:
    """A device with one slot `eye`, fed by the folder `in` and by requests, that asks the tier `big` when unsure."""
    base: dict[str, Any] = {
        "device": {"id": name, "site": SITE, "state_dir": folder / name},
        "broker": {"host": at.host, "port": at.port, "reconnect_s_max": 1},
        "delivery": {"retry_s": 2.0, "window_s": 2.0},
        "host": {"fetch_retry_s": 1.0},
        "trust": {"unsigned": True},
        "slots": {"eye": {"probation_s": 0.5}},
        "pipelines": {
            "line": {
                "slot": "eye", "source": {"type": "directory", "path": folder / f"{name}-in"}, "results": "durable",
                "escalate_to": "big", "policy": POLICY,
            },
            "ask": {
                "slot": "eye", "source": {"type": "mqtt"}, "escalate_to": "big", "answer_by_s": 2.0,
                "policy": POLICY,
            },
        },
    }  # fmt: skip
    if seed is not None:
        base["slots"]["eye"]["seed"] = seed
    if at.ca is not None:
        certificate, key = at.certificate(name)
        base["broker"] |= {"ca": at.ca, "certificate": certificate, "key": key}
    return merged(base, more)


def responder_tables(folder: Path, name: str, broker: Broker, seed: Path) -> dict[str, Any]:
    """A device that answers what others escalate to the tier `big`."""
    base = tables(folder, name, broker, seed, responders={"big": {"tier": "big", "slot": "eye"}})
    return {key: value for key, value in base.items() if key != "pipelines"}


class Device:
    """`with Device(folder, tables) as device:` the process runs and has its model (where it has a seed)."""

    def __init__(
        self, folder: Path, tables: dict[str, Any], *, ready: bool = True,
        program: tuple[str | Path, ...] = (EDGED,), env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._program, self._env = program, env or {}
        self.state_dir = Path(tables["device"]["state_dir"])
        self.name: str = tables["device"]["id"]
        self.config = folder / f"{self.name}.toml"
        self.config.write_text(toml(tables))
        self.inbox = folder / f"{self.name}-in"
        self.inbox.mkdir(exist_ok=True)
        self.log_path = folder / f"{self.name}.log"
        self._ready = ready
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Start the process."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._program, "run", "-c", self.config], stdout=log, stderr=log, env=clean_env() | self._env
            )

    def start(self) -> None:
        """Start the process and wait until it answers."""
        self.spawn()
        until(f"{self.name} answers\n{self.log()}", self.status)
        if self._ready:
            self.wait("its model is loaded", lambda status: all(m["active"] for m in status["models"].values()))

    def status(self) -> dict[str, Any] | None:
        """What `edged status` would show; fails when the process has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with status {self.process.returncode}\n{self.log()}")
        return ask_status(self.state_dir)

    def wait(self, what: str, condition: Callable[[dict[str, Any]], Any], seconds: float = WAIT_S) -> dict[str, Any]:
        """The first status that fulfils `condition`."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if status and condition(status) else None

        try:
            return until(f"{self.name}: {what}", look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(self.status(), indent=1)}\n{self.log()[-6000:]}") from None

    def counted(self, name: str, at_least: int = 1, seconds: float = WAIT_S) -> dict[str, Any]:
        """The status once a counter has come so far."""
        return self.wait(f"{name} >= {at_least}", lambda s: s["counters"].get(name, 0) >= at_least, seconds)

    def log(self) -> str:
        """Everything that the process has logged."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `edged` command on the same configuration."""
        return subprocess.run(
            [EDGED, *arguments, "-c", self.config],
            capture_output=True,
            text=True,
            timeout=60,
            env=clean_env(),
            check=False,
        )

    def signal(self, number: int) -> int:
        """Send a signal and wait for the end; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            status = self.process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not end on signal {number}\n{self.log()[-6000:]}") from None
        self.process = None
        return status

    def stop(self) -> int:
        """End it in order."""
        return self.signal(signal.SIGTERM)

    def kill9(self) -> None:
        """End it as a power cut would."""
        self.signal(signal.SIGKILL)

    def __enter__(self) -> Device:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


def clean_env() -> dict[str, str]:
    """This process's environment without anything that would configure the device."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("EDGED_", "PYTHONPATH"))}


class Bus:
    """A client of the broker that hears everything, and may say anything."""

    def __init__(self, broker: Broker, name: str = "observer") -> None:
        certificate, key = broker.certificate(name) if broker.ca else (None, None)
        options = LinkOptions(broker.host, broker.port, name, broker.ca, certificate, key, reconnect_s_max=1)
        self.link = Link(options, [route.filter() for route in topics.ROUTES if not route.raw])
        self.stamp = Stamp(SystemClock())
        self.heard: list[tuple[str, dict[str, str], messages.Message]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="bus", daemon=True)
        self.link.start()
        self._thread.start()
        until("the observer is connected", lambda: self.link.connected)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                event = self.link.inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(event, Inbound):
                self.link.acknowledge(event)
                try:
                    _, fields, message = messages.decode(event.topic, event.payload)
                except messages.InvalidPayload:
                    continue
                self.heard.append((event.topic, fields, message))

    def of(self, kind: type[Message], device: str | None = None) -> list[Message]:
        """Every message of this type (from this device), in the order of arrival."""
        return [m for _, f, m in list(self.heard) if isinstance(m, kind) and device in (None, f.get("dev"))]

    def reply(self, request: str, seconds: float = WAIT_S) -> messages.InferReply:
        """The reply to a request."""

        def find() -> messages.InferReply | None:
            return next((m for m in self.of(messages.InferReply) if m.request == request), None)

        return until(f"a reply to {request}", find, seconds)

    def say(self, address: topics.Address, message: messages.Message | bytes) -> None:
        """Publish a message, or bytes that are none."""
        payload = message if isinstance(message, bytes) else messages.encode(message)
        until("room to publish", lambda: self.link.publish(address, payload))

    def desire(self, device: str, rev: int, models: dict[str, ReleaseRef], **more: Any) -> None:
        """Tell a device what it shall run (retained)."""
        address = topics.DESIRED(site=SITE, dev=device)
        self.say(address, messages.Desired(**self.stamp(), rev=rev, models=models, **more))

    def online(self, device: str) -> None:
        """Wait for the device's birth: from then on it is subscribed."""
        until(f"{device} is online", lambda: any(s.state == "online" for s in self.of(messages.State, device)))  # type: ignore[attr-defined]

    def ask(self, device: str, pipeline: str, **fields: Any) -> str:
        """Send a request to a pipeline, once the device has announced itself; its id.

        Before its first birth nobody is subscribed, and the broker drops what it cannot deliver.
        """
        self.online(device)
        request = messages.InferRequest(**self.stamp(), **fields)
        self.say(topics.INFER(site=SITE, dev=device, pipeline=pipeline), request)
        return request.id

    def close(self) -> None:
        """Stop listening."""
        self._stopping.set()
        self._thread.join()
        self.link.stop()
