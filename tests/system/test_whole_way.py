"""The whole way, by the commands that an operator gives: authority, keys, broker, bundle, a signed release and a sample, to
and from a device that can reach nothing but the broker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.wire import topics
from tests.support.device import SITE, toml, until
from tests.support.models import STRANGE, make_release, put_pictures
from tests.support.plant import HOST, Client, Plant
from tests.system.test_enrolled_device import enrolled
from tests.system.test_tiers import SURE, model
from trainer.cli_keys import PASSPHRASE

NOWHERE = "https://127.0.0.1:9"  # what devices are told: nobody listens there, and they go on without


class SignedPlant(Plant):
    """A plant whose trainer has keys, serves blocks and trains on every sample that it is told of."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, [])
        self.trainer("ca", "issue", "watcher", "--role", "observer")
        media = [part for name in ("a", "b", "c") for part in ("--offline", str(folder / name))]
        self.trainer("keys", "init", *media)
        for name, *options in (["cam1"], ["big1", "--responder"]):
            self.trainer("enroll", name, *options, "--out", str(folder))

    def _configure(self, reload: str) -> None:
        authority = self.folder / "ca"
        issued = authority / "issued"
        tls = {"ca": authority / "ca.crt", "certificate": issued / "host.crt", "key": issued / "host.key"}
        bulk = {"bulk_certificate": issued / "host~blk.crt", "bulk_key": issued / "host~blk.key"}
        tables: dict[str, Any] = {
            "name": "host", "site": SITE, "data_dir": "data", "command_resend_s": 1.0,
            "broker": {"host": HOST, "port": self.port, **tls, **bulk},
            "http": {"port": 0, "url": NOWHERE, **tls},
            "enrolment": {"broker_folder": "mosquitto", "broker_reload": reload},
            "blocks": {"samples": True},
            "models": {"eye": {
                "tier": "device", "checkpoint": "first.pt", "labels": ["cat", "dog"], "imgsz": 32,
                "holdout": "holdout", "holdout_clean": "clean", "calibration": "calibration",
                "threshold": 0, "minimum_interval_s": 0,
            }},
        }  # fmt: skip
        self.settings.write_text(toml(tables))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`trainer serve` runs."""
        command = [sys.executable, "-m", "trainer", "serve", "--config", str(self.settings)]
        with (self.folder / "serve.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        except BaseException:
            print((self.folder / "serve.log").read_text()[-8000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)

    def told(self, *arguments: str) -> Any:
        """What a command of `trainer` prints for programs."""
        return json.loads(self.trainer(*arguments, "--json").stdout)


@pytest.mark.timeout(240)
def test_a_signed_release_comes_and_a_sample_goes_where_only_the_broker_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE, "correct horse battery")
    seed, release = tmp_path / "eye-1.0", tmp_path / "eye-1.1"
    make_release(seed, "eye@1.0")
    make_release(release, "eye@1.1", 1)
    teacher = model(tmp_path, "teacher@1.0", 0, SURE)
    with SignedPlant(tmp_path / "plant") as plant:
        # It runs, and was configured before they were enrolled.
        plant.trainer("broker", "admit", "cam1", "big1", "watcher")
        plant.trainer("release", "add", str(seed))
        plant.trainer("release", "add", str(release))
        device = enrolled(plant, tmp_path / "device", "cam1", seed)
        responder = enrolled(
            plant, tmp_path / "responder", "big1", teacher, device={"tier": "big"},
            responders={"r": {"tier": "big", "slot": "eye", "policy": {"audit_share": 0.0}}},
        )  # fmt: skip
        presence = topics.RESPONDER.filter(tier="big")
        with plant.serving(), device, responder, Client(plant, "watcher", presence) as watcher:
            until(
                "the trainer knows the device",
                lambda: "cam1" in [row["device"] for row in plant.told("fleet", "status")],
            )
            plant.trainer("fleet", "set", "cam1", "--model", "eye=eye@1.1")
            status = device.wait("installed", lambda s: s["models"]["eye"]["update"] == "committed", 90)
            assert status["models"]["eye"]["active"] == "eye@1.1"
            assert (status["trust"]["mode"], status["trust"]["refused"]) == ("signed", None)
            assert status["counters"]["blocks_received"] > 0

            until("somebody answers", watcher.topics)
            put_pictures(device.inbox, ["strange.png"], STRANGE)
            device.wait("its label", lambda s: s["samples"].get("labelled", 0) == 1, 60)
            job = until("the job got its sample", lambda: ended(plant), 60)
            assert job["metrics"]["samples_used"] == 1
            assert "the weights of eye@1.1 are wanted" in job["detail"], "it went on as far as the training"
            device.counted("blocks_sent")


def ended(plant: SignedPlant) -> dict[str, Any]:
    """The job, once it is over."""
    jobs: list[dict[str, Any]] = plant.told("rollout", "status")["jobs"]
    return next((job for job in jobs if job["status"] == "failed"), {})
