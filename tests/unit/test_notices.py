"""People are told of every change (L18), by real addresses: webhooks that answer, refuse, hang or are not there."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.unit.test_jobs import ALL, World, finished
from trainer import notices as module
from trainer.child import METADATA
from trainer.config import ConfigError, load_config
from trainer.config_fleet import Notify
from trainer.core.notices import Waiting, level, pause_s, plan, wanted
from trainer.database import events, notices
from trainer.files import write_json
from trainer.notices import Notices

pytestmark = pytest.mark.usefixtures("each_database")

SECRET = "t0ken-in-the-path"


class Hook:
    """A webhook on loopback. `status` is what it answers; `hang` until it is set."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.status, self.hang, self.asked = 200, threading.Event(), threading.Event()
        self.hang.set()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                hook.asked.set()
                hook.hang.wait(20)
                if hook.status == 200:
                    hook.said.append(body)
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"json://user:{SECRET}@127.0.0.1:{self.server.server_port}/{SECRET}"

    def close(self) -> None:
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


class Desk:
    """A trainer whose events go to these addresses, with a clock of its own."""

    def __init__(self, folder: Path, *urls: str, **settings: Any) -> None:
        self.world, self.clock = World(folder), 1_000_000.0
        self.notify = Notify(urls=list(urls), **settings)
        self.world.host.config = self.world.host.config.model_copy(update={"notify": self.notify})
        self.notices = self.again()

    def again(self) -> Notices:
        return Notices(self.notify, self.world.host.database, lambda: self.clock)

    def say(self, *texts: str, kind: str = "rollout_held") -> None:
        for text in texts:
            with self.world.host.database.write() as connection:
                self.world.host.announce(connection, kind, text)

    def states(self) -> list[str]:
        with self.world.host.database.read() as connection:
            return list(connection.execute(select(notices.c.state).order_by(notices.c.created)).scalars())


def test_l18_every_change_of_a_training_and_its_rollout_is_told(tmp_path: Path, hook: Hook) -> None:
    desk = Desk(tmp_path, hook.url)
    world = desk.world
    world.jobs.tick()
    world.upload(*ALL)
    world.jobs.tick()
    run = world.host.config.runs / world.job()["id"]
    world.release(run / "candidate", "digits@1.1", b"second")
    (run / "model.pt").write_bytes(b"weights")
    write_json(run / METADATA, {"outcome": "passed", "reason": "the gate passed", "summary": {}})
    world.jobs.tick()
    for _ in range(3):
        world.rollouts.tick()
    (canary,) = world.told()
    world.report(canary, "digits@1.1", "committed")
    world.rollouts.tick()
    world.window(canary, "digits@1.1", 5)
    other = "d2" if canary == "d1" else "d1"
    world.window(other, "digits@1.0", 50)
    for _ in range(3):
        world.rollouts.tick()
    for device in ("d1", "d2"):
        world.report(device, "digits@1.1", "committed")
    for _ in range(3):
        world.rollouts.tick()
        world.jobs.tick()
    assert world.job()["status"] == "completed"
    desk.notices.tick()
    told = [body["title"].removeprefix("host: ") for body in hook.said]
    assert told == [
        "training triggered", "training samples ready", "training passed", "rollout canary", "rollout watching",
        "rollout rolling", "rollout done", "training completed",
    ]  # fmt: skip
    assert "digits@1.1" in hook.said[-1]["message"]
    assert [hook.said[-1]["type"], hook.said[0]["type"]] == ["success", "info"]
    assert desk.notices.counters["notices_sent"] == 8
    desk.notices.tick()
    assert len(hook.said) == 8


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_l18_a_training_that_came_to_nothing_is_told(tmp_path: Path, hook: Hook, how: str) -> None:
    desk = Desk(tmp_path, hook.url)
    finished(desk.world, how)
    desk.notices.tick()
    assert hook.said[-1]["title"] == f"host: training {how}"
    assert hook.said[-1]["type"] == ("warning" if how == "refused" else "failure")


def test_what_fails_is_tried_again_with_growing_pauses_and_nothing_is_lost_or_out_of_order(
    tmp_path: Path, hook: Hook
) -> None:
    desk = Desk(tmp_path, hook.url, retry_s=10)
    hook.status = 503
    desk.say("one", "two")
    tried = []
    for _ in range(200):
        before = desk.notices.counters["notices_failed"]
        desk.notices.tick()
        if desk.notices.counters["notices_failed"] > before:
            tried.append(desk.clock)
        desk.clock += 1
    assert [later - sooner for sooner, later in pairwise(tried)] == [10, 20, 40, 80]
    hook.status = 200
    desk.clock += 3600
    desk.notices = desk.again()  # another process goes on with it
    desk.notices.tick()
    assert [body["message"] for body in hook.said] == ["one", "two"]


def test_what_fails_for_good_is_given_up_and_counted_and_the_next_one_goes_out(tmp_path: Path, hook: Hook) -> None:
    desk = Desk(tmp_path, hook.url, retry_s=1, tries_max=3)
    hook.status = 410
    desk.say("one")
    for _ in range(3):
        desk.notices.tick()
        desk.clock += 3600
    assert desk.states() == ["given_up"]
    assert (desk.notices.counters["notices_failed"], desk.notices.counters["notices_given_up"]) == (3, 1)
    hook.status = 200
    desk.say("two")
    desk.notices.tick()
    assert [body["message"] for body in hook.said] == ["two"]


