"""A plant as its operator sets it up: an authority, enrolled devices, and a mosquitto with the configuration that was
written for it; all by the commands that he would give."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from edged.link import Connected, Inbound, Link, LinkOptions, Published
from edged.wire.topics import Address
from tests.support.device import SITE, until
from tests.support.ports import free_port
from tests.system.broker import Broker
from trainer.cli import app

HOST = "127.0.0.1"
RELOAD = "kill -HUP {pid}"


class Plant(Broker):
    """`with Plant(folder, ["cam1"]) as plant:` a broker that knows the trainer `host` and these names, enrolled."""

    def __init__(self, folder: Path, devices: list[str], responders: list[str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.host, self.port = folder, HOST, free_port()
        self.settings = folder / "trainer.toml"
        self._process = None
        self._configure("true")
        self.trainer("ca", "init")
        self.trainer("ca", "issue", "broker", "--role", "broker", "--host", HOST)
        self.trainer("ca", "issue", "host", "--role", "trainer", "--host", HOST)
        for name in devices:
            self.enroll(name)
        for name in responders or []:
            self.enroll(name, "--responder")
        self.trainer("broker", "config", "--listen", HOST, "--user", "root")
        self.ca = folder / "ca" / "ca.crt"
        self._config = folder / "mosquitto" / "mosquitto.conf"

    def _configure(self, reload: str) -> None:
        self.settings.write_text(
            f'name = "host"\nsite = "{SITE}"\ndata_dir = "data"\n[broker]\nport = {self.port}\nhost = "{HOST}"\n'
            f'[enrolment]\nbroker_folder = "mosquitto"\nbroker_reload = "{reload}"\n'
        )

    def start(self) -> None:
        """Start mosquitto; `trainer revoke` can have it read its lists again."""
        super().start()
        assert self._process is not None
        self._configure(RELOAD.format(pid=self._process.pid))

    def trainer(self, *arguments: str, ok: bool = True) -> Result:
        """A command of `trainer`; fails when it does."""
        done = CliRunner().invoke(app, [*arguments, "--config", str(self.settings)])
        assert (done.exit_code == 0) is ok, done.output
        return done

    def enroll(self, name: str, *options: str) -> Path:
        """The bundle of a device that takes unsigned releases."""
        self.trainer("enroll", name, "--unsigned", "--out", str(self.folder), *options)
        return self.folder / f"{name}.edged"

    def certificate(self, cn: str) -> tuple[Path, Path]:
        """The files of somebody who is enrolled."""
        issued = self.folder / "ca" / "issued"
        return issued / f"{cn}.crt", issued / f"{cn}.key"


class Client:
    """A connection with the certificate of `cn`, that hears and says whatever it is told to."""

    def __init__(self, plant: Broker, cn: str, *topics: str, client_id: str | None = None, session_s: int = 0) -> None:
        certificate, key = plant.certificate(cn)
        options = LinkOptions(
            plant.host, plant.port, client_id or cn, plant.ca, certificate, key,
            session_expiry_s=session_s, reconnect_s_max=1,
        )  # fmt: skip
        self.link = Link(options, topics)
        self.heard: list[Inbound] = []
        self.connections = 0
        self.reasons: list[str] = []
        self._answers: dict[int, str] = {}
        self.link.start()

    def __enter__(self) -> Client:
        until("a connection", lambda: self.poll() or self.connections)
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()

    def poll(self) -> None:
        """Take in what has happened."""
        while not self.link.inbox.empty():
            event = self.link.inbox.get()
            if isinstance(event, Inbound):
                self.link.acknowledge(event)
                self.heard.append(event)
            elif isinstance(event, Published):
                self._answers[event.ref] = event.error
            elif isinstance(event, Connected):
                self.connections += 1
            else:
                self.reasons.append(event.reason)

    def say(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """Publish with QoS 1; what the broker has against it, empty when nothing.

        The broker answers in order: our subscriptions are answered by then too."""
        number = len(self._answers) + 1
        until("room", lambda: self.link.publish(Address(topic, 1, retain, None), payload, number))
        return until(
            f"an answer to {topic}",
            lambda: self.poll() or ([self._answers[number]] if number in self._answers else None),
        )[0]

    def topics(self) -> list[str]:
        """What it heard so far."""
        self.poll()
        return [message.topic for message in self.heard]
