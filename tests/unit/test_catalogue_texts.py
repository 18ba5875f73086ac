"""What devices kept of texts, as a data set: every line is understood, and what is none is counted."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from edged.cases import question
from edged.engines.base import ChatMessage, GenerateRequest
from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer.kinds.catalogue import write_dataset
from trainer.kinds.texts import read

WHO = {"kind": "model", "who": "site-1", "release": "large@1.0", "asked_by": "clerk@1.0", "captured": 9.0}


def made(folder: Path, *rows: tuple[bytes, dict[str, Any], dict[str, Any]], bring: bool = True) -> TrainingManifest:
    folder.mkdir(exist_ok=True)
    samples = []
    for number, (data, label, who) in enumerate(rows):
        digest = sha256(data).hexdigest()
        if bring:
            (folder / digest).write_bytes(data)
        samples.append(TrainingSample(id=f"s{number}", device="d1", sha256=digest, label=label, provenance=who))
    return TrainingManifest(
        job="j", model="clerk", source="clerk@1.0", target="clerk-lora@1.0", created="2026", config={}, samples=samples
    )


def said(text: Any, other: str | None = "accept", confidence: float = 0.9) -> dict[str, Any]:
    return {"text": text, "other": other, "confidence": confidence}


BARE = question(GenerateRequest("What to do?\n", tokens_max=9))
TALK = question(GenerateRequest(messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "A seven?"))))


def test_escalated_texts_become_examples_and_pairs_with_who_answered(tmp_path: Path) -> None:
    manifest = made(
        tmp_path / "samples",
        (BARE, said("reject"), WHO),
        (TALK, said("yes", None), {"kind": "person", "who": "ann", "captured": 8.0}),
        (BARE.replace(b"What", b"Who"), said("Accept "), {**WHO, "opinions": [{"who": "x"}]}),
    )
    out = tmp_path / "dataset.jsonl"
    assert write_dataset(manifest, tmp_path / "samples", out) == {}
    examples, bad, _ = read(out, "lora")
    assert bad == []
    assert [(each.prompt, each.wanted, each.messages) for each in examples] == [
        ("What to do?\n", "reject", ()),
        ("Be brief.\nInstruct: A seven?\nOutput:", "yes", (("system", "Be brief."), ("user", "A seven?"))),
        ("Who to do?\n", "Accept ", ()),
    ]
    assert [each.provenance for each in examples] == [
        {**WHO, "confidence": 0.9, "device": "d1"},
        {"kind": "person", "who": "ann", "device": "d1", "captured": 8.0},
        {**WHO, "confidence": 0.9, "device": "d1", "opinions": [{"who": "x"}]},
    ]
    (pair,), *_ = read(out, "dpo")
    assert (pair.wanted, pair.other, pair.provenance["who"]) == ("reject", "accept", "site-1")


def test_what_is_no_question_or_no_answer_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    manifest = made(
        folder, (BARE, said("reject"), WHO), (b"\xff pixels", said("x"), WHO), (b'{"seed": -1}', said("x"), WHO),
        (b'{"seed": 3}', said("x"), WHO), (TALK, said(" "), WHO), (TALK + b" ", {"boxes": [], "confidence": 1.0}, WHO),
        (b'{"generation_prompt": "changed"}', said("x"), WHO),
    )  # fmt: skip
    (folder / manifest.samples[-1].sha256).write_bytes(b'{"generation_prompt": "other"}')
    gone = made(tmp_path / "none", (b"gone", said("x"), WHO), bring=False).samples
    whole = manifest.model_copy(update={"samples": [*manifest.samples, *gone]})
    assert write_dataset(whole, folder, tmp_path / "dataset.jsonl") == {"unusable": 6, "no_text": 1}
    assert [json.loads(line)["summary"] for line in (tmp_path / "dataset.jsonl").read_text().splitlines()] == ["reject"]
