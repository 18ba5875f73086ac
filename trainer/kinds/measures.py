"""What is measured of an adapter besides its losses, on the engine that devices run: how sure its answers are, how long
they take beside those of what runs now, and what base and adapter take of the devices that they are for."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edged.core.confidence import answer_probability
from edged.engines.base import (
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    Generator,
    Token,
    generate_all,
    open_engine,
)
from edged.wire.manifest import Calibration, ReleaseManifest
from trainer.calibrate import ITEMS_MIN, PARTS, CalibrationReport, expected_calibration_error
from trainer.core.provenance import agree
from trainer.core.targets import Footprint
from trainer.footprint import Profile, measure_all
from trainer.kinds.texts import Text
from trainer.likelihood import request_of
from trainer.releases import MANIFEST, ReleaseError, StoredRelease, canonical_bytes
from trainer.scaling import fit_scaling
from trainer.side_by_side import Times, settled

Answered = tuple[float, bool]  # an answer's mean log-probability a token, and whether it was right

LATENCY_EXAMPLES_MAX = 4  # a large model takes minutes for them all
LATENCY_TOKENS = 32  # of the answer whose time is reckoned
GOLDEN_PROMPTS_MAX = 4
GOLDEN_TOKENS = 32  # of an answer: as many as a device asks for when it checks a golden prompt


@contextmanager
def generator(base: StoredRelease) -> Iterator[Generator]:
    """The base on the engine that devices run; raises EngineError."""
    engine = open_engine(base.folder, base.manifest, EngineOptions(threads=os.cpu_count() or 1))
    assert isinstance(engine, Generator)
    try:
        yield engine
    finally:
        engine.close()


def answered(engine: Generator, texts: Sequence[Text]) -> list[Answered]:
    """What the engine answers, greedily, to each question: right are the wanted words, case and spaces aside.

    Answers without a probability are left out: an empty one, of which there is nothing to be sure. Raises EngineError.
    """
    found = []
    for each in texts:
        # As many tokens as the wanted answer has bytes are always enough to be right.
        request = request_of(engine, each.said, tokens_max=len(each.wanted.encode()) + 1)
        text, end = generate_all(engine, request)
        if end.reason in ("stop", "length") and not math.isnan(end.mean_logprob):
            found.append((end.mean_logprob, agree([{"text": text}], [{"text": each.wanted}])))
    return found


def golden_answers(base: StoredRelease, adapter: Path, prompts: Iterable[str]) -> list[tuple[str, str]]:
    """The first prompts, which must have judged nothing, with what the base answers to them with the adapter on it.

    Raises EngineError, ValueError where it answers nothing to any of them.
    """
    found: list[tuple[str, str]] = []
    with generator(base) as engine:
        engine.attach(adapter)
        for prompt in prompts:
            answer, _ = generate_all(engine, GenerateRequest(prompt, tokens_max=GOLDEN_TOKENS))
            if answer.strip():
                found.append((prompt, answer))
            if len(found) == GOLDEN_PROMPTS_MAX:
                break
    if not found:
        raise ValueError("with the adapter the model answers nothing to any prompt: there is no golden set to make")
    return found


def cross_validate_answers(pairs: Sequence[Answered]) -> CalibrationReport:
    """What a fit on two thirds of the answers says about the other third, for every third; needs ITEMS_MIN answers.

    Raises ValueError with fewer.
    """
    if len(pairs) < ITEMS_MIN:
        raise ValueError(f"{len(pairs)} answers cannot be cross-validated; at least {ITEMS_MIN} are needed")
    parts = np.random.default_rng(0).permutation(len(pairs)) % PARTS
    logprobs = np.array([logprob for logprob, _ in pairs])
    right = np.array([good for _, good in pairs], dtype=bool)
    p = np.empty(len(pairs))
    for part in range(PARTS):
        held = parts == part
        fitted = fit_scaling(np.exp(np.minimum(logprobs[~held], 0.0)), right[~held])
        model = Calibration(method="scaled", answers=fitted, items=int((~held).sum()))
        p[held] = [answer_probability(logprob, model).p for logprob in logprobs[held].tolist()]
    brier = float(((p - right) ** 2).mean())
    ece = expected_calibration_error(p, right)
    return CalibrationReport(len(pairs), int(right.sum()), ece, brier, float(p.mean()))


def latencies(engine: Generator, sides: dict[str, Path | None], texts: Sequence[Text]) -> Times:
    """Milliseconds that an answer of LATENCY_TOKENS takes with each adapter (None: the bare base): the time to the first
    token and that from token to token, of each example the fastest, medians over the examples. Sides take turns, so that
    they meet the same machine (`trainer.side_by_side`).

    None where nothing was answered. Raises EngineError.
    """
    first: dict[str, dict[int, float]] = {name: {} for name in sides}
    step: dict[str, dict[int, float]] = {name: {} for name in sides}
    for adapter in sides.values():  # the first answer of a process and of an adapter takes longer
        engine.attach(adapter)
        for each in texts[:1]:
            _times(engine, each)

    def measure() -> Times:
        for number, each in enumerate(texts[:LATENCY_EXAMPLES_MAX]):
            for name, adapter in sides.items():
                engine.attach(adapter)
                begins, steps = _times(engine, each)
                first[name][number] = min(begins, first[name].get(number, math.inf))
                if steps:
                    step[name][number] = min(*steps, step[name].get(number, math.inf))
        return {name: _answer_ms(first[name], step[name]) for name in sides}

    found = settled(measure)
    engine.attach(None)
    return found


def _answer_ms(first: dict[int, float], step: dict[int, float]) -> float | None:
    whole = statistics.median(step.values()) * (LATENCY_TOKENS - 1) if step else 0.0
    return (statistics.median(first.values()) + whole) * 1000 if first else None


def _times(engine: Generator, text: Text) -> tuple[float, list[float]]:
    """Seconds to the first token (to the end of an empty answer), and those between tokens."""
    began = last = time.perf_counter()
    begins: float | None = None
    steps = []
    for event in engine.generate(request_of(engine, text.said, tokens_max=LATENCY_TOKENS)):
        now = time.perf_counter()
        if isinstance(event, Token) and begins is not None:
            steps.append(now - last)
        elif isinstance(event, Token | Finished) and begins is None:
            begins = now - began
        last = now
    return (time.perf_counter() - began if begins is None else begins), steps


def footprints(
    folder: Path, manifest: ReleaseManifest, base: StoredRelease, profiles: Sequence[Profile]
) -> tuple[Footprint, ...]:
    """What the adapter release in `folder` takes on its base under each profile. It needs its golden set; a release.json is
    made beside for the measuring."""
    if not profiles:
        return ()
    try:
        with tempfile.TemporaryDirectory(prefix=".measured-", dir=folder.parent) as name:
            beside = Path(name)
            for entry in manifest.files.values():
                shutil.copyfile(folder / entry.path, beside / entry.path)
            (beside / MANIFEST).write_bytes(canonical_bytes(manifest))
            return measure_all(beside, profiles, base.folder)
    except (EngineError, ReleaseError, ValueError, OSError) as error:
        return tuple(Footprint(profile.target.profile, error=str(error)) for profile in profiles)


def before_footprints(
    current: StoredRelease | None, base: StoredRelease, profiles: Sequence[Profile]
) -> tuple[Footprint, ...]:
    """The same of what runs now: the adapter before, or the bare base."""
    if current is None:
        return measure_all(base.folder, profiles)
    return measure_all(current.folder, profiles, base.folder)


def shipped_bytes(base: StoredRelease, adapter: Path) -> int:
    """What a device keeps and loads: the base's file and the adapter's."""
    model: Any = base.manifest.files["model"]
    return int(model.bytes) + adapter.stat().st_size
