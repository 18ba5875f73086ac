"""`trainer serve` trains a language model on what devices asked a larger one: real broker, real process, real training. The
device is a Link that acts as devices do."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.cases import question
from edged.engines.base import GenerateRequest
from edged.wire import topics
from edged.wire.messages import ModelReport, Provenance, Reported, SampleEntry, Text
from tests.support.hosted import clerk
from tests.support.trained import EXAMPLES, SETTINGS
from tests.system.broker import Broker
from tests.system.test_trainer_serve import Device, Trainer, job_of, until
from trainer.releases import Registry
from trainer.tuners.dpo.data import read_pairs

BEGAN = 1_700_000_000.0  # in whole minutes from here the device was asked: blocks of the split


class Clerk(Device):
    """A device with the demo's clerk, which was unsure of every question and asked a larger model."""

    def report(self) -> None:
        report = ModelReport(active="clerk@1.0", update=self.update, reason=self.reason)
        self.say(topics.REPORTED, Reported(**self._envelope(), desired_rev=self.rev, models={"clerk": report}))

    def keep(self, number: int, release: str = "large@1.0", confidence: float = 0.9) -> str:
        item = EXAMPLES[number % len(EXAMPLES)]
        data = question(GenerateRequest(item.prompt))
        digest, sample = sha256(data).hexdigest(), f"{self.name}-{number}"
        self.pixels[digest] = data
        entry = SampleEntry(
            **self._envelope(), sample=sample, pipeline="chat", task="generate", model="clerk", release="clerk@1.0",
            state="labelled", sha256=digest, bytes=len(data), prediction=[Text(text=item.base)], confidence=0.4,
            label=[Text(text=item.adapter)], label_confidence=confidence, captured=BEGAN + 60 * number + 30,
            provenance=Provenance(kind="model", who="site-1", release=release), reason="unsure",
        )  # fmt: skip
        self.entries[sample] = entry
        self.say(topics.SAMPLE, entry)
        return sample

    def used(self) -> set[str]:
        return {s for command in list(self.commands.values()) if command.action == "used" for s in command.samples}


@pytest.mark.timeout(300)
def test_what_devices_asked_about_becomes_an_adapter(tmp_path: Path, phi: dict[str, Path]) -> None:
    with Broker(tmp_path / "broker", tls=False, clients=None) as broker:
        trainer = Trainer(tmp_path / "trainer", broker)
        settings = SETTINGS.format(checkpoint=phi["base"].resolve())
        more = f"threshold = {len(EXAMPLES) - 1}\nminimum_interval_s = 0\n"
        trainer.config.write_text(trainer.config.read_text() + settings + more)
        releases = Registry(trainer.folder / "data" / "releases")
        releases.register(clerk(tmp_path / "clerk-1.0", phi["model_gguf"]))
        trainer.start()
        device = Clerk(broker, "d1")
        try:
            for number in range(5):
                device.keep(100 + number, release="clerk-lora@0.9")  # the model's own answers are no labels
                device.keep(200 + number, confidence=0.2)
            names = {device.keep(number) for number in range(len(EXAMPLES))}
            command_id, claim = until("it is asked for its texts", device.claims)[0]
            assert set(claim.samples) == names
            with httpx.Client(trust_env=False) as http:
                for digest, data in device.pixels.items():
                    assert http.put(f"{claim.upload_url}/{digest}", content=data).status_code in (200, 201, 204)
            device.done(command_id)

            job = until("the job ends", lambda: ended(job_of(trainer)), 240)
            assert job["status"] == "completed", job
            assert "trainer fleet set DEVICE --adapter clerk=clerk-lora@1.0" in job["detail"]
            assert until("the device is told what was used", lambda: device.used() == names)
        except BaseException:
            print(trainer.log()[-8000:])
            raise
        finally:
            device.stop()
            trainer.stop()

    released = releases.get("clerk-lora@1.0").manifest
    assert (released.kind, released.base) == ("lora", releases.get("clerk@1.0").ref)
    assert released.evaluation["gate"]["passed"]
    (run,) = (path for path in (trainer.folder / "data" / "runs").iterdir() if path.is_dir())
    samples = json.loads((run / "metadata.json").read_text())["samples"]
    assert samples["named"] == len(EXAMPLES)
    assert samples["provenance"] == {"model site-1 (large@1.0)": samples["training"] + samples["validation"]}
    assert samples["label_confidence"] == {"lowest": 0.9, "mean": pytest.approx(0.9)}
    assert min(samples["training"], samples["holdout"]) >= 10
    pairs, bad = read_pairs(run / "dataset.jsonl")
    assert bad == []
    assert {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs} == {
        (item.prompt, item.adapter, item.base) for item in EXAMPLES
    }


def ended(job: dict[str, Any]) -> dict[str, Any]:
    return job if job.get("status") in ("completed", "failed", "refused") else {}
