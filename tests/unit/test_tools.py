"""The tools (L3), what nobody gets around (L15), and the answers' fields (L16, L17), on a real database and registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sqlalchemy import delete, insert, select, update
from typer.testing import CliRunner

from edged.wire.messages import State
from tests.support.lived import lived
from tests.unit.test_jobs import ALL, World
from trainer import fleet
from trainer.cli import app
from trainer.core.guards import may_deploy
from trainer.database import events, jobs, measured, rollouts, samples, windows
from trainer.files import write_whole
from trainer.inventory import give_labels
from trainer.releases import MANIFEST, build_manifest, canonical_bytes
from trainer.tools import TOOLS, ToolRefused, Tools

pytestmark = pytest.mark.usefixtures("each_database")

FIVE = ["collect_samples", "request_training", "deploy_model", "query_metrics", "notify"]


@contextmanager
def served(world: World) -> Iterator[Tools]:
    """The tools while the coordinator's part that decides is at work, as `trainer serve` does it."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.02):
            world.orders.tick()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield Tools(world.host.config, world.host.database, wait_s=10)
    finally:
        done.set()
        thread.join()


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[tuple[World, Tools]]:
    world = World(tmp_path)
    with served(world) as found:
        yield world, found


def judged(world: World, release: str, verdict: dict[str, Any] | None) -> None:
    folder = world.host.config.data_dir.parent / release
    folder.mkdir()
    (folder / "model.onnx").write_bytes(release.encode())
    manifest = build_manifest(folder, release, kind="detect", engine="onnx_detect", roles={"model": "model.onnx"})
    if verdict is not None:
        manifest = manifest.model_copy(update={"evaluation": {"gate": verdict}})
    write_whole(folder / MANIFEST, canonical_bytes(manifest))
    world.host.registry.register(folder)


PASSED, FAILED = {"passed": True, "checks": []}, {"passed": False, "checks": []}


def test_l3_five_tools_with_schemas() -> None:
    assert list(TOOLS) == FIVE
    for tool in TOOLS.values():
        jsonschema.Draft202012Validator.check_schema(tool.schema)
        assert tool.schema["additionalProperties"] is False
        assert len(tool.description) > 40
        assert hasattr(Tools, tool.name)


def test_l3_l2_collect_samples_counts_by_model_device_state_and_class(tools: tuple[World, Tools]) -> None:
    world, its = tools
    with world.host.database.write() as connection:
        cats = [{"label": "cat", "box": [0, 0, 1, 1]}, {"label": "cat", "box": [1, 1, 2, 2]}, {"label": "dog"}]
        connection.execute(update(samples).where(samples.c.id == "d1-0").values(label=cats, label_confidence=0.6))
    found = its.collect_samples(model="digits")
    one = found["samples"][0]
    assert (one["model"], one["device"], one["state"], one["count"]) == ("digits", "d1", "labelled", 3)
    assert one["classes"] == {"cat": 1, "dog": 1}
    assert one["label_confidence_mean"] == pytest.approx(0.8)
    assert (found["samples_new"], found["trains_at"]) == (6, 4)
    assert [row["device"] for row in its.collect_samples(model="digits", selector="device=d2")["samples"]] == ["d2"]
    assert its.collect_samples(model="digits", state="rejected")["samples"] == []
    pulled = its.collect_samples(model="digits", selector="device=d2", pull=True, limit=2)
    assert pulled["pulled"] == 2
    assert world.commands("claim") == {"d2": ["d2-1", "d2-2"]}


def test_l3_a_pull_of_chosen_devices_finds_theirs_however_many_newer_ones_others_have(
    tools: tuple[World, Tools],
) -> None:
    world, its = tools
    with world.host.database.write() as connection:
        row = dict(connection.execute(select(samples).where(samples.c.id == "d1-0")).one()._mapping)
        more = [row | {"id": f"d1-more-{number}", "captured": 10.0 + number} for number in range(25)]
        connection.execute(insert(samples), more)
    pulled = its.collect_samples(model="digits", selector="device=d2", pull=True, limit=2)
    assert pulled["pulled"] == 2
    assert world.commands("claim") == {"d2": ["d2-1", "d2-2"]}
    with world.host.database.write() as connection:
        connection.execute(update(samples).where(samples.c.device == "d2").values(job="a job"))
    assert "no labelled sample of these devices" in refused(
        lambda: its.collect_samples(model="digits", selector="device=d2", pull=True, limit=2)
    )


