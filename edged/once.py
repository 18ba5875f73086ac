"""Answer one item without the daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from edged import images, regions
from edged.acts import Record
from edged.config import WHOLE, Pipeline, Settings
from edged.core.confidence import answer_probability
from edged.core.policy import Policy, judge
from edged.engines.base import (
    ChatMessage,
    Detector,
    EngineError,
    EngineOptions,
    GenerateRequest,
    Generator,
    generate_all,
    open_engine,
)
from edged.outgoing import boxes, plain
from edged.prompts import UNFINISHED
from edged.releases import BadRelease, Releases, reference, verify
from edged.store import Store
from edged.wire.manifest import ReleaseManifest
from edged.wire.parts import ChatTurn

NO_AUDIT = 1.0  # a draw that no share reaches
T = TypeVar("T")


class CannotAnswer(Exception):
    """Why not, and what to do about it."""


def language(prompt: str | None, turns: Path | None, schema: Path | None, **options: Any) -> GenerateRequest:
    """A request to a language model; `turns` and `schema` are JSON files: a list of {role, content}, and a JSON Schema.
    Raises CannotAnswer."""
    said = _read(turns, TypeAdapter(list[ChatTurn])) if turns else []
    return GenerateRequest(
        prompt or "",
        messages=tuple(ChatMessage(turn.role, turn.content) for turn in said),
        schema=_read(schema, TypeAdapter(dict[str, Any])) if schema else None,
        **options,
    )


def _read(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise CannotAnswer(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CannotAnswer(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def answer(
    settings: Settings, slot: str, image: Path | None, request: GenerateRequest | None, folder: Path | None,
    hear: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The answer of a slot's model (or of the release in `folder`) to one image or language request; `hear` gets the text
    as it is made. Raises CannotAnswer."""
    config = settings.slots.get(slot)
    if config is None:
        raise CannotAnswer(f"slot {slot!r} is not configured; known: {', '.join(sorted(settings.slots)) or 'none'}")
    try:
        folder = folder or _active(settings, slot)
        manifest = verify(folder, reference(folder))
        engine = open_engine(
            folder, manifest, EngineOptions(config.threads, tuple(config.providers), config.engine_keys())
        )
        try:
            if image is not None:
                if not isinstance(engine, Detector):
                    raise CannotAnswer(f"{manifest.release} answers prompts (kind {manifest.kind}): use --prompt")
                pipeline = next((p for p in settings.pipelines.values() if p.slot == slot), None)
                return {"release": manifest.release, **_look(engine, manifest, image.read_bytes(), pipeline)}
            if not isinstance(engine, Generator):
                raise CannotAnswer(f"{manifest.release} looks at pictures (kind {manifest.kind}): use --image")
            assert request is not None
            text, end = generate_all(engine, request, hear)
            out: dict[str, Any] = {
                "release": manifest.release,
                "generated_response": text,
                "finish_reason": end.reason,
                "prompt_tokens": end.prompt_tokens,
                "answer_tokens": end.answer_tokens,
            }
            if request.prompt:
                out["generation_prompt"] = request.prompt
            if end.reason in UNFINISHED:
                return out | {"error": end.reason}
            return out | {"confidence": answer_probability(end.mean_logprob, manifest.calibration).p}
        finally:
            engine.close()
    except (BadRelease, EngineError, images.BadImage, OSError) as error:
        raise CannotAnswer(str(error)) from None


def _look(engine: Detector, manifest: ReleaseManifest, data: bytes, pipeline: Pipeline | None) -> dict[str, Any]:
    """What the model answers to an image file, and what the pipeline's policy makes of it, audits aside."""
    part, corner = regions.cut(images.decode(data), pipeline.roi if pipeline else WHOLE)
    prepared = engine.prepare(part)
    found = engine.infer([prepared])[0]
    judged = judge(found, prepared.stats, manifest, pipeline.policy if pipeline else Policy(), NO_AUDIT)
    label = boxes(regions.shifted(found.above(manifest.thresholds.score), corner), manifest.labels)
    out: dict[str, Any] = {"prediction": plain(label), "confidence": judged.confidence.p}
    if pipeline is not None:
        out |= {"decision": judged.decision.action, "reason": judged.decision.reason}
    return out


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
