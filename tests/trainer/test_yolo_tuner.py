"""The vision tuner on tiny networks: tasks and methods, replay, and what must hold when things fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.support.shapes import LABELS, SIZE, shapes, tiny_network
from trainer.export.onnx import export_onnx
from trainer.tuners.base import Tuned, Work, tuner
from trainer.tuners.settings import SettingsError
from trainer.tuners.yolo import prepare_process
from trainer.tuners.yolo.data import Example, mix, outline_of, write_examples
from trainer.tuners.yolo.settings import YoloSettings

ROOT = Path(__file__).parents[2]
TASKS = {"-seg": "segment", "-cls": "classify"}
NETWORKS = ("yolo11n", "yolov8n", "yolo26n", "yolo11n-seg", "yolo26n-seg", "yolo11n-cls")


def task_of(network: str) -> str:
    return TASKS.get(network[-4:], "detect")


def settings(task: str, **keys: Any) -> YoloSettings:
    given = {"labels": LABELS[:3], "epochs": 3, "imgsz": SIZE, "batch": 12, "lr": 0.004, "device": "cpu", "threads": 1}
    return YoloSettings.parse({**given, "task": task, "replay_ratio": 0, **keys})


def weights(path: Path) -> dict[str, torch.Tensor]:
    model: Any = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class Bases:
    """A base of each network, trained on the spot when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tuned: dict[str, Tuned] = {}

    def __getitem__(self, network: str) -> Tuned:
        if network not in self.tuned:
            prepare_process()
            start, task = tiny_network(self.folder, network), task_of(network)
            work = Work(
                start, shapes(36 if task == "classify" else 24, 1, task), self.folder / f"{network}.pt",
                self.folder / "scratch", settings(task, method="full", epochs=6), 1,
            )  # fmt: skip
            self.tuned[network] = tuner("yolo").tune(work)
        return self.tuned[network]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def train(bases: Bases, network: str, out: Path, *, seed: int = 5, **keys: Any) -> Tuned:
    task = task_of(network)
    data = keys.pop("data", None) or shapes(24, 2, task)
    extra = {name: keys.pop(name) for name in ("held_out", "report", "scratch") if name in keys}
    extra.setdefault("scratch", out.with_suffix(""))
    return tuner("yolo").tune(Work(bases[network].path, data, out, settings=settings(task, **keys), seed=seed, **extra))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_learns_whole(bases: Bases, network: str) -> None:
    tuned = bases[network]
    losses = [row["loss"] for row in tuned.history]
    assert [row["epoch"] for row in tuned.history] == list(range(1, 7))
    assert losses[-1] < 0.93 * max(losses[:2])
    assert tuned.parameters - tuned.trainable in (0, 16)  # DFL's constants, where there are some
    assert tuned.facts["method"] == "full" and tuned.facts["stopped_early"] is False


@pytest.mark.parametrize(
    ("network", "method", "exported"),
    [
        ("yolo11n", "lora", False), ("yolov8n", "head", True), ("yolo26n", "lora", False),
        ("yolo26n", "head", False), ("yolo11n-seg", "head", False), ("yolo26n-seg", "lora", True),
        ("yolo11n-cls", "lora", True), ("yolo11n-cls", "head", False),
    ],
)  # fmt: skip
def test_a_method_trains_its_part_and_keeps_the_bases_structure(
    bases: Bases, tmp_path: Path, network: str, method: str, exported: bool
) -> None:
    from ultralytics import YOLO

    base, told = bases[network], []
    data = shapes(24, 7, task_of(network))
    for example in data:  # a new look: what is bright is dark
        example.image[...] = 255 - example.image  # type: ignore[index]
    tuned = train(bases, network, tmp_path / "t.pt", data=data, method=method, epochs=4, report=told.append)
    before, after = weights(base.path), weights(tuned.path)
    losses = [row["loss"] for row in tuned.history]
    assert [row["epoch"] for row in told] == [1, 2, 3, 4] and told == list(tuned.history)
    assert losses[-1] < losses[0]
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert tuned.parameters == base.parameters and 0 < tuned.trainable < 0.6 * base.parameters
    assert os.listdir(tmp_path / "t") == []
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"model.{max(int(name.split('.')[1]) for name in before)}."
    if method == "head":
        assert moved and all(name.startswith(last) for name in moved)
    else:
        assert any(not name.startswith(last) for name in moved)
    assert YOLO(tuned.path).task == task_of(network)
    if exported:
        file = export_onnx(tuned.path, tmp_path / "m.onnx", SIZE)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        given = np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32)
        answer = session.run(None, {session.get_inputs()[0].name: given})
        assert np.isfinite(answer[0]).all()
        if task_of(network) == "classify":
            model: Any = YOLO(tuned.path).model.eval()
            np.testing.assert_allclose(answer[0], model(torch.from_numpy(given))[0].detach().numpy(), atol=1e-4)