def test_a_dead_address_does_not_keep_the_other_one_waiting(tmp_path: Path, hook: Hook) -> None:
    dead = Hook()
    dead.close()
    desk = Desk(tmp_path, dead.url, hook.url)
    desk.say("one")
    desk.notices.tick()
    desk.notices.tick()
    assert [body["message"] for body in hook.said] == ["one"]
    assert desk.states().count("sent") == 1


def test_people_get_no_more_messages_an_hour_than_they_want_and_still_hear_of_everything(
    tmp_path: Path, hook: Hook
) -> None:
    desk = Desk(tmp_path, hook.url, per_hour=4)
    desk.say(*(f"event {number}" for number in range(10)))
    desk.notices.tick()
    assert [body["title"] for body in hook.said] == ["host: rollout held"] * 3 + ["7 events"]
    assert hook.said[3]["message"].splitlines() == [f"event {number}" for number in range(3, 10)]
    desk.say("late")
    desk.clock += 1800
    desk.notices = desk.again()  # a new process has not forgotten how many there were
    desk.notices.tick()
    assert len(hook.said) == 4
    desk.clock += 1801
    desk.notices.tick()
    assert hook.said[4]["message"] == "late"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 80), st.integers(0, 70), st.integers(1, 60))
def test_a_plan_tells_of_everything_once_or_of_nothing(count: int, sent: int, per_hour: int) -> None:
    waiting = [Waiting(str(number), "t", "text") for number in range(count)]
    messages = plan(waiting, sent, per_hour)
    assert len(messages) <= max(0, per_hour - sent)
    if messages:
        assert [key for message in messages for key in message.ids] == [each.id for each in waiting]


def test_secrets_are_shown_nowhere(tmp_path: Path, hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    desk = Desk(tmp_path, hook.url, tries_max=2, retry_s=1)
    hook.status = 500
    desk.say("one")
    desk.notices.tick()
    hook.close()
    desk.clock += 10
    desk.notices.tick()
    assert desk.notices.counters["notices_given_up"] == 1
    assert "notify.urls[0] (json): not told after 2 tries" in caplog.text
    for text in (caplog.text, repr(desk.notify), desk.notify.model_dump_json(), repr(desk.world.host.config)):
        assert SECRET not in text
    with desk.world.host.database.read() as connection:
        rows = [*connection.execute(select(notices)), *connection.execute(select(events))]
    assert len(rows) == 2
    assert SECRET not in str(rows)
    desk.world.host.database.close()
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / "data").glob("trainer.sqlite*"))


@pytest.mark.parametrize("url", [f"nonsense://{SECRET}", f"{SECRET}", f"json:///{SECRET}:{SECRET}@"])
def test_an_address_that_means_nothing_is_named_by_its_place_alone(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"notify.urls\[1\]") as caught:
        Desk(tmp_path, "json://127.0.0.1", url)
    assert SECRET not in str(caught.value).replace(f"({SECRET})", "" if url == SECRET else SECRET)


def test_a_configuration_that_is_wrong_does_not_show_them_either(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    for table in (f'[notify]\nurls = ["json://{SECRET}", 7]', f'[database]\nurl = "mysql://root:{SECRET}@db/x"'):
        path.write_text(table)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert SECRET not in str(caught.value)


def test_an_address_that_hangs_holds_nobody_up(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "STOP_S_MAX", 0.2)
    desk = Desk(tmp_path, hook.url)
    hook.hang.clear()
    desk.notices.start()
    desk.say("one")
    assert hook.asked.wait(20)
    desk.say("two")  # rows are written and orders carried out while the address keeps its sender waiting
    assert desk.world.jobs.train_now("digits")["action"] == "training_triggered"
    assert hook.said == []
    desk.notices.stop()
    hook.hang.set()
    until = time.monotonic() + 20
    while not hook.said and time.monotonic() < until:
        time.sleep(0.02)
    assert hook.said[0]["message"] == "one"


def test_too_much_is_dropped_from_the_end_and_counted(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 5)
    desk = Desk(tmp_path, hook.url)
    hook.status = 500
    desk.say(*(f"event {number}" for number in range(9)))
    desk.notices.tick()
    assert desk.notices.counters["notices_dropped"] == 4
    assert len(desk.states()) == 5


@pytest.mark.parametrize(
    ("kind", "told"), [("training_failed", True), ("rollout_held", True), ("root_expires", True), ("pull_done", False)]
)
def test_which_kinds_are_told(kind: str, told: bool) -> None:
    assert wanted(Notify().kinds, kind) is told


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [("notice", "error", "failure"), ("training_rolled_back", "", "warning"), ("pull_started", "", "info")],
)
def test_levels(kind: str, said: str, expected: str) -> None:
    assert level(kind, said) == expected


def test_pauses_end_at_an_hour() -> None:
    assert [pause_s(tries, 10) for tries in (1, 2, 3, 20, 10_000)] == [10, 20, 40, 3600, 3600]
