"""The texts that devices asked somebody about, as a data set: what `trainer serve` trains a language model on.

A sample's bytes are the request as its device was asked (a `wire.parts.Prompt`); its label is the answer of a larger model
or of a person, and the catalogue says what the device's own model had answered. Each becomes a line of dataset.jsonl, as
`edged requests export` writes it: an example, and where the local answer was another one, a pair.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edged.wire.manifest import TrainingManifest, TrainingSample
from edged.wire.parts import Prompt
from trainer.core.provenance import agree
from trainer.files import write_whole

DATASET = "dataset.jsonl"


def write_dataset(manifest: TrainingManifest, folder: Path, out: Path) -> dict[str, int]:
    """Write the manifest's samples whose bytes lie in `folder` (each file named by its SHA-256) to `out`, whole or not at
    all; how many are left out, by reason. Raises OSError."""
    left_out: dict[str, int] = {}
    rows = []
    for sample in manifest.samples:
        path = folder / sample.sha256
        row = _row(sample, path.read_bytes()) if path.is_file() else None
        if row is None:
            reason = "unusable" if path.is_file() else "no_text"
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            rows.append(row)
    write_whole(out, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return left_out


def _row(sample: TrainingSample, data: bytes) -> dict[str, Any] | None:
    """The line of a sample; None when its bytes are no request, or its label no answer."""
    said, own = sample.label.get("text"), sample.label.get("other")
    if sha256(data).hexdigest() != sample.sha256 or not isinstance(said, str) or not said.strip():
        return None
    try:
        asked = Prompt.model_validate_json(data)
    except ValidationError:
        return None
    turns = [{"role": turn.role, "content": turn.content} for turn in asked.messages or ()]
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    goal = turns[last]["content"] if last is not None else asked.generation_prompt or ""
    if not goal.strip():
        return None
    before = "\n".join(f"{turn['role']}: {turn['content']}" for number, turn in enumerate(turns) if number != last)
    who = sample.provenance
    where = {"device": sample.device, "ts": who.get("captured")}
    steps = []
    if isinstance(own, str) and own.strip():
        status = "success" if agree([{"text": own}], [{"text": said}]) else "failure"
        local = {"status": status, "output": own, "release": str(who.get("asked_by") or "")}
        steps.append({"tool": "generate", **local, **where})
    kept = {name: who[name] for name in ("kind", "who", "release", "opinions") if who.get(name)}
    sure = sample.label.get("confidence", 0.0)
    answer = {"status": "success", "output": said, "sample": sample.id, "confidence": sure, **where, **kept}
    steps.append({"tool": "escalate", **answer})
    return {
        "goal": goal,
        "context_summary": before,
        "plan": [{"tool": "generate", "arguments": {"messages": turns} if turns else {}}, {"tool": "escalate"}],
        "execution": steps,
        "summary": said,
    }