def test_l16_request_training_answers_with_exactly_these_fields(tools: tuple[World, Tools]) -> None:
    answer = tools[1].request_training(model="digits")
    assert sorted(answer) == [
        "action", "estimated_completion", "reason", "samples_collected", "target_model", "training_job_id",
    ]  # fmt: skip
    assert answer["action"] == "training_triggered"
    assert (answer["samples_collected"], answer["target_model"]) == (6, "digits@1.1")
    ends = datetime.fromisoformat(answer["estimated_completion"])
    assert ends.utcoffset() == timedelta(0)
    assert ends > datetime.now(UTC)


def test_l17_job_status_has_exactly_these_fields(tools: tuple[World, Tools]) -> None:
    world, its = tools
    its.request_training(model="digits")
    with world.host.database.write() as connection:
        result = {"accuracy": 0.9, "accuracy_before": 0.877, "samples_used": 6}
        connection.execute(update(jobs).values(status="completed", result=result, started=1000.0, finished=1090.0))
    (status,) = its.query_metrics(model="digits")["jobs"]
    assert status == {
        "job_id": status["job_id"],
        "status": "completed",
        "metrics": {"accuracy": 0.9, "improvement": "+2.3%", "samples_used": 6, "training_time_minutes": 1.5},
        "deployment": {"status": "none", "progress": "0/0 nodes", "canary_result": None},
    }
    assert status["job_id"].startswith("digits-")
    judged(world, "digits@1.10", PASSED)
    rollout = its.deploy_model(release="digits@1.10")["rollout"]
    with world.host.database.write() as connection:
        connection.execute(update(jobs).values(rollout=rollout))
    (status,) = its.query_metrics(model="digits")["jobs"]
    assert status["deployment"] == {"status": "pending", "progress": "0/2 nodes", "canary_result": "pending"}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ToolRefused) as caught:
        call()
    return str(caught.value)


def test_l15_an_agent_does_not_train_constantly(tmp_path: Path) -> None:
    world = World(tmp_path)
    own = world.host.config.model("digits").model_copy(update={"minimum_interval_s": 3600.0})
    world.host.config = world.host.config.model_copy(update={"models": {"digits": own}})
    with served(world) as its:
        its.request_training(model="digits")
        assert "a job of this model is open" in refused(lambda: its.request_training(model="digits"))
        with world.host.database.write() as connection:
            connection.execute(update(jobs).values(status="refused"))
            connection.execute(update(samples).values(job=None))
        assert "minimum interval" in refused(lambda: its.request_training(model="digits"))
        assert "minimum interval" in its.collect_samples(model="digits")["training_now"]
        # Nor by what it may add to its request, nor by the command line's tool.
        assert "reason: Extra" in refused(lambda: its.request_training(model="digits", reason="operator"))
        assert "by: Extra" in refused(lambda: its.request_training(model="digits", by="operator"))
        arguments = ["tool", "request_training", "--model", "digits", "--config", str(tmp_path / "trainer.toml")]
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, "minimum interval" in done.stderr) == (1, True)


def test_l15_only_new_and_well_labelled_samples_train_at_an_agents_wish(tools: tuple[World, Tools]) -> None:
    world, its = tools
    with world.host.database.write() as connection:
        connection.execute(update(samples).where(samples.c.device == "d1").values(tried=1))
        connection.execute(update(samples).where(samples.c.device == "d2").values(label_confidence=0.49))
    assert "0 new labelled samples" in refused(lambda: its.request_training(model="digits"))
    with world.host.database.write() as connection:
        connection.execute(update(samples).values(tried=0, state="rejected"))
    assert "no labelled sample" in refused(lambda: its.request_training(model="digits"))