def test_a_new_class_gets_its_rows_and_the_known_ones_keep_theirs(bases: Bases, tmp_path: Path) -> None:
    for network, row in (("yolo11n", "cv3.0.2.weight"), ("yolo11n-cls", "linear.weight")):
        data = shapes(16, 3, task_of(network), (2, 3))
        out = tmp_path / f"{network}.pt"
        labels = (LABELS[3], *LABELS[:3])  # in another order, too
        data = [Example(e.name, e.image, [(int(np.asarray(e.classes)[0]) + 1) % 4], e.boxes) for e in data]
        tuned = train(bases, network, out, data=data, labels=labels, method="head", epochs=1, lr=1e-6)
        old, new = weights(bases[network].path), weights(tuned.path)
        name = next(name for name in old if name.endswith(row))
        torch.testing.assert_close(new[name][1:], old[name], atol=1e-4, rtol=0)
        assert new[name].shape[0] == 4


class _Stopped(Exception):
    pass


def _stop_at(epoch: int) -> Callable[[Mapping[str, float]], None]:
    def stop(row: Mapping[str, float]) -> None:
        if row["epoch"] == epoch:
            raise _Stopped

    return stop


def test_twice_the_same_is_the_same_and_another_seed_is_not(bases: Bases, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"lora": {"r": 4, "lora_dropout": 0.2}}
    first = train(bases, "yolo11n-cls", tmp_path / "a.pt", **keys)
    with pytest.raises(_Stopped):  # after its last epoch and before its result
        train(bases, "yolo11n-cls", tmp_path / "b.pt", report=_stop_at(3), **keys)
    assert not (tmp_path / "b.pt").exists()
    second = train(bases, "yolo11n-cls", tmp_path / "b.pt", report=_stop_at(1), **keys)
    other = train(bases, "yolo11n-cls", tmp_path / "c.pt", seed=6, **keys)
    assert same(weights(first.path), weights(second.path)) and first.history == second.history
    assert not same(weights(first.path), weights(other.path))


_CHILD = r"""
import json, os, sys
from pathlib import Path
from tests.support.shapes import shapes
from trainer.tuners.base import Work, tuner
from trainer.tuners.yolo.settings import YoloSettings

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo") and "unix" not in str(arguments).lower():
        if "--offline" in sys.argv:
            raise RuntimeError(f"the network was used: {event} {arguments}")

sys.addaudithook(watch)
given = json.loads(sys.argv[1])
settings = YoloSettings.parse(given["settings"])

def report(row):
    os.write(1, f"{int(row['epoch'])}\n".encode())

held_out = shapes(6, 9, settings.task) if given["held_out"] else ()
together = []
if "RANK" in os.environ:  # what each process has in the end must be the same
    from trainer.tuners.yolo import prepare_process
    prepare_process()
    import torch
    wrap = torch.nn.parallel.DistributedDataParallel.__init__

    def kept(self, *arguments, **keys):
        together.append(self)
        wrap(self, *arguments, **keys)

    torch.nn.parallel.DistributedDataParallel.__init__ = kept

work = Work(Path(given["base"]), shapes(24, 2, settings.task), Path(given["out"]), Path(given["scratch"]), settings,
            given["seed"], held_out, report)
tuned = tuner("yolo").tune(work)
learned = [value for model in together for p in model.parameters() for value in p.detach().flatten().tolist()]
told = {**tuned.facts, "learned": len(learned), "sum": sum(learned)}
os.write(1, f"{json.dumps(told)}\n".encode())  # in one piece: two processes share the pipe
"""


