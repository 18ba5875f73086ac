"""An engine whose model is a small file: it answers with what stands there, and the file says how it goes wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edged.engines import base
from edged.engines.base import EngineError, EngineOptions, Finished, GenerateRequest, Token
from edged.wire.manifest import FileEntry, ReleaseManifest, ReleaseRef

base.ENGINES["sim"] = "tests.support.sim.engine:Model"
PADDING = 3000  # bytes after the words, so that a file has several sectors
QUESTION = "who are you?"


class Model:
    """Generates its own name. `fault`: "load" (cannot be loaded), "answer" (not as its golden set says) or "item" (fails at
    every item but those of its golden set)."""

    context = 100

    def __init__(self, folder: Path, manifest: ReleaseManifest, _options: EngineOptions) -> None:
        try:
            data = (folder / manifest.files["model"].path).read_bytes()
            words = json.loads(data.rstrip(b"."))
        except (OSError, ValueError) as error:
            raise EngineError(f"{manifest.release}: {error}") from None
        if len(data.rstrip(b".")) + PADDING != len(data):
            raise EngineError(f"{manifest.release}: {len(data)} bytes")
        self.name, self.fault = words["name"], words["fault"]
        if self.fault == "load":
            raise EngineError(f"{manifest.release}: cannot be loaded")
        self.adapter = ""

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        if self.fault == "item" and request.prompt != QUESTION:
            raise EngineError(f"{self.name}: fails")
        yield Token("nobody" if self.fault == "answer" else self.adapter or self.name, 0.0)
        yield Finished("stop", 1, 1, 0.0)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        if adapter is None:
            self.adapter = ""
            return
        words = json.loads(adapter.read_bytes().rstrip(b"."))
        if words["fault"] == "load":
            raise EngineError(f"{words['name']}: cannot be attached")
        self.adapter = words["name"] if words["fault"] != "answer" else "nobody"

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A release as its bytes: file name -> content."""

    ref: ReleaseRef
    files: dict[str, bytes]
    fault: str
    base: ReleaseRef | None

    def write_to(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    @property
    def good(self) -> bool:
        return not self.fault


def make(release: str, fault: str = "", on: ReleaseRef | None = None, like: str = "") -> Made:
    """A release, or with `on` an adapter for that base. `like`: a release whose files it has."""
    role = "model" if on is None else "adapter"
    words = json.dumps({"name": like or release, "fault": fault}).encode()
    contents = {role: words + b"." * PADDING}
    # The second file is the same in every release: it is linked from one that is there, not fetched.
    contents["golden_prompts"] = json.dumps([{"prompt": QUESTION, "answer": like or release}]).encode()
    contents["words"] = b"the same in every release" * 40
    names = {role: f"{role}.bin" for role in contents}
    manifest = ReleaseManifest(
        release=release, kind="llm" if on is None else "lora", engine="sim", base=on, created="2026-01-01T00:00:00Z",
        files={
            role: FileEntry.of(names[role], len(data), [data])
            for role, data in contents.items()
        },
    )  # fmt: skip
    text = manifest.model_dump_json().encode()
    files = {"release.json": text} | {names[role]: data for role, data in contents.items()}
    return Made(ReleaseRef(release=release, sha256=hashlib.sha256(text).hexdigest()), files, fault, on)
