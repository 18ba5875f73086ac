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
from trainer.ready import UnderWay, at_work, ready

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
    # A training that comes to nothing (there is no checkpoint) has had them all the same.
    arguments = ["train", "--model", "clerk", "--dataset", dataset, "--config", str(world / "trainer.toml")]
    assert CliRunner().invoke(app, arguments).exit_code == 1
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
