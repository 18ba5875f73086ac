"""YOLO's training side on networks and sets that are tiny: what each setting does to the weights that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from bench.demo.scenes import LABELS, encode_png, make_scenes
from trainer.checkpoints import CheckpointError
from trainer.export.onnx import export_onnx
from trainer.export.quantize import decoder_nodes, quantize_static_int8
from trainer.tuners.settings import LoraSettings, SettingsError
from trainer.tuners.yolo import Trained, TrainSettings, train_full, tune_lora, weights_sha256, write_yolo_dataset

ONE = ("model.3.conv",)  # 64 -> 64 channels, 3x3, with batch-norm behind it
SMALL = TrainSettings(epochs=1, imgsz=64, batch=8, seed=3)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    model: Any = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    scenes = make_scenes("train", 16, seed=1)
    items = ((f"s{i}", encode_png(s.image), s.boxes, s.classes) for i, s in enumerate(scenes))
    return write_yolo_dataset(folder, items, LABELS)


@pytest.fixture(scope="module")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_full(dataset, "yolo11n.yaml", tmp_path_factory.mktemp("base") / "base.pt", SMALL).path


def _tuned(base: Path, dataset: Path, out: Path, **keys: Any) -> Trained:
    return tune_lora(base, dataset, out, LoraSettings(**keys), SMALL)


@pytest.fixture(scope="module")
def one_layer(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _tuned(base, dataset, tmp_path_factory.mktemp("one") / "t.pt", target_modules=ONE)


@pytest.fixture(scope="module")
def all_layers(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _tuned(base, dataset, tmp_path_factory.mktemp("all") / "t.pt")


def _inputs(count: int) -> list[NDArray[np.float32]]:
    return [
        np.ascontiguousarray(s.image[::2, ::2, ::-1].transpose(2, 0, 1)[None][:, :, :64, :64].astype(np.float32) / 255)
        for s in make_scenes("calibration", count, seed=1)
    ]


def test_a_run_tells_its_epochs_and_leaves_only_its_result(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[tuple[int, int, dict[str, float]]] = []
    settings = TrainSettings(epochs=2, imgsz=64, batch=8, seed=3)
    train_full(dataset, "yolo11n.yaml", Path("m.pt"), settings, lambda *args: told.append(args))
    assert [(epoch, epochs) for epoch, epochs, _ in told] == [(1, 2), (2, 2)]
    assert all(losses["loss"] > 0 and losses["lr"] > 0 for _, _, losses in told)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert capfd.readouterr().out == ""


def test_the_same_seed_gives_the_same_weights(base: Path, dataset: Path, one_layer: Trained, tmp_path: Path) -> None:
    again = _tuned(base, dataset, tmp_path / "2.pt", target_modules=ONE)
    settings = TrainSettings(epochs=1, imgsz=64, batch=8, seed=4)
    other = tune_lora(base, dataset, tmp_path / "3.pt", LoraSettings(target_modules=ONE), settings)
    first, second, third = (_weights(run.path) for run in (one_layer, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert weights_sha256(one_layer.path) == weights_sha256(again.path) != weights_sha256(other.path)


def test_rank_sets_how_much_is_trained(
    base: Path, dataset: Path, one_layer: Trained, all_layers: Trained, tmp_path: Path
) -> None:
    low = _tuned(base, dataset, tmp_path / "low.pt", r=2, target_modules=ONE)
    assert one_layer.trainable - low.trainable == (16 - 2) * (64 * 9 + 64)
    assert one_layer.trainable < all_layers.trainable < 0.4 * _count(base)
    assert low.parameters == all_layers.parameters == _count(base)


def _count(path: Path) -> int:
    model: Any = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return sum(parameter.numel() for parameter in model.parameters())


def test_only_targets_and_batch_norm_change(base: Path, one_layer: Trained) -> None:
    before, after = _weights(base), _weights(one_layer.path)
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".bn." not in name} == {"model.3.conv.weight"}
    assert "model.3.bn.running_mean" in changed


def test_all_adapts_every_convolution_but_the_grouped_and_the_box_decoder(base: Path, all_layers: Trained) -> None:
    before, after = _weights(base), _weights(all_layers.path)
    model: Any = torch.load(base, map_location="cpu", weights_only=False)["model"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            adapted = module.groups == 1 and "dfl" not in name
            assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) is not adapted, name


def test_bias_says_which_biases_learn(base: Path, dataset: Path, tmp_path: Path) -> None:
    before = _weights(base)
    biases = {name for name in before if name.endswith(".bias") and ".bn." not in name}
    trainable: dict[str, int] = {}
    changed: dict[str, set[str]] = {}
    for bias in ("none", "lora_only", "all"):
        run = _tuned(base, dataset, tmp_path / f"{bias}.pt", target_modules=["cv3.0.2"], bias=bias)
        after = _weights(run.path)
        trainable[bias] = run.trainable
        changed[bias] = {name for name in biases if not torch.equal(before[name], after[name])}
    assert changed["none"] == set()
    assert changed["lora_only"] == {"model.23.cv3.0.2.bias"}
    assert changed["lora_only"] < changed["all"] <= biases
    assert trainable["lora_only"] - trainable["none"] == len(LABELS)
    assert trainable["all"] - trainable["none"] == sum(before[name].numel() for name in biases)


def test_alpha_scales_and_dropout_thins_the_update(
    base: Path, dataset: Path, one_layer: Trained, tmp_path: Path
) -> None:
    runs = {
        "plain": one_layer,
        "alpha": _tuned(base, dataset, tmp_path / "a.pt", target_modules=ONE, lora_alpha=128.0),
        "dropout": _tuned(base, dataset, tmp_path / "d.pt", target_modules=ONE, lora_dropout=0.5),
    }
    name, before = "model.3.conv.weight", _weights(base)
    moved = {key: _weights(run.path)[name] - before[name] for key, run in runs.items()}
    assert moved["alpha"].norm() > 1.5 * moved["plain"].norm()
    assert not torch.equal(moved["dropout"], moved["plain"])


@pytest.mark.parametrize("target", ["model.999.conv", "bn", "dfl.conv"])
def test_targets_that_cannot_be_adapted_are_refused(base: Path, dataset: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(SettingsError, match=r"lora\.target_modules.*fix: name convolutions"):
        _tuned(base, dataset, tmp_path / "t.pt", target_modules=[target])
    assert not (tmp_path / "t.pt").exists()


def test_bad_settings_and_missing_files_are_named(base: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="imgsz=100"):
        train_full(dataset, base, tmp_path / "t.pt", TrainSettings(epochs=1, imgsz=100))
    with pytest.raises(ValueError, match="epochs=0"):
        train_full(dataset, base, tmp_path / "t.pt", TrainSettings(epochs=0))
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        train_full(dataset, tmp_path / "none.pt", tmp_path / "t.pt", SMALL)
    with pytest.raises(SettingsError, match=r"nonsense: give the path of a \.pt file, or of a network"):
        train_full(dataset, tmp_path / "nonsense", tmp_path / "t.pt", SMALL)
    for name, content in (("cut.pt", base.read_bytes()[:5000]), ("empty.pt", b""), ("text.pt", b"no checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: not a checkpoint of ultralytics .* give a whole .pt file"):
            train_full(dataset, tmp_path / name, tmp_path / "t.pt", SMALL)
        with pytest.raises(CheckpointError, match=name):
            weights_sha256(tmp_path / name)
    assert not (tmp_path / ".t-run").exists()
    with pytest.raises(FileNotFoundError, match=r"dataset\.yaml"):
        train_full(tmp_path, base, tmp_path / "t.pt", SMALL)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        export_onnx(tmp_path / "none.pt", tmp_path / "o.onnx", 64)


def test_dataset_holds_the_given_bytes_and_shares_of_the_image(tmp_path: Path) -> None:
    scene = make_scenes("train", 1, seed=1)[0]
    png = encode_png(scene.image)
    yaml = write_yolo_dataset(tmp_path / "d", [("a", png, [[16, 32, 48, 96], [150, 150, 190, 170]], [1, 9])], LABELS)
    folder = yaml.parent
    assert (folder / "images/train/a.png").read_bytes() == png
    assert (folder / "labels/train/a.txt").read_text().splitlines() == [
        "1 0.2 0.4 0.2 0.4",
        "9 0.96875 0.96875 0.0625 0.0625",
    ]


def test_dataset_refuses_what_would_train_wrongly(tmp_path: Path) -> None:
    png = encode_png(make_scenes("train", 1, seed=1)[0].image)
    box = [[1, 1, 20, 20]]
    wrong: list[tuple[list[tuple[str, bytes, Any, Any]], str]] = [
        ([("a", png, box, [10])], "classes"),
        ([("a", png, box, [1, 2])], "1 boxes but 2 classes"),
        ([("a", png, box, [1]), ("a", png, box, [1])], "'a'"),
        ([("../a", png, box, [1])], "names"),
        ([("a", b"no image", box, [1])], "cannot|not an image"),
        ([], "no image"),
    ]
    for number, (items, message) in enumerate(wrong):
        with pytest.raises(ValueError, match=message):
            write_yolo_dataset(tmp_path / str(number), items, LABELS)
    write_yolo_dataset(tmp_path / "used", [("a", png, box, [1])], LABELS)
    with pytest.raises(ValueError, match="already holds"):
        write_yolo_dataset(tmp_path / "used", [("b", png, box, [1])], LABELS)


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(base, tmp_path_factory.mktemp("onnx") / "model.onnx", 64)


def test_export_and_int8_keep_metadata_and_answers(exported: Path, tmp_path: Path) -> None:
    quantised = quantize_static_int8(exported, tmp_path / "int8.onnx", _inputs(8))
    full = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    small = onnxruntime.InferenceSession(str(quantised), providers=["CPUExecutionProvider"])
    told = full.get_modelmeta().custom_metadata_map
    assert told["task"] == "detect" and told["stride"] == "32" and told["imgsz"] == "[64, 64]"
    assert eval(told["names"]) == dict(enumerate(LABELS))
    assert told.items() <= small.get_modelmeta().custom_metadata_map.items()
    assert quantised.stat().st_size < 0.4 * exported.stat().st_size
    feed = {full.get_inputs()[0].name: _inputs(9)[8]}
    one, other = full.run(None, feed)[0], small.run(None, feed)[0]
    assert one.shape == other.shape == (1, 4 + len(LABELS), 84)
    assert np.abs(one[:, :4] - other[:, :4]).mean() < 3  # pixels
    assert np.abs(one[:, 4:] - other[:, 4:]).max() < 0.05


def test_the_decoder_is_left_in_float(exported: Path, tmp_path: Path) -> None:
    quantised = onnx.load(str(quantize_static_int8(exported, tmp_path / "int8.onnx", _inputs(8))))
    kinds = {node.name: node.op_type for node in onnx.load(str(exported)).graph.node}
    left = decoder_nodes(onnx.load(str(exported)).graph)
    assert {"Softmax", "Sigmoid", "Concat"} <= {kinds[name] for name in left}
    assert len([name for name in left if kinds[name] == "Conv"]) == 1  # the box decoder's constants
    assert quantised.graph.output[0].name in {
        name for node in quantised.graph.node if node.op_type == "Concat" for name in node.output
    }


def test_too_few_calibration_images_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 calibration images"):
        quantize_static_int8(exported, tmp_path / "int8.onnx", _inputs(2))
    assert not (tmp_path / "int8.onnx").exists()
