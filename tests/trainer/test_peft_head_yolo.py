"""PeftHead in front of the vision tuner: the same configuration, every key of it, on a network's convolutions."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.shapes import LABELS, SIZE, shapes, tiny_network
from trainer.tuners.base import Work, tuner
from trainer.tuners.peft_head import PeftHead
from trainer.tuners.settings import SettingsError
from trainer.tuners.yolo.settings import YoloSettings

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = {"r": 4, "lora_alpha": 8, "target_modules": ["cv1.conv", "cv2.conv"], "lora_dropout": 0.1, "bias": "none"}
KEYS = {"labels": LABELS[:3], "imgsz": SIZE, "batch": 12, "lr": 0.004, "device": "cpu", "threads": 1, "replay_ratio": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    start, out = tiny_network(folder, "yolo11n"), folder / "base.pt"
    settings = YoloSettings.parse({**KEYS, "method": "full", "epochs": 2})
    tuner("yolo").tune(Work(start, shapes(24, 1, "detect"), out, folder / "scratch", settings, 1))
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    model: Any = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_head_trains_what_it_names_and_leaves_a_network_without_a_trace_of_it(base: Path, tmp_path: Path) -> None:
    head = PeftHead(base, HEAD, learner="yolo")
    told: list[Any] = []
    tuned = head.tune(
        shapes(24, 7, "detect"), tmp_path / "t.pt", tmp_path / "scratch", report=told.append, epochs=3, **KEYS
    )
    assert head.adapter == tuned.path == tmp_path / "t.pt"
    assert [row["epoch"] for row in told] == [1, 2, 3]
    assert tuned.facts["method"] == "lora"
    before, after = weights(base), weights(tuned.path)
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    convolutions = {name for name in before if name.endswith("conv.weight") or ".bn." not in name}
    moved = {name for name in convolutions if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("cv1.conv.weight", "cv2.conv.weight"))}
    for name in moved:
        difference = (after[name].float() - before[name].float()).flatten(1)
        assert torch.linalg.matrix_rank(difference, atol=1e-3 * float(difference.abs().max())) <= 4, name


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 3), ("lora_alpha", 5), ("target_modules", ["cv1.conv"]), ("lora_dropout", 0.5), ("bias", "all")],
)
def test_every_key_has_its_effect(base: Path, key: str, value: Any) -> None:
    plain = PeftHead(base, HEAD, learner="yolo").prepare_peft_model()
    changed = PeftHead(base, HEAD | {key: value}, learner="yolo").prepare_peft_model()

    def facts(model: Any) -> dict[str, Any]:
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        return {
            "r": {layer.lora_A["default"].weight.shape[0] for layer in layers.values()},
            "lora_alpha": {layer.scaling["default"] * layer.r["default"] for layer in layers.values()},
            "target_modules": set(layers),
            "lora_dropout": {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers.values()},
            "bias": {name for name, p in model.named_parameters()
                     if p.requires_grad and name.endswith(".bias") and ".bn." not in name},
        }  # fmt: skip

    before, after = facts(plain), facts(changed)
    assert {name for name in before if before[name] != after[name]} == {key}
    learns = {name for name, p in changed.named_parameters() if p.requires_grad}
    assert any(".lora_A." in name for name in learns) and not any(".dfl." in name for name in learns)


def test_what_a_head_cannot_honour_is_said(base: Path, tmp_path: Path) -> None:
    places = (tmp_path / "t.pt", tmp_path / "scratch")
    for config, values, said in (
        ({"target_modules": ["cv1.conv", "qkv_proj"]}, {}, r"target_modules = 'qkv_proj': no layer of the model"),
        ({}, {"method": "head"}, "method = 'head': a head trains its adapter"),
        ({}, {"lora": {"r": 4}}, "the head has its own"),
        ({}, {"epochs": 0}, r"yolo\.epochs = 0: Input should be greater"),
        ({}, {"epoch": 3}, r"yolo\.epoch = 3: no such setting"),
    ):
        with pytest.raises(SettingsError, match=said):
            PeftHead(base, config, learner="yolo").tune(shapes(12, 7, "detect"), *places, **{**KEYS, **values})
    with pytest.raises(SettingsError, match=r"yolo\.labels = "):
        PeftHead(base, learner="yolo").settings()
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist"):
        PeftHead(tmp_path / "missing.pt", learner="yolo").prepare_peft_model()
    assert not places[0].exists()


def test_places_may_be_relative_to_where_the_process_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/base.pt").write_bytes(base.read_bytes())
    head = PeftHead("models/base.pt", HEAD, learner="yolo")

    def stop(row: Any) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    for report in (stop, lambda _row: None):
        with nullcontext() if report is not stop else pytest.raises(KeyboardInterrupt):
            tuned = head.tune(
                shapes(12, 7, "detect"), Path("out/t.pt"), Path("scratch"), report=report, epochs=2, **KEYS
            )
    assert tuned.facts["resumed_at_epoch"] == 2
    assert tuned.path == Path("out/t.pt") and (tmp_path / "out" / "t.pt").is_file()
    known = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert known == {"models", "out"}, "nothing is left of its checkpoints, and nothing lies anywhere else"
