"""Whether it is time to train: what counts, and that the same samples never count twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update
from typer.testing import CliRunner

from tests.unit.test_jobs import World
from tests.unit.test_train_cli import line, world
from trainer.cli import app
from trainer.config import load_config
from trainer.database import jobs, samples
from trainer.jobfile import dataset_job
from trainer.ready import UnderWay, at_work, ready
from trainer.trained import ended

__all__ = ["world"]


def ask(folder: Path, model: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["ready", model, *arguments, "--json", "--config", str(folder / "trainer.toml")])
    return done.exit_code, json.loads(done.stdout)


def write(folder: Path, count: int) -> str:
    path = folder / "dataset.jsonl"
    path.write_text("".join(f"{line(number)}\n" for number in range(count)))
    return str(path)


def test_only_what_no_training_has_had_counts(world: Path) -> None:
    dataset = write(world, 49)
    assert ask(world, "clerk", "--dataset", dataset) == (4, {
        "model": "clerk", "ready": False, "reason": "49 new samples, 50 are needed", "samples_new": 49,
        "samples_usable": 49, "needed": 50,
    })  # fmt: skip
    assert ask(world, "clerk", "--dataset", dataset, "--min-samples", "49")[0] == 0
    dataset = write(world, 60)
    assert ask(world, "clerk", "--dataset", dataset)[0] == 0
    # A training that cannot begin (there is no checkpoint) has had nothing: cron says so until somebody mends it.
    arguments = ["train", "--model", "clerk", "--dataset", dataset, "--config", str(world / "trainer.toml")]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert ask(world, "clerk", "--dataset", dataset)[0] == 0
    config = load_config(world / "trainer.toml")
    job = dataset_job(config, "clerk", "lora", Path(dataset), world / "run", created="", job="run")
    ended(config, "clerk", job.manifest, "refused", 1.0)
    assert ask(world, "clerk", "--dataset", dataset)[1]["samples_new"] == 0
    again = CliRunner().invoke(app, [*arguments, "--require-threshold"])
    assert again.exit_code == 4
    assert json.loads(again.stdout)["samples_new"] == 0
    code, said = ask(world, "clerk", "--dataset", write(world, 110))
    assert (code, said["samples_new"], said["samples_usable"]) == (0, 50, 110)


def test_a_training_that_is_under_way_is_not_begun_twice(world: Path) -> None:
    config, dataset = load_config(world / "trainer.toml"), write(world, 60)
    with at_work(config, "clerk"):
        code, said = ask(world, "clerk", "--dataset", dataset)
        assert (code, said["reason"]) == (4, "a training of this model is under way")
        with pytest.raises(UnderWay, match="clerk is under way"), at_work(config, "clerk"):
            pass
    assert ask(world, "clerk", "--dataset", dataset)[0] == 0


def said_by(number: int, **who: Any) -> str:
    row = json.loads(line(number))
    row["execution"] = [{"tool": "escalate", "status": "success", "output": "x", "kind": "model", **who}]
    return json.dumps(row)


@pytest.mark.parametrize(
    "who",
    [
        {"confidence": 0.2, "release": "big@1.0"},
        {"confidence": 0.9, "release": "clerk@1.0"},
        {"confidence": 0.9, "release": "clerk-lora@1.0"},
        {"confidence": float("nan"), "release": "big@1.0"},
        {"confidence": 7, "release": "big@1.0"},
    ],
)
def test_what_may_not_train_does_not_count(world: Path, who: dict[str, Any]) -> None:
    path = world / "dataset.jsonl"
    lines = [*(line(number) for number in range(40)), *(said_by(number, **who) for number in range(40, 100))]
    path.write_text("".join(f"{each}\n" for each in lines))
    code, said = ask(world, "clerk", "--dataset", str(path))
    assert (code, said["samples_new"], said["samples_usable"]) == (4, 40, 40)
    told = CliRunner().invoke(
        app, ["train", "--model", "clerk", "--dataset", str(path), "--dry-run", "--config", str(world / "trainer.toml")]
    )
    plan = json.loads(told.stdout)
    reason = "own_prediction" if "clerk" in who["release"] else "below_label_confidence"
    assert (plan["samples_usable"], plan["left_out"]) == (40, {reason: 60})


def test_boxes_that_may_not_train_do_not_count(world: Path) -> None:
    path = world / "labelled" / "labels.jsonl"
    rows = [json.loads(each) for each in path.read_text().splitlines()]
    for row, who in zip(
        rows,
        (
            {"confidence": 0.2},
            {"confidence": float("nan")},
            {"confidence": 7},
            {"kind": "model", "release": "digits@1.0"},
        ),
        strict=False,
    ):
        row["provenance"] = who
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    _, said = ask(world, "digits", "--dataset", str(path.parent))
    assert (said["samples_new"], said["samples_usable"]) == (116, 116)


def test_to_look_makes_no_database(world: Path) -> None:
    assert ask(world, "clerk")[0] == 4
    arguments = ["train", "--model", "clerk", "--config", str(world / "trainer.toml")]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert json.loads(dry.stdout)["samples_new"] == 0
    assert CliRunner().invoke(app, [*arguments, "--require-threshold"]).exit_code == 4
    assert not list((world / "data").glob("*.sqlite*"))


def test_a_labelled_folder_counts_too(world: Path) -> None:
    code, said = ask(world, "digits", "--dataset", str(world / "labelled"))
    assert (code, said["samples_new"], said["needed"]) == (0, 120, 101)


def test_without_a_data_set_a_language_model_counts_what_devices_keep(world: Path) -> None:
    found = ready(load_config(world / "trainer.toml"), "clerk", now=0.0)
    assert (found.ready, found.samples_new, found.needed, found.reason) == (False, 0, 50, "no labelled sample")


def test_the_fleets_samples_count_until_a_job_has_had_them(tmp_path: Path) -> None:
    fleet = World(tmp_path)
    config = fleet.host.config
    found = ready(config, "digits", now=fleet.host.now())
    assert (found.ready, found.samples_new, found.needed) == (True, 6, 4)
    assert not ready(config, "digits", now=fleet.host.now(), samples_min=7).ready
    with fleet.host.database.write() as connection:
        row = {
            "id": "j",
            "model": "digits",
            "source": "digits@1.0",
            "target": "digits@1.1",
            "reason": "",
            "manifest": {},
        }
        connection.execute(insert(jobs).values(**row, status="training", created=0.0, claim_until=0.0))
    assert ready(config, "digits", now=fleet.host.now()).reason == "a job of this model is open"
    with fleet.host.database.write() as connection:
        connection.execute(update(jobs).values(status="refused"))
        connection.execute(update(samples).values(tried=1))  # the job gave them back
    found = ready(config, "digits", now=fleet.host.now())
    assert (found.ready, found.samples_new, found.samples_usable) == (False, 0, 6)
