"""`trainer serve` is killed by SIGKILL again and again while it carries out orders, on SQLite and on PostgreSQL.

Every training and every rollout that was asked for is there once, and every order has the answer of its one execution.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from edged.wire.messages import ModelReport, Reported, SampleEntry, State
from tests.support.postgres import Postgres
from tests.system.broker import free_port
from trainer import fleet
from trainer.config import load_config
from trainer.database import Database, commands, desired, events, jobs, leases, requests, rollouts, samples
from trainer.files import write_whole
from trainer.host import Host, new_id
from trainer.orders import place
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes

ROOT = Path(__file__).parents[2]
KILLS, MODELS, NOTES = 4, 12, 24
WAIT_S = 90.0


class Fleet:
    """A trainer's folder with twelve models, each on a device that has samples of it and a release to go to."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.path = folder, folder / "trainer.toml"
        tables = "".join(
            f'[models.m{number}]\ncheckpoint = "x.pt"\nlabels = ["1"]\nholdout = "h"\nholdout_clean = "c"\n'
            'calibration = "k"\n'
            for number in range(MODELS)
        )
        where = f'[database]\nurl = "{url}"\n' if url else ""
        self.path.write_text(
            f'name = "host"\ndata_dir = "data"\n{where}[broker]\nport = {free_port()}\n[http]\nport = 0\n{tables}'
        )
        config = load_config(self.path)
        self.database = Database(config.database_at)
        self.host = Host(config, self.path, self.database, Registry(config.releases))
        for number in range(MODELS):
            self._fill(f"m{number}")

    def _fill(self, model: str) -> None:
        for version in ("1.0", "1.1"):
            folder = self.folder / f"{model}-{version}"
            folder.mkdir()
            (folder / "model.onnx").write_bytes(folder.name.encode())
            made = build_manifest(
                folder, f"{model}@{version}", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"}
            )
            judged = made.model_copy(update={"evaluation": {"gate": {"passed": True, "checks": []}}})
            write_whole(folder / MANIFEST, canonical_bytes(judged))
            self.host.registry.register(folder)
        device = f"on-{model}"
        report = Reported(**self.host.envelope(), models={model: ModelReport(active=f"{model}@1.0")})
        with self.database.write() as connection:
            birth = State(**self.host.envelope(), state="online", device=device)
            fleet.take_state(connection, device, birth, self.host.now())
            fleet.take_reported(connection, device, report, self.host.now())
            for number in range(3):
                entry = SampleEntry(
                    **self.host.envelope(), sample=new_id(), pipeline="p", task="detect", model=model,
                    release=f"{model}@1.0", state="labelled", sha256=f"{number:064}", bytes=3, label_confidence=0.9,
                    captured=0.0,
                )  # fmt: skip
                fleet.take_sample(connection, device, entry)

    def serve(self) -> subprocess.Popen[bytes]:
        with (self.folder / "serve.log").open("ab") as log:
            command = [sys.executable, "-m", "trainer", "serve", "--config", str(self.path)]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def answers(self) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(select(requests).order_by(requests.c.created)))

    def done(self) -> int:
        return sum(row.answer is not None for row in self.answers())


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.001)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_at_any_point_no_job_or_rollout_is_lost_or_doubled(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    url = ""
    if kind == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.url("killed")
    world, dice = Fleet(tmp_path, url), random.Random(7)
    orders: dict[str, tuple[str, str]] = {}
    for number in range(MODELS):
        kind_of = "train" if number % 2 else "rollout_start"
        body = {"model": f"m{number}"} if number % 2 else {"release": f"m{number}@1.1"}
        orders[place(world.database, kind_of, body)] = (kind_of, f"m{number}")
        for note in range(NOTES // MODELS):
            body = {"title": "", "text": f"note {number} {note}", "level": "info"}
            orders[place(world.database, "notify", body)] = ("notify", f"note {number} {note}")
    process = world.serve()
    try:
        for kill in range(KILLS):
            target = min(len(orders) - 1, world.done() + dice.randrange(1, 2 * len(orders) // KILLS))
            until(f"{target} answers before kill {kill}", lambda target=target: world.done() >= target)  # type: ignore[misc]
            time.sleep(dice.random() * 0.004)
            process.kill()
            process.wait()
            process = world.serve()
        until("every answer", lambda: world.done() == len(orders))
        until("every rollout is on its way", lambda: phases(world) == {"canary"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    except BaseException:
        print((tmp_path / "serve.log").read_text()[-4000:])
        raise
    finally:
        process.kill()
        process.wait()
    check(world, orders)
    world.database.close()


def phases(world: Fleet) -> set[str]:
    with world.database.read() as connection:
        return set(connection.execute(select(rollouts.c.phase)).scalars())


def check(world: Fleet, orders: dict[str, tuple[str, str]]) -> None:
    answers = {row.id: row.answer for row in world.answers()}
    assert answers.keys() == orders.keys()
    errors = {orders[key]: answer["error"] for key, answer in answers.items() if "error" in answer}
    assert errors == {}  # one that was carried out twice finds its own first execution in its way
    with world.database.read() as connection:
        trained = {row.id: row.model for row in connection.execute(select(jobs))}
        rolled = {row.id: row.model for row in connection.execute(select(rollouts))}
        said = Counter((row.kind, row.text) for row in connection.execute(select(events)))
        claims = Counter(row.device for row in connection.execute(select(commands)) if row.body["action"] == "claim")
    assert trained == {answers[key]["training_job_id"]: what for key, (kind, what) in orders.items() if kind == "train"}
    assert rolled == {answers[key]["rollout"]: what for key, (kind, what) in orders.items() if kind == "rollout_start"}
    assert len(set(trained.values())) == len(trained) == len(rolled) == MODELS // 2
    notes = {text: count for (kind, text), count in said.items() if kind == "notice"}
    assert notes == {what: 1 for kind, what in orders.values() if kind == "notify"}
    triggered = [count for (kind, _), count in said.items() if kind == "training_triggered"]
    assert triggered == [1] * (MODELS // 2)
    started = [count for (kind, _), count in said.items() if kind == "rollout_canary"]
    assert started == [1] * (MODELS // 2)
    assert claims == {f"on-m{number}": 1 for number in range(1, MODELS, 2)}


# Killed in the middle of what it drives.


def where(world: Fleet) -> frozenset[str]:
    """What is open now: phases of rollouts, and `leased` while a child trains."""
    with world.database.read() as connection:
        found = set(connection.execute(select(rollouts.c.phase)).scalars())
        leased = connection.execute(select(leases.c.job).where(leases.c.ended.is_(None))).first()
    return frozenset(found | ({"leased"} if leased is not None else set()))


def report(world: Fleet, *, there: bool) -> None:
    """The devices say that they run what they were told, or that they are still fetching it; heard at the next start."""
    with world.database.write() as connection:
        for row in connection.execute(select(desired)).all():
            models = {
                slot: ModelReport(active=ref["release"], update="committed")
                if there
                else ModelReport(active=f"{slot}@1.0", update="downloading")
                for slot, ref in row.models.items()
            }
            said = Reported(**world.host.envelope(), desired_rev=row.rev, models=models)
            fleet.take_reported(connection, row.device, said, world.host.now())


def test_killed_while_training_rolling_and_aborting_each_comes_to_its_one_end(tmp_path: Path) -> None:
    world, dice, killed = Fleet(tmp_path, ""), random.Random(11), set[str]()
    config = world.host.config
    for number in range(3):  # pixels of the samples that the training claims
        config.samples.mkdir(parents=True, exist_ok=True)
        (config.samples / f"{number:064}").write_bytes(b"abc")
    place(world.database, "train", {"model": "m1"})
    for model in ("m0", "m2"):
        place(world.database, "rollout_start", {"release": f"{model}@1.1"})

    def life(what: str, holds: Callable[[], bool]) -> None:
        process = world.serve()
        try:
            until(what, holds)
            time.sleep(dice.random() * 0.05)
        finally:
            process.kill()
            process.wait()
        killed.update(where(world))

    def phase(model: str) -> str:
        with world.database.read() as connection:
            return str(connection.execute(select(rollouts.c.phase).where(rollouts.c.model == model)).scalar())

    def job() -> Any:
        with world.database.read() as connection:
            return connection.execute(select(jobs)).one()

    try:
        life("a training is leased", lambda: "leased" in where(world) and phases(world) == {"canary"})
        report(world, there=True)
        watched = frozenset({"watching", "leased"})
        life("both canaries are watched, a training is leased", lambda: where(world) == watched)
        report(world, there=False)  # so that nothing settles before the kill
        for model in ("m0", "m2"):
            place(world.database, "rollout_promote", {"rollout": model})
        life("both are rolling", lambda: phases(world) == {"rolling"})
        place(world.database, "rollout_abort", {"rollout": "m2"})
        life("one goes back", lambda: phase("m2") == "aborting")
        report(world, there=True)
        life("the other is done", lambda: phase("m0") == "done" and phase("m2") == "aborted")
        life("the training has ended", lambda: job().status == "failed")
        life("nothing happens any more", lambda: True)
    except BaseException:
        print((tmp_path / "serve.log").read_text()[-4000:])
        raise
    assert {"leased", "watching", "rolling", "aborting"} <= killed
    with world.database.read() as connection:
        said = Counter((row.kind, row.text.split()[0]) for row in connection.execute(select(events)))
        told = {row.device: (row.rev, row.models) for row in connection.execute(select(desired))}
        back = Counter(row.device for row in connection.execute(select(commands)) if row.body["action"] == "release")
        tried = [(row.job, row.state, row.tried) for row in connection.execute(select(samples)) if row.model == "m1"]
    for kind in ("watching", "rolling"):
        assert {name: count for (each, name), count in said.items() if each == f"rollout_{kind}"} == {
            "m0@1.1": 1,
            "m2@1.1": 1,
        }
    assert (
        said["rollout_done", "m0@1.1"] == said["rollout_aborting", "m2@1.1"] == said["rollout_aborted", "m2@1.1"] == 1
    )
    assert sum(count for (kind, _), count in said.items() if kind == "training_failed") == 1
    assert [told[f"on-{model}"][1][model]["release"] for model in ("m0", "m2")] == ["m0@1.1", "m2@1.0"]
    assert [told[f"on-{model}"][0] for model in ("m0", "m2")] == [1, 2]  # told once, and once more to go back
    assert back == {"on-m1": 1}
    assert tried == [(None, "labelled", 1)] * 3
    world.database.close()