def child(
    bases: Bases, network: str, out: Path, tmp_path: Path, wrapped: tuple[str, ...] = (), **keys: Any
) -> subprocess.Popen[str]:
    """A process that trains as `train` does, with a home of its own."""
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    given = {
        "base": str(bases[network].path), "out": str(out), "scratch": str(out.with_suffix("")), "seed": 5,
        "settings": settings(task_of(network), **keys).model_dump(mode="json"), "held_out": True,
    }  # fmt: skip
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "YOLO_CONFIG_DIR"},
        "HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    offline = () if wrapped else ("--offline",)
    return subprocess.Popen(
        [sys.executable, *wrapped, str(script), json.dumps(given), *offline],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_a_killed_training_goes_on_and_ends_as_one_that_was_not(bases: Bases, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "lora", "epochs": 4, "patience": 4, "lora": {"r": 4, "lora_dropout": 0.1}}
    out = tmp_path / "killed.pt"
    process = child(bases, "yolo26n", out, tmp_path, **keys)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "2":
            break
    time.sleep(0.05)  # into the third epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not out.exists()
    assert list((tmp_path / "home").rglob("*")) == []

    told: list[Mapping[str, float]] = []
    held_out = shapes(6, 9, "detect")
    ended = train(bases, "yolo26n", out, held_out=held_out, report=told.append, **keys)
    whole = train(bases, "yolo26n", tmp_path / "whole.pt", held_out=held_out, **keys)
    began = ended.facts["resumed_at_epoch"]
    assert 2 <= began < 4 and whole.facts["resumed_at_epoch"] is None
    assert [row["epoch"] for row in told] == list(range(began + 1, 5))
    assert [row["epoch"] for row in ended.history] == [1, 2, 3, 4]
    assert same(weights(ended.path), weights(whole.path))
    assert ended.history == whole.history


def test_a_state_of_another_training_or_a_damaged_one_is_not_continued(bases: Bases, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    small: dict[str, Any] = {"method": "head", "epochs": 2, "scratch": scratch}
    for changed in ({"lr": 0.001}, {"seed": 6}, {"data": shapes(24, 8, "classify")}, None):
        with pytest.raises(_Stopped):
            train(bases, "yolo11n-cls", tmp_path / "a.pt", report=_stop_at(1), **small)
        state = scratch / "state.pt"
        assert state.is_file()
        if changed is None:
            state.write_bytes(state.read_bytes()[:1000])
        tuned = train(bases, "yolo11n-cls", tmp_path / "a.pt", **{**small, **(changed or {})})
        assert tuned.facts["resumed_at_epoch"] is None and len(tuned.history) == 2


def test_it_stops_when_the_held_out_images_gain_nothing_and_keeps_the_best(bases: Bases, tmp_path: Path) -> None:
    held_out = shapes(9, 9, "classify")
    wrong = [Example(e.name, e.image, [(int(np.asarray(e.classes)[0]) + 1) % 3]) for e in shapes(24, 2, "classify")]
    keys: dict[str, Any] = {"method": "full", "data": wrong, "held_out": held_out, "lr": 0.002}
    tuned = train(bases, "yolo11n-cls", tmp_path / "t.pt", epochs=20, patience=2, **keys)
    losses = [row["held_out_loss"] for row in tuned.history]
    best = int(np.argmin(losses)) + 1
    assert tuned.facts["stopped_early"] and len(losses) == best + 2 and tuned.facts["best_epoch"] == best
    first = train(bases, "yolo11n-cls", tmp_path / "f.pt", epochs=20, patience=2, **keys)
    assert same(weights(tuned.path), weights(first.path))
    from ultralytics import YOLO

    model: Any = YOLO(tuned.path).model.eval()
    images = torch.from_numpy(np.stack([np.asarray(e.image)[..., ::-1].transpose(2, 0, 1) for e in held_out]) / 255.0)
    chances = model(images.float())[0]
    truth = torch.tensor([int(np.asarray(e.classes)[0]) for e in held_out])
    assert float(-chances[range(9), truth].log().mean()) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize(("network", "epoch"), [("yolo11n", 1), ("yolo11n-cls", 2)])
def test_too_little_memory_halves_the_batch_and_keeps_the_step(
    bases: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture, network: str, epoch: int
) -> None:
    from ultralytics.nn.tasks import BaseModel

    bases[network]
    epochs = [0]

    def full(module: torch.nn.Module, given: Any) -> None:
        batch = given[0]["img"] if isinstance(given[0], dict) else given[0]
        if isinstance(module, BaseModel) and module.training and len(batch) > 6 and epochs[0] >= epoch - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def report(row: Mapping[str, float]) -> None:
        epochs[0] = int(row["epoch"])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        tuned = train(bases, network, tmp_path / "t.pt", epochs=3, method="full", report=report, weight_decay=0.0)
    finally:
        hook.remove()
    assert tuned.facts["batch"] == {"asked": 12, "at_once": 6, "accumulated": 2}
    assert tuned.facts["steps"] == 3 * 24 / 12  # as many as if the memory had sufficed
    assert "out of memory with 12 images at once: 6 now" in caplog.text
    assert tuned.facts["resumed_at_epoch"] == (epoch - 1 or None)
    assert [row["epoch"] for row in tuned.history] == [1, 2, 3]


def test_not_one_image_fits(bases: Bases, tmp_path: Path) -> None:
    bases["yolo11n-cls"]

    def full(module: torch.nn.Module, given: Any) -> None:
        if module.training and type(module).__name__ == "ClassificationModel":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        with pytest.raises(MemoryError, match=r"out of memory with 1 images of 64 pixels.*smaller imgsz"):
            train(bases, "yolo11n-cls", tmp_path / "t.pt", batch=2)
    finally:
        hook.remove()
    assert not (tmp_path / "t.pt").exists()


def accuracy(path: Path, examples: list[Example]) -> float:
    from ultralytics import YOLO

    model: Any = YOLO(path).model.eval()
    images = torch.from_numpy(np.stack([np.asarray(e.image)[..., ::-1].transpose(2, 0, 1) for e in examples]) / 255.0)
    with torch.no_grad():
        found = model(images.float())[0].argmax(dim=1).tolist()
    return float(np.mean([index == int(np.asarray(e.classes)[0]) for index, e in zip(found, examples, strict=True)]))


def test_without_replay_it_forgets_and_with_replay_it_does_not(bases: Bases, tmp_path: Path) -> None:
    old = shapes(36, 1, "classify", replay=True)  # what the base has learned from
    new = shapes(24, 3, "classify", (3,))
    exam_old, exam_new = shapes(60, 11, "classify"), shapes(20, 12, "classify", (3,))
    found = {}
    for ratio in (0.0, 1.0):
        out = tmp_path / f"{ratio}.pt"
        tuned = train(
            bases, "yolo11n-cls", out, data=[*new, *old], labels=LABELS, method="full", epochs=8, replay_ratio=ratio
        )
        assert tuned.facts["replay"]["taken"] == 24 * ratio
        found[ratio] = accuracy(out, exam_old), accuracy(out, exam_new)
    assert found[0.0][1] >= 0.9 and found[1.0][1] >= 0.8, found
    assert found[0.0][0] <= 0.4, found
    assert found[1.0][0] >= 0.75, found


def pictures(*classes: tuple[int, ...], replay: bool = True) -> list[Example]:
    blank = np.zeros((8, 8, 3), np.uint8)
    name = "old" if replay else "new"
    return [Example(f"{name}-{number:03d}", blank, list(shown), replay=replay) for number, shown in enumerate(classes)]


def test_replay_is_balanced_by_class_and_the_same_in_any_order() -> None:
    old = pictures(*[(0,)] * 50, *[(1,)] * 5, *[(0, 2)] * 3, *[()] * 4)
    new = pictures(*[(0,)] * 10, replay=False)
    mixed = mix([*new, *old], 1.2, 3)
    assert (mixed.asked, mixed.taken) == (12, 12)
    assert mixed.by_class == {-1: 4, 0: 4, 1: 4, 2: 3}  # three pictures show both 0 and 2
    assert [example.name for example in mixed.examples[:10]] == [example.name for example in new]
    again = mix([*reversed(old), *new], 1.2, 3)
    assert [example.name for example in again.examples] == [example.name for example in mixed.examples]
    assert [example.name for example in mix([*new, *old], 1.2, 4).examples] != [e.name for e in mixed.examples]


@pytest.mark.parametrize(
    ("ratio", "old", "asked", "taken"), [(0.0, 5, 0, 0), (0.5, 5, 5, 5), (2.0, 5, 20, 5), (1.0, 0, 10, 0)]
)
def test_replay_takes_what_there_is(ratio: float, old: int, asked: int, taken: int) -> None:
    mixed = mix([*pictures(*[(0,)] * 10, replay=False), *pictures(*[(1,)] * old)], ratio, 0)
    assert (mixed.asked, mixed.taken, len(mixed.examples)) == (asked, taken, 10 + taken)


def test_replay_alone_is_no_training() -> None:
    with pytest.raises(ValueError, match="3 examples, none of them new"):
        mix(pictures((0,), (1,), (2,)), 1.0, 0)


def test_outlines_and_class_folders_are_written_as_given(tmp_path: Path) -> None:
    blank = np.zeros((50, 100, 3), np.uint8)
    outline = [[10, 10], [60, 10], [200, 40]]
    flat = [[1, 1], [9, 1], [5, 1]]
    item = Example("a", blank, [1, 0], outlines=[outline, flat])
    files = write_examples(tmp_path / "s", "segment", LABELS, [item])
    assert (tmp_path / "s/labels/train/a.txt").read_text() == "1 0.1 0.2 0.6 0.2 1 0.8\n"
    assert files.left_out == 1
    write_examples(tmp_path / "c", "classify", LABELS, [Example("b", blank, [2])], [Example("c", blank, [3])])
    assert (tmp_path / "c/train/class-000002/b.png").is_file() and (tmp_path / "c/val/class-000003/c.png").is_file()


@pytest.mark.parametrize(
    ("task", "item", "message"),
    [
        ("segment", {"classes": [0, 1], "outlines": [[[0, 0], [5, 0], [5, 5]]]}, "1 outlines but 2 classes"),
        ("classify", {"classes": [0, 1]}, "2 classes; a classifier's image has exactly one"),
        ("classify", {"classes": []}, "0 classes"),
        ("detect", {"classes": [4], "boxes": [[0, 0, 5, 5]]}, "4 labels"),
        ("detect", {"classes": [1]}, "0 boxes but 1 classes"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(
    tmp_path: Path, task: Any, item: dict[str, Any], message: str
) -> None:
    example = Example("a", np.zeros((8, 8, 3), np.uint8), **item)
    with pytest.raises(ValueError, match=message):
        write_examples(tmp_path, task, LABELS, [example])


def test_a_masks_outline_covers_the_mask() -> None:
    import cv2

    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:25], mask[25:38, 30:55] = True, True
    drawn = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [outline_of(mask).astype(np.int32)], (1,)) > 0
    assert (mask & ~drawn).sum() == 0 and (drawn & ~mask).sum() < 0.05 * mask.sum()
    assert len(outline_of(np.zeros((4, 4), bool))) == 0


def test_what_the_network_cannot_honour_is_said(bases: Bases, tmp_path: Path) -> None:
    out, scratch = tmp_path / "o.pt", tmp_path / "s"
    other_task = Work(bases["yolo11n"].path, shapes(4, 1, "segment"), out, scratch, settings("segment"), 0)
    no_weights = Work(
        tiny_network(bases.folder, "yolo11n"), shapes(4, 1, "detect"), out, scratch, settings("detect"), 0
    )
    with pytest.raises(SettingsError, match=r"yolo\.task = 'segment'.* is made to detect"):
        tuner("yolo").tune(other_task)
    with pytest.raises(SettingsError, match=r"yolo\.method = 'lora'.*no weights to keep"):
        tuner("yolo").tune(no_weights)
    with pytest.raises(SettingsError, match=r"yolo\.imgsz = 100: .*; yolo\.metod = 'full': .*known keys are labels"):
        YoloSettings.parse({"labels": ["a"], "imgsz": 100, "metod": "full"})
    assert not out.exists()


def test_two_processes_train_together(bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "two.pt"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    process = child(bases, "yolo11n", out, tmp_path, launcher, method="full", epochs=2)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    facts = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [fact["processes"] for fact in facts] == [2, 2]
    assert facts[0]["learned"] > 10000
    assert (facts[0]["learned"], facts[0]["sum"]) == (facts[1]["learned"], facts[1]["sum"])
    assert sorted(line for line in text.splitlines() if line.isdigit()) == ["1", "2"]  # one of them reports
    before, after = weights(bases["yolo11n"].path), weights(out)
    assert list(before) == list(after)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("conv.weight"))
    assert os.listdir(out.with_suffix("")) == []
