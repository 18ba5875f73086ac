"""A release's file opened as the device decides: damaged files, providers that are missing, keys that are wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from edged.config import Slot
from edged.engines.base import EngineError, EngineOptions
from edged.engines.ort import Session, choose_providers
from edged.wire.manifest import FileEntry, ReleaseManifest

CPU = "CPUExecutionProvider"
MANIFEST = ReleaseManifest(
    release="toy@1.0",
    kind="detect",
    engine="onnx_detect",
    files={"model": FileEntry.of("model.onnx", 1, [b"x"])},
    created="2026-01-01T00:00:00Z",
)


def twice(path: Path) -> None:
    """A model that adds its input to itself."""
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("x", "y")}
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [value["x"]], [value["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"task": "detect"})
    onnx.save(model, str(path))


def opened(folder: Path, **options: Any) -> Session:
    twice(folder / "model.onnx")
    return Session(folder, MANIFEST, EngineOptions(**options))


def answer(session: Session) -> list[float]:
    return session.run(np.array([[1, 2]], np.float32))[0].tolist()  # type: ignore[no-any-return]


def test_a_session_tells_what_its_file_says(tmp_path: Path) -> None:
    session = opened(tmp_path)
    assert [str(value) for value in (*session.inputs, *session.outputs)] == ["tensor(float) [1, 'n']"] * 2
    assert session.metadata == {"task": "detect"}
    assert answer(session) == [[2, 4]]


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
def test_a_damaged_file_is_an_error_with_its_reason(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    twice(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"\x07" * 500}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(EngineError, match=r"toy@1\.0: .*model\.onnx (does not load: .+|is missing)"):
        Session(tmp_path, MANIFEST, EngineOptions())


def test_a_release_without_a_model_names_what_it_has(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"files": {"adapter": MANIFEST.files["model"]}})
    with pytest.raises(EngineError, match=r"no file with the role 'model'; it has \['adapter'\]"):
        Session(tmp_path, manifest, EngineOptions())


@pytest.mark.parametrize(
    ("wanted", "available", "expected"),
    [
        (("cpu",), (CPU,), []),
        ((), (CPU,), []),
        (("tensorrt", "cuda", "cpu"), ("CUDAExecutionProvider", CPU), ["CUDAExecutionProvider"]),
        (("cpu", "openvino"), (CPU, "OpenVINOExecutionProvider"), ["OpenVINOExecutionProvider"]),
        (("cuda", "CUDAExecutionProvider"), ("CUDAExecutionProvider", CPU), ["CUDAExecutionProvider"]),
        (("DmlExecutionProvider",), ("DmlExecutionProvider", CPU), ["DmlExecutionProvider"]),
        (("auto",), ("CUDAExecutionProvider", CPU), ["CUDAExecutionProvider"]),
        (("auto",), (CPU,), []),
    ],
)
def test_providers_keep_their_order_with_the_cpu_last(
    wanted: tuple[str, ...], available: tuple[str, ...], expected: list[str]
) -> None:
    assert choose_providers(wanted, available) == [*expected, CPU]


def test_auto_where_there_is_no_gpu_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert answer(opened(tmp_path, providers=("auto",))) == [[2, 4]]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorrt", "TensorrtExecutionProvider is not available: pip install onnxruntime-gpu brings it"),
        ("cuda", "CUDAExecutionProvider is not available: pip install onnxruntime-gpu brings it"),
        ("openvino", "OpenVINOExecutionProvider is not available: pip install onnxruntime-openvino brings it"),
        ("AcmeExecutionProvider", "AcmeExecutionProvider is not available: this build of onnxruntime lacks it"),
    ],
)
def test_a_missing_provider_is_one_warning_with_its_package_and_the_next_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, said: str
) -> None:
    with caplog.at_level(logging.WARNING):
        session = opened(tmp_path, providers=(name, name, "cpu"))
    assert caplog.text.count("not available") == 1
    assert said in caplog.text
    assert answer(session) == [[2, 4]]


def test_a_provider_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="execution provider 'gpu' is unknown; use tensorrt, cuda, openvino, cpu"):
        opened(tmp_path, providers=("gpu",))


def test_the_configuration_knows_the_same_names() -> None:
    assert (
        Slot.model_validate({"providers": ["tensorrt", "openvino", "AcmeExecutionProvider"]}).providers[0] == "tensorrt"
    )
    with pytest.raises(ValidationError, match="execution provider 'gpu' is unknown; use tensorrt, cuda, openvino, cpu"):
        Slot.model_validate({"providers": ["cpu", "gpu"]})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"spinn": True}, "engine key spinn = True is unknown to ONNX engines; known: spin, arena, graph"),
        ({"spin": 1}, "engine key spin = 1: use true or false"),
        ({"arena": "no"}, "engine key arena = 'no': use true or false"),
        ({"graph": "most"}, "engine key graph = 'most': use one of off, basic, extended, all"),
        ({"graph": True}, "engine key graph = True: use one of off"),
        ({"graph": ["all"]}, r"engine key graph = \['all'\]: use one of off"),
    ],
)
def test_wrong_engine_keys_are_refused(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        opened(tmp_path, extra=extra)


@pytest.mark.parametrize("graph", ["off", "basic", "extended", "all"])
def test_every_level_gives_the_same_answer(tmp_path: Path, graph: str) -> None:
    assert answer(opened(tmp_path, threads=2, extra={"graph": graph, "spin": True, "arena": False})) == [[2, 4]]


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.close()
    with pytest.raises(EngineError, match="was closed"):
        answer(session)
