"""Answer one item without the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edged import images
from edged.acts import Record
from edged.config import Settings
from edged.core.confidence import answer_probability, probability
from edged.core.policy import decide
from edged.engines.base import Detector, EngineError, EngineOptions, GenerateRequest, Generator, open_engine
from edged.golden import generate_all
from edged.outgoing import boxes, plain
from edged.releases import BadRelease, Releases, reference, verify
from edged.store import Store


class CannotAnswer(Exception):
    """Why not, and what to do about it."""


def answer(
    settings: Settings, slot: str, image: Path | None, prompt: str | None, folder: Path | None
) -> dict[str, Any]:
    """The answer of a slot's model (or of the release in `folder`) to one image or prompt; raises CannotAnswer."""
    config = settings.slots.get(slot)
    if config is None:
        raise CannotAnswer(f"slot {slot!r} is not configured; known: {', '.join(sorted(settings.slots)) or 'none'}")
    try:
        folder = folder or _active(settings, slot)
        manifest = verify(folder, reference(folder))
        engine = open_engine(folder, manifest, EngineOptions(config.threads, tuple(config.providers), config.extra))
        try:
            if image is not None:
                if not isinstance(engine, Detector):
                    raise CannotAnswer(f"{manifest.release} answers prompts (kind {manifest.kind}): use --prompt")
                prepared = engine.prepare(images.decode(image.read_bytes()))
                found = engine.infer([prepared])[0]
                confidence = probability(found, manifest.thresholds, prepared.stats, manifest.calibration)
                policy = next((p.policy for p in settings.pipelines.values() if p.slot == slot), None)
                kept = found.above(manifest.thresholds.score)
                out: dict[str, Any] = {"prediction": plain(boxes(kept, manifest.labels)), "confidence": confidence.p}
                if policy is not None:
                    out["decision"] = decide(confidence, policy, 1.0).action
                return {"release": manifest.release, **out}
            if not isinstance(engine, Generator):
                raise CannotAnswer(f"{manifest.release} looks at pictures (kind {manifest.kind}): use --image")
            text, end = generate_all(engine, GenerateRequest(prompt or ""))
            return {
                "release": manifest.release,
                "generation_prompt": prompt,
                "generated_response": text,
                "confidence": answer_probability(end.mean_logprob),
            }
        finally:
            engine.close()
    except (BadRelease, EngineError, images.BadImage, OSError) as error:
        raise CannotAnswer(str(error)) from None


def _active(settings: Settings, slot: str) -> Path:
    state = settings.device.state_dir
    if (state / "edged.db").is_file():
        store = Store(state)
        try:
            saved = store.updates().get(slot)
        finally:
            store.close()
        record = Record.model_validate(saved) if saved else None
        if record and record.active:
            return Releases(state / "releases").folder(record.active)
    seed = settings.slots[slot].seed
    if seed is None:
        raise CannotAnswer(f"slot {slot} has no release yet: set slots.{slot}.seed, or name one with --release FOLDER")
    return seed
