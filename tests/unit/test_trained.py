"""The ledger of what has trained: written whole, never changed, and what counts as new follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edged.wire.manifest import TrainingManifest, TrainingSample
from tests.unit.test_holdout import image, settings, taken
from trainer import files
from trainer.config import TrainerConfig
from trainer.sketches import SketchError, sketch_file
from trainer.trained import BEGUN_MAX, LedgerError, add_images, begun, ended, had, ledger_of, read_images


@pytest.fixture
def config(tmp_path: Path) -> TrainerConfig:
    return settings(tmp_path)


def manifest(job: str, *samples: str) -> TrainingManifest:
    rows = [TrainingSample(id=each, device="", sha256=each * 64, label={}, provenance={}) for each in samples]
    return TrainingManifest(
        job=job, model="digits", source="digits@1.0", target="digits@1.1", created="", config={}, samples=rows
    )


def used(config: TrainerConfig, model: str = "digits") -> str:
    return "".join(sorted(each[0] for each in had(config, model)))


def written(config: TrainerConfig) -> dict[str, bytes]:
    folder = ledger_of(config, "digits")
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.parametrize("outcome", ["passed", "refused"])
def test_what_a_training_that_was_judged_has_had_is_used(config: TrainerConfig, outcome: str) -> None:
    first = manifest("run-1", "a", "b")
    begun(config, "digits", first)
    assert used(config) == ""  # a power cut now, and it is begun again
    ended(config, "digits", first, outcome, 1.0)
    assert used(config) == "ab"
    assert used(config, "other") == ""


def test_one_that_failed_is_a_try_and_none_before_it_began(config: TrainerConfig) -> None:
    for number in range(BEGUN_MAX + 1):  # a checkpoint that is missing: however often cron asks, it says so again
        ended(config, "digits", manifest(f"early-{number}", "a"), "failed", 1.0)
    assert used(config) == ""
    for number in range(BEGUN_MAX):
        assert used(config) == ""
        begun(config, "digits", manifest(f"late-{number}", "a"))
        ended(config, "digits", manifest(f"late-{number}", "a"), "failed", 1.0)
    assert used(config) == "a"


def test_records_are_never_changed_and_the_same_again_is_no_record(config: TrainerConfig) -> None:
    first = manifest("run-1", "b", "a")
    for _ in range(2):
        begun(config, "digits", first)
        ended(config, "digits", first, "refused", 1.0)
    before = written(config)
    assert len(before) == 2
    ended(config, "digits", manifest("run-1", "a", "b", "b"), "passed", 9.0)  # the same samples in another order
    assert written(config) == before
    begun(config, "digits", manifest("run-1", "c"))  # another training in a folder of the same name
    assert written(config).items() > before.items()


def test_trainings_that_never_end_do_not_go_on_for_ever(config: TrainerConfig) -> None:
    for number in range(BEGUN_MAX):
        assert used(config) == ""
        begun(config, "digits", manifest(f"run-{number}", "a"))
        begun(config, "digits", manifest(f"run-{number}", "a"))  # continued: no other training
    assert used(config) == "a"


def test_images_are_kept_once_and_found_again(config: TrainerConfig) -> None:
    folder = ledger_of(config, "digits")
    assert len(read_images(folder).sha256) == 0
    assert add_images(folder, [image(1), taken(2, 1000.0, "d1"), image(1)]) == 2
    first = written(config)
    assert add_images(folder, [image(1), image(3)]) == 1
    assert add_images(folder, [image(3)]) == 0
    assert sorted(written(config)) == ["images-000001.npz", "images-000002.npz"]
    assert written(config).items() > first.items()
    found = read_images(folder)
    assert found.sha256 == (image(1).sha256, taken(2, 1000.0, "d1").sha256, image(3).sha256)
    assert (found.devices, found.captured) == (("", "d1", ""), (0.0, 1000.0, 0.0))
    assert np.array_equal(found.grey[2], np.rint(sketch_file("", image(3).data)))


def test_a_cut_leaves_a_record_or_none(config: TrainerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ledger_of(config, "digits")
    add_images(folder, [image(1)])
    before = written(config)

    def cut(*_: object) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "replace", cut)
    for act in (
        lambda: add_images(folder, [image(2)]),
        lambda: begun(config, "digits", manifest("run-1", "a")),
        lambda: ended(config, "digits", manifest("run-1", "a"), "passed", 1.0),
    ):
        with pytest.raises(OSError, match="power"):
            act()
    monkeypatch.undo()
    assert written(config) == before
    (folder / ".images-000002.npz.half").write_bytes(b"PK")  # what a real one leaves
    (folder / ".run-1.begun.json.half").write_bytes(b"{")
    assert read_images(folder).sha256 == (image(1).sha256,)
    assert used(config) == ""
    assert add_images(folder, [image(2)]) == 1


def test_a_damaged_record_is_named_and_an_image_that_does_not_decode_too(config: TrainerConfig) -> None:
    begun(config, "digits", manifest("run-1", "a"))
    (record,) = ledger_of(config, "digits").iterdir()
    files.write_whole(record, b'{"samples": ')
    with pytest.raises(LedgerError, match=record.name):
        had(config, "digits")
    broken = image(1)
    with pytest.raises(SketchError, match="do not decode"):
        add_images(ledger_of(config, "digits"), [type(broken)("f" * 64, b"no image", (), {})])
