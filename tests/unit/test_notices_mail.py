"""People are told by mail, by a server on loopback, of what goes wrong too; and which addresses are taken (L18)."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_notices import Desk
from tests.unit.test_rollouts import HOUR, NEW, QUICK, World, job_of
from trainer.config import ConfigError
from trainer.config_fleet import Notify
from trainer.notices import Notices, _addresses

WAIT_S = 30.0


class Mail:
    """A mail server that takes everything (RFC 5321, as much as a client needs)."""

    def __init__(self) -> None:
        self.letters: list[str] = []
        self.to: list[str] = []
        mail = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 sink\r\n")
                for line in self.rfile:
                    word = line[:4].upper()
                    if word == b"DATA":
                        self.wfile.write(b"354 go on\r\n")
                        mail.letters.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                    elif word == b"RCPT":
                        mail.to.append(line.decode().split("<")[1].split(">")[0])
                    self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 sink\r\n")
                    if word == b"QUIT":
                        return

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        port = self.server.server_address[1]
        self.url = f"mailto://127.0.0.1:{port}/?smtp=127.0.0.1&from=trainer@plant.example&to=shift@plant.example"


@pytest.fixture
def mail() -> Iterator[Mail]:
    found = Mail()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_l18_a_rollout_that_is_held_is_told_by_mail(tmp_path: Path, mail: Mail) -> None:
    desk = Desk(tmp_path, mail.url)
    desk.say("digits@1.1 watching -> held: too little evidence")
    desk.notices.start()
    try:
        until = time.monotonic() + WAIT_S
        while desk.states() != ["sent"] and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        desk.notices.stop()
    assert desk.states() == ["sent"]
    assert mail.to == ["shift@plant.example"]
    (letter,) = mail.letters
    assert "rollout held" in letter
    assert "too little evidence" in letter


@pytest.mark.parametrize(
    ("rollout", "accuracy", "told"),
    [
        (
            QUICK,
            0.5,
            ["rollout canary", "rollout watching", "rollout aborting", "rollout aborted", "training rolled back"],
        ),
        # Nobody checks as many answers as a pass asks for: a person has to say.
        (
            QUICK.replace("120", "100000") + "\nextend_max = 0",
            0.9,
            ["rollout canary", "rollout watching", "rollout held"],
        ),
    ],
)
def test_l18_a_rollout_that_does_not_pass_is_told(
    tmp_path: Path, mail: Mail, rollout: str, accuracy: float, told: list[str]
) -> None:
    world = World(tmp_path, rollout=rollout)
    notify = Notify(urls=[mail.url])  # type: ignore[list-item]
    world.host.config = world.host.config.model_copy(update={"notify": notify})
    world.past()
    world.accuracy[NEW] = accuracy
    world.begin()
    job_of(world, ["s1"])
    world.live(4 * HOUR)
    notices = Notices(notify, world.host.database, lambda: world.clock)
    notices.tick()
    subjects = [line.partition("host: ")[2] for letter in mail.letters for line in letter.splitlines()
                if line.startswith("Subject: ")]  # fmt: skip
    assert [each for each in subjects if each != "rollout unjudged"] == told
    assert NEW in mail.letters[-1]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("mailtos://user:secret@mail.plant.example?to=shift@plant.example", "mailtos"),
        ("mailto://user:secret@plant.example", "mailto"),
        ("matrixs://user:secret@chat.plant.example/#line3", "matrixs"),
        ("mmosts://chat.plant.example/3ccdd113474722377935511fc85d3dd4", "mmosts"),
        ("json://hooks.plant.example/path", "json"),
    ],
)
def test_l18_mail_chat_and_webhooks_are_addresses(url: str, kind: str) -> None:
    ((_, name, _),) = _addresses(Notify(urls=[url]))  # type: ignore[list-item]
    assert kind in name
    assert "secret" not in name


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError):
        list(_addresses(Notify(urls=["nobody://plant.example"])))  # type: ignore[list-item]
