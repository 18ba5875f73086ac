"""The golden set: the right model passes on any processor, another one does not, whatever the difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edged import golden
from edged.engines.base import Detector, EngineOptions, Finished, GenerateRequest, Token, open_engine
from edged.golden import GoldenMismatch
from edged.releases import read_manifest
from edged.wire.manifest import FileEntry, ReleaseManifest


@pytest.fixture
def folder(tmp_path: Path, toy: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "toy"))


def checked(folder: Path) -> int:
    manifest = read_manifest(folder)
    engine = open_engine(folder, manifest, EngineOptions())
    assert isinstance(engine, Detector)
    return golden.check(engine, folder, manifest)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "golden_outputs.json"
    rows = json.loads(path.read_text())
    rows[1] |= fields
    path.write_text(json.dumps(rows))


def test_the_release_answers_as_it_promises(folder: Path) -> None:
    assert checked(folder) == 2


def test_a_part_of_the_set_can_be_asked_for(folder: Path) -> None:
    change(folder, boxes=[[30, 22, 50, 42]])  # the second input's
    manifest = read_manifest(folder)
    engine = open_engine(folder, manifest, EngineOptions())
    assert golden.check(engine, folder, manifest, 1) == 1
    with pytest.raises(GoldenMismatch):
        golden.check(engine, folder, manifest, 2)


@pytest.mark.parametrize(
    "slightly",
    [{"boxes": [[22.4, 22, 42, 42]]}, {"scores": [0.85]}, {"boxes": [[22, 22, 42, 42], [1, 1, 9, 9]],
                                                           "scores": [0.9, 0.3], "classes": [0, 1]}],
)  # fmt: skip
def test_what_another_processor_rounds_differently_passes(folder: Path, slightly: dict[str, Any]) -> None:
    change(folder, **slightly)
    assert checked(folder) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"classes": [1]}, r"golden input 1: expected class 1 at \[22.*not found"),
        ({"boxes": [[30, 22, 50, 42]]}, "golden input 1: expected class 0"),
        ({"scores": [0.7]}, "golden input 1: expected class 0.*with score 0.70"),
        ({"boxes": [], "scores": [], "classes": []}, "golden input 1: found class 0 with score 0.90 where nothing"),
        (
            {"boxes": [[22, 22, 42, 42], [1, 1, 9, 9]], "scores": [0.9, 0.8], "classes": [0, 1]},
            r"expected class 1 at \[1",
        ),
    ],
)
def test_another_answer_is_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    change(folder, **fields)
    with pytest.raises(GoldenMismatch, match=said):
        checked(folder)


def test_a_golden_set_that_shows_nothing_is_refused(folder: Path) -> None:
    (folder / "golden_outputs.json").write_text("[]")
    with pytest.raises(GoldenMismatch, match="2 golden inputs and 0 outputs"):
        checked(folder)
    np.savez(folder / "golden_inputs.npz")
    with pytest.raises(GoldenMismatch, match="0 golden inputs and 0 outputs"):
        checked(folder)


def test_a_release_without_a_golden_set_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    engine = open_engine(folder, manifest, EngineOptions())
    del manifest.files["golden_inputs"]
    with pytest.raises(GoldenMismatch, match="no golden set; nothing shows that this model works"):
        golden.check(engine, folder, manifest)


class Parrot:
    """A generator that knows three answers."""

    context = 64

    def generate(self, request: GenerateRequest) -> Any:
        for word in {"1 + 1 =": [" 2"], "sky:": [" bl", "ue"]}.get(request.prompt, [])[: request.tokens_max]:
            yield Token(word, -0.1)
        yield Finished("stop", 3, 2, -0.1)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "sky:", "answer": "blue"}], ""),
        ([{"prompt": "sky:", "answer": "bl", "tokens_max": 1}], ""),
        ([{"prompt": "sky:", "answer": "green"}], "prompt 'sky:': expected 'green', got ' blue'"),
        ([], "the list of golden prompts is empty"),
        (None, "no golden prompts; nothing shows"),
    ],
)
def test_golden_prompts(tmp_path: Path, rows: list[dict[str, Any]] | None, said: str) -> None:
    (tmp_path / "golden.json").write_text(json.dumps(rows))
    files = {"golden_prompts": FileEntry.of("golden.json", 1, [b"x"])} if rows is not None else {}
    manifest = ReleaseManifest(release="phi@1.0", kind="llm", engine="llama", files=files, created="2026")
    if not said:
        assert golden.check(Parrot(), tmp_path, manifest) == len(rows or [])
        return
    with pytest.raises(GoldenMismatch, match=said):
        golden.check(Parrot(), tmp_path, manifest)
