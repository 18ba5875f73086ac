"""L7: what the manifest of a job says, and that its training is given exactly that."""

from __future__ import annotations

from hashlib import sha256

import pytest

from edged.wire.manifest import TrainingManifest
from edged.wire.messages import Box, Opinion, Provenance, SampleEntry
from tests.unit.test_jobs import World, world
from trainer import fleet

__all__ = ["world"]
pytestmark = pytest.mark.usefixtures("each_database")


def test_l7_a_manifest_holds_ids_labels_provenance_the_source_and_the_configuration(world: World) -> None:
    digest = sha256(b"pixels").hexdigest()
    label = Box(label="1", box=(1.0, 2.0, 3.0, 4.0), score=0.9)
    said = [
        Opinion(who="mid", release="mid@1.0", tier="site", status="labelled", confidence=0.4, label=[]),
        Opinion(who="big", release="teacher@2.0", tier="top", status="labelled", confidence=0.9, label=[label]),
    ]
    entry = SampleEntry(
        **world.host.envelope(), sample="s9", pipeline="p", task="detect", model="digits", release="digits@1.0",
        state="labelled", sha256=digest, bytes=6, label=[label], label_confidence=0.9, captured=77.0, opinions=said,
        provenance=Provenance(kind="model", who="big", release="teacher@2.0"),
    )  # fmt: skip
    with world.host.database.write() as connection:
        fleet.take_sample(connection, "d1", entry)
    answer = world.jobs.train_now("digits")

    manifest = TrainingManifest.model_validate(world.job()["manifest"])
    assert (manifest.job, manifest.model) == (answer["training_job_id"], "digits")
    assert (manifest.source, manifest.target) == ("digits@1.0", "digits@1.1")
    assert manifest.created.endswith("Z")
    assert manifest.config == world.host.config.model("digits").model_dump(mode="json")
    assert len(manifest.samples) == 7
    sample = next(each for each in manifest.samples if each.id == "s9")
    assert (sample.device, sample.sha256) == ("d1", digest)
    (box,) = sample.label["boxes"]
    assert (box["label"], box["box"], sample.label["confidence"]) == ("1", [1.0, 2.0, 3.0, 4.0], 0.9)
    told = sample.provenance
    assert (told["kind"], told["who"], told["release"], told["asked_by"]) == (
        "model",
        "big",
        "teacher@2.0",
        "digits@1.0",
    )
    assert told["captured"] == 77.0
    assert [opinion["who"] for opinion in told["opinions"]] == ["mid", "big"]
