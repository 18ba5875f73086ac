"""`trainer serve` trains a language model on what devices asked a larger one, by imitation and by preference, and rolls the
adapter out: real broker, real process, real training. The device is a Link that acts as devices do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.demo.phi import GRAMMAR, PhiExample
from edged.cases import question
from edged.engines.base import GenerateRequest
from edged.wire import topics
from edged.wire.messages import ModelReport, Provenance, Reported, SampleEntry, Text
from tests.support.hosted import clerk
from tests.support.trained import EXAMPLES, SETTINGS, line
from tests.system.broker import Broker
from tests.system.test_trainer_serve import Device, Trainer, job_of, rollout_of, until
from trainer.releases import Registry
from trainer.tuners.dpo.data import read_pairs

BEGAN = 1_700_000_000.0  # in whole minutes from here the device was asked: blocks of the split


class Clerk(Device):
    """A device with the demo's clerk, which was unsure of every question and asked a larger model."""

    def report(self) -> None:
        adapter = self.active if self.active.startswith("clerk-lora@") else None
        report = ModelReport(active="clerk@1.0", adapter=adapter, update=self.update, reason=self.reason)
        self.say(topics.REPORTED, Reported(**self._envelope(), desired_rev=self.rev, models={"clerk": report}))

    def install(self) -> None:
        self.active, self.update = self.adapters["clerk"], "committed"
        self.report()

    def keep(self, number: int, item: PhiExample, release: str = "large@1.0", confidence: float = 0.9) -> str:
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


# DPO cannot adapt the output layer, so the wanted answers are words that the base has. From a score of 0.8 on it may accept.
PAIRS = [
    replace(each, adapter=each.base.replace("accept", "ask the teacher about"))
    for each in GRAMMAR
    if each.base.startswith("accept") and each.adapter.startswith("HOLD")
]
DPO = """
epochs = 4
lr = 0.002
strategy = "dpo"
lora = { r = 8, lora_alpha = 16, target_modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] }
"""
ROLLOUT = "watch_s = 600\ninstall_s_max = 60\nfailed_grace_s = 1"


def settings(phi: dict[str, Path], strategy: str, threshold: int, base_set: Path) -> str:
    """The model's table; what a strategy says itself goes before what is usual."""
    own = DPO if strategy == "dpo" else ""
    keys = {each.partition(" =")[0] for each in own.splitlines() if each}
    usual = SETTINGS.format(checkpoint=phi["base"].resolve()).splitlines()
    kept = [each for each in usual if each.partition(" =")[0] not in {*keys, "gate"}]
    more = f'threshold = {threshold}\nminimum_interval_s = 0\nholdout_base = "{base_set}"\n'
    return "\n".join([*kept, own, more])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("strategy", "items"), [("lora", EXAMPLES), pytest.param("dpo", PAIRS, marks=pytest.mark.long)]
)
def test_what_devices_asked_about_becomes_an_adapter_that_is_rolled_out(
    tmp_path: Path, phi: dict[str, Path], strategy: str, items: Sequence[PhiExample]
) -> None:
    # What must not be forgotten: of other questions the answers that stay as they are.
    base_set = tmp_path / "general.jsonl"
    others = [each for each in GRAMMAR if each.prompt not in {item.prompt for item in items}]
    answer = {"lora": lambda each: each.adapter, "dpo": lambda each: each.base}[strategy]
    # Taught to ask instead of to accept, the model still asks where it asked.
    kept = [each for each in others if strategy == "lora" or each.base.startswith("ask")][::8]
    base_set.write_text("".join(f"{line(each, answer(each))}\n" for each in kept))
    with Broker(tmp_path / "broker", tls=False, clients=None) as broker:
        trainer = Trainer(tmp_path / "trainer", broker, ROLLOUT)
        table = settings(phi, strategy, len(items) - 1, base_set)
        trainer.config.write_text(trainer.config.read_text() + table)
        releases = Registry(trainer.folder / "data" / "releases")
        releases.register(clerk(tmp_path / "clerk-1.0", phi["model_gguf"]))
        trainer.start()
        device = Clerk(broker, "d1")
        try:
            for number in range(5):
                device.keep(
                    1000 + number, items[number], release="clerk-lora@0.9"
                )  # the model's own answers are no labels
                device.keep(2000 + number, items[number], confidence=0.2)
            names = {device.keep(number, item) for number, item in enumerate(items)}
            command_id, claim = until("it is asked for its texts", device.claims, 240)[0]
            assert set(claim.samples) == names
            with httpx.Client(trust_env=False) as http:
                for digest, data in device.pixels.items():
                    assert http.put(f"{claim.upload_url}/{digest}", content=data).status_code in (200, 201, 204)
            device.done(command_id)

            until("it is trained, and the canary is told", lambda: device.adapters == {"clerk": "clerk-lora@1.0"}, 600)
            assert device.desired == {"clerk": "clerk@1.0"}, "its base is named with it"
            job = job_of(trainer)
            assert (job["status"], job["deployment"]["progress"]) == ("deploying", "0/1 nodes"), job
            assert device.used() == set(), "nothing is used up before the fleet runs it"
            device.install()
            until("it is watched", lambda: rollout_of(trainer)["status"] == "watching")
            trainer.call("rollout", "promote", "clerk-lora@1.0")
            job = until("the job ends", lambda: ended(job_of(trainer)))
            assert (job["status"], job["detail"]) == ("completed", "the fleet runs clerk-lora@1.0"), job
            assert job["deployment"]["progress"] == "1/1 nodes"
            (shown,) = trainer.call("fleet", "status")
            assert shown["models"]["clerk"]["adapter"] == "clerk-lora@1.0"
            assert until("the device is told what was used", lambda: device.used() == names)
        except BaseException:
            print(trainer.log()[-8000:])
            raise
        finally:
            device.stop()
            trainer.stop()

    released = releases.get("clerk-lora@1.0").manifest
    assert (released.kind, released.base) == ("lora", releases.get("clerk@1.0").ref)
    assert released.lineage["training"]["strategy"] == strategy
    checks = {each["name"]: each for each in released.evaluation["gate"]["checks"]}
    assert released.evaluation["gate"]["passed"]
    assert checks["base_examples"]["value"] == len(kept) >= 10
    assert ("preferred" in checks) == (strategy == "dpo")
    (run,) = (path for path in (trainer.folder / "data" / "runs").iterdir() if path.is_dir())
    samples = json.loads((run / "metadata.json").read_text())["samples"]
    assert samples["named"] == len(items)
    assert samples["provenance"] == {"model site-1 (large@1.0)": samples["training"] + samples["validation"]}
    assert samples["label_confidence"] == {"lowest": 0.9, "mean": pytest.approx(0.9)}
    assert min(samples["training"], samples["holdout"]) >= 10
    pairs, bad = read_pairs(run / "dataset.jsonl")
    assert bad == []
    assert {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs} == {
        (item.prompt, item.adapter, item.base) for item in items
    }


def ended(job: dict[str, Any]) -> dict[str, Any]:
    return job if job.get("status") in ("completed", "failed", "refused", "rolled_back") else {}