def test_l15_nothing_is_deployed_that_no_gate_has_passed(tools: tuple[World, Tools]) -> None:
    world, its = tools
    for release, verdict in (("digits@1.1", None), ("digits@1.2", FAILED), ("digits@1.3", PASSED)):
        judged(world, release, verdict)
    assert "no gate has judged it" in refused(lambda: its.deploy_model(release="digits@1.1"))
    assert "the gate refused it" in refused(lambda: its.deploy_model(release="digits@1.2"))
    assert "unjudged: Extra" in refused(lambda: its.deploy_model(release="digits@1.1", unjudged="because I say so"))
    with world.host.database.read() as connection:
        assert connection.execute(select(rollouts)).first() is None
    assert its.deploy_model(release="digits@1.3")["release"] == "digits@1.3"


@pytest.mark.parametrize(
    ("verdict", "unjudged", "by", "said"),
    [
        (PASSED, "", "operator", ""), (PASSED, "", "agent", ""),
        (FAILED, "", "operator", "the gate refused it"), (FAILED, "I know better", "operator", "the gate refused it"),
        (FAILED, "", "agent", "the gate refused it"), ({}, "made by hand", "operator", "the gate refused it"),
        (None, "", "operator", "say why"), (None, "  x ", "operator", "say why"), (None, "made by hand", "operator", ""),
        (None, "made by hand", "agent", "only an operator"), (None, "", "agent", "only an operator"),
    ],
)  # fmt: skip
def test_l15_who_may_deploy_what(verdict: dict[str, Any] | None, unjudged: str, by: str, said: str) -> None:
    reason = may_deploy("digits@1.1", verdict, unjudged, by)
    assert (said in reason) if said else reason == ""


def test_l15_an_operator_rolls_out_what_is_unjudged_only_with_a_reason_that_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path)
    judged(world, "digits@1.1", None)
    judged(world, "digits@1.2", FAILED)
    shell = CliRunner()
    with served(world):
        base = ["rollout", "start", "digits@1.1", "--config", str(tmp_path / "trainer.toml")]
        assert "--unjudged REASON" in shell.invoke(app, base).stderr
        assert shell.invoke(app, [*base, "--unjudged", "a test by hand"]).exit_code == 0
        told = ["fleet", "set", "d1", "--model", "digits@1.2", "--config", str(tmp_path / "trainer.toml")]
        assert "the gate refused it" in shell.invoke(app, told).stderr
    with world.host.database.read() as connection:
        said = connection.execute(select(events.c.text).where(events.c.kind == "rollout_unjudged")).scalar_one()
    assert said == "digits@1.1: a test by hand"


def test_l15_no_tool_removes_a_sample_and_used_is_said_only_when_the_fleet_runs_the_release(
    tools: tuple[World, Tools],
) -> None:
    world, its = tools
    its.request_training(model="digits")
    for number in range(5):  # whatever an agent does meanwhile
        its.notify(text=f"note {number}")
        its.collect_samples(model="digits")
        world.jobs.tick()
    with world.host.database.read() as connection:
        assert len(connection.execute(select(samples)).all()) == 6
    assert world.commands("used") == {}
    assert world.commands("claim") == {"d1": ALL[:3], "d2": ALL[3:]}


def test_query_metrics_adds_up_by_release_and_selector(tools: tuple[World, Tools]) -> None:
    world, its = tools
    for device, escalated in (("d1", 10), ("d1", 20), ("d2", 0)):
        world.window(device, "digits@1.0", escalated)
    (row,) = its.query_metrics(model="digits")["releases"]
    assert (row["release"], row["devices"], row["items"], row["escalated"]) == ("digits@1.0", 2, 300, 30)
    assert row["escalation_rate"] == pytest.approx(0.1)
    (row,) = its.query_metrics(model="digits", selector="device=d2")["releases"]
    assert (row["devices"], row["items"], row["escalation_rate"]) == (1, 100, 0)
    with world.host.database.write() as connection:
        connection.execute(delete(measured))
    assert its.query_metrics()["releases"] == []


