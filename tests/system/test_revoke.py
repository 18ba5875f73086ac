"""`trainer revoke` at a real broker and a real HTTPS server: out at once, and out for good, and nobody else with it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.device import until
from tests.support.plant import Client, Plant
from trainer.releases import Registry
from trainer.server import Server, ServerOptions

UP = "edged/v1/plant/{}/up/event"
RETRIES_S = 4.0  # the client tries to come back every second


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    with Plant(tmp_path, ["cam1", "cam2"]) as running:
        yield running


def gone(client: Client) -> None:
    """It was thrown out, and for a while neither comes back nor says anything."""
    until("it is thrown out", lambda: client.poll() or not client.link.connected)
    before = client.connections
    deadline = time.monotonic() + RETRIES_S
    while time.monotonic() < deadline:
        client.poll()
        assert client.connections == before
        assert client.link.room() == 0  # nothing can be handed over
        time.sleep(0.1)
    assert len(client.reasons) > 1, client.reasons  # it did try


def refused(plant: Plant, cn: str) -> None:
    """A new connection with its certificate is not taken."""
    client = Client(plant, cn)
    try:
        until("it is refused", lambda: client.poll() or client.reasons)
        assert client.connections == 0
    finally:
        client.link.stop()


def test_who_is_revoked_is_thrown_out_and_stays_out_and_the_others_do_not_notice(plant: Plant) -> None:
    with Client(plant, "cam1") as stolen, Client(plant, "cam1~blk") as bulk, Client(plant, "cam2") as other:
        assert stolen.say(UP.format("cam1")) == ""
        plant.trainer("revoke", "cam1", "--reason", "stolen at gate 3")
        gone(stolen)
        gone(bulk)
        assert other.say(UP.format("cam2")) == ""
        assert other.connections == 1

    rows = {row["name"]: row for row in json.loads(plant.trainer("ca", "show", "--json").stdout)}
    assert rows["cam1"]["reason"] == "stolen at gate 3"
    assert rows["cam1"]["revoked"] and not rows["cam2"]["revoked"]

    plant.stop()  # what was revoked outlives the broker, however it ends
    plant.start()
    refused(plant, "cam1")
    plant.kill9()
    plant.start()
    refused(plant, "cam1~blk")
    with Client(plant, "cam2") as other:
        assert other.say(UP.format("cam2")) == ""


def test_the_broker_shows_nothing_more_of_who_is_revoked(plant: Plant) -> None:
    up = "edged/v1/plant/{}/up/{}"
    for name in ("cam1", "cam2"):
        with Client(plant, name) as device:
            for topic in ("state", "reported"):
                assert device.say(up.format(name, topic), retain=True) == ""
    with Client(plant, "cam1"):
        plant.trainer("revoke", "cam1")
    with Client(plant, "host", up.format("+", "state"), up.format("+", "reported")) as host:
        until("what it retains", lambda: len(host.topics()) >= 2)
        assert sorted(host.topics()) == [up.format("cam2", "reported"), up.format("cam2", "state")]


def test_a_revoked_device_comes_back_with_new_certificates_only(plant: Plant, tmp_path: Path) -> None:
    plant.trainer("revoke", "cam1", "--reason", "lost")
    old = [path.read_bytes() for path in plant.certificate("cam1")]
    done = plant.trainer("enroll", "cam1", "--unsigned", ok=False)
    assert "cam1 is revoked (lost): --renew gives it new certificates" in done.output
    done = plant.trainer("broker", "admit", "cam1", ok=False)
    assert "cam1 is revoked" in done.output

    plant.enroll("cam1", "--renew")
    plant.trainer("broker", "admit", "cam1")
    with Client(plant, "cam1") as back:
        assert back.say(UP.format("cam1")) == ""
    for path, data in zip(plant.certificate("cam1"), old, strict=True):  # who has the old ones is still out
        path.write_bytes(data)
    refused(plant, "cam1")


def test_what_could_not_be_done_is_said_and_done_by_the_same_command(plant: Plant) -> None:
    plant.stop()
    done = plant.trainer("revoke", "cam1", "--wait", "1", ok=False)
    assert "the broker's reload" in done.output and "the broker's client" in done.output
    assert "give `trainer revoke cam1` again" in done.output
    plant.start()
    refused(plant, "cam1")  # the list was placed, though nobody could be told
    plant.trainer("revoke", "cam1")
    done = plant.trainer("revoke", "nobody", ok=False)
    assert "'nobody' was never enrolled here; `trainer ca show`" in done.output


@pytest.fixture
def https(plant: Plant, tmp_path: Path) -> Iterator[Server]:
    certificate, key = plant.certificate("host")
    served = Server(
        ServerOptions("127.0.0.1", 0, 1000, plant.ca, certificate, key),
        Registry(tmp_path / "releases"),
        tmp_path / "samples",
        claimed=lambda _: False,
        status=lambda: {},
        arrived=lambda _: None,
    )
    served.start()
    yield served
    served.stop()


def browser(plant: Plant, server: Server, cn: str) -> httpx.Client:
    context = ssl.create_default_context(cafile=plant.ca)
    context.load_cert_chain(*plant.certificate(cn))
    return httpx.Client(base_url=server.url, verify=context, trust_env=False)


def shakes_hands(plant: Plant, server: Server, cn: str) -> bool:
    """Whether the server waits for a request, and does not end the connection before there is one."""
    context = ssl.create_default_context(cafile=plant.ca)
    context.load_cert_chain(*plant.certificate(cn))
    with socket.create_connection(("127.0.0.1", server.port), timeout=2.0) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.recv(1) != b""
        except TimeoutError:
            return True
        except OSError:
            return False


def test_the_https_server_refuses_it_too_without_a_restart(plant: Plant, https: Server) -> None:
    with browser(plant, https, "cam1") as stolen, browser(plant, https, "cam2") as other:
        assert stolen.get("/healthz").status_code == 200
        assert other.get("/healthz").status_code == 200
        plant.trainer("revoke", "cam1")
        assert not shakes_hands(plant, https, "cam1")
        assert shakes_hands(plant, https, "cam2")
        for _ in range(3):  # on the connection that it has, and on new ones
            with pytest.raises(httpx.HTTPError):
                stolen.get("/healthz")
        assert other.get("/healthz").status_code == 200
        with browser(plant, https, "cam2") as fresh:
            assert fresh.get("/healthz").status_code == 200


def test_a_list_that_cannot_be_read_opens_no_door(plant: Plant, https: Server) -> None:
    plant.trainer("revoke", "cam1")
    with browser(plant, https, "cam1") as stolen, pytest.raises(httpx.HTTPError):
        stolen.get("/healthz")
    (plant.folder / "ca" / "crl.pem").unlink()
    with browser(plant, https, "cam1") as stolen, pytest.raises(httpx.HTTPError):
        stolen.get("/healthz")
    with browser(plant, https, "cam2") as other:
        assert other.get("/healthz").status_code == 200
