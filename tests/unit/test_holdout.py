"""Holdouts: frozen once, only ever longer, and of nothing that the model has said or seen."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from trainer import holdout
from trainer.cli import app
from trainer.config import Model, TrainerConfig
from trainer.datasets import LabelledBox, LabelledImage, append_folder, read_folder, write_folder
from trainer.files import write_whole
from trainer.holdout import HoldoutError, check_frozen, ledger_path, read_ledger, remember, take
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes
from trainer.trained import LedgerError, ledger_of

PERSON = {"kind": "person", "who": "annotator"}
TEACHER = {"kind": "model", "who": "srv", "release": "digits-teacher@2.0", "confidence": 0.9}


def image(number: int, label: str = "a", provenance: dict[str, Any] | None = None, dim: float = 1.0) -> LabelledImage:
    """A picture of blocks, drawn by its number: each number is a scene of its own, `dim` changes its light only."""
    blocks = np.random.default_rng(number).uniform(0, 255, (6, 6, 3))
    pixels = (np.kron(blocks, np.ones((8, 8, 1))) * dim).astype(np.uint8)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    said = PERSON if provenance is None else provenance
    return LabelledImage(sha256(data).hexdigest(), data, (LabelledBox(label, (1.0, 2.0, 5.0, 6.5)),), said)


def taken(number: int, at: float, device: str = "d1", **others: Any) -> LabelledImage:
    return image(number, provenance={**PERSON, "device": device, "captured": at, **others})


@pytest.fixture
def config(tmp_path: Path) -> TrainerConfig:
    for name in ("calibration", "replay"):
        write_folder(tmp_path / name, [image({"calibration": 1000, "replay": 2000}[name])])
    return settings(tmp_path)


def settings(folder: Path, **values: Any) -> TrainerConfig:
    model = Model(
        checkpoint=folder / "a.pt", labels=["a", "b"], holdout=folder / "target", holdout_clean=folder / "base",
        holdout_test=folder / "test", calibration=folder / "calibration", replay=folder / "replay", **values,
    )  # fmt: skip
    return TrainerConfig(data_dir=folder / "data", models={"digits": model})


def freeze(config: TrainerConfig, items: list[LabelledImage], name: str = "target", **values: Any) -> holdout.Taken:
    return take(config, "digits", name, items, 100.0, **{"first": True, **values})


def folder(config: TrainerConfig, name: str = "target") -> Path:
    found = holdout.folder_of(config.model("digits"), name)
    assert found is not None
    return found


def test_a_holdout_may_not_move(config: TrainerConfig) -> None:
    """L10: the holdout is frozen."""
    items = [image(1), image(2)]
    identity = check_frozen(config, "digits", "target", items, 1.0)
    assert check_frozen(config, "digits", "target", items[::-1], 2.0) == identity
    for other in ([items[0]], [items[0], replace(items[1], boxes=image(2, "b").boxes)], [*items, image(3)]):
        with pytest.raises(HoldoutError, match="holdout digits/target has changed"):
            check_frozen(config, "digits", "target", other, 3.0)
    assert check_frozen(config, "digits", "base", [image(3)], 4.0)


def test_a_holdout_grows_and_keeps_what_it_had(config: TrainerConfig) -> None:
    first = freeze(config, [image(1), image(2)])
    more = freeze(config, [image(2), image(3)], first=False)
    assert (first.added, more.added, more.entries) == (2, 1, 3)
    assert more.refused == {"duplicate": [image(2).sha256]}
    entries = read_ledger(ledger_path(config, "digits", "target"))
    assert [entry.sha256 for entry in entries] == [image(number).sha256 for number in (1, 2, 3)]
    assert [entry.batch for entry in entries] == [0, 0, 1]
    assert [item.sha256 for item in read_folder(folder(config))] == [entry.sha256 for entry in entries]
    assert check_frozen(config, "digits", "target", read_folder(folder(config)), 5.0) == more.identity


@pytest.mark.parametrize(
    ("first", "said"), [(True, "use `trainer holdout extend`"), (False, "use `trainer holdout freeze`")]
)
def test_freezing_and_extending_are_not_mixed_up(config: TrainerConfig, first: bool, said: str) -> None:
    if first:
        freeze(config, [image(1)])
    with pytest.raises(HoldoutError, match=said):
        freeze(config, [image(2)], first=first)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: rows[:1] + rows[2:], "line 2 .*entry 1 is missing"),
        (lambda rows: [rows[0], {**rows[1], "labels": "0" * 64}, rows[2]], "line 2 .*entry 1, image .*was changed"),
        (lambda rows: [rows[1], rows[0], rows[2]], "line 1 .*entry 0 is missing or was put elsewhere"),
        (lambda rows: [rows[0], {"number": 1}, rows[2]], "line 2"),
    ],
)
def test_a_changed_ledger_is_found(config: TrainerConfig, spoil: Any, said: str) -> None:
    freeze(config, [image(1), image(2), image(3)])
    path = ledger_path(config, "digits", "target")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in spoil(rows)))
    with pytest.raises(HoldoutError, match=said):
        check_frozen(config, "digits", "target", read_folder(folder(config)), 5.0)


def test_a_resealed_entry_breaks_the_one_after_it(config: TrainerConfig) -> None:
    freeze(config, [image(1), image(2)])
    path = ledger_path(config, "digits", "target")
    entries = read_ledger(path)
    forged = replace(entries[0], labels="0" * 64)
    forged = replace(forged, hash=forged.sealed())
    rows = [forged, entries[1]]
    path.write_text("".join(json.dumps({f: getattr(row, f) for f in row.__slots__}) + "\n" for row in rows))
    with pytest.raises(HoldoutError, match=r"line 2 .*entry 1"):
        read_ledger(path)


def test_what_was_changed_in_the_folder_is_named(config: TrainerConfig) -> None:
    freeze(config, [image(1), image(2)])
    write_folder(folder(config), [image(1)])
    with pytest.raises(HoldoutError, match=f"entry 1, image {image(2).sha256[:12]} is gone"):
        freeze(config, [image(3)], first=False)


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({}, "no_provenance"),
        ({"kind": "model", "who": "srv"}, "no_provenance"),
        ({"kind": "model", "who": "srv", "release": "digits@1.0", "confidence": 0.99}, "own_prediction"),
        ({"kind": "model", "who": "srv", "release": "digits@9.1"}, "own_prediction"),
        ({**TEACHER, "confidence": 0.4}, "below_label_confidence"),
        ({**TEACHER, "confidence": float("nan")}, "below_label_confidence"),
        (TEACHER, ""),
        (PERSON, ""),
    ],
)
def test_only_people_and_other_models_say_what_is_true(
    config: TrainerConfig, provenance: dict[str, Any], reason: str
) -> None:
    item = image(1, provenance=provenance)
    found = freeze(config, [item])
    assert found.refused == ({reason: [item.sha256]} if reason else {})
    assert found.added == (0 if reason else 1)
    if reason:  # lying in the folder already makes it no better
        append_folder(folder(config), [item])
        with pytest.raises(HoldoutError, match=f"{item.sha256[:12]}: {reason}"):
            check_frozen(config, "digits", "target", [item], 1.0)
        assert not ledger_path(config, "digits", "target").exists()


def test_what_trained_never_judges(config: TrainerConfig) -> None:
    freeze(config, [image(1)])
    assert remember(config, "digits", [image(5), taken(6, 1000.0)]) == 2
    assert remember(config, "digits", [image(5)]) == 0
    offered = [
        image(5), image(5, dim=0.7), image(2000, dim=0.8), taken(7, 1003.0), taken(8, 1010.0), taken(9, 1003.0, "d2"),
    ]  # fmt: skip
    found = freeze(config, offered, first=False)
    assert found.refused == {
        "near_training": [item.sha256 for item in offered[:3]], "beside_training": [offered[3].sha256],
    }  # fmt: skip
    assert found.added == 2


def test_the_sets_are_apart(config: TrainerConfig) -> None:
    freeze(config, [image(1)])
    found = freeze(config, [image(1, dim=0.8), image(1000, dim=0.8), image(4)], "test")
    assert found.refused == {"near_other_set": [image(1, dim=0.8).sha256, image(1000, dim=0.8).sha256]}
    assert found.added == 1


def test_a_share_kept_for_the_gate_is_what_it_takes(config: TrainerConfig, tmp_path: Path) -> None:
    shared = settings(tmp_path, gate_share=0.5, test_share=0.2, split_block_s=60.0, split_guard_s=0.0)
    offered = [taken(number, 1e9 + 60 * number) for number in range(1, 30)]
    gate, test = freeze(shared, offered), freeze(shared, offered, "test")
    every = {item.sha256 for item in offered}
    chosen = [
        every - set(found.refused["other_side"]) - set(found.refused.get("near_other_set", ()))
        for found in (gate, test)
    ]
    assert len(chosen[0]) > 5
    assert len(chosen[1]) > 2
    assert not chosen[0] & chosen[1]
    assert set(gate.refused) == {"other_side"}


def test_a_killed_extension_is_finished_by_the_next(config: TrainerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(config, [image(1)])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(holdout, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        freeze(config, [image(2)], first=False)
    monkeypatch.undo()
    with pytest.raises(
        HoldoutError, match=r"1 images .* are not frozen; run `trainer holdout extend digits --set target`"
    ):
        check_frozen(config, "digits", "target", read_folder(folder(config)), 5.0)
    assert freeze(config, [], first=False).added == 1
    assert check_frozen(config, "digits", "target", read_folder(folder(config)), 5.0)


def test_a_damaged_record_of_training_is_named(config: TrainerConfig) -> None:
    path = ledger_of(config, "digits") / "images-000001.npz"
    write_whole(path, b"PK but no zip")
    with pytest.raises(LedgerError, match=r"digits/images-000001\.npz"):
        remember(config, "digits", [image(5)])


TOML = """
data_dir = "data"
[models.digits]
checkpoint = "a.pt"
labels = ["a", "b"]
holdout = "target"
holdout_clean = "base"
calibration = "calibration"
"""


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["holdout", *arguments, "--config", str(folder / "trainer.toml")])
    return done.exit_code, done.output


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "trainer.toml").write_text(TOML)
    write_folder(tmp_path / "calibration", [image(1000)])
    write_folder(tmp_path / "given", [image(1), image(2, provenance={}), image(3, "b", TEACHER)])
    code, said = run(tmp_path, "freeze", "digits", "--from", str(tmp_path / "given"), "--json")
    assert code == 0
    assert json.loads(said)["refused"] == {"no_provenance": [image(2).sha256]}
    code, said = run(tmp_path, "freeze", "digits")
    assert code == 1
    assert "use `trainer holdout extend`" in said
    write_folder(tmp_path / "more", [image(4)])
    assert run(tmp_path, "extend", "digits", "--from", str(tmp_path / "more"))[0] == 0
    code, said = run(tmp_path, "show", "digits", "--json")
    shown = json.loads(said)["target"]
    assert (shown["images"], shown["classes"], shown["labelled_by"]) == (
        3, {"a": 2, "b": 1}, {"person annotator": 2, "model digits-teacher@2.0": 1},
    )  # fmt: skip
    assert "annotator" in run(tmp_path, "show", "digits")[1]
    assert run(tmp_path, "verify", "digits")[0] == 0
    write_folder(tmp_path / "target", [image(1), image(4)])
    code, said = run(tmp_path, "verify", "digits")
    assert code == 1
    assert f"entry 1, image {image(3).sha256[:12]} is gone" in said


def test_releases_that_were_judged_on_another_holdout_are_named(tmp_path: Path) -> None:
    """Whoever replaces ledger and images together has to explain the releases."""
    (tmp_path / "trainer.toml").write_text(TOML)
    config = settings(tmp_path).model_copy(update={"data_dir": tmp_path / "data"})
    first = freeze(config, [image(1)]).identity
    freeze(config, [image(2)], first=False)

    def release(version: str, judged: str) -> None:
        made = tmp_path / version
        made.mkdir()
        (made / "model.onnx").write_bytes(version.encode())
        manifest = build_manifest(
            made, f"digits@{version}", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"},
            evaluation={"holdout_sha256": {"target": judged}},
        )  # fmt: skip
        write_whole(made / MANIFEST, canonical_bytes(manifest))
        Registry(config.releases).register(made)

    release("1.0", first)  # judged before the extension: a state that the ledger has been in
    assert run(tmp_path, "verify", "digits")[0] == 0
    release("1.1", "0" * 64)
    code, said = run(tmp_path, "verify", "digits")
    assert code == 1
    assert "digits@1.1" in said
    assert "digits@1.0" not in said