def test_query_metrics_shows_how_right_answers_were_also_long_ago(tools: tuple[World, Tools]) -> None:
    """Windows are kept for 14 days, their sums by the hour for 180."""
    world, its = tools
    now = world.host.now()
    with world.host.database.write() as connection:
        for device, days, right in (("d1", 1, 57), ("d2", 1, 45), ("d1", 20, 60), ("d2", 170, 30)):
            lived(connection, device, now - days * 86400, items=1000, audits=60, right=right)
        assert isinstance(give_labels(connection, "d1", {"line": "a"}), dict)
        assert isinstance(give_labels(connection, "d2", {"line": "b"}), dict)
        fleet.prune(connection, now)
        assert len(connection.execute(select(windows)).all()) == 2

    def row(**asked: Any) -> dict[str, Any]:
        (found,) = its.query_metrics(model="digits", **asked)["releases"]
        return dict(found)

    day = row(hours=30, group_by=["line"])
    assert (day["items"], day["accepted"], day["audited"], day["devices"]) == (2000, 1880, 120, 2)
    assert day["accuracy"]["value"] == pytest.approx(102 / 120)
    assert day["accuracy"]["low"] < 102 / 120 < day["accuracy"]["high"] < day["accuracy"]["low"] + 0.2
    assert (day["accuracy"]["audits"], day["accuracy"]["answered"]) == (120, 0)
    assert {name: part["accuracy"]["value"] for name, part in day["groups"].items()} == {
        "line=a": pytest.approx(57 / 60), "line=b": pytest.approx(45 / 60),
    }  # fmt: skip
    assert row(hours=24 * 30)["accuracy"]["value"] == pytest.approx(162 / 180)
    assert row(hours=4320)["items"] == 4000
    assert row(hours=24 * 30, selector="line=a")["accuracy"]["value"] == pytest.approx(117 / 120)
    assert its.query_metrics(hours=1)["releases"] == []
    assert "less than or equal to 4320" in refused(lambda: its.query_metrics(hours=4321))
    assert "no device has a label 'lime'" in refused(lambda: its.query_metrics(group_by=["lime"]))


def test_what_nobody_checked_has_no_accuracy(tools: tuple[World, Tools]) -> None:
    world, its = tools
    world.window("d1", "digits@1.0", 10)
    (row,) = its.query_metrics()["releases"]
    assert row["accuracy"] == {"value": None, "low": 0.0, "high": 1.0, "audits": 0, "answered": 0}


def test_what_a_tool_cannot_take_is_named(tools: tuple[World, Tools]) -> None:
    _, its = tools
    assert "there are collect_samples, request_training" in refused(lambda: its.call("delete_samples", {}))
    assert "hours: Input should be greater than 0" in refused(lambda: its.query_metrics(hours=0))
    assert "models.eye: no such model; configured: digits" in refused(lambda: its.request_training(model="eye"))
    assert "no device has a label 'sit'; there are device, group" in refused(
        lambda: its.query_metrics(selector="sit=a")
    )
    assert "at character 6 a value is expected" in refused(lambda: its.query_metrics(selector="site="))


def test_an_order_that_nobody_began_is_withdrawn(tmp_path: Path) -> None:
    world = World(tmp_path)
    its = Tools(world.host.config, world.host.database, wait_s=0.1)
    assert "nothing was done" in refused(lambda: its.request_training(model="digits"))
    world.orders.tick()
    with world.host.database.read() as connection:
        assert connection.execute(select(jobs)).first() is None


