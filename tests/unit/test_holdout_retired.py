"""A holdout whose labels were wrong: put aside whole, with the reason, and never unsaid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_holdout import TOML, config, freeze, image, run, settings
from trainer.config import TrainerConfig
from trainer.datasets import write_folder
from trainer.files import write_whole
from trainer.holdout import HoldoutError, check_frozen, ledger_path, read_ledger
from trainer.holdout_retired import retire, retired
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes

__all__ = ["config"]
REASON = "a and b were mixed up"


def test_a_retired_set_is_kept_and_the_same_pictures_judge_again_with_other_labels(config: TrainerConfig) -> None:
    first = freeze(config, [image(1), image(2)]).identity
    second = freeze(config, [image(3)], first=False).identity
    before = ledger_path(config, "digits", "target").read_bytes()
    said = retire(config, "digits", "target", f" {REASON} ", 500.0)
    assert (said["reason"], said["images"], said["retired"]) == (REASON, 3, 500.0)
    assert said["identities"] == sorted([first, second])
    kept = config.holdouts / "retired" / "digits.target.1.jsonl"
    assert kept.read_bytes() == before
    assert len(read_ledger(kept)) == 3
    assert retired(config, "digits", "target") == [said]
    assert retired(config, "digits", "base") == []

    mended = [replace(image(number), boxes=image(number, "b").boxes) for number in (1, 2)]
    write_folder(config.model("digits").holdout, mended)
    assert check_frozen(config, "digits", "target", mended, 600.0) != first
    retire(config, "digits", "target", "worn out", 700.0)
    assert [each["reason"] for each in retired(config, "digits", "target")] == [REASON, "worn out"]


def test_what_was_changed_or_is_not_there_is_not_retired(config: TrainerConfig) -> None:
    with pytest.raises(HoldoutError, match="is not frozen: there is nothing to retire"):
        retire(config, "digits", "target", REASON, 1.0)
    freeze(config, [image(1)])
    with pytest.raises(HoldoutError, match="say why it is retired"):
        retire(config, "digits", "target", "  ", 1.0)
    write_folder(config.model("digits").holdout, [image(1, "b")])
    with pytest.raises(HoldoutError, match="has other labels than when it was frozen"):
        retire(config, "digits", "target", REASON, 1.0)
    assert retired(config, "digits", "target") == []


def test_releases_of_a_retired_set_go_on_being_known(tmp_path: Path) -> None:
    (tmp_path / "trainer.toml").write_text(TOML)
    write_folder(tmp_path / "calibration", [image(1000)])
    config = settings(tmp_path).model_copy(update={"data_dir": tmp_path / "data"})
    judged = freeze(config, [image(1)]).identity
    made = tmp_path / "1.0"
    made.mkdir()
    (made / "model.onnx").write_bytes(b"model")
    manifest = build_manifest(
        made, "digits@1.0", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"},
        evaluation={"holdout_sha256": {"target": judged}},
    )  # fmt: skip
    write_whole(made / MANIFEST, canonical_bytes(manifest))
    Registry(config.releases).register(made)

    code, said = run(tmp_path, "retire", "digits", "--reason", REASON, "--json")
    assert (code, json.loads(said)["images"]) == (0, 1)
    write_folder(tmp_path / "target", [image(1, "b")])
    assert run(tmp_path, "freeze", "digits")[0] == 0
    assert run(tmp_path, "verify", "digits")[0] == 0
    for path in (config.holdouts / "retired").iterdir():
        path.unlink()
    code, said = run(tmp_path, "verify", "digits")
    assert (code, "digits@1.0" in said) == (1, True)