def test_an_order_that_breaks_keeps_nobody_waiting_and_leaves_nothing(
    tools: tuple[World, Tools], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, its = tools

    def broken(model: str, _wish: str) -> dict[str, Any]:
        with world.host.database.write() as connection:
            connection.execute(delete(samples).where(samples.c.model == model))
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr(world.jobs, "train_now", broken)
    assert "train failed: RuntimeError: a fault in the program" in refused(lambda: its.request_training(model="digits"))
    assert its.notify(text="still here") == {"notified": True}
    with world.host.database.read() as connection:
        assert len(connection.execute(select(samples)).all()) == 6


def test_words_that_a_database_does_not_take_keep_nobody_waiting(
    tools: tuple[World, Tools], each_database: str
) -> None:
    _, its = tools
    if each_database == "postgresql":
        assert "does not take these words" in refused(lambda: its.notify(text="a\0b"))
    else:
        assert its.notify(text="a\0b") == {"notified": True}
    assert its.notify(text="still here") == {"notified": True}


def test_the_command_line_says_the_schemas_and_needs_nothing_to_do_so() -> None:
    done = CliRunner().invoke(app, ["tool", "schemas"])
    assert [each["name"] for each in json.loads(done.stdout)] == FIVE


def born(world: World, device: str, **labels: str) -> None:
    with world.host.database.write() as connection:
        birth = State(**world.host.envelope(), state="online", device=device, profile="pi5", labels=labels)
        fleet.take_state(connection, device, birth, world.host.now())


def test_labels_of_births_and_operators_and_a_status_of_the_selected(tmp_path: Path) -> None:
    world, shell = World(tmp_path), CliRunner()
    config = ["--config", str(tmp_path / "trainer.toml")]

    def status(selector: str) -> dict[str, dict[str, str]]:
        done = shell.invoke(app, ["fleet", "status", "--selector", selector, "--json", *config])
        assert done.exit_code == 0, done.stderr
        return {row["device"]: row["labels"] for row in json.loads(done.stdout)}

    born(world, "d1", line="a", group="east", **{"bad key": "x", "k": "no good"})
    born(world, "d2", line="b", site="elsewhere")
    assert status("line") == {
        "d1": {"device": "d1", "group": "east", "line": "a", "profile": "pi5", "site": "default"},
        "d2": {"device": "d2", "line": "b", "profile": "pi5", "site": "default"},  # a device is where its topics are
    }
    with served(world):
        label = ["fleet", "label", *config, "d1"]
        assert shell.invoke(app, [*label, "line=c", "shift=night", "group-"]).exit_code == 0
        assert "is a fact of the device" in shell.invoke(app, [*label, "site=x"]).stderr
        assert "use key=value" in shell.invoke(app, [*label, "line"]).stderr
        assert (
            "'d9' was never seen; known: d1, d2" in shell.invoke(app, ["fleet", "label", *config, "d9", "a=b"]).stderr
        )
    born(world, "d1", line="a", group="east")  # born again: the operator's word stays
    assert status("line in (c),!group")["d1"]["shift"] == "night"
    with served(world):
        assert shell.invoke(app, [*label, "line-", "shift-"]).exit_code == 0
    assert status("device=d1") == {"d1": {"device": "d1", "profile": "pi5", "site": "default"}}
    assert list(status("profile=pi5,line!=b")) == ["d1"]
    done = shell.invoke(app, ["fleet", "status", "--selector", "lin=a", *config])
    assert (done.exit_code, "no device has a label 'lin'" in done.stderr) == (1, True)


def test_jobs_are_listed_for_people_and_programs(tmp_path: Path) -> None:
    world, shell = World(tmp_path), CliRunner()
    config = ["--config", str(tmp_path / "trainer.toml")]
    assert shell.invoke(app, ["jobs", *config]).stdout == "nothing yet\n"
    job = world.jobs.train_now("digits")["training_job_id"]
    (row,) = json.loads(shell.invoke(app, ["jobs", "--json", *config]).stdout)
    assert sorted(row) == ["deployment", "job_id", "metrics", "status"]
    (row,) = json.loads(shell.invoke(app, ["jobs", "--json", "--long", *config]).stdout)
    assert (row["job_id"], row["status"], row["target_model"]) == (job, "claiming", "digits@1.1")
    assert job in shell.invoke(app, ["jobs", "--model", "digits", *config]).stdout
    refused = shell.invoke(app, ["jobs", "--json", "--model", "x", *config])
    assert (refused.exit_code, "no such model" in json.loads(refused.stdout)["error"]) == (1, True)
